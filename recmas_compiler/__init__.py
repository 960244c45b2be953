"""The compiler: `load_spec`, `compile`, `train`, `build`, `evaluate`, `to_torch`.

Names are resolved on first use, so that a part of the compiler can be imported without the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from recmas_compiler.api import Program as Program
    from recmas_compiler.api import build as build
    from recmas_compiler.api import compile as compile
    from recmas_compiler.api import evaluate as evaluate
    from recmas_compiler.api import to_torch as to_torch
    from recmas_compiler.api import train as train
    from recmas_compiler.spec.spec import Spec as Spec
    from recmas_compiler.spec.spec import load_spec as load_spec
    from recmas_compiler.spec.spec import parse_spec as parse_spec
    from recmas_runtime.core.errors import Problem as Problem
    from recmas_runtime.core.errors import RecmasError as RecmasError

_HOMES = {
    "recmas_compiler.api": ("Program", "build", "compile", "evaluate", "to_torch", "train"),
    "recmas_compiler.spec.spec": ("Spec", "load_spec", "parse_spec"),
    "recmas_runtime.core.errors": ("Problem", "RecmasError"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Import what is asked for; RM201 where recmas is installed without its extra `compile`."""
    if name == "__version__":
        from importlib.metadata import version

        return version("recmas")
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        from recmas_runtime.core.errors import missing_package

        raise missing_package(error) from error


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *globals()})
