"""How a model of transformers takes its cache: the argument has some names, by version and family.

A model's `forward` swallows arguments that it does not know, so a wrong name is no error: the model
starts an empty cache at every call, and forgets.
"""

from __future__ import annotations

import inspect
from functools import cache as cached
from typing import Any, Final

from recmas_runtime.core.errors import fail

# The older name, that of transformers 5.24 on, and that of models that only keep states.
_NAMES: Final = ("past_key_values", "cache", "cache_params")


def cache_argument(model: object) -> str:
    """Return the name under which a model's `forward` takes its cache.

    Args:
        model: A decoder with or without its head.

    Raises:
        RecmasError: RM202 if it takes none.
    """
    kind: Any = type(model)
    return _name(kind)


def with_cache(model: object, cache: object) -> dict[str, Any]:
    """Return the arguments of `forward` that let a model read and extend a cache.

    Raises:
        RecmasError: RM202 if it takes none.
    """
    return {cache_argument(model): cache, "use_cache": True}


@cached
def _name(kind: Any) -> str:
    parameters = inspect.signature(kind.forward).parameters
    name = next((name for name in _NAMES if name in parameters), None)
    if name is None:
        raise fail(
            "RM202",
            f"{kind.__name__} takes no cache under a name that recmas knows ({', '.join(_NAMES)})",
            hint="Use a version of transformers that recmas was tested with: see constraints.txt.",
        )
    return name
