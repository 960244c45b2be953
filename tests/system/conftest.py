"""Whole systems on tiny backbones: YAML to bundle to answers."""

from kit.fixtures import exports_once, one_thread

__all__ = ["exports_once", "one_thread"]
