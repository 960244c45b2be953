"""The compiler: `load_spec`, `compile`, `train`, `build`, `to_torch`.

Names are resolved on first use, so that a part of the compiler can be imported without the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recmas_compiler.api import Program, build, compile, to_torch, train
    from recmas_compiler.spec.spec import Spec, load_spec, parse_spec
    from recmas_runtime.core.errors import Problem, RecmasError

__all__ = [
    "Problem",
    "Program",
    "RecmasError",
    "Spec",
    "build",
    "compile",
    "load_spec",
    "parse_spec",
    "to_torch",
    "train",
]

_HOMES = {
    "Problem": "recmas_runtime.core.errors",
    "Program": "recmas_compiler.api",
    "RecmasError": "recmas_runtime.core.errors",
    "Spec": "recmas_compiler.spec.spec",
    "build": "recmas_compiler.api",
    "compile": "recmas_compiler.api",
    "load_spec": "recmas_compiler.spec.spec",
    "parse_spec": "recmas_compiler.spec.spec",
    "to_torch": "recmas_compiler.api",
    "train": "recmas_compiler.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
