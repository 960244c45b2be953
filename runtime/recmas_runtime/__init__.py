"""The runtime: loads bundles and answers, without torch.

Names are resolved on first use, so that `recmas --help` does not wait for ONNX Runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from recmas_runtime.core.errors import Problem as Problem
    from recmas_runtime.core.errors import RecmasError as RecmasError
    from recmas_runtime.formats.plan import SamplingPlan as SamplingPlan
    from recmas_runtime.prompts.earlier_turns import EarlierTurn as EarlierTurn
    from recmas_runtime.running.batch import AnswerStream as AnswerStream
    from recmas_runtime.running.records import Answer as Answer
    from recmas_runtime.running.records import FailedRecord as FailedRecord
    from recmas_runtime.running.records import Record as Record
    from recmas_runtime.running.records import Timing as Timing
    from recmas_runtime.running.records import Usage as Usage
    from recmas_runtime.running.run_trace import Trace as Trace
    from recmas_runtime.running.run_trace import TraceWriter as TraceWriter
    from recmas_runtime.running.system import System as System
    from recmas_runtime.running.system import load as load

_HOMES = {
    "core.errors": ("Problem", "RecmasError"),
    "formats.plan": ("SamplingPlan",),
    "prompts.earlier_turns": ("EarlierTurn",),
    "running.records": ("Answer", "FailedRecord", "Record", "Timing", "Usage"),
    "running.run_trace": ("Trace", "TraceWriter"),
    "running.batch": ("AnswerStream",),
    "running.system": ("System", "load"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("recmas")
        except PackageNotFoundError:
            return "unknown"  # run from a checkout
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
