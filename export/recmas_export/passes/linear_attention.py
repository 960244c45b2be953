"""Layers that keep a state, in standard operators: one graph for every number of positions.

Positions are taken in chunks of 16, or of as many as there are. Within a chunk everything is a
product of matrices, so that a Scan has one turn for each chunk. Of a rule that writes the
difference to what a key gives already, each position depends on those before it in its chunk: a
triangular system, which is solved row by row. Doubling, (I - L)(I + L^2)(I + L^4)..., is shorter
and wrong in float32: powers of L explode where keys resemble each other.

Shape legend: B samples, S positions, H heads, k and v widths of keys and values; N chunks of C
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.passes.tidy import MICROSOFT, insert, take_over

OPERATOR: Final = "LinearAttention"

# With 32 or 64 both a step and 256 positions take longer.
_CHUNK: Final = 16
_END: Final = 2**63 - 1


class ExpandLinearAttention(InPlacePass):
    """Write ONNX Runtime's `LinearAttention` in standard operators.

    1. A decay for each head: a Scan over chunks.
    2. A decay for each entry of a key: a Scan over positions, for the decays between two positions
       of a chunk would be a matrix for every entry.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        nodes = [node for node in model.graph if node.op_type == OPERATOR]
        constants: dict[str, ir.Value] = {}
        for number, node in enumerate(nodes):
            form = _Form(f"state_{number}.", constants)
            rule = _Rule(node)
            out, state = (_by_position if rule.is_by_entry else _by_chunk)(form, rule)
            form.insert(model.graph, before=node)
            for new, old in zip((out, state), node.outputs, strict=True):
                take_over(new, old)
            model.graph.remove(node, safe=True)
        model.graph.opset_imports.pop(MICROSOFT, None)
        return PassResult(model, modified=bool(nodes))


class _Form:
    """Nodes under construction; names within a Scan must not be those of its graph."""

    def __init__(self, prefix: str, constants: dict[str, ir.Value]) -> None:
        self.prefix = prefix
        self._constants = constants  # those of all layers: they share them
        self._tape = Tape()
        self._count = 0

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node with one output."""
        return self._named(self._tape.op(kind, inputs, attributes), kind)

    def _named(self, value: ir.Value, kind: str) -> ir.Value:
        value.name = f"{self.prefix}{kind}_{self._count}"
        self._count += 1
        return value

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """Return a constant of the graph, which Scans within it see too."""
        if name not in self._constants:
            tensor = ir.tensor(array, name=f"state.{name}")
            self._constants[name] = ir.Value(
                name=tensor.name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        return self._constants[name]

    def numbers(self, *numbers: int) -> ir.Value:
        """Return a constant vector."""
        return self.constant(np.array(numbers, np.int64), ".".join(map(str, numbers)))

    def scan(
        self,
        turn: _Form,
        given: Sequence[ir.Value],
        made: Sequence[ir.Value],
        *inputs: ir.Value,
        axes: Sequence[int],
        along: int | None = None,
    ) -> tuple[ir.Value, ir.Value | None]:
        """Append a Scan with one state, which comes first everywhere; returns its outputs.

        Args:
            given: Inputs of a turn.
            made: Outputs of it: the state and, with `along`, what is put together along that axis.
            inputs: The state, then what is scanned along `axes`.
        """
        body = ir.Graph(given, made, nodes=turn._tape.nodes, name=turn.prefix)
        attributes: dict[str, Any] = {
            "body": body,
            "num_scan_inputs": len(axes),
            "scan_input_axes": list(axes),
        }
        if along is None:
            return self.op("Scan", *inputs, **attributes), None
        attributes["scan_output_axes"] = [along]
        state, out = self._tape.op_multi_out("Scan", inputs, attributes, num_outputs=2)
        return self._named(state, "Scan"), self._named(out, "Scan")

    def turn(self, name: str) -> _Form:
        """Return what the body of a Scan is made in."""
        return _Form(f"{self.prefix}{name}.", self._constants)

    def given(self, *names: str) -> list[ir.Value]:
        """Return inputs of a turn."""
        kind = ir.TensorType(ir.DataType.FLOAT)
        return [ir.Value(name=self.prefix + name, type=kind) for name in names]

    def insert(self, graph: ir.Graph, *, before: ir.Node) -> None:
        """Put everything into the graph."""
        for name, constant in self._constants.items():
            if f"state.{name}" not in graph.initializers:
                graph.register_initializer(constant)
        insert(graph, self._tape, before=before)


class _Rule:
    """One node and what its attributes say."""

    def __init__(self, node: ir.Node) -> None:
        self.query, self.key, self.value, state, self.decay, *beta = node.inputs
        self.beta = beta[0] if beta else None
        attributes = node.attributes
        self.heads = attributes["kv_num_heads"].as_int()
        self.scale = attributes["scale"].as_float()
        assert attributes["q_num_heads"].as_int() == self.heads, "queries are repeated already"
        rule = attributes["update_rule"].as_string()
        assert rule == ("gated" if self.beta is None else "gated_delta"), rule
        assert state is not None
        assert state.shape is not None
        self.state: ir.Value = state
        sizes = [size for size in state.shape[2:] if isinstance(size, int)]
        self.key_width, self.width = sizes

    @property
    def is_by_entry(self) -> bool:
        """Whether each entry of a key decays by its own factor."""
        assert self.decay is not None
        assert self.decay.shape is not None
        return self.decay.shape[-1] != self.heads


def _by_chunk(form: _Form, rule: _Rule) -> tuple[ir.Value, ir.Value]:
    """Return output [B, S, H v] and state."""
    op, number = form.op, form.numbers
    positions = op("Shape", rule.query, start=1, end=2)
    size = op("Min", positions, number(_CHUNK))
    missing = op("Mod", op("Neg", positions), size)
    pads = op("Concat", number(0), missing, axis=0)
    square = op("Concat", size, size, axis=0)

    def chunks(x_BSw: ir.Value | None, width: int) -> ir.Value:
        """Return [B, H, N, C, w]; what is filled up is 0 and so writes and forgets nothing."""
        split = op("Reshape", x_BSw, number(0, 0, rule.heads, width))
        filled = op("Transpose", op("Pad", split, pads, None, number(1)), perm=[0, 2, 1, 3])
        return op("Reshape", filled, op("Concat", number(0, 0, -1), size, number(width), axis=0))

    def part(matrix: NDArray[Any], name: str) -> ir.Value:
        return op("Slice", form.constant(matrix, name), number(0, 0), square)

    def flip(x: ir.Value) -> ir.Value:
        return op("Transpose", x, perm=[0, 1, 2, 4, 3])

    ones = np.ones((_CHUNK, _CHUNK), bool)
    scale = form.constant(np.array(rule.scale, np.float32), f"scale.{rule.scale}")
    query = chunks(op("Mul", rule.query, scale), rule.key_width)
    key, value = chunks(rule.key, rule.key_width), chunks(rule.value, rule.width)
    # the logarithm of what is left of the state before the chunk
    since = op("CumSum", chunks(rule.decay, 1), form.constant(np.array(3), "axis"))
    nothing = form.constant(np.array(-np.inf, np.float32), "nothing")
    between = op("Sub", since, flip(since))
    pair = op("Exp", op("Where", part(np.tril(ones), "lower"), between, nothing))
    left = op("Exp", since)
    end = op("Slice", since, number(-1), number(_END), number(3))
    attention = op("Mul", op("MatMul", query, flip(key)), pair)
    to_end = flip(op("Mul", key, op("Exp", op("Sub", end, since))))
    scanned = [op("Mul", query, left), attention, to_end, op("Exp", end)]
    turn = form.turn("chunk")
    state, q, att, ke, whole = turn.given("state", "query", "attention", "to_end", "whole")
    given = [state, q, att, ke, whole]
    if rule.beta is not None:
        beta = chunks(rule.beta, 1)
        weighted = op("Mul", key, beta)
        zero = form.constant(np.array(0, np.float32), "zero")
        overlaps = op("Mul", op("MatMul", weighted, flip(key)), pair)
        system = op("Where", part(np.tril(ones, -1), "below"), overlaps, zero)
        inverse = _invert(form, system, part(np.eye(_CHUNK, dtype=np.float32), "unit"))
        new = op("MatMul", inverse, op("Mul", value, beta))
        old = op("MatMul", inverse, op("Mul", weighted, left))
        scanned += [new, old]
        new_t, old_t = turn.given("new", "old")
        given += [new_t, old_t]
        written = turn.op("Sub", new_t, turn.op("MatMul", old_t, state))
    else:
        scanned.append(value)
        (written,) = turn.given("value")
        given.append(written)
    out = turn.op("Add", turn.op("MatMul", q, state), turn.op("MatMul", att, written))
    now = turn.op("Add", turn.op("Mul", state, whole), turn.op("MatMul", ke, written))
    final, outs = form.scan(
        turn, given, [now, out], rule.state, *scanned, axes=[2] * len(scanned), along=2
    )
    assert outs is not None
    rows = op("Transpose", op("Reshape", outs, number(0, 0, -1, rule.width)), perm=[0, 2, 1, 3])
    own = op("Slice", rows, number(0), positions, number(1))
    return op("Reshape", own, number(0, 0, rule.heads * rule.width)), final


def _invert(form: _Form, system: ir.Value, unit: ir.Value) -> ir.Value:
    """Return (I + L)^-1 [B, H, N, C, C]: row i is e_i - L_i (the rows above it)."""
    turn = form.turn("row")
    rows, below, one, column = turn.given("rows", "below", "one", "column")
    row = turn.op("Sub", one, turn.op("MatMul", below, rows))
    now = turn.op("Add", rows, turn.op("Mul", column, row))
    zeros = form.op("ConstantOfShape", form.op("Shape", system))
    final, _ = form.scan(
        turn,
        [rows, below, one, column],
        [now],
        zeros,
        form.op("Unsqueeze", system, form.numbers(4)),
        form.op("Unsqueeze", unit, form.numbers(1)),
        form.op("Unsqueeze", unit, form.numbers(2)),
        axes=[3, 0, 0],
    )
    return final


def _by_position(form: _Form, rule: _Rule) -> tuple[ir.Value, ir.Value]:
    """Return output [B, S, H v] and state, for decays of every entry of a key."""
    op, number = form.op, form.numbers

    def rows(x_BSw: ir.Value | None, width: int) -> ir.Value:
        return op("Reshape", x_BSw, number(0, 0, rule.heads, 1, width))

    def columns(x_BSw: ir.Value | None) -> ir.Value:
        return op("Reshape", x_BSw, number(0, 0, rule.heads, rule.key_width, 1))

    scale = form.constant(np.array(rule.scale, np.float32), f"scale.{rule.scale}")
    scanned = [
        rows(op("Mul", rule.query, scale), rule.key_width),
        columns(rule.key),
        rows(rule.value, rule.width),
        columns(op("Exp", rule.decay)),
    ]
    turn = form.turn("position")
    given = turn.given("state", "query", "key", "value", "decay")
    state, query, key, value, decay = given
    kept = turn.op("Mul", state, decay)
    if rule.beta is not None:
        scanned += [rows(rule.key, rule.key_width), rows(rule.beta, 1)]
        key_row, beta = turn.given("key_row", "beta")
        given += [key_row, beta]
        known = turn.op("MatMul", key_row, kept)
        value = turn.op("Mul", turn.op("Sub", value, known), beta)
    now = turn.op("Add", kept, turn.op("Mul", key, value))
    out = turn.op("MatMul", query, now)
    final, outs = form.scan(
        turn, given, [now, out], rule.state, *scanned, axes=[1] * len(scanned), along=1
    )
    return op("Reshape", outs, number(0, 0, rule.heads * rule.width)), final
