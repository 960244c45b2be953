"""Rows that were handed to an agent, and that some layers do not see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from kit.engines import CASES, Exported, make_engine
from kit.engines import random_ids as ids_of
from kit.files import MadeOnce
from kit.models import load_folder, write_tiny_backbone
from kit.zoo import write_zoo_model
from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_cache import empty_cache
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.hidden_rows import rows_hidden
from recmas_export.backbone_graph import CPU_DECODER, export_backbone
from recmas_runtime.checking.parity import relative_difference
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.interface import HandedRows, handed_rows, masks_of
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.formats.messages import masked_layers
from recmas_runtime.formats.precisions import TOLERANCES

# Rotated attention alone; sinks and windows in one layer; other windows. What has a decoder of its
# own for the CPU comes first.
FOR_CPU = ("llama", "gpt_oss")
NAMES = (
    *FOR_CPU,
    pytest.param("gemma3", marks=pytest.mark.families),
    pytest.param("mistral-all-slide", marks=pytest.mark.families),
)
# Two links: the first one's rows are seen by layer 0 alone, those of the second one by layer 1.
SEEN_BY = ((0,), (1,))
MASKED = masked_layers(2, SEEN_BY)
# Of four sequences: how many rows each link hands over, and the receiver's own positions.
HANDED = ((5, 0), (0, 0), (4, 7), (0, 11))
LENGTHS = (9, 12, 4, 7)
STEPS = 3


class Hidden(NamedTuple):
    name: str
    case: Exported
    backbone: TorchBackbone


@pytest.fixture(scope="module", params=NAMES)
def hidden(request: pytest.FixtureRequest, made_once: MadeOnce) -> Hidden:
    name: str = request.param

    def make(new: Path) -> None:
        if name in CASES:
            family, dims = CASES[name]
            write_tiny_backbone(new / "source", family, **dims)
        else:
            write_zoo_model(new / "source", name)
        backbone = load_folder(new / "source")
        export_backbone(backbone, new / "graphs", masked_layers=MASKED)

    folder = made_once(f"export with hidden rows {name}", make)
    backbone = load_folder(folder / "source")
    return Hidden(name, Exported(backbone, folder / "graphs", was_changed=False), backbone)


def sequences(case: Exported) -> list[NDArray[np.float32]]:
    """Return what each sequence is made of: handed rows, its own prompt, and its steps."""
    totals = [sum(rows) + own + STEPS for rows, own in zip(HANDED, LENGTHS, strict=True)]
    embeds = case.embed(ids_of(case.backbone, len(totals), max(totals)))
    return [row[:total] for row, total in zip(embeds, totals, strict=True)]


@torch.no_grad()
def layer_by_layer(
    backbone: TorchBackbone, embeds_Td: NDArray[np.float32], handed: Sequence[int]
) -> NDArray[np.float32]:
    """Return hidden states [T, d] under one explicit mask for each layer."""
    body: Any = backbone.body
    hidden = torch.from_numpy(embeds_Td)[None].clone()
    count = hidden.shape[1]
    position = torch.arange(count)[None]
    query, key = position.T, position
    ends = np.cumsum(handed).tolist()
    config = body.config
    for number, layer in enumerate(body.layers):
        kind = backbone.facts.attention[number]
        allowed = key <= query
        if kind == "sliding":
            allowed = allowed & (query - key < config.sliding_window)
        for start, end, seen_by in zip([0, *ends], ends, SEEN_BY, strict=False):
            # What is handed over was computed where every layer has it.
            if number not in seen_by:
                of_others = (query < ends[-1]) & (query >= start) & (query < end)
                allowed = allowed & ~((key >= start) & (key < end) & ~of_others)
        # Rows of one sender do not see those of the other.
        if ends[0] > 0:
            allowed = allowed & ~((key < ends[0]) & (query >= ends[0]) & (query < ends[-1]))
        mask = torch.zeros(count, count).masked_fill(~allowed, torch.finfo(torch.float32).min)
        has_kinds = backbone.facts.model_type == "gemma3_text"
        by_kind = {"layer_type": config.layer_types[number]} if has_kinds else {}
        angles = body.rotary_emb(hidden, position, **by_kind)
        found = layer(
            hidden,
            attention_mask=mask[None, None],
            position_embeddings=angles,
            position_ids=position,
            past_key_values=None,
        )
        hidden = found[0] if isinstance(found, tuple) else found
    return np.asarray(body.norm(hidden)[0].numpy())


def run(engine: BackboneEngine, case: Exported) -> list[NDArray[np.float32]]:
    """Hand rows to four sequences; return what they then have at their own positions."""
    embeds, inner = sequences(case), case.no_link()
    rows, starts = len(embeds), np.array([sum(handed) for handed in HANDED])
    cache = engine.new_cache(rows, 64)
    # The senders' rows, each link's computed by itself, at the places that they are to have.
    for link in range(2):
        begin = np.array([sum(handed[:link]) for handed in HANDED])
        counts = np.array([handed[link] for handed in HANDED])
        for row in np.flatnonzero(counts).tolist():
            first, end = begin[row], begin[row] + counts[row]
            own = engine.new_cache(1, 64)
            if link == 1 and first > 0:
                own.hide_rows(0, [HandedRows(0, int(first), ())])
            part = np.ascontiguousarray(embeds[row][None, first:end])
            engine.forward(own, part, np.array([first]), counts[row : row + 1] - 1, inner)
            for name, store in cache._stores[0].items():
                if name != "hidden_rows":
                    store.numpy()[row, :, first:end] = own._stores[0][name].numpy()[0, :, first:end]
    for row, (first_rows, second) in enumerate(HANDED):
        spans = [HandedRows(0, first_rows, SEEN_BY[0])]
        spans += [HandedRows(first_rows, first_rows + second, SEEN_BY[1])]
        cache.hide_rows(row, spans)
        # What lies where no layer of a group looks does not matter.
        for kind in ("key", "value"):
            cache._stores[0][f"{kind}.1"].numpy()[row, :, :first_rows] = 1e4
            cache._stores[0][f"{kind}.0"].numpy()[row, :, first_rows : first_rows + second] = -1e4
    longest = max(LENGTHS)
    prompts = np.zeros((rows, longest, case.width), np.float32)
    for row, (start, length) in enumerate(zip(starts, LENGTHS, strict=True)):
        prompts[row, :length] = embeds[row][start : start + length]
    last = np.array(LENGTHS) - 1
    states, _, _ = engine.forward(cache, prompts, starts, last, inner)
    found = [[*state[:length]] for state, length in zip(states, LENGTHS, strict=True)]
    # Into a larger cache, as a batch goes that needs more room; the masks go with the rows.
    larger = engine.new_cache(rows, 128)
    larger.copy_rows(cache, range(rows), int((starts + LENGTHS).max()))
    for step in range(STEPS):
        at = starts + LENGTHS + step
        part = np.stack([row[place][None] for row, place in zip(embeds, at, strict=True)])
        states, _, _ = engine.forward(larger, part, at, np.zeros(rows, np.int64), inner)
        for row in range(rows):
            found[row].append(states[row, 0])
    return [np.stack(states) for states in found]


def test_layers_that_do_not_have_rows_do_not_see_them(hidden: Hidden) -> None:
    case, is_for_cpu = hidden.case, hidden.name in FOR_CPU
    assert (case.folder / CPU_DECODER).exists() == is_for_cpu
    expected = [
        layer_by_layer(hidden.backbone, embeds, handed)[sum(handed) :]
        for embeds, handed in zip(sequences(case), HANDED, strict=True)
    ]
    for for_cpu in {False, is_for_cpu}:
        found = run(make_engine(case, for_cpu=for_cpu, masked_layers=MASKED), case)
        for states, wanted in zip(found, expected, strict=True):
            assert relative_difference(states, wanted) < TOLERANCES["hidden_relative"]


def test_eager_torch_hides_the_same(hidden: Hidden) -> None:
    """With a cache of transformers' own, call by call: what the reference does."""
    backbone = hidden.backbone
    embeds, handed = sequences(hidden.case)[0], HANDED[0]
    start, whole = sum(handed), torch.from_numpy(embeds)[None]
    steps = ((start, start + 6), (start + 6, len(embeds) - 1), (len(embeds) - 1, None))
    cache = empty_cache(backbone.facts.layers)
    with torch.no_grad():
        backbone.body(inputs_embeds=whole[:, :start], **with_cache(backbone.body, cache))
        found = []
        for first, end in steps:
            part = whole[:, first:end]
            rows = torch.arange(first + part.shape[1])[None] < start
            with rows_hidden(backbone.body, {1: rows}):
                given = with_cache(backbone.body, cache)
                found.append(backbone.body(inputs_embeds=part, **given).last_hidden_state[0])
    expected = layer_by_layer(backbone, embeds, handed)[start:]
    states = torch.cat(found).numpy()
    assert relative_difference(states, expected) < TOLERANCES["hidden_relative"]


def test_a_sequence_that_begins_anew_sees_everything(hidden: Hidden) -> None:
    case = hidden.case
    engine = make_engine(case, masked_layers=MASKED)
    embeds = case.embed(ids_of(case.backbone, 2, 12))
    last, begin, inner = np.array([11, 11]), np.zeros(2, np.int64), case.no_link()
    cache = engine.new_cache(2, 64)
    expected, _, _ = engine.forward(cache, embeds, begin, last, inner)
    cache.hide_rows(1, [HandedRows(0, 3, ())])
    behind, _, _ = engine.forward(cache, embeds, begin + 3, last, inner)
    assert not np.allclose(behind[0], behind[1], atol=1e-3)
    found, _, _ = engine.forward(cache, embeds, begin, last, inner)
    np.testing.assert_array_equal(found, expected)
    cache.hide_rows(1, [HandedRows(0, 3, ())])
    engine.release(cache)
    again = engine.new_cache(2, 64)
    assert again is cache
    found, _, _ = engine.forward(again, embeds, begin, last, inner)
    np.testing.assert_array_equal(found, expected)


def test_the_decoder_for_the_cpu_keeps_its_operator(made_once: MadeOnce, tmp_path: Path) -> None:
    """Hidden rows cost a bias, one for all layers of a group; other layers have none."""
    backbone = load_folder(write_tiny_backbone(tmp_path / "source", "llama"))
    export_backbone(backbone, tmp_path / "graphs", masked_layers=((0, 2),))
    graph = onnx.load(tmp_path / "graphs" / CPU_DECODER, load_external_data=False).graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    biases = [node.input[10] if len(node.input) > 10 else None for node in attention]
    assert biases[0] == biases[2] is not None
    assert biases[1] is None
    assert Counter(node.op_type for node in graph.node)["Attention"] == 0
    with pytest.raises(RecmasError, match="RM404"):
        make_engine(Exported(backbone, tmp_path / "graphs", was_changed=False))


def test_a_first_row_is_seen_by_every_layer() -> None:
    told = [(3, 0, (1,)), (2, 0, (0,)), (0, 7, None), (4, 9, None)]
    assert handed_rows(told) == ((1, 3, (1,)), (3, 5, (0,)), (5, 5, None), (5, 9, None))
    assert handed_rows([(0, 0, (1,)), (2, 0, (1,))]) == ((0, 0, (1,)), (1, 2, (1,)))
    assert handed_rows([(2, 5, (1,))]) == ((0, 2, (1,)),)  # it was no first row
    masks = masks_of(((0,), (1,)), handed_rows(told), 10)
    assert np.flatnonzero(masks[0]).tolist() == [1, 2]
    assert np.flatnonzero(masks[1]).tolist() == [3, 4]


def test_layers_are_grouped_by_what_they_see() -> None:
    assert masked_layers(3, [None, None]) == ()
    assert masked_layers(3, [(0, 1, 2), None]) == ()
    assert masked_layers(4, [(1, 2), None, (1, 2)]) == ((0, 3),)
    assert masked_layers(5, [(1, 2), (2, 3)]) == ((0, 4), (1,), (3,))
