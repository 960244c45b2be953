"""Commands in this process and in processes of their own."""

from kit.fixtures import exports_once, one_thread

__all__ = ["exports_once", "one_thread"]
