"""Layer states that go back to snapshots: never to wrong ones, and never by themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

import recmas_runtime as rt
from kit.hand_bundle import TRACE, edit_json, rehash, write_hand_bundle
from recmas_runtime.cli.main import main
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.engines.onnx.caches import CachePool, Memory
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.plan import DecodeStep, Plan, PrefillStep, ThinkStep
from recmas_runtime.running.system import System
from recmas_runtime.sequences.sequence_batch import SavedRow, SequenceBatch

QUESTIONS = ["7", "How many? 3", "1", "A much longer question than the others have, with 8"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hand_bundle(tmp_path_factory.mktemp("by-hand") / "sums", with_state=True)


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "own"))


@pytest.fixture(params=["host", "as on a device"])
def engine(request: pytest.FixtureRequest, bundle: Path) -> Iterator[BackboneEngine]:
    """The engine, also where states are copied as they would be in a device's memory."""
    system = rt.load(bundle, device="cpu", threads=1)
    assert isinstance(system, System)
    found = system.loaded.engines.backbones["one"]
    assert isinstance(found, BackboneEngine)
    if request.param != "host":
        found.memory = Memory("cpu", shared=False)
        found.caches = CachePool(found.decoder, found.entry, found.memory)
    yield found
    system.close()


def sequences(engine: BackboneEngine, rows: int, capacity: int = 64) -> SequenceBatch:
    inner = {name: operand[None] for name, operand in inner_operands(engine.entry.width).items()}
    return SequenceBatch.empty(engine, inner, rows=rows, capacity=capacity)


def inner_operands(width: int) -> dict[str, Any]:
    flags = {name: np.zeros((1, 1), np.bool_) for name in ("pre_norm", "post_norm")}
    names = ("pre_scale", "pre_bias", "w1", "b1", "w2", "w3", "bias", "post_scale", "post_bias")
    return flags | {name: np.zeros((1, 1), np.float32) for name in names}


def embeds_of(engine: BackboneEngine, prompts: list[list[int]]) -> list[Any]:
    return [engine.embed(np.array([prompt], np.int64))[0] for prompt in prompts]


def expected(engine: BackboneEngine, prompt: list[int]) -> Any:
    """The hidden state of a prompt's last token: the token, and a trace of all there was."""
    table = np.eye(engine.entry.width, dtype=np.float32)[prompt]
    return table[-1] + TRACE * table.sum(axis=0)


def assert_thoughts(batch: SequenceBatch, prompts: list[list[int]]) -> None:
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(
            batch.thought[row, 0],
            expected(batch.engine, prompt),
            atol=1e-6,  # type: ignore[arg-type]
        )


FIRST = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [5, 5, 5, 5, 5, 6], [3, 1]]
THEN = [[1, 2, 3, 4, 9], [9, 8, 6, 6, 6], [5, 5, 5, 5, 5, 2, 2], [4, 4, 4]]


def first_prefill(engine: BackboneEngine, **stops: list[int]) -> tuple[SequenceBatch, Any]:
    batch = sequences(engine, 4)
    batch.begin([None] * 4, batch)
    batch.prefixes = [tuple(prompt) for prompt in FIRST]
    saved = batch.prefill(embeds_of(engine, FIRST), [0] * 4, stops)
    assert_thoughts(batch, FIRST)
    return batch, saved


def test_rows_go_back_each_to_where_it_was_saved(engine: BackboneEngine) -> None:
    # The stops of two snapshots come in another order in each row, and one row has none.
    batch, saved = first_prefill(engine, own=[4, 2, 5, 0], other=[6, 2, 1, 0])
    assert [row and row.ids for row in saved["own"]] == [(1, 2, 3, 4), (9, 8), (5,) * 5, None]
    assert [row and len(row.ids) for row in saved["other"]] == [6, 2, 1, None]
    assert len({id(row.states) for rows in saved.values() for row in rows if row}) == 2
    batch.begin(saved["own"], batch)
    assert batch.lengths.tolist() == [4, 2, 5, 0]
    batch.prefixes = [tuple(prompt) for prompt in THEN]
    again = batch.prefill(embeds_of(engine, THEN), batch.lengths.tolist(), {"own": [4, 2, 5, 0]})
    assert_thoughts(batch, THEN)
    assert again["own"][3] is None
    # Text behind it, of unequal length, then back once more.
    batch.feed([[1], [2, 3], [4], [5]])
    assert_thoughts(batch, [p + t for p, t in zip(THEN, [[1], [2, 3], [4], [5]], strict=True)])
    batch.begin(again["own"], batch)
    batch.prefill(embeds_of(engine, THEN), batch.lengths.tolist())
    assert_thoughts(batch, THEN)


def test_what_is_restored_in_all_rows_is_not_copied_again(engine: BackboneEngine) -> None:
    stops = [4, 2, 5, 1]
    batch, saved = first_prefill(engine, own=stops)
    batch.begin(saved["own"], batch)
    batch.prefixes = [tuple(prompt) for prompt in FIRST]
    again = batch.prefill(embeds_of(engine, FIRST), stops, {"own": stops})
    assert again["own"] == saved["own"]
    assert_thoughts(batch, FIRST)


def test_another_batch_goes_on_from_its_source(engine: BackboneEngine) -> None:
    source, saved = first_prefill(engine, shared=[3, 2, 3, 1])
    other = sequences(engine, 2)
    prompts = [[5, 5, 5, 1, 1], [1, 2, 3, 8]]
    other.begin([saved["shared"][2], saved["shared"][0]], source)
    other.prefixes = [tuple(prompt) for prompt in prompts]
    other.prefill(embeds_of(engine, prompts), [3, 3])
    assert_thoughts(other, prompts)
    source.feed([[1]] * 4)  # is still where it was
    assert_thoughts(source, [[*prompt, 1] for prompt in FIRST])


def test_a_short_cache_grows_where_nothing_may_run_twice(engine: BackboneEngine) -> None:
    long = [list(range(60)), [7] * 61]
    batch = sequences(engine, 2)
    batch.begin([None, None], batch)
    batch.prefixes = [tuple(prompt) for prompt in long]
    saved = batch.prefill(embeds_of(engine, long), [0, 0], {"own": [59, 2]})
    batch.begin(saved["own"], batch)
    batch.prefill(embeds_of(engine, long), [59, 2])
    assert_thoughts(batch, long)
    assert batch.cache.capacity > 64


def test_positions_that_ran_cannot_run_again(engine: BackboneEngine) -> None:
    batch, _ = first_prefill(engine)
    with pytest.raises(AssertionError, match="states stand behind other positions"):
        batch.prefill(embeds_of(engine, THEN), [1] * 4)
    batch, _ = first_prefill(engine)
    batch.went_on(2)
    with pytest.raises(AssertionError, match="states went on alone"):
        batch.feed([[1]] * 4)
    with pytest.raises(AssertionError, match="states went on alone"):
        batch.select([0], keep=True)


@pytest.mark.parametrize("keep", [True, False])
def test_selected_rows_take_their_states_along(engine: BackboneEngine, keep: bool) -> None:
    batch, _ = first_prefill(engine)
    chosen = batch.select([1, 3], keep=keep)
    chosen.feed([[4], [6]])
    assert_thoughts(chosen, [[*FIRST[1], 4], [*FIRST[3], 6]])
    if keep:
        batch.feed([[2]] * 4)
        assert_thoughts(batch, [[*prompt, 2] for prompt in FIRST])


class Messages:
    """Keeps what the agents sent, record by record."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self.kept: list[int] = []

    def add_batch(self, records: Any, events: Any, messages: list[dict[str, Any]]) -> None:
        self.found += messages
        self.kept += [sum(event.reused_tokens) for event in events if event.op == "prefill"]


def run(system: System, batch: int) -> tuple[list[str], Messages]:
    trace, answers = Messages(), []
    records = [rt.Record(id=q, fields={"question": q}, index=i) for i, q in enumerate(QUESTIONS)]
    for start in range(0, len(records), batch):
        for answer in system.run_batch(records[start : start + batch], trace=trace):  # type: ignore[arg-type]
            assert isinstance(answer, rt.Answer), answer
            answers.append(answer.answer)
    return answers, trace


def changed(plan: Plan, **changes: object) -> Plan:
    steps = tuple(
        structs.replace(step, **changes) if isinstance(step, PrefillStep) else step
        for step in plan.steps
    )
    return structs.replace(plan, steps=steps)


def test_messages_do_not_depend_on_snapshots_or_batches(bundle: Path) -> None:
    system = rt.load(bundle, device="cpu", threads=1)
    assert isinstance(system, System)
    assert main(["verify", str(bundle), "--json"]) == 0
    together, found = run(system, 4)
    assert together == ["h", "d", "b", "i"]
    assert sum(found.kept) > 0
    for other in (
        run(system, 1),
        run(system.with_plan(changed(system.plan, restore=None, snapshots=())), 4),
        run(system.with_plan(changed(system.plan, restore=None)), 4),
        # Nobody has saved what is to be restored: all runs again.
        run(system.with_plan(changed(system.plan, snapshots=())), 4),
    ):
        assert other[0] == together
        for left, right in zip(found.found, other[1].found, strict=True):
            for name in left:
                np.testing.assert_allclose(left[name], right[name], atol=1e-6)


def test_rows_that_another_prompt_has_overwritten_are_not_gone_on_from(bundle: Path) -> None:
    """A snapshot of tokens that the prompt does not begin with is left alone."""
    system = rt.load(bundle, device="cpu", threads=1)
    assert isinstance(system, System)
    _, found = run(system, 4)
    spoiled = SequenceBatch.prefill

    def other_tokens(
        self: SequenceBatch, *given: Any, **options: Any
    ) -> dict[str, list[SavedRow | None]]:
        saved = spoiled(self, *given, **options)
        for rows in saved.values():
            rows[0] = rows[0] and SavedRow(
                ids=(*rows[0].ids[:-1], 0), states=rows[0].states, row=rows[0].row
            )
        return saved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBatch, "prefill", other_tokens)
        _, others = run(system, 4)
    assert sum(others.kept) < sum(found.kept)
    for left, right in zip(found.found, others.found, strict=True):
        for name in left:
            np.testing.assert_allclose(left[name], right[name], atol=1e-6)


def test_tools_and_text_go_on_behind_states(bundle: Path) -> None:
    system = rt.load(bundle, device="cpu", threads=1)
    for name in ("text", "moa"):
        text = system.baseline(name)
        assert [a.answer for a in text.run(QUESTIONS)] == [text.run(q).answer for q in QUESTIONS]


def plan_with(root: Path, keys: str, value: object) -> Path:
    edit_json(root / "plan.json", keys, value)
    rehash(root)
    return root


SNAPSHOT = {"cache": "planner", "bytes_per_sample": 4}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("steps/6/restore", "attic", "steps[6].restore: unknown snapshot 'attic'"),
        ("steps/0/restore", "planner", "no prefill before has made snapshot 'planner'"),
        ("steps/6/restore", "solver", "'solver' is of cache 'solver', the rows that are kept are"),
        ("steps/6/reuse_prefix", False, "the rows that are kept are none"),
        ("steps/3/snapshots", ["planner"], "snapshot 'planner' is of cache 'planner'"),
        ("steps/0/snapshots", ["planner", "planner"], "steps[0].snapshots: each is made once"),
        ("snapshots/spare", SNAPSHOT, "snapshots.spare: no step makes it"),
        ("snapshots/planner/cache", "attic", "unknown cache 'attic'"),
        ("steps/6/restore", None, "snapshots.planner: no step makes it, or none restores it"),
    ],
)
def test_plans_that_restore_what_is_not_there(
    own_bundle: Path, keys: str, value: object, message: str
) -> None:
    with pytest.raises(rt.RecmasError) as caught:
        open_bundle(plan_with(own_bundle, keys, value))
    assert {problem.code for problem in caught.value.problems} == {"RM404"}
    assert any(message in problem.message for problem in caught.value.problems), caught.value


def test_nobody_thinks_twice_behind_one_prompt(own_bundle: Path) -> None:
    plan = json.loads((own_bundle / "plan.json").read_text())
    steps = [step["op"] for step in plan["steps"]]
    place = steps.index(ThinkStep.__struct_config__.tag)
    again = [*plan["steps"][: place + 1], plan["steps"][place], *plan["steps"][place + 1 :]]
    with pytest.raises(rt.RecmasError, match="those behind a rollout already"):
        open_bundle(plan_with(own_bundle, "steps", again))
    assert steps[-1] == DecodeStep.__struct_config__.tag


def test_inspect_tells_of_snapshots(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    told = capsys.readouterr().out
    assert "prefill planner (first), save planner" in told
    assert "prefill planner (then), reuse prefix, restore planner" in told
    assert "snapshots   2.08 kB per record" in told
