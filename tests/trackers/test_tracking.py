"""Trackers as a whole: which there are, what they receive, and that none of them stops a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recmas_compiler.trackers.tracker import Ending, Figures, TrackedRun, figures_of, settings_of
from recmas_compiler.trackers.tracking import TRACKERS, Tracking, chosen_trackers
from recmas_runtime.core.errors import RecmasError

RUN = TrackedRun(name="pair outer", job="train", settings={})


class Lines:
    """Writes a line for everything; from a step on it fails."""

    def __init__(self, path: Path, *, fails_at: int = 10**6) -> None:
        self.path, self.fails_at = path, fails_at

    def start(self, run: TrackedRun, *, run_id: str | None) -> str:
        return "1"

    def log(self, group: str, figures: Figures, *, step: int) -> None:
        if step >= self.fails_at:
            raise OSError(28, "No space left on device")
        self._write([group, step, dict(figures)])

    def finish(self, results: Figures, *, ending: Ending) -> None:
        self._write([dict(results), ending])

    def _write(self, line: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[object]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def test_one_that_fails_receives_nothing_more(tmp_path: Path) -> None:
    whole, broken = Lines(tmp_path / "whole"), Lines(tmp_path / "broken", fails_at=2)
    tracking = Tracking({"wandb": broken, "mlflow": whole})
    sink = tracking.sink("inner planner")
    for step in (1, 2, 3):
        sink({"kind": "step", "step": step, "loss": 1 / step, "grad_norm": {"a->b": 2}})
    tracking.ended({"outer": {"after": {"latent": 0.5}, "note": "text"}}, interrupted=False)
    tracking.finish()
    tracking.finish()
    figures = [{"loss": 1 / step, "grad_norm/a->b": 2.0} for step in (1, 2, 3)]
    steps = [["inner/planner/step", place, each] for place, each in enumerate(figures, start=1)]
    assert whole.read() == [*steps, [{"outer/after/latent": 0.5}, "finished"]]
    assert broken.read() == steps[:1]
    (problem,) = tracking.problems
    assert str(problem) == (
        "warning[RM759]: the tracker wandb failed (OSError: [Errno 28] No space left on device) "
        "and receives nothing more. The run itself is whole; its own files have every figure."
    )


@pytest.mark.parametrize(
    ("ended", "interrupted", "told"),
    [(None, False, "failed"), (None, True, "interrupted"), (True, False, "interrupted")],
)
def test_endings(tmp_path: Path, ended: bool | None, interrupted: bool, told: str) -> None:
    lines = Lines(tmp_path / "lines")
    tracking = Tracking({"mlflow": lines})
    if ended is not None:
        tracking.ended({}, interrupted=ended)
    tracking.finish(interrupted=interrupted)
    assert lines.read() == [[{}, told]]


def test_figures_are_numbers_and_settings_are_texts() -> None:
    found = {"a": {"b": 1, "c": None, "d": "x"}, "e": [1, 2], "f": True}
    assert figures_of(found) == {"a/b": 1.0, "f": 1.0}
    assert settings_of(found) == {"a.b": "1", "a.d": "x", "e": "[1, 2]", "f": "True"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["aim"], "there is no tracker 'aim'. Trackers are tensorboard, wandb, mlflow and trackio"),
        (["wandb="], "there is no tracker 'wandb='"),
        (["trackio=https://some.where"], "trackio writes to a folder"),
    ],
)
def test_what_is_no_tracker(given: list[str], message: str) -> None:
    with pytest.raises(RecmasError, match=message) as raised:
        chosen_trackers(given)
    assert raised.value.problems[0].code == "RM506"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "recmas_compiler.trackers.tracking.find_spec"
    monkeypatch.setattr(names, lambda name: None if name == "wandb" else object())
    assert [choice.name for choice in chosen_trackers(["mlflow=http://127.0.0.1:5000"])] == [
        "mlflow"
    ]
    with pytest.raises(RecmasError, match="is named twice"):
        chosen_trackers(["mlflow", "mlflow=elsewhere"])
    with pytest.raises(RecmasError) as raised:
        chosen_trackers(["wandb"])
    assert str(raised.value) == (
        "error[RM201]: --tracker wandb needs the package wandb, which is not installed. Install it "
        "with `pip install wandb`."
    )


def test_each_tracker_has_its_file() -> None:
    folder = Path(__file__).parents[2] / "recmas_compiler/trackers"
    for _, place in TRACKERS.values():
        module, _, name = place.partition(":")
        assert f"class {name}" in (folder / f"{module}.py").read_text()
