"""Trackers with their own packages, which write to disk: `make test-trackers`.

Everything is read back with what the packages read with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import recmas_compiler as rc
from kit.commands import run_recmasc
from kit.wandb_file import read_wandb_run
from recmas_compiler.trackers.tracking import TRACKERS
from recmas_compiler.training.loop.metrics import METRICS_NAME
from recmas_runtime.core.jsonl import read_json_lines

pytestmark = pytest.mark.trackers

ALL = [option for name in TRACKERS for option in ("--tracker", name)]
STEPS = 8
PROTOCOL = """
name: words
version: 1
description: Exact words.
data:
  source: nowhere
  split: test
  fields:
    question: [question]
  gold:
    answer: [answer]
max_new_tokens: 4
check: {kind: exact}
"""

Points = dict[str, dict[int, float]]
_reached: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every address of another machine that this process turns to."""
    if event == "socket.getaddrinfo":
        _reached.append(str(arguments[0]))
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        _reached.append(str(arguments[1][0]))


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def nobody_is_reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages that ask for a user's name would do so with a token."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    _reached.clear()
    yield
    assert set(_reached) <= {"127.0.0.1", "localhost", "::1"}


def in_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def in_wandb(folder: Path) -> Points:
    points: Points = {}
    last = -1
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run = read_wandb_run(path)
        for row in run.history:
            assert row["_step"] > last, "wandb would leave it out"
            last = row["_step"]
            (at,) = [name for name in row if name.endswith("/at")]
            for name, value in row.items():
                if name != at and not name.startswith("_"):
                    points.setdefault(name, {})[row[at]] = value
        for name, value in run.summary.items():
            if name.startswith("results/"):
                points[name] = {0: value}
    return points


def in_mlflow(folder: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    run = only_mlflow_run(folder)
    return {
        name.replace(" to ", "->").replace(" round ", "@"): {
            point.step: point.value for point in client.get_metric_history(run.info.run_id, name)
        }
        for name in run.data.metrics
    }


def only_mlflow_run(folder: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recmas")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def in_trackio(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Points:
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", folder.resolve())
    storage = sqlite_storage.SQLiteStorage
    assert len(storage.get_runs("recmas")) == 1
    points: Points = {}
    for row in storage.get_logs("recmas", storage.get_runs("recmas")[0]):
        for name, value in row.items():
            if name not in ("step", "timestamp", "ending"):
                points.setdefault(name, {})[row["step"]] = value
    return points


def everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Points]:
    return {
        "tensorboard": in_tensorboard(folder / "tensorboard"),
        "wandb": in_wandb(folder / "wandb"),
        "mlflow": in_mlflow(folder / "mlflow"),
        "trackio": in_trackio(folder / "trackio", monkeypatch),
    }


def of_metrics(path: Path, group: str) -> Points:
    """Return the figures that the run itself has written."""
    points: Points = {}
    for entry in read_json_lines(path):
        for name, value in entry.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            for part, number in parts.items():
                if name not in ("kind", "step"):
                    tag = f"{group}/{entry['kind']}/{name}/{part}".rstrip("/")
                    points.setdefault(tag, {})[entry["step"]] = number
    return points


def test_a_training_that_is_interrupted_and_resumed(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = rc.compile(rc.load_spec(case))

    def interrupt(_: str) -> Any:
        return lambda e: os.kill(os.getpid(), signal.SIGINT) if e["step"] == 5 else None

    first = rc.train(program, "run", stage="outer", make_sink=interrupt, trackers=[*TRACKERS])
    assert first.interrupted
    assert only_mlflow_run(Path("run/trackers/mlflow")).info.status == "KILLED"
    report = rc.train(program, "run", stage="outer", resume=True, trackers=[*TRACKERS])
    assert not report.interrupted
    assert not [problem for problem in report.warnings if problem.code == "RM759"]

    wanted = of_metrics(Path("run/outer") / METRICS_NAME, "outer")
    assert [*wanted["outer/step/loss"]] == [*range(1, STEPS + 1)]
    assert [*wanted["outer/eval/latent"]] == [0, 4, STEPS]
    after = report.stages["outer"]["after"]["latent"]
    for name, points in everywhere(Path("run/trackers"), monkeypatch).items():
        found = {tag: each for tag, each in points.items() if not tag.startswith("results/")}
        assert found.keys() == wanted.keys(), name
        for tag, each in wanted.items():
            assert found[tag] == pytest.approx(each, rel=1e-6), (name, tag)
        assert points["results/outer/after/latent"] == {0: pytest.approx(after)}
        assert "results/costs/outer/step_seconds" in points

    run = only_mlflow_run(Path("run/trackers/mlflow"))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "pair outer"
    assert run.data.params["train.outer.lr"] == "0.001"
    parts = sorted(Path("run/trackers/wandb").glob("wandb/offline-run-*/run-*.wandb"))
    read = [read_wandb_run(path) for path in parts]
    assert len({each.id for each in read}) == 1
    assert [each.summary["ending"] for each in read] == ["interrupted", "finished"]
    assert read[0].config["train"]["outer"]["steps"] == STEPS


def test_an_evaluation(build_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.specs import SEQUENTIAL

    bundle = build_tiny(SEQUENTIAL).bundle
    (tmp_path / "words.yaml").write_text(PROTOCOL)
    lines = [{"id": f"q{i}", "question": f"Q{i}", "answer": f"A{i}"} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    ran = run_recmasc(
        "eval", bundle, "--data", tmp_path / "data.jsonl", "--protocol", tmp_path / "words.yaml",
        "--baseline", "latent", "--baseline", "single", "--score", "likelihood", "--out", out,
        "--threads", 1, "--quiet", "--json", *ALL,
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    printed = json.loads(ran.stdout)
    assert not [p for p in printed["problems"] if p["code"] == "RM759"]
    for points in everywhere(out / "trackers", monkeypatch).values():
        for system in printed["data"]["systems"]:
            name = system["name"]
            assert points[f"{name}/loss"][5] == pytest.approx(system["loss"], rel=1e-6)
            assert points[f"results/{name}/loss"][0] == pytest.approx(system["loss"], rel=1e-6)
            assert points[f"results/{name}/accuracy"][0] == system["accuracy"]
            assert points[f"results/{name}/ms/total"][0] > 0
    params = only_mlflow_run(out / "trackers/mlflow").data.params
    assert params["protocol.name"] == "words"
    assert params["systems"] == "['latent', 'single']"


def test_trackers_that_break_in_the_middle(case: Path) -> None:
    """Databases that turn into something else after the third step."""

    def damage(_: str) -> Any:
        def take(entry: Mapping[str, Any]) -> None:
            if entry["step"] == 3:
                for path in (Path("run/trackers/mlflow/mlflow.db"), Path("b/recmas.db")):
                    path.unlink()
                    path.mkdir()

        return take

    trackers = ["mlflow", "trackio=b", "tensorboard=c"]
    program = rc.compile(rc.load_spec(case))
    report = rc.train(program, "run", stage="outer", make_sink=damage, trackers=trackers)
    assert not report.interrupted
    failed = [problem for problem in report.warnings if problem.code == "RM759"]
    assert sorted(problem.message.split()[2] for problem in failed) == ["mlflow", "trackio"]
    assert [*in_tensorboard(Path("c"))["outer/step/loss"]] == [*range(1, STEPS + 1)]


def test_places_that_cannot_be_written(case: Path) -> None:
    Path("file").write_text("")
    for name in TRACKERS:
        ran = run_recmasc(
            "train", case, "--stage", "outer", "--steps", 1, "--out", f"run-{name}", "--quiet",
            "--tracker", f"{name}=file",
        )  # fmt: skip
        assert (ran.exit_code, "error[RM503]" in ran.stderr) == (1, True), (name, ran.output)
        assert f"--tracker {name} cannot write to file" in ran.stderr
