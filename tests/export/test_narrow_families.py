"""Backbones of many kinds in 16 bits: every product, every norm, and what engines compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kit.engines import entry_of, identity_link, random_ids, relative
from kit.models import load_folder
from kit.narrow_graphs import NORMS, PRODUCTS, checked, computed_in, types_of
from kit.parser_documentation import refused_nodes
from kit.zoo import write_zoo_model
from recmas_export.backbone_graph import (
    CPU_DECODER,
    CPU_HEAD,
    DECODER,
    EMBED,
    HEAD,
    export_backbone,
)
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.engines.tensorrt.static_graph import read_graph, static_decoder
from recmas_runtime.formats.layers import is_rows
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.precisions import PRECISIONS

pytestmark = pytest.mark.families

# Norms of heads, windows, scaled embeddings and capped logits, biases, experts, states, sinks,
# positions that are looked up.
_TYPES = ("qwen3", "gemma3_text", "gemma2", "qwen2", "qwen3_moe", "qwen3_5_text", "gpt_oss", "gpt2")
FOR_TENSORRT = ("llama", "qwen3", "gemma3_text", "qwen2")
CASES = [
    *((name, "bfloat16", "auto") for name in ("llama", *_TYPES)),
    *((name, "float16", "auto") for name in ("llama", "gemma3_text", "qwen3_moe")),
    *((name, "int4", "cuda") for name in ("llama", "qwen3")),
]


def states_of(engine: BackboneEngine, embeds: np.ndarray, width: int) -> np.ndarray:
    """Return hidden states of a ragged batch: a prompt in two parts, then steps of one position."""
    inner, cache = stack_operands([identity_link(width)]), engine.new_cache(2, 64)
    at, found = 0, []
    for count in (11, 6, 1, 1, 1):
        part = np.ascontiguousarray(embeds[:, at : at + count])
        last = np.full(2, count - 1)
        hidden, _, _ = engine.forward(cache, part, np.full(2, at), last, inner)
        found.append(np.array(hidden))
        at += count
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(("name", "precision", "device"), CASES)
def test_types_and_numbers(name: str, precision: str, device: str, tmp_path: Path) -> None:
    backbone = load_folder(write_zoo_model(tmp_path / "model", name))
    folder, types = tmp_path / "graphs", PRECISIONS[precision].types[device]
    export_backbone(backbone, folder, precision=precision, device=device)
    graph = checked(folder / DECODER)
    narrow, wide = frozenset({types.products}), frozenset({"float32"})
    told = types_of(graph)
    weights = {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        kinds = {told[n] for n in (*node.input, *node.output) if n in told}
        has_weight = any(n in weights and n in told for n in node.input[1:2])
        if node.op_type in ("Attention", "MatMulNBits", "TensorScatter"):
            assert kinds == narrow, node.op_type
        elif node.op_type in ("MatMul", "Gemm") and has_weight and "router" not in node.input[1]:
            assert kinds in (narrow, wide), node.input[1]
        elif node.op_type in NORMS:
            assert kinds == wide, node.op_type
        elif node.op_type != "Cast":
            assert len(kinds) <= 1, f"{node.op_type} has operands of {kinds}"
    products = [kinds for op, kinds in computed_in(graph) if op in PRODUCTS]
    assert products.count(narrow) >= 4 * backbone.facts.num_layers
    borders = (*graph.graph.input, *graph.graph.output)
    rows = {v.name: told[v.name] for v in borders if v.name in told}
    for border, kind in rows.items():
        is_cache = is_rows(border.removeprefix("present_"))
        assert kind == (types.caches if is_cache else "float32"), border
    for other in (EMBED, HEAD, CPU_DECODER, CPU_HEAD):
        checked(folder / other)
    if name in FOR_TENSORRT and precision != "int4":
        adapted = static_decoder(read_graph(folder / DECODER), 64, file=DECODER)
        assert refused_nodes(onnx.shape_inference.infer_shapes(adapted)) == []
        scaled = [n for n in adapted.graph.node if n.op_type == "Mul" and ".scale" in n.input[1]]
        assert len(scaled) == backbone.facts.num_layers

    ids = random_ids(backbone, 2, 20)
    with torch.no_grad():
        reference = backbone.body(input_ids=ids, use_cache=False).last_hidden_state.numpy()
        logits = backbone.logits(torch.from_numpy(reference[:, -1])).numpy()
        embedded = backbone.embed(ids).numpy()
    allowed = PRECISIONS[precision].tolerances
    forms = [{"cpu_decoder": CPU_DECODER, "cpu_head": CPU_HEAD}]
    # Of float16 ONNX Runtime has kernels on a CPU, or puts casts around what it has in float32.
    forms += [{}] if types.products == "float16" and name != "qwen3_moe" else []
    found = []
    for form in forms:
        entry = entry_of(backbone, precision=precision, cache_dtype=types.caches, **form)
        engine = BackboneEngine(entry, folder, threads=1)
        embeds = engine.embed(ids.numpy())
        assert relative(embeds, embedded) <= allowed["embeds_relative"]
        found.append(states_of(engine, embeds, backbone.facts.width))
        assert relative(found[-1], reference) <= allowed["hidden_relative"]
        given = np.ascontiguousarray(reference[:, -1])
        assert relative(engine.logits(given), logits) <= allowed["logits_relative"]
    assert relative(found[0], reference) > 1e-5, "nothing was rounded"
    if len(found) > 1:
        assert relative(found[1], found[0]) <= allowed["hidden_relative"] / 4
