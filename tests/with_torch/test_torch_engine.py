"""The torch engine computes what the whole sequence without a cache computes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from kit.models import FAMILIES, LoadTiny
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.bench.torch_engine import TorchEngine, apply_inner
from recmas_compiler.links.modules import make_link, randomize, save_link
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.link_kinds import LinkKind
from recmas_runtime.formats.links import Operands, load_operands, stack_operands
from recmas_runtime.formats.manifest import LinkEntry
from recmas_runtime.formats.precisions import TOLERANCES

LENGTHS = np.array([5, 11, 8, 7, 9])
CAPACITY, NUM_STEPS = 64, 4

KINDS = get_args(LinkKind)


@pytest.fixture(scope="module")
def inner_of(tmp_path_factory: pytest.TempPathFactory):
    """Return a random inner link of a width: the module, and its operands."""

    def make(width: int, kind: str = "projected", seed: int = 0):
        link = make_link(kind, "inner", width, width)
        randomize(link, link_id="inner", seed=seed)
        path = tmp_path_factory.mktemp("links") / "inner.safetensors"
        save_link(path, link)
        entry = LinkEntry(
            file=path.name, kind=kind, role="inner", in_dim=width, out_dim=width, init="random"
        )
        return link, load_operands(path, entry)

    return make


def prompts(backbone: TorchBackbone) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    vocab = backbone.facts.vocab_size
    ids = [torch.randint(3, vocab, (int(n),), generator=draw) for n in LENGTHS]
    return [backbone.embed(sequence) for sequence in ids]


def padded(sequences: list[torch.Tensor]) -> np.ndarray:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).numpy()


@torch.no_grad()
def rolled_out(
    backbone: TorchBackbone, inner: torch.nn.Module, embeds_TD: torch.Tensor
) -> np.ndarray:
    """Return the thoughts [M, d] of a prompt, everything recomputed at every step."""
    thoughts = []
    for _ in range(NUM_STEPS):
        out = backbone.body(inputs_embeds=embeds_TD[None], use_cache=False)
        thoughts.append(out.last_hidden_state[0, -1])
        embeds_TD = torch.cat([embeds_TD, inner(thoughts[-1])[None]])
    return torch.stack(thoughts).numpy()


def run(engine: TorchEngine, sequences: list[torch.Tensor], inner: Operands) -> np.ndarray:
    """Return the thoughts [M, R, d] of prompts that run as one ragged batch."""
    cache = engine.new_cache(len(sequences), CAPACITY)
    start = np.zeros(len(sequences), np.int64)
    _, thought, following = engine.forward(cache, padded(sequences), start, LENGTHS - 1, inner)
    thoughts, _ = engine.rollout(cache, thought, following, LENGTHS, inner, NUM_STEPS)
    return thoughts


def own(backbone: TorchBackbone) -> TorchBackbone:
    """Return a copy that an engine may keep."""
    return replace(backbone, model=deepcopy(backbone.model))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= TOLERANCES["hidden_relative"] * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rollouts_equal_the_whole_sequence(family: str, tiny: LoadTiny, inner_of) -> None:
    backbone = tiny(family)
    link, operands = inner_of(backbone.facts.width)
    engine = TorchEngine(own(backbone), compiled=False)
    thoughts = run(engine, prompts(backbone), stack_operands([operands]))
    for row, sequence in enumerate(prompts(backbone)):
        assert_close(thoughts[:, row], rolled_out(backbone, link, sequence))


def test_groups_of_rows_have_inner_links_of_their_own(tiny: LoadTiny, inner_of) -> None:
    backbone = tiny("llama")
    pairs = [inner_of(backbone.facts.width, kind, seed=1) for kind in KINDS]
    operands = stack_operands([operands for _, operands in pairs])
    engine = TorchEngine(own(backbone), compiled=False)
    thoughts = run(engine, prompts(backbone), operands)
    for row, (sequence, (link, _)) in enumerate(zip(prompts(backbone), pairs, strict=True)):
        assert_close(thoughts[:, row], rolled_out(backbone, link, sequence))


@pytest.mark.parametrize("kind", KINDS)
def test_the_unified_form_is_the_link(kind: str, inner_of) -> None:
    link, operands = inner_of(16, kind)
    hidden = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0))
    tensors = {k: torch.from_numpy(v) for k, v in stack_operands([operands]).items()}
    with torch.no_grad():
        assert_close(apply_inner(hidden, tensors).numpy(), link(hidden).numpy())


def test_compiled_steps_are_the_eager_ones(tiny: LoadTiny, inner_of) -> None:
    backbone = tiny("gemma3")
    _, operands = inner_of(backbone.facts.width)
    inner = stack_operands([operands])
    eager, compiled = (
        run(TorchEngine(own(backbone), compiled=flag), prompts(backbone), inner)
        for flag in (False, True)
    )
    assert_close(compiled, eager)


def test_text_continues_a_prompt(tiny: LoadTiny, inner_of) -> None:
    backbone = tiny("qwen3")
    _, operands = inner_of(backbone.facts.width)
    inner = stack_operands([operands])
    engine = TorchEngine(own(backbone), compiled=False)
    ids = np.array([[4, 9, 17, 5, 30]])
    cache = engine.new_cache(1, CAPACITY)
    zero = np.zeros(1, np.int64)
    engine.forward(cache, engine.embed(ids[:, :4]), zero, zero + 3, inner)
    _, last, _ = engine.forward(cache, engine.embed(ids[:, 4:]), zero + 4, zero, inner)
    with torch.no_grad():
        expected = backbone.model(input_ids=torch.from_numpy(ids)).logits[:, -1].numpy()
    assert_close(engine.logits(np.ascontiguousarray(last[:, 0])), expected)


def test_rows_move_to_another_cache(tiny: LoadTiny, inner_of) -> None:
    backbone = tiny("llama")
    link, operands = inner_of(backbone.facts.width)
    inner = stack_operands([operands])
    engine = TorchEngine(own(backbone), compiled=False)
    sequences = prompts(backbone)
    cache = engine.new_cache(len(LENGTHS), CAPACITY)
    start = np.zeros(len(LENGTHS), np.int64)
    _, thought, following = engine.forward(cache, padded(sequences), start, LENGTHS - 1, inner)
    chosen = [2, 0]
    other = engine.new_cache(2, 2 * CAPACITY)
    other.copy_rows(cache, chosen, int(LENGTHS.max()))
    thoughts, _ = engine.rollout(
        other, thought[chosen], following[chosen], LENGTHS[chosen], inner, NUM_STEPS
    )
    for row, place in enumerate(chosen):
        assert_close(thoughts[:, row], rolled_out(backbone, link, sequences[place]))


def test_layer_states_are_refused(tiny: LoadTiny) -> None:
    cache = TorchEngine(own(tiny("llama")), compiled=False).new_cache(2, CAPACITY)
    with pytest.raises(RecmasError, match="RM203"):
        cache.save_states()
    with pytest.raises(RecmasError, match="torch's engine goes back to no layer states"):
        cache.restore_states({}, {0: 0})


def test_a_cache_that_was_given_back_is_used_again(tiny: LoadTiny) -> None:
    engine = TorchEngine(own(tiny("llama")), compiled=False)
    first = engine.new_cache(2, CAPACITY)
    assert engine.new_cache(2, CAPACITY) is not first
    engine.release(first)
    assert engine.new_cache(2, 2 * CAPACITY) is not first
    assert engine.new_cache(2, CAPACITY) is first


def test_rows_are_read_as_the_runtime_reads_them(tiny: LoadTiny, inner_of) -> None:
    backbone = tiny("llama")
    _, operands = inner_of(backbone.facts.width)
    engine = TorchEngine(own(backbone), compiled=False)
    sequences = prompts(backbone)
    cache = engine.new_cache(len(LENGTHS), CAPACITY)
    start = np.zeros(len(LENGTHS), np.int64)
    engine.forward(cache, padded(sequences), start, LENGTHS - 1, stack_operands([operands]))
    with torch.no_grad():
        out = backbone.body(inputs_embeds=sequences[2][None], use_cache=True)
    found = cache.read_rows([2], int(LENGTHS[2]))
    expected = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs.numpy())
