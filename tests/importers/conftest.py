"""Teams of other frameworks: their files to specs, and the specs to answers."""

from kit.fixtures import exports_once, one_thread

__all__ = ["exports_once", "one_thread"]
