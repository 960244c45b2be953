"""Measurements of a bundle written by hand, and of a tiny one that the compiler built."""

from kit.fixtures import exports_once, one_thread

__all__ = ["exports_once", "one_thread"]
