"""The known-answer probe: does an engine compute `TensorScatter` and `Attention` rightly here?

Old kernels and silent fallbacks return wrong numbers without an error. The probe is a graph with
its inputs built in; it is run with nothing fed, and `output` must equal `expected`, which was
worked out by hand:

- Two samples, one K/V head per two query heads, a cache of 8 rows filled with junk (1e6) beyond
  what was written. Sample 0 has 2 rows and sample 1 has 5; two new positions are written to each.
- The value at row j of K/V head k is k + j/8, so a mean over rows 0..n is k + n/16.
- Key row 0 is (1, 0, 0, 0) and every other key is zero. Even query heads are (ln 2, 0, 0, 0) and so
  give row 0 twice the weight of the others; odd query heads are zero and give all the same.
- Position p sees rows 0..p. The value at row 0 being k, an even head gets
  k + (1 + 2 + ... + p) / 8 / (p + 2) and an odd head gets k + p / 16.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from recmas_export.passes.tidy import IR_VERSION, OPSET, strip

_WRITE_INDEX: Final = (2, 5)
_NUM_NEW: Final = 2
_CAPACITY: Final = 8
_HEADS: Final = 4
_KV_HEADS: Final = 2
_HEAD_DIM: Final = 4
_JUNK: Final = 1e6

# (even heads, odd heads) above k, by sample and new position: rows 0..2, 0..3 and 0..5, 0..6.
_ABOVE_K: Final = (
    ((3 / 8 / 4, 1 / 8), (6 / 8 / 5, 3 / 16)),
    ((15 / 8 / 7, 5 / 16), (21 / 8 / 8, 3 / 8)),
)


def write_probe(path: Path) -> None:
    """Write `probe.onnx`: nothing to feed, outputs `output` and `expected`."""
    model = _probe_model()
    strip(model, name="probe")
    ir.save(model, path)


def _probe_model() -> ir.Model:
    tape = Tape()
    feeds = {name: _default_input(name, array) for name, array in _inputs().items()}

    def op(kind: str, *inputs: ir.Value, **attributes: int | float | str) -> ir.Value:
        return tape.op(kind, inputs, attributes)

    def number(name: str, value: Any) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(value, dtype=np.int64), name=name))

    start_B1 = op("Unsqueeze", feeds["write_index"], number("second_axis", [1]))
    position_BS = op("Add", start_B1, number("new_positions", np.arange(_NUM_NEW)[None]))
    position_B1S1 = op("Unsqueeze", position_BS, number("mask_axes", [1, 3]))
    rows = number("rows", np.arange(_CAPACITY)[None, None, None])
    mask = op("LessOrEqual", rows, position_B1S1)
    keys, values = (
        op(
            "TensorScatter",
            feeds[kind],
            feeds[f"new_{kind}"],
            feeds["write_index"],
            axis=2,
            mode="linear",
        )
        for kind in ("key", "value")
    )
    output = op("Attention", feeds["query"], keys, values, mask, scale=1.0)
    expected_constant = tape.initializer(ir.tensor(_expected(), name="by_hand"))
    expected = op("Identity", expected_constant)
    shape = ir.Shape(_expected().shape)
    for value, name in ((output, "output"), (expected, "expected")):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), shape
    graph = ir.Graph(
        # Inputs with default values: nothing has to be fed, yet no runtime folds them into
        # constants at load, which it would do on the CPU whatever device is being probed.
        list(feeds.values()),
        [output, expected],
        nodes=tape.nodes,
        initializers=[*feeds.values(), *tape.initializers],
        opset_imports={"": OPSET},
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def _default_input(name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )


def _inputs() -> dict[str, NDArray[Any]]:
    """Return the graph's inputs by name."""
    batch = len(_WRITE_INDEX)
    row_KC = np.arange(_KV_HEADS)[:, None] + np.arange(_CAPACITY) / 8
    key, value = (
        np.full((batch, _KV_HEADS, _CAPACITY, _HEAD_DIM), _JUNK, np.float32) for _ in range(2)
    )
    new_key = np.zeros((batch, _KV_HEADS, _NUM_NEW, _HEAD_DIM), np.float32)
    new_value = np.zeros_like(new_key)
    for sample, start in enumerate(_WRITE_INDEX):
        key[sample, :, :start] = 0
        key[sample, :, 0, 0] = 1
        value[sample, :, :start] = row_KC[:, :start, None]
        new_value[sample] = row_KC[:, start : start + _NUM_NEW, None]
    query = np.zeros((batch, _HEADS, _NUM_NEW, _HEAD_DIM), np.float32)
    query[:, ::2, :, 0] = math.log(2)
    return {
        "query": query,
        "key": key,
        "value": value,
        "new_key": new_key,
        "new_value": new_value,
        "write_index": np.array(_WRITE_INDEX, np.int64),
    }


def _expected() -> NDArray[np.float32]:
    """Return what the attention must give: [B, H, S, D]."""
    batch = len(_WRITE_INDEX)
    expected = np.zeros((batch, _HEADS, _NUM_NEW, _HEAD_DIM), np.float32)
    for sample in range(batch):
        for position, above in enumerate(_ABOVE_K[sample]):
            for head in range(_HEADS):
                kv_head = head * _KV_HEADS // _HEADS
                expected[sample, head, position] = kv_head + above[head % 2]
    return expected
