"""The three graphs of a backbone against Hugging Face's own model, family by family."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from kit.engines import CASES, Exported, random_ids, random_link, relative, weights_bytes
from kit.models import load_tiny
from recmas_export.backbone_graph import (
    CHAT_TEMPLATE,
    DECODER,
    EMBED,
    HEAD,
    TOKENIZER,
    WEIGHTS,
    export_backbone,
)
from recmas_export.export_torch import portable_attention
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.precisions import PRECISIONS, TOLERANCES
from recmas_runtime.formats.safetensors_file import read_tensors

GRAPHS = (DECODER, EMBED, HEAD)
TOLERANCE = TOLERANCES["hidden_relative"]
# Three small layers round less than thirty: a real mistake must not hide below the general bound.
TIGHT = TOLERANCE / 10

Get = Callable[[str], Exported]


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_the_model_over_chunked_calls(exported: Get, name: str) -> None:
    case = exported(name)
    ids = random_ids(case.backbone, 2, 40)
    expected = case.reference(ids)
    embeds = case.embed(ids)
    with torch.no_grad():
        assert np.array_equal(embeds, case.backbone.embed(ids).numpy())
        logits = case.backbone.model(input_ids=ids).logits.numpy()
    cache, start, hidden = case.new_cache(2), 0, []
    for length in (23, 1, 1, 7, 8):
        part = embeds[:, start : start + length]
        hidden.append(case.call(cache, part, write_index=[start] * 2)["hidden"])
        start += length
    found = np.concatenate(hidden, axis=1)
    assert relative(found, expected) < TIGHT
    (head,) = case.head.run(None, {"hidden": expected[:, -1]})
    assert relative(head, logits[:, -1]) < TOLERANCES["logits_relative"]


@pytest.mark.parametrize("name", ["qwen2-mixed", "gemma3", "mistral-all-slide", "phi3-all-slide"])
def test_windows_matter_in_these_cases(exported: Get, name: str) -> None:
    """Without this, a graph that ignores windows could pass the test above."""
    case = exported(name)
    ids = random_ids(case.backbone, 1, 40)
    wide = {**CASES[name][1], "sliding_window": 4096}
    family = CASES[name][0]
    unlimited = load_tiny(case.folder.parent / f"{name}-unlimited", family, **wide)
    with torch.no_grad():
        other = unlimited.body(input_ids=ids, use_cache=False).last_hidden_state.numpy()
    assert relative(other, case.reference(ids)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-all-slide"])
def test_ragged_batch_equals_one_by_one(exported: Get, name: str) -> None:
    case = exported(name)
    lengths, steps = (19, 3, 30), 3
    ids = [random_ids(case.backbone, 1, n + steps, seed=n) for n in lengths]
    expected = [case.reference(i)[0] for i in ids]

    # Shorter prompts are filled up with whatever; the steps overwrite what that leaves behind.
    prompts = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, (i, n) in enumerate(zip(ids, lengths, strict=True)):
        prompts[row, :n] = i[0, :n]
    cache = case.new_cache(3)
    last = [n - 1 for n in lengths]
    found = case.call(cache, case.embed(prompts), write_index=[0, 0, 0], last_index=last)
    for row, n in enumerate(lengths):
        assert relative(found["hidden"][row, :n], expected[row][:n]) < TIGHT
        assert np.array_equal(found["thought"][row, 0], found["hidden"][row, n - 1])
    for step in range(steps):
        at = [n + step for n in lengths]
        tokens = torch.tensor([[int(i[0, p])] for i, p in zip(ids, at, strict=True)])
        found = case.call(cache, case.embed(tokens), write_index=at)
        for row, position in enumerate(at):
            assert relative(found["hidden"][row, 0], expected[row][position]) < TIGHT


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_smaller_write_index_truncates_the_cache(exported: Get, name: str) -> None:
    case = exported(name)
    ids = random_ids(case.backbone, 1, 24)
    other = torch.cat([ids[:, :10], random_ids(case.backbone, 1, 12, seed=7)], dim=1)
    cache = case.new_cache(1)
    case.call(cache, case.embed(ids), write_index=[0])
    again = case.call(cache, case.embed(other[:, 10:]), write_index=[10])
    fresh = case.call(case.new_cache(1), case.embed(other), write_index=[0])
    assert relative(again["hidden"], fresh["hidden"][:, 10:]) < TIGHT
    assert relative(again["hidden"], case.reference(other)[:, 10:]) < TIGHT


def test_capacity_does_not_change_the_result(exported: Get) -> None:
    case = exported("qwen3")
    embeds = case.embed(random_ids(case.backbone, 1, 20))
    results = [
        case.call(case.new_cache(1, capacity=capacity), embeds, write_index=[0])["hidden"]
        for capacity in (20, 64, 192)
    ]
    for other in results[1:]:
        assert relative(other, results[0]) < TIGHT


def test_each_group_gets_its_own_inner_link(exported: Get, tmp_path: Path) -> None:
    """Three agents with links of three kinds in one call, two samples each, agent-major."""
    case = exported("llama")
    kinds = ("residual", "ln_residual", "projected")
    links = [random_link(tmp_path, k, "inner", case.width, case.width) for k in kinds]
    embeds = case.embed(random_ids(case.backbone, 6, 12))
    last = [3, 11, 0, 7, 5, 9]
    found = case.call(
        case.new_cache(6),
        embeds,
        write_index=[0] * 6,
        last_index=last,
        inner=stack_operands([operands for _, operands in links]),
    )
    for row in range(6):
        assert np.array_equal(found["thought"][row, 0], found["hidden"][row, last[row]])
        with torch.no_grad():
            expected = links[row // 2][0](torch.from_numpy(found["thought"][row])).numpy()
        assert relative(found["next_embeds"][row], expected) < TOLERANCES["link_relative"]


@pytest.mark.parametrize("name", CASES)
def test_only_standard_operators(exported: Get, name: str) -> None:
    for graph in GRAPHS:
        model = onnx.load(exported(name).folder / graph, load_external_data=False)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
        assert not model.functions
        onnx.checker.check_model(str(exported(name).folder / graph), full_check=True)


def test_signature_is_the_contract(exported: Get) -> None:
    case = exported("gemma3")
    facts = case.backbone.facts
    inputs = {i.name: (i.type, i.shape) for i in case.decoder.get_inputs()}
    d = facts.width
    assert list(inputs)[:3] == ["inputs_embeds", "write_index", "last_index"]
    assert inputs.pop("inputs_embeds") == ("tensor(float)", ["batch", "positions", d])
    assert inputs.pop("write_index") == ("tensor(int64)", ["batch"])
    assert inputs.pop("last_index") == ("tensor(int64)", ["batch"])
    rows = ["batch", facts.num_kv_heads, "capacity", facts.head_dim]
    caches = [f"{kind}.{i}" for kind in ("key", "value") for i in range(facts.num_layers)]
    for name in caches:
        assert inputs.pop(name) == ("tensor(float)", rows)
    assert inputs == {
        "inner.pre_norm": ("tensor(bool)", ["groups", 1, 1]),
        "inner.pre_scale": ("tensor(float)", ["groups", 1, d]),
        "inner.pre_bias": ("tensor(float)", ["groups", 1, d]),
        "inner.w1": ("tensor(float)", ["groups", d, "link_hidden"]),
        "inner.b1": ("tensor(float)", ["groups", 1, "link_hidden"]),
        "inner.w2": ("tensor(float)", ["groups", "link_hidden", d]),
        "inner.w3": ("tensor(float)", ["groups", d, d]),
        "inner.bias": ("tensor(float)", ["groups", 1, d]),
        "inner.post_norm": ("tensor(bool)", ["groups", 1, 1]),
        "inner.post_scale": ("tensor(float)", ["groups", 1, d]),
        "inner.post_bias": ("tensor(float)", ["groups", 1, d]),
    }
    outputs = {o.name: o.shape for o in case.decoder.get_outputs()}
    assert outputs == {
        "hidden": ["batch", "positions", d],
        "thought": ["batch", 1, d],
        "next_embeds": ["batch", 1, d],
        **{f"present_{name}": rows for name in caches},
    }
    assert [(i.name, i.shape) for i in case.head.get_inputs()] == [("hidden", ["batch", d])]
    assert [(o.name, o.shape) for o in case.head.get_outputs()] == [
        ("logits", ["batch", facts.vocab_size])
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_weights_are_stored_once(exported: Get, name: str) -> None:
    """Untied (llama): embedding and head apart. Tied (gemma3): the same bytes for both graphs."""
    case = exported(name)
    state = case.backbone.model.state_dict()
    tensors, _ = read_tensors(case.folder / WEIGHTS)
    stored = sum(t.nbytes for name, t in tensors.items() if not name.endswith(".table"))
    extra = stored - weights_bytes(state)
    # Rotary frequencies and tables are outside the state dict; nothing else may come on top.
    assert 0 <= extra < 1024
    places = {
        graph: {
            initializer.name: {entry.key: entry.value for entry in initializer.external_data}
            for initializer in onnx.load(
                case.folder / graph, load_external_data=False
            ).graph.initializer
            if initializer.external_data
        }
        for graph in GRAPHS
    }
    for graph, initializers in places.items():
        assert initializers, graph
        assert {p["location"] for p in initializers.values()} == {WEIGHTS}
    table = next(iter(places[EMBED].values()))
    tied = [p for p in places[HEAD].values() if p == table]
    assert len(tied) == (1 if case.backbone.model.config.tie_word_embeddings else 0)
    for graph in GRAPHS:
        assert (case.folder / graph).stat().st_size < 400_000


def test_tensors_are_aligned(exported: Get) -> None:
    raw = (exported("qwen3").folder / WEIGHTS).read_bytes()
    (header,) = struct.unpack("<Q", raw[:8])
    assert (8 + header) % 4096 == 0
    entries = json.loads(raw[8 : 8 + header])
    whole = [e for e in entries.values() if (e["data_offsets"][1] - e["data_offsets"][0]) % 64 == 0]
    assert all(entry["data_offsets"][0] % 64 == 0 for entry in whole)


def test_equal_weights_give_equal_bytes(exported: Get, tmp_path: Path) -> None:
    case = exported("qwen2")
    family, dims = CASES["qwen2"]
    export_backbone(load_tiny(tmp_path / "elsewhere", family, **dims), tmp_path / "again")
    for name in (*GRAPHS, WEIGHTS, TOKENIZER, CHAT_TEMPLATE):
        first, second = (
            hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for folder in (case.folder, tmp_path / "again")
        )
        assert first == second, name


def test_graphs_say_nothing_of_this_machine(exported: Get) -> None:
    for name in GRAPHS:
        raw = (exported("llama").folder / name).read_bytes()
        assert not re.search(rb"site-packages|\.py\b|/home|/root|/tmp|pkg\.torch|stack_trace", raw)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_left_as_it_was(exported: Get, name: str) -> None:
    assert not exported(name).was_changed


def test_other_precision_is_refused(tmp_path: Path) -> None:
    backbone = load_tiny(tmp_path / "source", "llama")
    backbone.model.half()
    with pytest.raises(RecmasError, match=r"RM300.*float16"):
        export_backbone(backbone, tmp_path / "out")


@pytest.mark.parametrize("kind", ["longrope", {"full_attention": "longrope"}])
def test_frequencies_are_fixed_in_a_trace_alone(tmp_path: Path, kind: object) -> None:
    backbone = load_tiny(tmp_path / "source", "llama", num_hidden_layers=1)
    rotary: Any = backbone.body.rotary_emb
    rotary.rope_type = kind
    with portable_attention(backbone.model):
        assert "longrope" not in str(rotary.rope_type)
    assert rotary.rope_type == kind


def test_attention_beyond_the_operator_is_refused_by_name(tmp_path: Path) -> None:
    """A bias by distance, for example, comes as one more argument."""
    backbone = load_tiny(tmp_path / "source", "llama", num_hidden_layers=1)
    attention = backbone.model.get_decoder().layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *args, **kwargs: plain(*args, position_bias=torch.zeros(4), **kwargs)
    with pytest.raises(
        RecmasError, match=r"RM300.*LlamaAttention uses attention with position_bias"
    ):
        export_backbone(backbone, tmp_path / "out")
    assert backbone.model.config._attn_implementation != "recmas_portable"


def test_model_code_that_fails_is_named(tmp_path: Path) -> None:
    backbone = load_tiny(tmp_path / "source", "llama", num_hidden_layers=1)

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("no such kernel")

    backbone.model.get_decoder().norm.forward = broken
    with pytest.raises(RecmasError) as caught:
        export_backbone(backbone, tmp_path / "out")
    assert caught.value.problems[0].code == "RM300"
    assert "(model type 'llama') could not be traced: ValueError: no such kernel" in str(
        caught.value
    )


def test_graphs_keep_the_shapes_that_make_loading_fast(exported: Get) -> None:
    """Without them ONNX Runtime infers every shape anew, which takes most of its loading time."""
    graph = onnx.load(exported("llama").folder / DECODER, load_external_data=False).graph
    known = {value.name for value in (*graph.value_info, *graph.output)}
    heavy = [node for node in graph.node if node.op_type in ("Attention", "MatMul")]
    unknown = [node for node in heavy if node.output[0] not in known]
    assert len(heavy) == 2 * (1 + 4) + 3
    assert len(unknown) == 3, "those of the inner link, whose sizes only its weights know"


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_layers_with_equal_weights_are_exported(precision: str, tmp_path: Path) -> None:
    """As a model is before any training: biases of zero, and here equal layers, too."""
    backbone = load_tiny(tmp_path / "source", "qwen2")
    layers = backbone.body.layers
    with torch.no_grad():
        for layer in layers:
            layer.load_state_dict(layers[0].state_dict())
            for name, weight in layer.named_parameters():
                if name.endswith("bias"):
                    weight.zero_()
    export_backbone(backbone, tmp_path / "graphs", precision=precision)
    case = Exported(backbone, tmp_path / "graphs", was_changed=False)
    ids = random_ids(backbone, 1, 12)
    found = case.call(case.new_cache(1), case.embed(ids), write_index=[0])["hidden"]
    bound = TIGHT if precision == "float32" else PRECISIONS["int4"].tolerances["hidden_relative"]
    assert relative(found, case.reference(ids)) < bound
