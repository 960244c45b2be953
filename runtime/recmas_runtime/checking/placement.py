"""Where the operators of a step run: on the device that was asked for, and without copies between.

A provider that has no kernel for an operator does not say so. ONNX Runtime gives the operator to
the CPU and puts copies around it, or computes it in another precision and puts casts around it; the
results are right and the step is many times slower. So one step is run under ONNX Runtime's
profiler, which names every kernel that ran and its provider.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from recmas_runtime.core.errors import fail
from recmas_runtime.engines.onnx.caches import NUMPY_TYPES, ort_value
from recmas_runtime.engines.onnx.session import Device, call_onnx, make_session, provider_of

# What a free dimension of an input gets: one sample, one position, one link; rows of a cache.
_SIZES: Final = {"capacity": 64}
# Providers leave the arithmetic of shapes to the CPU, which is where it belongs. It differs
# from computation in its results: a handful of integers.
_SHAPE_TYPES: Final = frozenset({"int64", "int32", "bool"})
_LARGEST_SHAPE: Final = 16
_MOST_NAMED: Final = 5
_COPIES: Final = frozenset({"MemcpyFromHost", "MemcpyToHost"})
# How ONNX Runtime names the casts it puts around operators that lack a kernel of their type.
_INSERTED_CAST: Final = "InsertedPrecisionFreeCast_"


class StrayNode(NamedTuple):
    """An operator of a step that does not run where it should."""

    op_type: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op_type} ({self.name}) {self.reason}"


def find_stray_nodes(
    path: Path, *, threads: int | None = None, device: Device = "cpu"
) -> tuple[StrayNode, ...]:
    """Run a graph once over zeros, for one position, and return the operators that ran elsewhere.

    Copies between devices and casts that ONNX Runtime inserted count as such; arithmetic of shapes
    on the CPU does not.

    Raises:
        RecmasError: RM504 if the device cannot be used, RM507 if the graph is refused.
    """
    with tempfile.TemporaryDirectory(prefix="recmas-") as folder:
        session = make_session(path, threads=threads, device=device, profile=Path(folder) / "step")
        feeds = {}
        for given in session.get_inputs():
            shape = [size if isinstance(size, int) else _SIZES.get(size, 1) for size in given.shape]
            feeds[given.name] = ort_value(np.zeros(shape, NUMPY_TYPES[given.type]), given.type)
        call_onnx(session.run_with_ort_values, None, feeds)
        profile = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in profile if event["name"].endswith("_kernel_time")]
    found = (_judge(event, provider_of(device)) for event in kernels)
    return tuple(node for node in found if node is not None)


def refuse_stray_nodes(path: Path, *, threads: int | None = None, device: Device = "cpu") -> None:
    """Raise unless every operator of a graph runs where it should; see `find_stray_nodes`.

    Raises:
        RecmasError: RM304 if one does not, and what `find_stray_nodes` raises.
    """
    stray = find_stray_nodes(path, threads=threads, device=device)
    if stray:
        raise fail(
            "RM304",
            f"{len(stray)} operators of a step do not run on {provider_of(device)} alone: "
            f"{'; '.join(map(str, stray[:_MOST_NAMED]))}.",
            file=str(path),
            hint="Upgrade onnxruntime, or build with another precision.",
        )


def _judge(event: Mapping[str, Any], wanted: str) -> StrayNode | None:
    arguments = event["args"]
    op_type, provider = arguments["op_name"], arguments["provider"]
    name = event["name"].removesuffix("_kernel_time")
    if op_type in _COPIES:
        return StrayNode(op_type, name, "copies between devices")
    if name.startswith(_INSERTED_CAST):
        return StrayNode(op_type, name, "was inserted for an operator without a kernel of its type")
    if provider != wanted and not _is_shape(arguments["output_type_shape"]):
        return StrayNode(op_type, name, f"runs on {provider}")
    return None


def _is_shape(outputs: list[dict[str, list[int]]]) -> bool:
    return all(
        kind in _SHAPE_TYPES and math.prod(shape) <= _LARGEST_SHAPE
        for output in outputs
        for kind, shape in output.items()
    )
