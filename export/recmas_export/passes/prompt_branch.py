"""One decoder that computes prompts in one way and latent steps in another.

A call of several positions and a call of one want different weights: the former is bound by
arithmetic, the latter by the bytes it reads. ONNX's If runs one of two graphs; weights that both
read are there once.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from recmas_runtime.formats.layers import PROMPT_BRANCH

_ONE: Final = "choice.one"


def choose_by_length(prompts: ir.Model, steps: ir.Model) -> ir.Model:
    """Return a decoder that is `prompts` for calls of several positions, else `steps`.

    The number of rows plays no part, so that what becomes of one does not depend on how many others
    share its call. Both are used up. Inputs and outputs are those of `steps`, which `prompts` has
    too. Initializers of both that are equal become one.
    """
    old = steps.graph
    inputs = {v.name: ir.Value(name=v.name, type=v.type, shape=v.shape) for v in old.inputs}
    results = [(v.name, v.type, v.shape) for v in old.outputs]
    one = ir.tensor(np.array([1], np.int64), name=_ONE)
    held = {_ONE: _initializer(_ONE, one)}
    # Those of steps keep their names, by which other graphs of the backbone share them.
    step, prompt = (
        _branch(model.graph, name, inputs, held)
        for name, model in (("step", steps), (PROMPT_BRANCH, prompts))
    )
    tape = Tape()
    positions = tape.op("Shape", (inputs["inputs_embeds"],), {"start": 1, "end": 2})
    is_prompt = tape.op("Greater", (positions, held[_ONE]))
    positions.name, is_prompt.name = "choice.positions", "choice.is_prompt"
    outputs = tape.op_multi_out(
        "If",
        (is_prompt,),
        {"then_branch": prompt, "else_branch": step},
        num_outputs=len(results),
    )
    for value, (name, kind, shape) in zip(outputs, results, strict=True):
        value.name, value.type, value.shape = name, kind, shape
    graph = ir.Graph(
        list(inputs.values()),
        list(outputs),
        nodes=tape.nodes,
        initializers=list(held.values()),
        opset_imports={**old.opset_imports, **prompts.graph.opset_imports},
        name=old.name,
    )
    return ir.Model(
        graph,
        ir_version=steps.ir_version,
        producer_name=steps.producer_name,
        producer_version=steps.producer_version,
    )


def _branch(
    graph: ir.Graph, name: str, inputs: dict[str | None, ir.Value], held: dict[str, ir.Value]
) -> ir.Graph:
    """Return a graph's nodes as a branch, over inputs and initializers of the graph around it."""
    for value in graph.inputs:
        value.replace_all_uses_with(inputs[value.name])
    for key, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        key = key if _is(held.get(key), tensor) else f"{key}.{name}"
        value.replace_all_uses_with(held.setdefault(key, _initializer(key, tensor)))
    outputs, nodes = list(graph.outputs), list(graph)
    for value in outputs:
        value.name = f"{name}.{value.name}"
    graph.outputs.clear()
    graph.remove(nodes)
    return ir.Graph([], outputs, nodes=nodes, name=name)


def _is(held: ir.Value | None, tensor: ir.TensorProtocol) -> bool:
    """Whether a name is free for a tensor or has the same numbers."""
    if held is None or held.const_value is None:
        return True
    other = held.const_value
    return other.dtype == tensor.dtype and np.array_equal(other.numpy(), tensor.numpy())


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
