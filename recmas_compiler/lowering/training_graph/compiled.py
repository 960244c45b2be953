"""torch.compile with a way back: what cannot be compiled runs eagerly, and says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Generic, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as autograd_config
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.fx.experimental import _config as shape_config

P = ParamSpec("P")
R = TypeVar("R")

# Lengths are symbols in compiled code, and columns come in multiples of this many, so that code
# made for aligned lengths serves all of them.
COMPILED_COLUMNS: Final = 8

# One function is compiled anew for gradients on or off and needed or not, a constant part or none,
# one position or many, one row or many: never for another length.
MOST_VERSIONS: Final = 32

# Torch's own annotations do not know the last two.
_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "fullgraph": True,
        "dynamic": True,
        "recompile_limit": MOST_VERSIONS,
        "isolate_recompiles": True,
    }
)

_FAILURES: Final = (
    TorchDynamoException,
    FailOnRecompileLimitHit,
    CppCompileError,
    InvalidCxxCompiler,
)


class CompileWarning(UserWarning):
    """Something runs eagerly although it was to be compiled."""


class Compiled(Generic[P, R]):
    """A function as one compiled graph, without graph breaks; its backward pass as another one.

    Args:
        function: Takes and gives tensors; is run as it is once compiling it has failed.
        name: What warnings call it.
    """

    def __init__(self, function: Callable[P, R], *, name: str) -> None:
        self._function = function
        self._name = name
        self._compiled: Callable[P, R] | None = torch.compile(function, **_OPTIONS)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it, compiled if that is possible."""
        if self._compiled is not None:
            try:
                # Lengths that happen to be equal, or to equal a width, are still different things.
                # Gradients are compiled with the rest, while there is still a way back.
                with (
                    shape_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
                    autograd_config.patch(force_non_lazy_backward_lowering=True),
                ):
                    return self._compiled(*args, **kwargs)
            except _FAILURES as error:
                self._compiled = None
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"{self._name} runs eagerly, torch.compile cannot compile it: {cause}",
                    CompileWarning,
                    stacklevel=2,
                )
        return self._function(*args, **kwargs)
