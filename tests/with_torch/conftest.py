"""Tiny backbones, loaded once for all torch tests."""

from kit.fixtures import one_thread, tiny

__all__ = ["one_thread", "tiny"]
