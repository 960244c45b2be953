"""What rewrites do to a graph: put new nodes in, let new values take the place of old ones."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape


def insert(graph: ir.Graph, tape: Tape, *, before: ir.Node) -> None:
    """Put the nodes and initializers of a tape into the graph."""
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    graph.insert_before(before, tape.nodes)


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Let `new` be what `old` was: for its users, as an output, in shape and type."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def integers(value: ir.Value | None) -> list[int] | None:
    """Return a constant vector of integers; None if it is no constant."""
    tensor = value.const_value if value is not None else None
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None
