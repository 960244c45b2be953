"""Every target that a spec can be built for: one row each, and nothing else says so.

Which precisions a target can build is a column of `precisions.PRECISIONS`. A new target is a row
here, its name in that column and, where it needs engines of its own, the package that opens them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from recmas_runtime.formats.precisions import buildable

TargetName = Literal["onnx", "tensorrt"]
TARGET_NAMES: Final[tuple[str, ...]] = get_args(TargetName)

# A decoder that is exported: in standard operators, or in those of ONNX Runtime's CPU provider.
DecoderForm = Literal["portable", "cpu"]

TENSORRT: Final = "tensorrt"
# What a bundle can be run on: ONNX Runtime's devices, the engines built for one machine, or `auto`.
DEVICES: Final = ("auto", "cpu", "cuda", TENSORRT)

# Limits of the decoder for ONNX Runtime's CPU provider. Angles are in tables up to here: 64 MiB for
# heads of 128. Tables for more positions would take more memory than its attention is worth.
MOST_TABLE_POSITIONS: Final = 2**17
# Heads of other widths its attention does not take.
HEAD_MULTIPLE: Final = 16


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of engine.

    Attributes:
        decoders: Those that are exported, each by its pipeline in `recmas_export.pipeline`.
        machine_engines: Engines that are built from the portable graphs for the machine that the
            build runs on, which must have what they need; None where graphs are all there is.
        other_precision: What to do instead where it cannot build a precision, after a list of those
            it can.
    """

    layers: frozenset[str]
    decoders: tuple[DecoderForm, ...]
    machine_engines: Literal["tensorrt"] | None = None
    other_precision: str


TARGETS: Final[dict[str, Target]] = {
    "onnx": Target(
        layers=frozenset({"full", "sliding"}),
        decoders=("portable", "cpu"),
        other_precision=". To store float32 in half the bytes, set `dtype`.",
    ),
    "tensorrt": Target(
        layers=frozenset({"full", "sliding"}),
        # Its bundles run on machines without a GPU too.
        decoders=("portable", "cpu"),
        machine_engines=TENSORRT,
        other_precision=", or target `onnx`.",
    ),
}


def precision_hint(target: str) -> str:
    """Return what to use where a target cannot build a precision."""
    *others, last = buildable(target)
    names = f"{', '.join(others)} or {last}" if others else last
    return f"Use {names}{TARGETS[target].other_precision}"
