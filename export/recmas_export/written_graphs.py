"""The graphs that no model is traced into: links, the latent step, and the known-answer probe.

Links have one general form that every kind of link is a special case of:

    y = post?( W3 x + W2 gelu(W1 pre?(x) + b1) + bias )

where `pre` is a layer norm and `post` an RMS norm with a bias, which is a layer norm where W2, W3
and `bias` have the mean taken from their results (`recmas_runtime.formats.links`).

The weights are inputs ("operands"), so one graph serves all links of a bundle, several at a time,
and the decoder's fused inner link serves all agents that share the backbone.

Shapes of links: G groups (links applied in one call), N rows per group, di and do widths, h hidden
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.passes.tidy import IR_VERSION, OPSET, Strip, constant
from recmas_runtime.formats.link_kinds import NORM_EPSILON

# Names of the latent step's inputs begin so.
INNER_PREFIX: Final = "inner."

# The probe: sizes, and what is in rows that nothing was written to.
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


def operand_inputs(
    in_dim: int | str, out_dim: int | str, *, prefix: str = ""
) -> dict[str, ir.Value]:
    """Return new graph inputs for a link's weights, by operand; their own names get the prefix."""
    flag, real = ir.DataType.BOOL, ir.DataType.FLOAT
    operands = {
        "pre_norm": (flag, 1, 1),
        "pre_scale": (real, 1, in_dim),
        "pre_bias": (real, 1, in_dim),
        "w1": (real, in_dim, "link_hidden"),
        "b1": (real, 1, "link_hidden"),
        "w2": (real, "link_hidden", out_dim),
        "w3": (real, in_dim, out_dim),
        "bias": (real, 1, out_dim),
        "post_norm": (flag, 1, 1),
        "post_scale": (real, 1, out_dim),
        "post_bias": (real, 1, out_dim),
    }
    return {
        name: _value(prefix + name, dtype, ("groups", rows, columns))
        for name, (dtype, rows, columns) in operands.items()
    }


def _value(name: str, dtype: ir.DataType, shape: Sequence[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _type(value: ir.Value, name: str, shape: Sequence[Any]) -> None:
    """Give a result that leaves the graph its name, float32 and a shape."""
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)


def append_link(
    tape: Tape, x_GNI: ir.Value, operand: dict[str, ir.Value], *, prefix: str = ""
) -> ir.Value:
    """Append the nodes of the general link; returns y [G, N, do]. New constants get the prefix."""
    epsilon = constant(tape, NORM_EPSILON, prefix + "epsilon")
    last_axis = constant(tape, [-1], prefix + "last_axis")

    def op(kind: str, *inputs: ir.Value) -> ir.Value:
        return tape.op(kind, inputs)

    def normed(x: ir.Value, place: str) -> ir.Value:
        # Not LayerNormalization: its scale is one vector, here every group has its own.
        square = op("ReduceMean", op("Mul", x, x), last_axis)
        unit = op("Div", x, op("Sqrt", op("Add", square, epsilon)))
        scaled = op("Mul", unit, operand[f"{place}_scale"])
        return op("Add", scaled, operand[f"{place}_bias"])

    centred = op("Sub", x_GNI, op("ReduceMean", x_GNI, last_axis))
    read = op("Where", operand["pre_norm"], normed(centred, "pre"), x_GNI)
    inner = op("Add", op("MatMul", read, operand["w1"]), operand["b1"])
    hidden = tape.op("Gelu", (inner,), {"approximate": "none"})
    curved = op("MatMul", hidden, operand["w2"])
    straight = op("MatMul", x_GNI, operand["w3"])
    y = op("Add", op("Add", straight, curved), operand["bias"])
    return op("Where", operand["post_norm"], normed(y, "post"), y)


class AddLatentStep(InPlacePass):
    """Add the latent step to a decoder.

    1. thought = hidden at `last_index`; next_embeds = R(thought), the inner link.
    2. Its inputs come after `write_index` and at the end, its outputs after `hidden`. Where layers
       keep states, `last_index` is an input already.

    Operands have one group per agent of the batch; rows are agent-major, so a group's samples are
    neighbours and [B, 1, d] is [G, B/G, d] in another shape.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Extend in place."""
        graph, tape = model.graph, Tape()
        hidden = graph.outputs[0]
        assert hidden.name == "hidden"
        assert hidden.shape is not None
        batch, width = hidden.shape[0], hidden.shape[2]
        assert isinstance(width, int)
        embeds, write_index, *caches = graph.inputs
        if caches[0].name == "last_index":
            last_index, *caches = caches
        else:
            last_index = _value("last_index", ir.DataType.INT64, (batch,))
        inner = operand_inputs(width, width, prefix=INNER_PREFIX)

        index_column = tape.op("Unsqueeze", (last_index, constant(tape, [-1], "thought.last_axis")))
        row_BD = tape.op("GatherND", (hidden, index_column), {"batch_dims": 1})
        thought = tape.op("Unsqueeze", (row_BD, constant(tape, [1], "thought.position_axis")))
        groups = tape.op("Shape", (inner["w1"],), {"start": 0, "end": 1})
        grouped = tape.op(
            "Concat", (groups, constant(tape, [-1, width], "thought.rest")), {"axis": 0}
        )
        next_grouped = append_link(
            tape, tape.op("Reshape", (thought, grouped)), inner, prefix=INNER_PREFIX
        )
        single = constant(tape, [-1, 1, width], "thought.single")
        next_embeds = tape.op("Reshape", (next_grouped, single))
        _type(thought, "thought", (batch, 1, width))
        _type(next_embeds, "next_embeds", (batch, 1, width))

        for initializer in tape.initializers:
            graph.register_initializer(initializer)
        graph.extend(tape.nodes)
        graph.inputs[:] = [embeds, write_index, last_index, *caches, *inner.values()]
        graph.outputs[1:1] = [thought, next_embeds]
        return PassResult(model, modified=True)


def write_link_graph(path: Path) -> None:
    """Write `link.onnx`: x [G, N, di] and the operands to y [G, N, do], every size free."""
    x = _value("x", ir.DataType.FLOAT, ("groups", "rows", "in_dim"))
    inputs = operand_inputs("in_dim", "out_dim")
    tape = Tape()
    y = append_link(tape, x, inputs)
    _type(y, "y", ("groups", "rows", "out_dim"))
    graph = ir.Graph(
        [x, *inputs.values()],
        [y],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": OPSET},
    )
    _save(graph, "link", path)


def _save(graph: ir.Graph, name: str, path: Path) -> None:
    model = ir.Model(graph, ir_version=IR_VERSION)
    Strip(name)(model)
    ir.save(model, path)


def write_probe(path: Path) -> None:
    """Write `probe.onnx`: does an engine compute `TensorScatter` and `Attention` rightly here?

    Old kernels and silent fallbacks return wrong numbers without an error. The probe is a graph
    with its inputs built in; it is run with nothing fed, and `output` must equal `expected`, which
    was worked out by hand:

    - Two samples, one K/V head per two query heads, a cache of 8 rows filled with junk (1e6)
      beyond what was written. Sample 0 has 2 rows and sample 1 has 5; two new positions are
      written to each.
    - The value at row j of K/V head k is k + j/8, so a mean over rows 0..n is k + n/16.
    - Key row 0 is (1, 0, 0, 0) and every other key is zero. Even query heads are (ln 2, 0, 0, 0)
      and so give row 0 twice the weight of the others; odd query heads are zero and give all the
      same.
    - Position p sees rows 0..p. The value at row 0 being k, an even head gets
      k + (1 + 2 + ... + p) / 8 / (p + 2) and an odd head gets k + p / 16.
    """
    _save(_probe(), "probe", path)


def _probe() -> ir.Graph:
    tape = Tape()
    feeds = {}
    for name, array in _inputs().items():
        tensor = ir.tensor(array, name=name)
        feeds[name] = _value(name, tensor.dtype, array.shape)
        feeds[name].const_value = tensor

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
    _type(output, "output", _expected().shape)
    _type(expected, "expected", _expected().shape)
    return ir.Graph(
        # Inputs with default values: nothing has to be fed, yet no runtime folds them into
        # constants at load, which it would do on the CPU whatever device is being probed.
        list(feeds.values()),
        [output, expected],
        nodes=tape.nodes,
        initializers=[*feeds.values(), *tape.initializers],
        opset_imports={"": OPSET},
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
