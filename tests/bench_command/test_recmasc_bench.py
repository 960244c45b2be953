"""`recmasc bench`: rounds, latent steps and the plot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recmas_cli.main import main
from recmas_compiler.analysis.plots import COLOURS
from recmas_compiler.bench.plots import draw_report
from recmas_runtime.core.errors import Exit


def recmasc(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    body: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {**body, "status": ended.value.code}


QUICK = ("--limit", "1", "--warmup", "0", "--repeats", "1", "--threads", "1", "--quiet")


def test_rounds_and_steps_in_one_run(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = recmasc(
        capsys, "bench", project / "bundle", *QUICK, "--latent-steps", "2,4,6", "--out", tmp_path
    )
    assert (body["status"], body["ok"], body["problems"]) == (0, True, [])
    rows = body["data"]["rows"]
    assert [(row["system"], row["rounds"], row["latent_steps"]) for row in rows] == [
        ("latent", 1, 4),
        ("latent", 2, 4),
        ("latent", 3, 4),
        ("latent", 3, 2),
        ("latent", 3, 6),
        ("text", 1, 0),
        ("text", 2, 0),
        ("text", 3, 0),
    ]
    assert [row["per_question"]["rounds"] for row in rows] == [1, 2, 3, 3, 3, 1, 2, 3]
    # Planner and critic in every round, the solver in all but the last.
    turns = {1: 2, 2: 5, 3: 8}
    for row in rows:
        latent = row["system"] == "latent"
        counts = row["per_question"]
        assert counts["latent_steps"] == turns[row["rounds"]] * row["latent_steps"]
        assert counts["texts"] == (0 if latent else turns[row["rounds"]])
        assert row["against"] == ("text" if latent else None)
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "bench.json").read_text()) == body["data"]


def test_rounds_that_are_asked_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rounds", "4, 2,2", "--baseline", "single", "--baseline", "moa@3"]
    body = recmasc(capsys, "bench", project / "bundle", *QUICK, *arguments)
    assert [(row["system"], row["rounds"]) for row in body["data"]["rows"]] == [
        *(("latent", n) for n in (2, 4)),
        *(("single", n) for n in (2, 4)),
        *(("moa@3", n) for n in (2, 4)),
    ]
    singles = [row for row in body["data"]["rows"] if row["system"] == "single"]
    assert singles[0]["seconds_per_question"] == singles[1]["seconds_per_question"]
    assert all(row["against"] is None for row in body["data"]["rows"])


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["--rounds", "1,x"], Exit.USAGE, "RM506"),
        (["--rounds", ""], Exit.USAGE, "RM506"),
        (["--latent-steps", "-3"], Exit.USAGE, "RM506"),
        (["--rounds", "65"], Exit.SPEC_INVALID, "RM122"),
        (["--latent-steps", "384"], Exit.SPEC_INVALID, "RM105"),  # as long as a prompt may be
        (["--repeats", "none"], Exit.USAGE, "RM506"),
        (["--repeats", "0"], Exit.USAGE, "RM506"),
        (["--baseline", "frozen"], Exit.USAGE, "RM508"),
    ],
)
def test_what_is_refused(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: Exit,
    code: str,
) -> None:
    body = recmasc(capsys, "bench", project / "bundle", "--threads", "1", *arguments)
    assert (body["status"], body["ok"]) == (status, False)
    assert {problem["code"] for problem in body["problems"]} == {code}


def test_no_bundle(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = recmasc(capsys, "bench", project / "spec.yaml")
    assert (body["status"], body["problems"][0]["code"]) == (Exit.VERIFICATION, "RM400")


def test_an_interruption_prints_what_there_is(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from recmas_runtime.bench import measure

    real, calls = measure.run_once, []

    def run_once(*arguments: Any) -> measure.Run:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure, "run_once", run_once)
    arguments = ["--rounds", "1", "--limit", "1", "--warmup", "0", "--threads", "1", "--quiet"]
    body = recmasc(capsys, "bench", project / "bundle", *arguments)
    assert (body["status"], body["ok"]) == (Exit.INTERRUPTED, False)
    assert body["data"]["interrupted"] is True
    assert body["data"]["repeats"] == 1
    assert len(body["data"]["rows"]) == 2


def test_every_system_is_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn, bar = [], axes.bar

    def note(*arguments: Any, **options: Any) -> Any:
        drawn.append(options["label"])
        return bar(*arguments, **options)

    monkeypatch.setattr(axes, "bar", note)
    names = ["latent", *(f"another {number}" for number in range(len(COLOURS)))]
    cost = SimpleNamespace(seconds=[1.0], generated_tokens=10)
    cases = [SimpleNamespace(name=name, rounds=1, latent_steps=4) for name in names]
    rows = [SimpleNamespace(case=case, cost=cost, comparison=None) for case in cases]
    figures: Any = SimpleNamespace(rows=rows, questions=1)
    report: Any = SimpleNamespace(figures=figures, interrupted=False, about={"name": "tiny"})
    assert draw_report(report, tmp_path / "bench.png")
    assert drawn == names * 2
