"""Tiny backbones, loaded once for all torch tests."""

from torch_fixtures import one_thread, tiny

__all__ = ["one_thread", "tiny"]
