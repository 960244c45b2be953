"""The loop on a task of two numbers: order, rate, resuming, stopping, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recmas_compiler.spec.schema.train import TrainSection
from recmas_compiler.training.loop.checkpoint import load_checkpoint, save_checkpoint
from recmas_compiler.training.loop.checkpoint_head import CHECKPOINTS, Health, latest_checkpoint
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.loop import (
    AtStep,
    Loop,
    LoopResult,
    batch_of,
    rate_factor,
)
from recmas_compiler.training.loop.metrics import COST_NAME, METRICS_NAME, draw_curves, write_cost
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.progress import Advance

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
IDENTITY = {"the data": "d", "the settings": "s"}


def section(*, steps: int = 20, **changes: object) -> TrainSection:
    """Return settings; the loop's own are those of the outer stage."""
    settings = {
        "data": "train.jsonl",
        "targets": {"solver": "solution"},
        "outer": {"steps": steps, "lr": 0.05, "batch_size": 4},
        "warmup_steps": 3,
        "betas": (0.9, 0.95),
        "weight_decay": 0.01,
        "eval_every": 6,
        "checkpoint_every": 4,
    }
    return TrainSection.model_validate({**settings, **changes})


SETTINGS = section()


@dataclass(frozen=True)
class Sum:
    total: Tensor
    tokens: int


class Line:
    """Learns y = 3 x from points, every third of which counts twice."""

    name = "a line"

    def __init__(self, *, spoil: Callable[[int], float] | None = None) -> None:
        torch.manual_seed(0)
        self.link = nn.Linear(1, 1)
        self.idle = nn.Linear(1, 1)
        self.links = {"line": self.link, "idle": self.idle}
        self.num_examples = 10
        self.rates: dict[str, float] = {}
        self._spoil = spoil
        self._calls = 0

    def loss(self, places: Sequence[int], at: AtStep) -> Sum:
        self._calls += 1
        x = torch.tensor([[float(place)] for place in places]) / 10
        weight = torch.tensor([[2.0 if place % 3 == 0 else 1.0] for place in places])
        total = (weight * (self.link(x) - 3 * x).square()).sum()
        if self._spoil is not None:
            total = total * self._spoil(self._calls)
        return Sum(total=total, tokens=int(weight.sum()))

    def finish_step(self, at: AtStep, world: World) -> None:
        pass

    def measure(self, world: World) -> Mapping[str, Any]:
        return {"slope": self.link.weight.item()}

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        return {}


def run(
    folder: Path,
    task: Line | None = None,
    settings: TrainSection = SETTINGS,
    *,
    resume: bool = False,
    identity: Mapping[str, str] = IDENTITY,
    watch: Callable[[int], None] = lambda step: None,
) -> tuple[LoopResult, Line]:
    task = Line() if task is None else task
    loop = Loop(task, settings, settings.outer, folder=folder, identity=identity, world=ALONE)
    return loop.run(resume=resume, title="a line", progress=Watched(watch)), task


class Watched:
    """Calls a function after every step, with the number of steps done."""

    def __init__(self, watch: Callable[[int], None]) -> None:
        self._watch = watch

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, done: int = 0) -> Iterator[Advance]:
        step = done

        def advance(num_units: int = 1, /, *, note: str = "") -> None:
            nonlocal step
            step += num_units
            assert note.startswith("loss ")
            self._watch(step)

        yield advance


def weights(task: Line) -> list[float]:
    return [w.item() for link in task.links.values() for w in link.parameters()]


class Killed(Exception):
    """Stands for whatever ends a process."""


def killer(at: int) -> Callable[[int], None]:
    def watch(step: int) -> None:
        if step == at:
            raise Killed

    return watch


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    drawn = [p for s in range(15) for p in batch_of(s, num_examples=10, batch_size=4, seed=0)]
    epochs = [tuple(drawn[first : first + 10]) for first in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    assert batch_of(7, num_examples=10, batch_size=4, seed=0) == tuple(drawn[28:32])
    assert batch_of(7, num_examples=10, batch_size=4, seed=1) != tuple(drawn[28:32])
    assert batch_of(0, num_examples=2, batch_size=5, seed=0)[:2] in ((0, 1), (1, 0))


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [2.0 * rate_factor(s, steps=100, warmup_steps=10) for s in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10] == max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert rate_factor(0, steps=5, warmup_steps=0) == 1.0


def test_it_learns_and_writes_what_it_does(tmp_path: Path) -> None:
    result, task = run(tmp_path, settings=section(steps=200))
    assert task.link.weight.item() == pytest.approx(3, abs=0.3)
    assert not result.interrupted
    entries = list(read_json_lines(tmp_path / METRICS_NAME))
    steps = [entry for entry in entries if entry["kind"] == "step"]
    assert [entry["step"] for entry in steps] == list(range(1, 201))
    assert steps[-1]["loss"] < steps[0]["loss"] / 5
    assert steps[0]["grad_norm"]["line"] > 0
    assert steps[0]["grad_norm"]["idle"] == 0
    assert {"lr", "tokens", "tokens_per_s", "memory_mb"} <= steps[0].keys()
    measured = [entry["step"] for entry in entries if entry["kind"] == "eval"]
    assert measured == [0, *range(6, 200, 6), 200]
    assert result.last == {"slope": task.link.weight.item()}


@pytest.mark.parametrize("pieces", [2, 3, 4, 9])
def test_accumulation_changes_nothing_but_rounding(tmp_path: Path, pieces: int) -> None:
    _, whole = run(tmp_path / "whole")
    _, parts = run(tmp_path / "parts", settings=section(accumulation=pieces))
    assert weights(parts) == pytest.approx(weights(whole), rel=1e-5)


@pytest.mark.parametrize("at", [1, 4, 5, 11, 19])
def test_resuming_is_bit_exact(tmp_path: Path, at: int) -> None:
    _, whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", watch=killer(at))
    result, resumed = run(tmp_path / "killed", resume=True)
    assert weights(resumed) == weights(whole)
    assert result.first == {"slope": Line().link.weight.item()}

    def figures(folder: str) -> list[dict[str, Any]]:
        timing = ("tokens_per_s", "memory_mb")
        entries = read_json_lines(tmp_path / folder / METRICS_NAME)
        return [{k: v for k, v in entry.items() if k not in timing} for entry in entries]

    assert figures("killed") == figures("whole")


@pytest.mark.parametrize("left", [0, 1, 300])
def test_metrics_that_were_lost_stop_no_run(tmp_path: Path, left: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path, watch=killer(11))
    metrics = tmp_path / METRICS_NAME
    there = metrics.read_bytes()[:left]
    metrics.write_bytes(there)
    run(tmp_path, resume=True)
    entries = list(read_json_lines(metrics))
    assert len(entries) == there.count(b"\n") + 15, "12 steps and 3 measurements after step 8"
    assert metrics.read_bytes().startswith(there[: there.rfind(b"\n") + 1])


def test_a_finished_run_without_metrics_has_no_cost_and_no_curves(tmp_path: Path) -> None:
    _, task = run(tmp_path)
    (tmp_path / METRICS_NAME).unlink()
    run(tmp_path, resume=True)
    write_cost(tmp_path, task.links, ALONE)
    assert not (tmp_path / COST_NAME).exists()
    assert draw_curves(tmp_path, title="a line") is None


def test_metrics_are_on_the_disk_before_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync

    def note(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    run(tmp_path, settings=section(steps=8))
    assert synced == [
        name
        for step in (4, 8)
        for name in (
            METRICS_NAME,
            "tensors.safetensors",
            "state.json",
            f".step-{step:08d}.writing",
            CHECKPOINTS,  # the rename
        )
    ]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    before, first = run(tmp_path)
    metrics = (tmp_path / METRICS_NAME).read_bytes()
    after, second = run(tmp_path, resume=True)
    assert after == before
    assert weights(second) == weights(first)
    assert (tmp_path / METRICS_NAME).read_bytes() == metrics


def test_only_two_checkpoints_are_kept_and_none_is_half_written(tmp_path: Path) -> None:
    run(tmp_path)
    names = sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir())
    assert names == ["step-00000016", "step-00000020"]


def test_a_run_is_not_begun_again_by_mistake(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(RecmasError, match="holds a run already") as refused:
        run(tmp_path)
    assert refused.value.problems[0].code == "RM302"


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(RecmasError, match="of another run: the data differ") as refused:
        run(tmp_path, resume=True, identity={**IDENTITY, "the data": "e"})
    assert refused.value.problems[0].code == "RM703"


def damaged(content: bytes, how: str, draw: random.Random) -> bytes:
    """Return the content of a file with something wrong in it."""
    at = draw.randrange(len(content))
    match how:
        case "flip":
            return (
                content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
            )
        case "cut":
            return content[:at]
        case "grow":
            return content + content[at:] + b"\n"
        case "zeros":
            return content[:at] + bytes(len(content) - at)
        case _:
            return draw.randbytes(len(content))


FILES = ["state.json", "tensors.safetensors"]


@pytest.mark.parametrize("seed", range(60))
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path, seed: int) -> None:
    draw = random.Random(f"damage {seed}")
    whole, task = run(tmp_path)
    latest = latest_checkpoint(tmp_path / CHECKPOINTS)
    assert latest is not None
    file = latest / draw.choice(FILES)
    how = draw.choice(["flip", "cut", "grow", "zeros", "noise", "gone", "folder", "pipe", "swap"])
    if how in ("gone", "folder", "pipe"):
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)
    elif how == "swap":
        file.write_bytes((latest.parent / "step-00000016" / file.name).read_bytes())
    else:
        file.write_bytes(damaged(file.read_bytes(), how, draw))
    result, resumed = run(tmp_path, resume=True)
    assert weights(resumed) == weights(task)
    assert (result.steps, result.last) == (20, whole.last)
    (warning,) = result.warnings
    assert warning.code == "RM753"
    assert "step-00000020 cannot be read" in warning.message
    assert "goes on from step-00000016" in warning.message
    again, _ = run(tmp_path, resume=True)
    assert not again.warnings, "it was written anew"


@pytest.mark.parametrize("name", FILES)
def test_damage_to_all_checkpoints_is_named(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    for place in (tmp_path / CHECKPOINTS).iterdir():
        (place / name).write_bytes((place / name).read_bytes()[:50])
    with pytest.raises(RecmasError, match="step-00000020 cannot be read") as refused:
        run(tmp_path, resume=True)
    assert [p.code for p in refused.value.problems] == ["RM703", "RM703"]
    assert "step-00000016" in refused.value.problems[1].message


def edit_state(draw: random.Random, values: Any) -> Any:
    """Return values of a state with one of them replaced by something of another type."""
    others = [None, True, -1, 2**70, 1e999, "text", [], {}, [1], {"a": 1}, "\ud800", 0.5]
    if isinstance(values, dict) and values and draw.random() < 0.8:
        name = draw.choice(list(values))
        if draw.random() < 0.15:
            return {key: value for key, value in values.items() if key != name}
        if draw.random() < 0.1:
            return {**values, "more": 1}
        return {**values, name: edit_state(draw, values[name])}
    return draw.choice(others)


@pytest.mark.parametrize("seed", range(60))
def test_a_state_of_another_form_is_damage(tmp_path: Path, seed: int) -> None:
    # With digests that are right, as somebody would write them who means harm.
    draw = random.Random(f"form {seed}")
    run(tmp_path, settings=section(steps=4))
    (place,) = (tmp_path / CHECKPOINTS).iterdir()
    state = place / "state.json"
    values = json.loads(state.read_bytes())
    edited = edit_state(draw, values)
    if isinstance(edited, dict):
        edited.pop("sha256", None)
        text = json.dumps(edited, sort_keys=True).encode()
        edited = {"sha256": hashlib.sha256(text).hexdigest(), **edited}
    state.write_text(json.dumps(edited))
    if edited == values:
        return
    refused: tuple[Problem, ...] = ()
    try:
        result, _ = run(tmp_path, settings=section(steps=4), resume=True)
    except RecmasError as error:
        refused = error.problems
    if refused:
        assert [p.code for p in refused] == ["RM703"], seed
    else:
        kept = ("identity", "step", "tensors_sha256", "checkpoint")
        assert all(edited[name] == values[name] for name in kept), seed
        assert result.steps == 4


EDITS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a tensor is missing": lambda t: t.pop("links/line/weight"),
    "a moment is missing": lambda t: t.pop("optimizer/line/weight/exp_avg"),
    "no random state": lambda t: t.pop("random/cpu"),
    "a foreign tensor": lambda t: t.update(more=torch.zeros(1)),
    "another shape": lambda t: t.update({"links/line/weight": torch.zeros(2, 1)}),
    "another type": lambda t: t.update({"links/line/bias": torch.zeros(1, dtype=torch.float64)}),
    "not a number": lambda t: t["links/line/weight"].fill_(math.nan),
    "infinite": lambda t: t["optimizer/line/weight/exp_avg_sq"].fill_(math.inf),
    "no state of a generator": lambda t: t["random/cpu"].fill_(255),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("name", EDITS)
def test_tensors_of_another_form_are_damage(tmp_path: Path, name: str) -> None:
    run(tmp_path, settings=section(steps=4))
    (place,) = (tmp_path / CHECKPOINTS).iterdir()
    found = load_checkpoint(place)
    tensors = dict(found.tensors)
    EDITS[name](tensors)
    head = found.head
    save_checkpoint(
        place.parent,
        step=4,
        identity=head.identity,
        machine=head.machine,
        state=head.state,
        tensors=tensors,
    )
    before = torch.get_rng_state()
    with pytest.raises(RecmasError, match="step-00000004 cannot be read") as refused:
        run(tmp_path, settings=section(steps=4), resume=True)
    assert refused.value.problems[0].code == "RM703"
    assert len(torch.get_rng_state()) == len(before)


def test_going_on_with_other_threads_is_said(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, watch=killer(9))
    (place,) = [p for p in (tmp_path / CHECKPOINTS).iterdir() if p.name == "step-00000008"]
    found = load_checkpoint(place)
    save_checkpoint(
        place.parent,
        step=8,
        identity=found.head.identity,
        machine={**found.head.machine, "threads": "64"},
        state=found.head.state,
        tensors=found.tensors,
    )
    result, _ = run(tmp_path, resume=True)
    (warning,) = result.warnings
    assert warning.code == "RM754"
    assert f"threads 64, now {torch.get_num_threads()}" in warning.message


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    run(tmp_path)
    latest = latest_checkpoint(tmp_path / CHECKPOINTS)
    assert latest is not None
    assert sorted(path.name for path in latest.iterdir()) == ["state.json", "tensors.safetensors"]
    assert load_checkpoint(latest).tensors["random/cpu"].dtype == torch.uint8


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_it_spoils_the_links(
    tmp_path: Path, factor: float
) -> None:
    task = Line(spoil=lambda call: factor if call == 11 else 1.0)
    with pytest.raises(RecmasError, match="stopped at step 11: the loss is") as stopped:
        run(tmp_path, task)
    (problem,) = stopped.value.problems
    assert problem.code == "RM701"
    assert "step-00000008" in problem.message
    assert all(math.isfinite(weight) for weight in weights(task))


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecmasError, match="there is no checkpoint yet"):
        run(tmp_path, Line(spoil=lambda call: math.nan))


def test_a_loss_that_runs_away_stops(tmp_path: Path) -> None:
    with pytest.raises(RecmasError, match="diverges: its mean rose") as stopped:
        run(tmp_path, Line(spoil=lambda call: 1.0 if call < 9 else 300.0))
    assert stopped.value.problems[0].code == "RM701"
    steady = Health()
    for loss in [2.0, 9.0, 2.0, 1.5, 5.0] * 20:
        assert steady.why_stop(loss, 1.0) is None, "single batches differ"
        steady = steady.after(loss)


def test_no_memory_says_what_to_lower(tmp_path: Path) -> None:
    def spoil(call: int) -> float:
        if call == 6:
            torch.empty(2**60)  # what torch itself raises then
        return 1.0

    with pytest.raises(RecmasError, match="memory ran out in step 6 of a line") as stopped:
        run(tmp_path, Line(spoil=spoil))
    (problem,) = stopped.value.problems
    assert problem.code == "RM702"
    assert "step-00000004" in problem.message
    assert "train.accumulation" in problem.hint


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=str,
)
def test_every_wording_of_no_memory_is_known(tmp_path: Path, error: Exception) -> None:
    def spoil(call: int) -> float:
        raise error

    with pytest.raises(RecmasError, match="memory ran out in step 1") as stopped:
        run(tmp_path, Line(spoil=spoil))
    assert stopped.value.problems[0].code == "RM702"


def test_other_failures_stay_what_they_are(tmp_path: Path) -> None:
    def spoil(call: int) -> float:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path, Line(spoil=spoil))


def test_an_interrupt_ends_the_step_and_keeps_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def watch(step: int) -> None:
        if step == 9:
            os.kill(os.getpid(), signal.SIGINT)

    result, _ = run(tmp_path / "a", watch=watch)
    assert "finishing this step; once more stops without saving" in capfd.readouterr().err
    assert result.interrupted
    assert result.steps in (9, 10)
    latest = latest_checkpoint(tmp_path / "a" / CHECKPOINTS)
    assert latest is not None
    assert load_checkpoint(latest).step == result.steps
    _, resumed = run(tmp_path / "a", resume=True)
    _, whole = run(tmp_path / "b")
    assert weights(resumed) == weights(whole)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch(step: int) -> None:
        if step == 10:  # a checkpoint is larger than this, the metrics are not yet
            size = (tmp_path / METRICS_NAME).stat().st_size
            assert size > 2000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1500, hard))

    settings = section(eval_every=100)
    try:
        with pytest.raises(RecmasError) as stopped:
            run(tmp_path, settings=settings, watch=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (problem,) = stopped.value.problems
    assert problem.code == "RM303"
    assert "--resume" in problem.hint
    names = [path.name for path in (tmp_path / CHECKPOINTS).iterdir()]
    assert "step-00000008" in names
    assert not [name for name in names if name.startswith(".")]
    for line in (tmp_path / METRICS_NAME).read_text().splitlines():
        json.loads(line)
    _, resumed = run(tmp_path, settings=settings, resume=True)
    _, whole = run(tmp_path / "whole", settings=settings)
    assert weights(resumed) == weights(whole)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecmasError, match="cannot write") as refused:
        run(tmp_path / "file" / "run")
    assert refused.value.problems[0].code == "RM303"


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(tmp_path)
    path = draw_curves(tmp_path, title="a line", levels={"random": 0.1})
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
