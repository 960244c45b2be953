"""Experts of a mixture: as they are traced, in standard operators, and in those of a CPU.

Traced are three nodes of an own domain. Between the first two is the model's own activation,
between the last two its norm if it has one:

    ExpertsIn  (x [N,d], taken [N,k], matrices [E,m,d], bias [E,m]?) -> rows [P,m]
    ExpertsOut (inner [P,w], taken [N,k], matrices [E,d,w], bias [E,d]?) -> outputs [P,d]
    ExpertsSum (outputs [P,d], taken [N,k], shares [N,k]) -> [N,d]

The standard form has two branches: it looks up the matrices that positions take, which copies a
matrix for every position that takes it, or it goes through the experts one by one, each with the
positions that take it. All forms read the same bytes.

Shape legend: N positions, k experts that each takes, P = N k pairs, E experts, d width, w hidden
width of an expert, m = w or 2 w with a gate; n pairs with one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.passes.gates import Gate, known_gate
from recmas_export.passes.tidy import MICROSOFT, TRACED, free_name, take_over

IN: Final = "ExpertsIn"
OUT: Final = "ExpertsOut"
SUM: Final = "ExpertsSum"

# Of what is quantized, on the traced nodes and on QMoE; `recmas_export.quantize` writes them.
BITS, BLOCK = "bits", "block_size"

# A share whose logarithm stands for that of an expert that is not taken.
_NO_SHARE: Final = 1e-30


@dataclass(frozen=True)
class Mixture:
    """The three nodes of a layer's experts."""

    first: ir.Node
    last: ir.Node
    total: ir.Node

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int(_sizes(self.first.inputs[2])[0])

    @property
    def num_taken(self) -> int:
        """Experts that each position takes."""
        return int(_sizes(self.total.inputs[1])[1])

    @property
    def width(self) -> int:
        """Width of the model."""
        return int(_sizes(self.total.outputs[0])[1])

    @property
    def rows(self) -> int:
        """Rows of the first matrix."""
        return int(_sizes(self.first.outputs[0])[1])

    @property
    def inner(self) -> int:
        """Hidden width of an expert."""
        return int(_sizes(self.last.inputs[0])[1])


def mixtures(graph: ir.Graph) -> Iterator[Mixture]:
    """Yield the experts of every layer that has some."""
    for total in [node for node in graph if node.domain == TRACED and node.op_type == SUM]:
        last = _ancestor(total.inputs[0], OUT)
        yield Mixture(_ancestor(last.inputs[0], IN), last, total)


def routers(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the products with weights that a choice of the largest is made from."""
    waiting = [value for node in graph if node.op_type == "TopK" for value in node.inputs[:1]]
    seen = set[ir.Node]()
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node not in seen:
            seen.add(node)
            weight = node.inputs[1] if node.op_type in ("Gemm", "MatMul") else None
            if weight is not None and weight.is_initializer():
                yield node
            else:
                waiting += node.inputs


class StoreExperts(InPlacePass):
    """Store the matrices of experts as every form reads them.

    1. Transposed matrices are stored as they are multiplied, [E, outputs, inputs].
    2. Where the activation is one that the CPU's operator computes too, the rows of the first
       matrices are stored in its order, gate and input in turn; the portable form puts what they
       give back into the model's order. Which activation that is, is computed (`known_gate`).
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        found = list(mixtures(model.graph))
        for mixture in found:
            for node in (mixture.first, mixture.last):
                for place in range(2, len(node.inputs)):
                    _store(model.graph, node, place)  # 1
            gate = known_gate(model.graph, mixture.first.outputs[0], mixture.last.inputs[0])
            if gate is not None and mixture.total.inputs[0] is mixture.last.outputs[0]:
                _set_gate(mixture.total, gate)
                if gate.order is not None:
                    _reorder(model.graph, mixture.first, gate.order)  # 2
        return PassResult(model, bool(found))


class UseMixtureOperator(InPlacePass):
    """Write the experts of a layer as one MoE of ONNX Runtime's CPU provider.

    1. Layers whose activation it has; the others stay, for a Scan: a graph with experts is in any
       case another one on the CPU.
    2. Its router is a softmax over logits: those are the logarithms of the shares of the experts
       that are taken, and what comes out is multiplied by the shares' sum.

    A share below 0 has no logarithm; what comes out is then not a number.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place; nodes that are then unused stay."""
        found = list(mixtures(model.graph))
        for mixture in found:
            if "activation_type" in mixture.total.attributes:
                self._rewrite(model.graph, mixture)
                model.graph.opset_imports[MICROSOFT] = 1
        return PassResult(model, bool(found))

    def _rewrite(self, graph: ir.Graph, mixture: Mixture) -> None:
        first, last, total = mixture.first, mixture.last, mixture.total
        tape, constants = Tape(), Constants(graph)
        _, taken, shares = total.inputs
        # the square of the root is the share, or not a number
        root = tape.op("Sqrt", (shares,))
        shares = tape.op("Mul", (root, root))
        count = tape.op("Shape", (taken,), {"start": 0, "end": 1})
        sizes = tape.op("Concat", (count, constants([mixture.num_experts])), {"axis": 0})
        nothing = tape.op("Expand", (constants(0.0), sizes))
        each = tape.op("ScatterElements", (nothing, taken, shares), {"axis": 1, "reduction": "add"})
        logits = tape.op("Log", (tape.op("Max", (each, constants(_NO_SHARE))),))
        bias = (*first.inputs[3:4], None)[0], (*last.inputs[3:4], None)[0]
        mixed = tape.op(
            "MoE",
            (first.inputs[0], logits, first.inputs[2], bias[0], last.inputs[2], bias[1]),
            {
                "k": mixture.num_taken,
                "normalize_routing_weights": 1,
                **{name: attribute.value for name, attribute in total.attributes.items()},
            },
            domain=MICROSOFT,
        )
        whole = tape.op("ReduceSum", (shares, constants([1])), {"keepdims": 1})
        result = tape.op("Mul", (mixed, whole))
        graph.insert_before(total, tape.nodes)
        take_over(result, total.outputs[0])
        graph.remove(total, safe=True)


class ExpandExperts(InPlacePass):
    """Write experts in standard operators, but for products of quantized matrices.

    1. A Scan over the experts: each computes the positions that take it and adds to their sum.
    2. With `look_up`, an If before it: few positions look their experts' matrices up. On a CPU the
       Scan is as fast then; on other devices every expert costs a wait for its positions.

    The nodes between products are copied into both.
    """

    def __init__(self, *, look_up: bool) -> None:
        self._look_up = look_up

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        found = list(mixtures(model.graph))
        for mixture in found:
            _Expansion(model.graph, mixture).write(look_up=self._look_up)
        if any(BITS in mixture.first.attributes for mixture in found):
            model.graph.opset_imports[MICROSOFT] = 1
        model.graph.opset_imports.pop(TRACED, None)
        return PassResult(model, bool(found))


class Constants:
    """Small constants of a graph, one for each value."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def __call__(self, value: float | Sequence[int]) -> ir.Value:
        """Return the initializer of a float32 scalar or of an int64 vector."""
        if isinstance(value, float):
            name, dtype = f"experts.number.{value:g}", ir.DataType.FLOAT
        else:
            name, dtype = "experts." + ".".join(map(str, value)), ir.DataType.INT64
            if len(value) > 4:
                name = f"experts.{len(value)}.numbers"
        if name not in self._graph.initializers:
            tape = Tape()
            self._graph.register_initializer(
                tape.initializer(ir.tensor(value, dtype=dtype, name=name))
            )
        return self._graph.initializers[name]


class _Expansion:
    """One layer's experts in standard operators."""

    def __init__(self, graph: ir.Graph, mixture: Mixture) -> None:
        self._graph, self._mixture = graph, mixture
        self._constants = Constants(graph)
        self._name = mixture.total.outputs[0].name
        self._activation = _between(mixture.first.outputs[0], mixture.last.inputs[0])
        self._norm = _between(mixture.last.outputs[0], mixture.total.inputs[0])

    def write(self, *, look_up: bool) -> None:
        """Replace the three nodes and what is between them."""
        total, c = self._mixture.total, self._constants
        num_experts, num_taken = self._mixture.num_experts, self._mixture.num_taken
        # positions that look up: no more than take half of the experts, but one in any case
        most = max(num_experts // (2 * num_taken), 1)
        tape = Tape()
        if look_up:
            count = tape.op("Shape", (self._mixture.first.inputs[0],), {"start": 0, "end": 1})
            few = tape.op("Squeeze", (tape.op("LessOrEqual", (count, c([most]))),))
            by_expert = Tape()
            branches = {
                "then_branch": self._branch("looked_up", *self._looked_up()),
                "else_branch": self._branch("by_expert", by_expert, self._scan(by_expert)),
            }
            result = tape.op("If", (few,), branches)
        else:
            result = self._scan(tape)
        self._graph.insert_before(total, tape.nodes)
        take_over(result, total.outputs[0])
        dead = [total, *reversed(self._norm), self._mixture.last]
        for node in (*dead, *reversed(self._activation), self._mixture.first):
            self._graph.remove(node, safe=True)

    def _branch(self, name: str, tape: Tape, result: ir.Value) -> ir.Graph:
        result.type, result.shape = self._type_of(self._mixture.total.outputs[0])
        return _subgraph(f"{self._name}.{name}", (), [result], tape)

    def _looked_up(self) -> tuple[Tape, ir.Value]:
        """Return the sum [N, d] from matrices [N, k, ...] that are copied for each position."""
        tape, c, mixture = Tape(), self._constants, self._mixture
        x, taken, shares = mixture.first.inputs[0], *mixture.total.inputs[1:]
        num_taken = mixture.num_taken
        columns = tape.op("Unsqueeze", (x, c([1, 3])))
        hidden = _copied(self._activation, tape, self._product(tape, mixture.first, columns, taken))
        columns = tape.op("Reshape", (hidden, c([-1, num_taken, mixture.inner, 1])))
        outputs = _copied(self._norm, tape, self._product(tape, mixture.last, columns, taken))
        each = tape.op("Reshape", (outputs, c([-1, num_taken, mixture.width])))
        weighted = tape.op("Mul", (each, tape.op("Unsqueeze", (shares, c([2])))))
        return tape, tape.op("ReduceSum", (weighted, c([1])), {"keepdims": 0})

    def _product(
        self, tape: Tape, node: ir.Node, columns: ir.Value, taken: ir.Value | None
    ) -> ir.Value:
        """Return [P, rows] of columns [N, 1 or k, inputs, 1]."""
        c, (rows, inputs) = self._constants, self._matrix(node)
        if BITS in node.attributes:
            packed, scales = (self._flat(value) for value in (node.inputs[2], node.inputs[-1]))
            flat = tape.op(
                "GatherBlockQuantized",
                (packed, taken, scales),
                {
                    "gather_axis": 0,
                    "quantize_axis": 1,
                    "bits": node.attributes[BITS].as_int(),
                    "block_size": node.attributes[BLOCK].as_int(),
                },
                domain=MICROSOFT,
            )
            matrices = tape.op("Reshape", (flat, c([0, 0, rows, inputs])))
        else:
            matrices = tape.op("Gather", (node.inputs[2], taken))
        product = tape.op("Reshape", (tape.op("MatMul", (matrices, columns)), c([-1, rows])))
        bias = _bias(node)
        if bias is None:
            return product
        biases = tape.op("Reshape", (tape.op("Gather", (bias, taken)), c([-1, rows])))
        return tape.op("Add", (product, biases))

    def _matrix(self, node: ir.Node) -> tuple[int, int]:
        mixture = self._mixture
        is_first = node is mixture.first
        return (mixture.rows, mixture.width) if is_first else (mixture.width, mixture.inner)

    def _flat(self, value: ir.Value | None) -> ir.Value:
        """Return the same memory as one row for each expert."""
        assert value is not None
        assert value.const_value is not None
        name = f"{value.name}.rows"
        if name not in self._graph.initializers:
            array = value.const_value.numpy()
            tape = Tape()
            rows = ir.Tensor(array.reshape(len(array), -1), name=name)
            self._graph.register_initializer(tape.initializer(rows))
        return self._graph.initializers[name]

    def _scan(self, tape: Tape) -> ir.Value:
        """Return the sum [N, d] of one expert after the other."""
        c, mixture = self._constants, self._mixture
        x, taken, shares = mixture.first.inputs[0], *mixture.total.inputs[1:]
        assert x is not None
        pairs = tape.op("Reshape", (taken, c([-1])))
        shares_P = tape.op("Reshape", (shares, c([-1])))
        # positions of 16 bits are summed up in float32
        wide = (
            x if x.dtype == ir.DataType.FLOAT else tape.op("Cast", (x,), {"to": ir.DataType.FLOAT})
        )
        start = tape.op("Mul", (wide, c(0.0)))
        numbers = c(list(range(mixture.num_experts)))
        operands = [*mixture.first.inputs[2:], *mixture.last.inputs[2:]]
        body, sums = Tape(), _input(mixture.total.outputs[0].type, x.shape)
        number = _input(ir.TensorType(ir.DataType.INT64), ir.Shape(()))
        each = [_input(*_slice_of(value)) for value in operands]
        first, last = each[: len(mixture.first.inputs) - 2], each[len(mixture.first.inputs) - 2 :]

        takes = body.op("NonZero", (body.op("Equal", (pairs, number)),))
        places_n = body.op("Squeeze", (takes, c([0])))
        positions_n = body.op("Div", (places_n, c([mixture.num_taken])))
        x_nd = body.op("Gather", (x, positions_n))
        inner = _copied(self._activation, body, self._times(body, mixture.first, x_nd, first))
        outputs = _copied(self._norm, body, self._times(body, mixture.last, inner, last))
        shares_n1 = body.op("Unsqueeze", (body.op("Gather", (shares_P, places_n)), c([1])))
        added = body.op(
            "ScatterND",
            (
                sums,
                body.op("Unsqueeze", (positions_n, c([1]))),
                body.op("Mul", (outputs, shares_n1)),
            ),
            {"reduction": "add"},
        )
        added.shape, added.type = sums.shape, sums.type
        graph = _subgraph(f"{self._name}.expert", [sums, number, *each], [added], body)
        return tape.op(
            "Scan",
            (start, numbers, *operands),
            {"body": graph, "num_scan_inputs": 1 + len(operands)},
        )

    def _times(
        self, tape: Tape, node: ir.Node, x_n: ir.Value, operands: Sequence[ir.Value]
    ) -> ir.Value:
        """Return [n, rows]: positions times one expert's matrix."""
        if BITS in node.attributes:
            rows, inputs = self._matrix(node)
            product = tape.op(
                "MatMulNBits",
                (x_n, operands[0], operands[-1]),
                {
                    "K": inputs,
                    "N": rows,
                    "bits": node.attributes[BITS].as_int(),
                    "block_size": node.attributes[BLOCK].as_int(),
                },
                domain=MICROSOFT,
            )
        else:
            transposed = tape.op("Transpose", (operands[0],), {"perm": [1, 0]})
            product = tape.op("MatMul", (x_n, transposed))
        return product if _bias(node) is None else tape.op("Add", (product, operands[1]))

    @staticmethod
    def _type_of(value: ir.Value) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
        return value.type, value.shape


def _bias(node: ir.Node) -> ir.Value | None:
    """Return [E, rows]; the last operand of a quantized product are its scales."""
    operands = node.inputs[3:-1] if BITS in node.attributes else node.inputs[3:]
    return operands[0] if operands else None


def _sizes(value: ir.Value | None) -> list[Any]:
    assert value is not None
    assert value.shape is not None, f"{value.name} has no shape"
    return list(value.shape)


def _slice_of(value: ir.Value | None) -> tuple[ir.TypeProtocol, ir.Shape]:
    assert value is not None
    assert value.dtype is not None
    return ir.TensorType(value.dtype), ir.Shape(_sizes(value)[1:])


def _input(type_: ir.TypeProtocol | None, shape: ir.Shape | None) -> ir.Value:
    return ir.Value(type=type_, shape=shape)


def _subgraph(
    name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], tape: Tape
) -> ir.Graph:
    """Return a body; its values have names of their own, for it sees those around it."""
    made = (value for node in tape.nodes for value in node.outputs)
    for number, value in enumerate((*inputs, *made)):
        value.name = f"{name}.{number}"
    graph = ir.Graph(inputs, outputs, nodes=tape.nodes, name=name)
    for node in graph:
        node.name = None  # names that a graph gives, every body would give again
    return graph


def _ancestor(value: ir.Value | None, operator: str) -> ir.Node:
    """Return the node of our domain that a value is computed from, through others."""
    waiting, seen = [value], set[int]()
    while waiting:
        current = waiting.pop()
        node = current.producer() if current is not None else None
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.domain == TRACED and node.op_type == operator:
            return node
        waiting += node.inputs
    raise AssertionError(f"no {operator} before it")


def _between(start: ir.Value, end: ir.Value | None) -> list[ir.Node]:
    """Return the nodes that compute `end` from `start` and from constants, in order."""
    found: dict[ir.Node, None] = {}

    def visit(value: ir.Value | None) -> None:
        if value is None or value is start or value.is_initializer():
            return
        node = value.producer()
        assert node is not None, f"{value.name} is neither the experts' nor a constant"
        if node not in found:
            for each in node.inputs:
                visit(each)
            found[node] = None

    visit(end)
    return list(found)


def _copied(nodes: Sequence[ir.Node], tape: Tape, given: ir.Value) -> ir.Value:
    """Copy nodes onto a tape, with `given` in the place of what they were computed from."""
    new: dict[ir.Value, ir.Value] = {}
    result = given
    for node in nodes:
        inputs = [
            new.get(i, i if i.is_initializer() else given) if i else None for i in node.inputs
        ]
        outputs = tape.op_multi_out(
            node.op_type,
            inputs,
            {name: attribute.value for name, attribute in node.attributes.items()},
            domain=node.domain,
            num_outputs=len(node.outputs),
        )
        new.update(zip(node.outputs, outputs, strict=True))
        result = outputs[0]
    return result


def _store(graph: ir.Graph, node: ir.Node, place: int) -> None:
    """Let an operand be an initializer, where a Transpose of one is traced."""
    value = node.inputs[place]
    assert value is not None
    transpose = value.producer()
    if transpose is None:
        assert value.const_value is not None
        # of what the exporter has folded, every reading would be another copy
        array = np.ascontiguousarray(value.const_value.numpy())
        value.const_value = ir.Tensor(array, name=value.name)
    else:
        assert transpose.op_type == "Transpose", f"experts' matrices are {transpose.op_type}"
        source = transpose.inputs[0]
        assert source is not None
        assert source.const_value is not None
        turned = source.const_value.numpy().transpose(transpose.attributes["perm"].as_ints())
        _replace_operand(graph, node, place, turned, f"{source.name}.transposed")


def _reorder(graph: ir.Graph, node: ir.Node, order: NDArray[np.int64]) -> None:
    """Store rows of the first product in `order`, and put what they give back into the model's."""
    for place in range(2, len(node.inputs)):
        value = node.inputs[place]
        assert value is not None
        assert value.const_value is not None
        array = value.const_value.numpy()
        _replace_operand(graph, node, place, array[:, order], f"{value.name}.in_turn")
    tape, result = Tape(), node.outputs[0]
    users = list(result.uses())
    name = free_name(graph, f"{result.name}.order")
    back = tape.initializer(ir.tensor(np.argsort(order), name=name))
    restored = tape.op("Gather", (result, back), {"axis": 1})
    restored.type, restored.shape = result.type, result.shape
    for user, place in users:
        user.replace_input_with(place, restored)
    graph.register_initializer(back)
    graph.insert_after(node, tape.nodes)


def _replace_operand(
    graph: ir.Graph, node: ir.Node, place: int, array: NDArray[Any], name: str
) -> None:
    tape = Tape()
    value = tape.initializer(ir.Tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    node.replace_input_with(place, value)


def _set_gate(node: ir.Node, gate: Gate) -> None:
    for name, value in gate.attributes.items():
        node.attributes[name] = ir.convenience.convert_attribute(name, value)
