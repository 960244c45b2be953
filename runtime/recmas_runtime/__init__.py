"""The runtime: loads bundles and answers, without torch.

Names are resolved on first use, so that `recmas --help` does not wait for ONNX Runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recmas_runtime.core.errors import Problem, RecmasError
    from recmas_runtime.formats.plan import SamplingPlan
    from recmas_runtime.running.batch import AnswerStream
    from recmas_runtime.running.records import Answer, Record, Timing, Usage
    from recmas_runtime.running.system import System, load

__all__ = [
    "Answer",
    "AnswerStream",
    "Problem",
    "RecmasError",
    "Record",
    "SamplingPlan",
    "System",
    "Timing",
    "Usage",
    "load",
]

_HOMES = {
    "Answer": "running.records",
    "AnswerStream": "running.batch",
    "Problem": "core.errors",
    "RecmasError": "core.errors",
    "Record": "running.records",
    "SamplingPlan": "formats.plan",
    "System": "running.system",
    "Timing": "running.records",
    "Usage": "running.records",
    "load": "running.system",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
