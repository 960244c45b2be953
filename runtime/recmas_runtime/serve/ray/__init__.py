"""Several machines: on Ray, which starts, watches and replaces what runs on them."""

from recmas_runtime.serve.ray.application import app

__all__ = ["app"]
