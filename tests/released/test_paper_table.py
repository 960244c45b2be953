"""The paper's table on tiny weights in the released form: planned, run, stopped, gone on with."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit.bundles import each_backbone_exported_once
from kit.commands import run_recmasc
from kit.files import MadeOnce
from paper_data import PAPER, paper_module, write_config, write_data
from recmas_compiler.evaluation.intervals import wilson
from recmas_compiler.released.styles import STYLES
from recmas_runtime.core.errors import Exit
from recmas_runtime.core.jsonl import read_json_lines
from released_form import write_release

table = paper_module("table")
config = paper_module("paper_config")
costs = paper_module("paper_cost")
results = paper_module("paper_results")

CONTROLS = ("latent", "shuffled", "mean", "null")
STYLE_NAMES = ("distillation", "deliberation")


@dataclass
class Commands:
    """`recmasc` in this process; remembers what it was asked.

    Attributes:
        killed: The number of the evaluation that ends as a killed process does.
    """

    asked: list[tuple[str, ...]] = field(default_factory=list)
    killed: int | None = None

    def __call__(self, arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
        self.asked.append(tuple(arguments))
        ran = run_recmasc(*arguments)
        if arguments[0] == "eval" and self.count("eval") == self.killed:
            return -9, None
        return ran.exit_code, json.loads(ran.stdout)

    def count(self, name: str) -> int:
        return sum(arguments[0] == name for arguments in self.asked)


def small(folder: Path, weights: Path, out: Path, **changes: Any) -> Path:
    """Write a config of two styles and two benchmarks; the second run of AIME is pass@2."""
    settings = {
        "out": str(out),
        "weights": str(weights),
        "data": str(folder / "data"),
        "benchmarks_file": str(folder / "data" / "benchmarks.yaml"),
        "styles": {name: {} for name in STYLE_NAMES},
        "benchmarks": ["aime2026", "medqa"],
        "systems": list(CONTROLS),
        "runs": 2,
        "rounds": 2,
        "latent_steps": 2,
        "prompt_tokens": 512,
        "answer_tokens": 4,
        "batch": 4,
        "device": "cpu",
        "threads": 1,
        **changes,
    }
    return write_config(folder / "config.yaml", **settings)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, families: Path) -> Path:
    """The released form of two styles; the model that most tests build stands for all four."""
    return write_weights(tmp_path_factory.mktemp("weights"), STYLE_NAMES, families)


def write_weights(root: Path, styles: Iterable[str], families: Path) -> Path:
    for name in styles:
        roles = [agent.role for agent in STYLES[name].agents]
        write_release(root, STYLES[name], types=dict.fromkeys(roles, "llama"))
    for model in root.glob("*/config.json"):
        shutil.copytree(families / "llama", model.parent, dirs_exist_ok=True)
    return root


@dataclass(frozen=True)
class Run:
    config: Path
    out: Path
    commands: Commands
    status: int


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory, made_once: MadeOnce) -> Run:
    """A run in which the second evaluation is killed when it has answered everything."""
    folder = tmp_path_factory.mktemp("table")
    write_data(folder / "data")
    path = small(folder, weights, folder / "out")
    commands = Commands(killed=2)
    with each_backbone_exported_once(made_once):
        status = table.run_table(["run", str(path), "--yes"], commands)
    return Run(config=path, out=folder / "out", commands=commands, status=status)


def written(answers: Path) -> list[tuple[str, str]]:
    return [(one["id"], one["answer"]["answer"]) for one in read_json_lines(answers)]


def cells_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((out / "table.json").read_text())
    return {(cell["style"], cell["benchmark"]): cell for cell in found["cells"]}


def test_a_killed_cell_leaves_the_others_and_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on with its answers: a second run asks only what is not there."""
    assert run.status == Exit.RUN_FAILED
    assert [run.commands.count(name) for name in ("import", "build", "eval")] == [2, 2, 4]
    cells = cells_of(run.out)
    states = {key: cell["status"] for key, cell in cells.items()}
    killed = ("distillation", "medqa")
    assert states.pop(killed) == "failed"
    assert set(states.values()) == {"done"}
    assert cells[killed]["problems"] == ["`recmasc eval` ended with status -9"]
    assert not cells[killed]["systems"]
    assert "**failed**; `recmasc eval` ended with status -9" in (run.out / "table.md").read_text()

    answers = run.out / "cells" / "distillation" / "medqa" / "answers-mean.jsonl"
    before = answers.read_bytes()
    # As if it had been killed within the second run, with a half line written.
    lines = before.splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    again = Commands()
    assert table.run_table(["run", str(run.config), "--yes"], again) == Exit.OK
    assert again.count("eval") == 1
    kept = [(one["id"], one["answer"]["answer"]) for one in map(json.loads, lines)]
    assert written(answers) == kept
    assert answers.read_bytes().startswith(b"".join(lines[:2]))
    assert {cell["status"] for cell in cells_of(run.out).values()} == {"done"}

    nothing = Commands()
    assert table.run_table(["run", str(run.config)], nothing) == Exit.OK  # and there is no question
    assert nothing.asked == []
    shown = capsys.readouterr().out
    assert table.run_table(["table", str(run.config)], nothing) == Exit.OK
    assert capsys.readouterr().out in shown


def test_figures_come_from_the_answers(run: Run) -> None:
    """Recomputed here: pass@2 is the share of problems with a right answer among two, a run's."""
    cell = cells_of(run.out)["deliberation", "aime2026"]
    assert cell["metric"] == "pass@2"
    folder = run.out / "cells" / "deliberation" / "aime2026"
    for system in CONTROLS:
        lines = list(read_json_lines(folder / f"answers-{system}.jsonl"))
        assert len(lines) == 2 * 2 * 2
        passed = [
            any(one["correct"] for one in lines if (one["id"], one["seed"]) == (record, seed))
            for record in ("0", "1")
            for seed in (0, 1)
        ]
        figures = cell["systems"][system]
        assert figures["value"] == sum(passed) / 4
        interval = wilson(sum(passed) / 2, 2)
        assert figures["interval"] == {"low": interval.low, "high": interval.high}
        assert figures["num_questions"] == 2
    papers = {one["from"]: one for one in cell["published"] if one["system"] == "latent"}
    assert papers["table8"]["value"] == 0.9
    high = cell["systems"]["latent"]["interval"]["high"]
    assert papers["table8"]["outside"] is (high < 0.9)
    assert "2 questions, not 30" in cell["notes"]


def test_differences_are_those_of_the_same_questions(run: Run) -> None:
    """A judged answer is turned round: what is right now is right in every figure."""
    grid = config.load_grid(run.config)
    (cell,) = [one for one in grid.cells if one.name == "deliberation/medqa"]
    path = run.out / "cells" / "deliberation" / "medqa" / "answers-latent.jsonl"
    before = path.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    first = lines[0]["id"]
    changed = [{**one, "correct": one["id"] == first} for one in lines]
    path.write_text("".join(json.dumps(one) + "\n" for one in changed))
    try:
        figures = results.figures_of(grid, cell)
    finally:
        path.write_text(before)
    assert figures["latent"].value == 0.5
    assert figures["latent"].minus_latent is None
    difference, interval = figures["null"].minus_latent
    assert difference == figures["null"].value - 0.5
    assert interval.low <= difference <= interval.high


@pytest.mark.parametrize("system", CONTROLS)
def test_costs_are_what_a_run_takes(run: Run, system: str) -> None:
    """Answers and latent steps that are told before are those that the reports count after."""
    grid = config.load_grid(run.config)
    for cell in grid.cells:
        report = json.loads(
            (run.out / "cells" / cell.style.name / cell.benchmark / "report.json").read_text()
        )
        (measured,) = [one for one in report["systems"] if one["name"] == system]
        told = costs.cost_of(grid, cell, system)
        counted = cell.about.questions / measured["num_questions"]  # the paper asks more
        assert told.answers == measured["num_answers"] * counted
        steps = measured["usage"]["latent_steps"] * measured["num_answers"]
        assert told.latent_steps == steps * counted
        assert told.most_tokens == 4 * told.answers


def test_the_cost_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.run_table(["plan", str(run.config)]) == Exit.OK
    shown = capsys.readouterr().out
    assert "on one H100 80 GB, 3 USD an hour" in shown
    assert "All weights and data are there." in shown
    head, first, *_ = shown.splitlines()
    assert re.split(r"  +", head)[:5] == [
        "cell",
        "answers",
        "agent turns",
        "latent steps",
        "tokens",
    ]
    # 30 problems, 2 runs, 2 rollouts; 2 agents in 2 rounds under three systems, 1 turn without.
    assert re.split(r"  +", first)[:4] == [
        "distillation/aime2026",
        "480",
        f"{120 * (4 + 4 + 4 + 1):,}",
        f"{120 * 3 * 2 * 3:,}",
    ]


def test_nothing_runs_unasked(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody can be asked, the answer is no; nothing is written."""
    path = small(run.config.parent, Path("nowhere"), tmp_path / "out")
    commands = Commands()
    assert table.run_table(["run", str(path), "--yes"], commands) == Exit.ENVIRONMENT
    assert not commands.asked
    assert not (tmp_path / "out").exists()
    capsys.readouterr()


def test_all_that_is_missing_is_told_at_once(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    listed = write_data(tmp_path / "data")
    for name in ("medqa.json", "livecodebench/test3.jsonl"):
        (tmp_path / "data" / name).unlink()
    text = listed.read_text().replace("sha256: null", f"sha256: {'a' * 64}", 1)
    listed.write_text(text)
    path = small(
        tmp_path,
        weights,
        tmp_path / "out",
        styles={"mixture": {}, "deliberation": {}},
        benchmarks=["math500", "medqa", "livecodebench", "gpqa"],
    )
    commands = Commands()
    # The first of them is a wrong hash.
    assert table.run_table(["run", str(path), "--yes"], commands) == Exit.ENVIRONMENT
    said = capsys.readouterr().err
    assert not commands.asked
    for name in ("RM207", "mixture", "Mixture-Outerlinks", "medqa.json", "test3.jsonl", "sha256"):
        assert name in said
    assert "gpqa" not in said
    # With what is there one cell can run; nobody is there to be asked whether it may.
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert table.run_table(["run", str(path), "--skip-missing"], commands) == Exit.USAGE
    said = capsys.readouterr().err
    assert "deliberation/gpqa" in said
    assert "mixture" not in said.replace("mixture of", "")
    assert "Nothing was run" in said
    assert not commands.asked


def test_other_settings_are_another_evaluation(run: Run, weights: Path, tmp_path: Path) -> None:
    """Answers of other settings are neither shown nor mixed in; the cell says so."""
    folder = run.config.parent
    before = run.config.read_text()
    try:
        path = small(
            folder,
            weights,
            run.out,
            styles={"deliberation": {}},
            benchmarks=["medqa"],
            eval_set=["temperature=0.9"],
        )
        assert table.run_table(["table", str(path)]) == Exit.OK
        (cell,) = cells_of(run.out).values()
        assert (cell["status"], cell["systems"]) == ("to do", {})
        assert "temperature is 0.9, not 0.6" in cell["notes"]
        commands = Commands()
        assert table.run_table(["run", str(path), "--yes"], commands) == Exit.RUN_FAILED
        (cell,) = cells_of(run.out).values()
        assert cell["status"] == "failed"
        assert "the answers in" in cell["problems"][0]
        assert "RM603" in cell["problems"][0]
    finally:
        run.config.write_text(before)


@pytest.mark.heavy
def test_an_interrupted_run_goes_on(weights: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the process that runs, and the table; the same command ends what it began."""
    write_data(tmp_path / "data")
    path = small(
        tmp_path, weights, tmp_path / "out", styles={"distillation": {}}, benchmarks=["medqa"],
        runs=40,
    )  # fmt: skip
    command = [sys.executable, str(PAPER / "table.py"), "run", str(path), "--yes"]
    answers = tmp_path / "out" / "cells" / "distillation" / "medqa" / "answers-latent.jsonl"
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        while not answers.exists() or not answers.stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(600) == Exit.INTERRUPTED
    assert cells_of(tmp_path / "out")["distillation", "medqa"]["status"] == "interrupted"
    before = answers.read_bytes()
    assert 0 < len(before.splitlines()) < 80
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    assert ended.returncode == Exit.OK
    assert answers.read_bytes().startswith(before)
    assert len(answers.read_bytes().splitlines()) == 80
    assert cells_of(tmp_path / "out")["distillation", "medqa"]["status"] == "done"


@pytest.mark.heavy
def test_the_whole_table(families: Path, tmp_path: Path, made_once: MadeOnce) -> None:
    """Five styles, nine benchmarks, all systems and the tool as shipped, but for size."""
    listed = write_data(tmp_path / "data")
    write_weights(tmp_path / "released", STYLES, families)
    shipped = {"deliberation": {"set": ["answer.tools.python={}"]}}
    path = small(
        tmp_path,
        tmp_path / "released",
        tmp_path / "out",
        benchmarks_file=str(listed),
        styles={name: shipped.get(name, {}) for name in STYLES},
        benchmarks=list(config.load_grid(write_config(tmp_path / "all.yaml")).benchmarks),
        systems=[*CONTROLS, "single", "text", "moa"],
        runs=1,
    )
    with each_backbone_exported_once(made_once):
        assert table.run_table(["run", str(path), "--yes"], Commands()) == Exit.OK
    cells = cells_of(tmp_path / "out")
    assert len(cells) == 45
    assert {cell["status"] for cell in cells.values()} == {"done"}
    for (_, benchmark), cell in cells.items():
        assert set(cell["systems"]) == {*CONTROLS, "single", "text", "moa"}
        assert not any("could not be asked" in note for note in cell["notes"]), cell
        count = 6 if benchmark == "livecodebench" else 3 if benchmark == "math500" else 2
        assert cell["systems"]["latent"]["num_questions"] == count
