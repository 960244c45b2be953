"""Which engines of a bundle this machine can use, and the backbones on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.tensorrt.availability import find_platform
from recmas_runtime.engines.tensorrt.engine_cache import (
    EngineFolder,
    choose_engines,
    engine_folders,
)
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.formats.manifest import BackboneEntry

OpenOnnx = Callable[[BackboneEntry], Backbone[Any]]

_BUILD = "Build engines for this machine with `recmas engines {root}`."


def find_engines(bundle: Bundle) -> EngineFolder:
    """Return the engines of a bundle that this machine can use.

    Raises:
        RecmasError: RM201, RM504 or RM509 if it has no TensorRT, RM511 with every reason why it can
            use none of the engines that are there.
    """
    platform = find_platform()
    root, fingerprint = bundle.root, bundle.manifest.fingerprint
    engines, reasons = choose_engines(root, fingerprint, platform)
    if engines is None:
        why = "; ".join(reasons) if reasons else "the bundle holds none"
        raise fail(
            "RM511",
            f"no TensorRT engine of this bundle can be used here: {why}",
            hint=_BUILD.format(root=root),
        )
    return engines


def find_engines_or_say_why(bundle: Bundle, problems: list[Problem]) -> EngineFolder | None:
    """Return engines for this machine, or None where ONNX Runtime is to be used.

    A bundle without engines is no reason for a word. One with engines that cannot be used is: who
    built them expects them to run.

    Args:
        bundle: The bundle.
        problems: Gets a warning with the reasons.
    """
    if not engine_folders(bundle.root):
        return None
    try:
        return find_engines(bundle)
    except RecmasError as error:
        problems += [as_warning(problem) for problem in error.problems]
        return None


def open_backbones(
    bundle: Bundle, engines: EngineFolder, open_onnx: OpenOnnx, problems: list[Problem]
) -> Mapping[str, Backbone[Any]]:
    """Open every backbone of a bundle on TensorRT.

    Args:
        bundle: The bundle.
        engines: From `find_engines`.
        open_onnx: Opens a backbone on ONNX Runtime.
        problems: Gets a warning when a batch needs more than the engines take.

    Raises:
        RecmasError: RM510 if TensorRT refuses a plan, RM511 if a backbone has none.
    """
    from recmas_runtime.engines.tensorrt.backbone import TensorrtBackbone

    def beyond(name: str, entry: BackboneEntry) -> Backbone[Any]:
        plans = engines.record.backbones[name]
        problems.append(
            Problem(
                code="RM550",
                message=f"backbone {name!r}: a batch needs more than its TensorRT engines take "
                f"({plans.max_rows} rows, {plans.decoders[-1].capacity} positions); it ran on ONNX "
                "Runtime",
                hint="Build with a larger build.max_batch or answer.max_new_tokens.",
                severity="warning",
            )
        )
        return open_onnx(entry)

    missing = sorted(bundle.manifest.backbones.keys() - engines.record.backbones.keys())
    if missing:
        raise fail(
            "RM511",
            f"there is no TensorRT engine of backbone {missing[0]!r}",
            hint=_BUILD.format(root=bundle.root),
        )
    return {
        name: TensorrtBackbone(
            entry,
            bundle.root,
            engines=engines,
            plans=engines.record.backbones[name],
            fallback=partial(beyond, name, entry),
        )
        for name, entry in bundle.manifest.backbones.items()
    }


def as_warning(problem: Problem) -> Problem:
    """Return an error as the reason why ONNX Runtime is used instead."""
    return Problem(
        code="RM550",
        message=f"{problem.message}; ONNX Runtime is used",
        hint=problem.hint,
        severity="warning",
        file=problem.file,
    )
