"""Engines over their buffers: steps at fixed addresses, caches that are used again.

A device is stood in for by the CPU with memory that numpy does not see, so everything goes through
the copies that a device needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kit.engines import Exported, make_engine, random_ids, random_link
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.engines.interface import Operands
from recmas_runtime.engines.onnx import backbone as engines
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.engines.onnx.caches import Memory, Series
from recmas_runtime.engines.onnx.session import make_session
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.sequences.sequence_batch import SequenceBatch

Get = Callable[[str], Exported]
STEPS = 5


@pytest.fixture
def inner(exported: Get, tmp_path: Any) -> Operands:
    width = exported("llama").width
    return stack_operands([random_link(tmp_path, "projected", "inner", width, width)[1]])


def prompt_of(case: Exported, rows: int = 2, positions: int = 7) -> NDArray[np.float32]:
    return case.embed(random_ids(case.backbone, rows, positions))


def roll_out(
    engine: BackboneEngine, embeds: NDArray[np.float32], inner: Operands, *, capacity: int = 64
) -> tuple[Any, ...]:
    rows, positions, _ = embeds.shape
    cache = engine.new_cache(rows, capacity)
    index = np.full(rows, positions)
    _, thought, following = engine.forward(cache, embeds, index * 0, index - 1, inner)
    return cache, *engine.rollout(cache, thought, following, index, inner, STEPS)


@pytest.mark.parametrize("shared", [True, False])
def test_steps_are_what_one_call_computes(exported: Get, inner: Operands, shared: bool) -> None:
    """All thoughts but the first come from calls of one position, here all from a single call."""
    case = exported("llama")
    engine, embeds = make_engine(case, shared=shared), prompt_of(case)
    _, thoughts, following = roll_out(engine, embeds, inner)
    whole = np.concatenate([embeds, following[:-1].swapaxes(0, 1)], axis=1)
    last = np.full(2, whole.shape[1] - 1)
    hidden, _, _ = engine.forward(engine.new_cache(2, 64), whole, last * 0, last, inner)
    wanted = hidden[:, -STEPS:].swapaxes(0, 1)
    assert np.abs(thoughts - wanted).max() < TOLERANCES["hidden_relative"] * np.abs(wanted).max()


def test_memory_apart_gives_the_same_numbers(exported: Get, inner: Operands) -> None:
    case = exported("llama")
    embeds = prompt_of(case)
    (_, *near), (_, *far) = (
        roll_out(make_engine(case, shared=shared), embeds, inner) for shared in (True, False)
    )
    assert all(np.array_equal(a, b) for a, b in zip(near, far, strict=True))


def test_a_call_leaves_earlier_results_alone(exported: Get, inner: Operands) -> None:
    case = exported("llama")
    engine = make_engine(case)
    cache = engine.new_cache(2, 64)
    index, token = np.zeros(2, np.int64), prompt_of(case, positions=1)
    first = engine.forward(cache, token, index, index, inner)
    kept = [array.copy() for array in first]
    engine.forward(cache, -token, index + 1, index, inner)
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))


class Recorder:
    """Notes the CUDA graph of every run."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.graphs: list[int] = []

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.graphs.append(int(options.get_run_config_entry("gpu_graph_id")))
        self.session.run_with_iobinding(binding, options)


@pytest.mark.parametrize("shared", [True, False])
def test_a_graph_belongs_to_addresses(exported: Get, inner: Operands, shared: bool) -> None:
    """A replayed CUDA graph reads where it was captured, whatever is bound by then."""
    case = exported("llama")
    engine, index = make_engine(case, shared=shared), np.zeros(1, np.int64)
    prompt, token = prompt_of(case, rows=1), prompt_of(case, rows=1, positions=1)
    other = {name: array.copy() for name, array in inner.items()}
    graphs = []
    for _ in range(2):
        cache = engine.new_cache(1, 64)
        cache.session = recorder = Recorder(engine.decoder)
        for embeds, link in ((prompt, inner), (token, inner), (token, inner), (token, other)):
            engine.forward(cache, embeds, index, index, link)
        graphs.append(recorder.graphs)
    (call, step, again, moved), (_, of_other_cache, *_) = graphs
    assert call == -1, "prompts have all lengths: each would be a graph of its own"
    assert 0 < step == again != of_other_cache
    assert (moved == step) is not shared, "operands were copied to where the graph reads them"


class NoGraphs:
    """Refuses to capture or to replay, from some step on."""

    def __init__(self, session: Any, *, allowed: int) -> None:
        self.session = session
        self.allowed = allowed

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if int(options.get_run_config_entry("gpu_graph_id")) > 0:
            self.allowed -= 1
            if self.allowed < 0:
                raise ValueError("operation not permitted when stream is capturing")
        self.session.run_with_iobinding(binding, options)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("allowed", [0, 2])
def test_steps_go_on_without_graphs_that_are_refused(
    exported: Get, inner: Operands, shared: bool, allowed: int
) -> None:
    case = exported("llama")
    engine, embeds = make_engine(case, shared=shared), prompt_of(case)
    _, *expected = roll_out(engine, embeds, inner)
    engine.uses_graphs = True
    refusing, idle = engine.decoder, engine.new_cache(1, 64)
    cache = engine.new_cache(2, 64)
    cache.session = NoGraphs(refusing, allowed=allowed)
    index = np.full(2, embeds.shape[1])
    _, thought, following = engine.forward(cache, embeds, index * 0, index - 1, inner)
    found = engine.rollout(cache, thought, following, index, inner, STEPS)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert engine.decoder is cache.session is idle.session is engine.new_cache(3, 64).session
    assert engine.decoder is not refusing
    (warning,) = engine.problems
    assert (warning.code, warning.severity) == ("RM507", "warning")
    assert "without CUDA graphs" in warning.message
    assert "not permitted when stream is capturing" in warning.message
    cache.session = NoGraphs(engine.decoder, allowed=0)
    with pytest.raises(RecmasError, match=r"RM507.*capturing"):
        engine.forward(cache, embeds[:, :1], index, index * 0, inner)


def test_a_decoder_that_opens_only_without_graphs(
    exported: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime refuses a session with graphs where an operator is not CUDA's."""
    opened = []

    def refuse_graphs(path: Any, *, cuda_graphs: bool = False, **others: Any) -> Any:
        opened.append(cuda_graphs)
        if cuda_graphs:
            raise fail("RM507", "not all nodes are on CUDA", hint="None.")
        return make_session(path, **{**others, "device": "cpu"})

    monkeypatch.setattr(engines, "make_session", refuse_graphs)
    entry = make_engine(exported("llama")).entry
    opened.clear()
    engine = BackboneEngine(entry, exported("llama").folder, threads=1, device="cuda")
    assert opened == [True, False, False, False], "the decoder twice, embedding and head once"
    assert "not all nodes are on CUDA" in engine.problems[0].message
    assert not engine.uses_graphs


def test_caches_are_used_again(exported: Get, inner: Operands) -> None:
    case = exported("llama")
    engine, embeds = make_engine(case), prompt_of(case)
    expected = roll_out(engine, embeds, inner)[1]
    sequences = SequenceBatch.empty(engine, inner, rows=2, capacity=64)
    spoilt = sequences.cache
    engine.forward(
        spoilt, np.full_like(embeds, np.nan), np.zeros(2, np.int64), np.full(2, 6), inner
    )
    del sequences
    cache, thoughts, _ = roll_out(engine, embeds, inner)
    assert cache is spoilt
    assert np.array_equal(thoughts, expected), "not a number must not reach the next user"


def test_idle_caches_never_add_to_the_most_that_was_used(exported: Get, inner: Operands) -> None:
    engine = make_engine(exported("llama"))
    pool = engine.caches

    def sequence_batches(*capacities: int) -> list[SequenceBatch]:
        return [SequenceBatch.empty(engine, inner, rows=1, capacity=c) for c in capacities]

    used = sequence_batches(64, 64, 128)
    most = pool.num_bytes
    del used
    assert pool.num_bytes == most, "all are kept"
    used = sequence_batches(192)
    assert pool.num_bytes <= most
    used += sequence_batches(64)
    assert pool.num_bytes <= most
    del used
    used = sequence_batches(256, 256)
    assert pool.num_bytes == 2 * most, "two of 256 rows are twice as much as 64 + 64 + 128"
    assert [sequences.cache.capacity for sequences in used] == [256, 256]


def test_a_lane_that_grows_returns_its_cache(exported: Get, inner: Operands) -> None:
    case = exported("llama")
    engine = make_engine(case)
    sequences = SequenceBatch.empty(engine, inner, rows=2, capacity=64)
    small = sequences.cache
    prompt = prompt_of(case, positions=60)
    sequences.prefill(list(prompt), [0, 0])
    sequences.feed([[1, 2, 3, 4, 5]] * 2)
    assert sequences.cache is not small
    assert sequences.cache.capacity > 64
    assert engine.new_cache(2, 64) is small
    whole = np.concatenate([prompt, engine.embed(np.array([[1, 2, 3, 4, 5]] * 2))], axis=1)
    last = np.full(2, 64)
    _, thought, _ = engine.forward(engine.new_cache(2, 128), whole, last * 0, last, inner)
    scale = np.abs(thought).max()
    assert np.abs(sequences.thought - thought).max() < TOLERANCES["hidden_relative"] * scale


@pytest.mark.parametrize(("shared", "for_cpu"), [(True, True), (True, False), (False, False)])
def test_rows_that_go_on(exported: Get, inner: Operands, shared: bool, for_cpu: bool) -> None:
    """Texts that end one by one leave the others as they were, wherever those lie by then."""
    case = exported("llama")
    engine = make_engine(case, shared=shared, for_cpu=for_cpu)
    prompts = [row[:n] for row, n in zip(prompt_of(case, rows=4), (7, 3, 5, 6), strict=True)]

    def written(keep: bool) -> tuple[list[Any], list[int], SequenceBatch]:
        first = sequences = SequenceBatch.empty(engine, inner, rows=4, capacity=64)
        sequences.prefill(prompts, [0] * 4)
        before = engine.caches.num_bytes
        found, more = [], []
        # The last text outgrows the 64 rows.
        for rows, count in (([0, 2, 3], 10), ([1, 2], 10), ([1], 50)):
            sequences = sequences.select(rows, keep=keep)
            sequences.feed([[token + 1] * count for token in rows])
            found.append(sequences.thought)
            more.append(engine.caches.num_bytes - before)
        return found, more, first

    moved, more, _ = written(keep=False)
    if shared:
        assert more[:2] == [0, 0]
    assert more[2] > 0
    copied, _, kept = written(keep=True)
    assert all(np.array_equal(a, b) for a, b in zip(moved, copied, strict=True))
    kept.feed([[1]] * 4)


@pytest.mark.parametrize("kind", ["tensor(float16)", "tensor(bfloat16)", "tensor(bool)"])
@pytest.mark.parametrize("shared", [True, False])
def test_elements_of_other_types(kind: str, shared: bool) -> None:
    memory = Memory("cpu", shared=shared)
    first, second = memory.zeros((2, 3), kind), memory.zeros((2, 3), kind)
    first.write(1)
    second.copy(first)
    assert second.numpy().tolist() == [[1, 1, 1], [1, 1, 1]]
    series = Series(memory, np.zeros((2, 2, 3)), kind)
    series.store(1, second)
    series.load(0, second)
    assert series.numpy().sum() == 6
    assert second.numpy().sum() == 0
