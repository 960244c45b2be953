"""The links as ONNX: one general form that every kind of link is a special case of.

    y = post?( W3 x + W2 gelu(W1 pre?(x) + b1) + bias )

The weights are inputs ("operands"), so one graph serves all links of a bundle, several at a time,
and the decoder's fused inner link serves all agents that share the backbone.

Shapes: G groups (links applied in one call), N rows per group, di and do widths, h hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.tape import Tape

from recmas_export.passes.tidy import IR_VERSION, OPSET, strip
from recmas_runtime.formats.link_kinds import LAYER_NORM_EPSILON


@dataclass(frozen=True)
class Operand:
    """An input that carries a part of a link's weights."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, int | str, int | str]


def operands(in_dim: int | str, out_dim: int | str) -> tuple[Operand, ...]:
    """Return the operands of links from `in_dim` to `out_dim`, in the order of graph inputs."""
    flag, real = ir.DataType.BOOL, ir.DataType.FLOAT
    return (
        Operand("pre_norm", flag, ("groups", 1, 1)),
        Operand("pre_scale", real, ("groups", 1, in_dim)),
        Operand("pre_bias", real, ("groups", 1, in_dim)),
        Operand("w1", real, ("groups", in_dim, "link_hidden")),
        Operand("b1", real, ("groups", 1, "link_hidden")),
        Operand("w2", real, ("groups", "link_hidden", out_dim)),
        Operand("w3", real, ("groups", in_dim, out_dim)),
        Operand("bias", real, ("groups", 1, out_dim)),
        Operand("post_norm", flag, ("groups", 1, 1)),
        Operand("post_scale", real, ("groups", 1, out_dim)),
        Operand("post_bias", real, ("groups", 1, out_dim)),
    )


def operand_inputs(
    in_dim: int | str, out_dim: int | str, *, prefix: str = ""
) -> dict[str, ir.Value]:
    """Return new graph inputs for the operands, by operand name; their own names get the prefix."""
    return {
        o.name: ir.Value(name=prefix + o.name, type=ir.TensorType(o.dtype), shape=ir.Shape(o.shape))
        for o in operands(in_dim, out_dim)
    }


def constant(tape: Tape, value: float | list[int], name: str) -> ir.Value:
    """Return a new constant of the graph: a float32 scalar or an int64 vector."""
    dtype = ir.DataType.FLOAT if isinstance(value, float) else ir.DataType.INT64
    return tape.initializer(ir.tensor(value, dtype=dtype, name=name))


def append_link(
    tape: Tape, x_GNI: ir.Value, operand: dict[str, ir.Value], *, prefix: str = ""
) -> ir.Value:
    """Append the nodes of the general link and return y [G, N, do].

    Args:
        tape: Records the nodes.
        x_GNI: What the links read, [G, N, di].
        operand: By name, see `operands`.
        prefix: Put before the names of new constants.
    """
    epsilon = constant(tape, LAYER_NORM_EPSILON, prefix + "epsilon")
    last_axis = constant(tape, [-1], prefix + "last_axis")

    def op(kind: str, *inputs: ir.Value) -> ir.Value:
        return tape.op(kind, inputs)

    def normed_if(x: ir.Value, place: str) -> ir.Value:
        # Not LayerNormalization: its scale is one vector, here every group has its own.
        centred = op("Sub", x, op("ReduceMean", x, last_axis))
        variance = op("ReduceMean", op("Mul", centred, centred), last_axis)
        unit = op("Div", centred, op("Sqrt", op("Add", variance, epsilon)))
        scaled = op("Mul", unit, operand[f"{place}_scale"])
        shifted = op("Add", scaled, operand[f"{place}_bias"])
        return op("Where", operand[f"{place}_norm"], shifted, x)

    inner = op("Add", op("MatMul", normed_if(x_GNI, "pre"), operand["w1"]), operand["b1"])
    hidden = tape.op("Gelu", (inner,), {"approximate": "none"})
    curved = op("MatMul", hidden, operand["w2"])
    straight = op("MatMul", x_GNI, operand["w3"])
    return normed_if(op("Add", op("Add", straight, curved), operand["bias"]), "post")


def write_link_graph(path: Path) -> None:
    """Write `link.onnx`: x [G, N, di] and the operands to y [G, N, do], every size free."""
    x = ir.Value(
        name="x",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(("groups", "rows", "in_dim")),
    )
    inputs = operand_inputs("in_dim", "out_dim")
    tape = Tape()
    y = append_link(tape, x, inputs)
    y.name = "y"
    y.type = ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape(("groups", "rows", "out_dim"))
    graph = ir.Graph(
        [x, *inputs.values()],
        [y],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": OPSET},
    )
    model = ir.Model(graph, ir_version=IR_VERSION)
    strip(model, name="link")
    ir.save(model, path)
