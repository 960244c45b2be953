"""`recmas bench`: what is measured, what is shown, what is refused. Never how fast."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import recmas_runtime as rt
from recmas_runtime.bench.command import QUESTIONS
from recmas_runtime.bench.measure import make_cases
from recmas_runtime.cli.main import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
COUNTS = {
    *("prompt_tokens", "latent_steps", "handover_tokens", "completion_tokens", "rounds"),
    *("texts", "cut_texts", "generated_tokens", "sequential_steps"),
}


def bench_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    status = main(["bench", *map(str, arguments), "--json", "--threads", "1"])
    body: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert body.keys() == {"ok", "data", "problems"}
    return {**body, "status": status}


def only(data: dict[str, Any], system: str) -> dict[str, Any]:
    (row,) = (row for row in data["rows"] if row["system"] == system)
    return row


def test_rows_hold_every_figure(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--question", "What is 7", "--question", "Is it 12", "--repeats", "3"]
    body = bench_json(capsys, hand_bundle, *arguments, "--baseline", "text", "--baseline", "single")
    assert (body["status"], body["ok"], body["problems"]) == (0, True, [])
    data = body["data"]
    assert data.keys() == {
        *("name", "fingerprint", "date", "device", "threads", "batch", "warmup", "sampling"),
        *("machine", "questions", "questions_left_out", "repeats", "interrupted", "rows", "paper"),
    }
    assert (data["questions"], data["questions_left_out"], data["repeats"]) == (2, 0, 3)
    assert data["machine"].keys() >= {"cpu", "logical_cpus", "platform", "python", "packages"}
    assert data["machine"]["packages"]["onnxruntime"]
    assert [(r["system"], r["rounds"], r["latent_steps"]) for r in data["rows"]] == [
        ("latent", 2, 2),
        ("text", 2, 0),
        ("single", 2, 0),
    ]
    for row in data["rows"]:
        assert row["per_question"].keys() == COUNTS
        assert row["phases_ms_per_question"].keys() == {
            *("prefill", "think", "send", "write", "decode", "tools")
        }
        spread = row["seconds_per_question"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    text, single, latent = (only(data, name) for name in ("text", "single", "latent"))
    assert (text["against"], text["speed_up"], text["token_reduction"]) == (None, None, None)
    for row in (latent, single):
        assert row["against"] == "text"
        assert 0 < row["speed_up"]["min"] <= row["speed_up"]["max"]
    # A text is a letter and the end; the planner's second prompt ends in no digit: only the end.
    assert latent["per_question"]["generated_tokens"] == 2
    assert text["per_question"]["handover_tokens"] == 2 + 2 + 1
    assert text["per_question"]["texts"] == 3
    assert text["per_question"]["cut_texts"] == 0
    assert latent["token_reduction"] == round(1 - 2 / 7, 4)
    assert latent["per_question"]["latent_steps"] == 6
    assert latent["step_reduction"] == round(1 - 8 / 7, 4)
    assert single["per_question"]["rounds"] == 1
    assert data["paper"]["rounds"]["3"] == {"speed_up": 2.4, "token_reduction": 0.756}


def test_texts_that_reach_their_cap_are_counted(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = bench_json(
        capsys, hand_bundle, "--question", "7", "--repeats", "1", "--baseline", "text@1"
    )
    counts = only(body["data"], "text@1")["per_question"]
    assert (counts["texts"], counts["cut_texts"], counts["handover_tokens"]) == (3, 2, 3)
    assert only(body["data"], "latent")["against"] == "text@1"


def test_counts_are_those_of_a_run(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = bench_json(capsys, hand_bundle, "--question", "What is 7", "--repeats", "2")
    system = rt.load(hand_bundle, threads=1)
    for name in ("latent", "text"):
        usage = system.baseline(name).run("What is 7").usage
        counts = only(body["data"], name)["per_question"]
        for key in ("prompt_tokens", "latent_steps", "handover_tokens", "completion_tokens"):
            assert counts[key] == getattr(usage, key)


def test_own_questions_without_any(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limited = ["--limit", "3", "--repeats", "1", "--warmup", "0", "--baseline", "text"]
    data = bench_json(capsys, hand_bundle, *limited)["data"]
    assert data["questions"] + data["questions_left_out"] == 3
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 8


def test_data_in_batches(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": f"Is it {i}"}) for i in range(7)]
    data.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    arguments = ["--data", data, "--batch", "3", "--limit", "5", "--repeats", "1"]
    body = bench_json(capsys, hand_bundle, *arguments, "--baseline", "shuffled")
    assert [(p["code"], p["line"]) for p in body["problems"]] == [("RM500", 2)]
    assert body["data"]["questions"] == 5
    assert body["data"]["batch"] == 3
    assert only(body["data"], "shuffled")["against"] is None


def test_questions_without_an_answer_are_left_out_for_all(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    questions = ["Is it 7", "x" * 200, "Is it 12"]
    data.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    body = bench_json(capsys, hand_bundle, "--data", data, "--repeats", "2")
    # The text system allows longer prompts, but what one system cannot answer counts for none.
    assert (body["data"]["questions"], body["data"]["questions_left_out"]) == (2, 1)
    (problem,) = body["problems"]
    assert (problem["code"], problem["severity"]) == ("RM501", "warning")
    assert problem["message"].startswith("latent of 2 rounds: record '2': ")
    assert body["ok"] is True


def test_rows_that_run_the_same_share_a_measurement(hand_bundle: Path) -> None:
    system = rt.load(hand_bundle, threads=1)
    cases = make_cases([system, system], baselines=["single", "text", "single"])
    assert [case.name for case in cases] == ["latent"] * 2 + ["single"] * 2 + ["text"] * 2
    assert cases[2].system is cases[3].system
    assert cases[2].system is not cases[4].system


def test_report_files(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep/report"
    arguments = ["--question", "7", "--repeats", "1", "--out", str(out)]
    assert main(["bench", str(hand_bundle), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == (out / "bench.md").read_text()
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.md"}
    found = json.loads((out / "bench.json").read_text())
    assert [row["system"] for row in found["rows"]] == ["latent", "text"]
    table = [line for line in printed.out.splitlines() if line.startswith("| latent")]
    assert "1.9 x" in table[0]  # the paper's, of two rounds
    assert "65.5%" in table[0]
    assert "arXiv 2604.25917" in printed.out


def test_a_second_bundle_with_untrained_links(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--untrained-bundle", hand_bundle, "--question", "7", "--repeats", "1"]
    body = bench_json(capsys, hand_bundle, *arguments)
    assert [row["system"] for row in body["data"]["rows"]] == ["latent", "untrained-links", "text"]


@pytest.mark.parametrize("having", [("one",), ("two",), ("one", "two")])
def test_what_either_bundle_warns_of_is_reported_once(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], having: tuple[str, ...]
) -> None:
    bundles = {name: shutil.copytree(hand_bundle, tmp_path / name) for name in ("one", "two")}
    for name in having:  # engines that no machine can use
        (bundles[name] / "engines/any").mkdir(parents=True)
        (bundles[name] / "engines/any/engines.json").write_text("{}")
    arguments = ["--untrained-bundle", bundles["two"], "--question", "7", "--repeats", "1"]
    body = bench_json(capsys, bundles["one"], *arguments)
    messages = [problem["message"] for problem in body["problems"]]
    assert messages
    assert len(set(messages)) == len(messages)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--data", "x.jsonl", "--question", "7"], "RM506", "not both"),
        (["--warmup", "-1"], "RM506", "--warmup -1"),
        (["--repeats", "0"], "RM506", "--repeats 0"),
        (["--limit", "0"], "RM506", "--limit 0"),
        (["--batch", "5"], "RM506", "--batch 5, the bundle takes 1 to 4"),
        (["--batch", "0"], "RM506", "--batch 0"),
        (["--max-new-tokens", "0"], "RM505", "max_new_tokens is 0"),
        (["--baseline", "texts"], "RM508", "there is no baseline 'texts'"),
        (["--baseline", "shuffled", "--question", "7"], "RM508", "there is only one"),
        (["--data", "/nowhere.jsonl"], "RM502", "cannot be read"),
        (["--question", " "], "RM500", "empty question"),
        (["--untrained-bundle", "/nowhere"], "RM400", "not a bundle"),
        (["--out", "/dev/null/report"], "RM503", "cannot be written"),
        (["--rounds", "2"], "RM506", "--rounds"),
    ],
)
def test_what_is_refused(
    hand_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: str,
    told: str,
) -> None:
    body = bench_json(capsys, hand_bundle, *arguments)
    assert body["ok"] is False
    assert body["status"] != 0
    assert [problem["code"] for problem in body["problems"]] == [code]
    assert told in body["problems"][0]["message"]


def test_data_without_a_question(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    body = bench_json(capsys, hand_bundle, "--data", data)
    assert [problem["code"] for problem in body["problems"]] == ["RM500", "RM506"]


def test_nothing_that_could_be_measured(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = bench_json(capsys, hand_bundle, "--question", "x" * 200, "--repeats", "1")
    assert (body["status"], body["ok"]) == (1, False)
    assert {(p["code"], p["severity"]) for p in body["problems"]} == {("RM501", "error")}


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_an_interruption_keeps_what_is_measured(hand_bundle: Path, *, as_json: bool) -> None:
    code = (
        "import os, signal, sys\n"
        "from recmas_runtime.bench import measure\n"
        "from recmas_runtime.cli.main import main\n"
        "real, calls = measure.run_once, []\n"
        "def run_once(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2 * 3 * 3 + 1:\n"  # in the third of four repeats, warm-up included
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*arguments)\n"
        "measure.run_once = run_once\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["bench", str(hand_bundle), "--repeats", "3", "--threads", "1"]
    arguments += [part for digit in "123" for part in ("--question", digit)]
    arguments += ["--baseline", "text", "--baseline", "single"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments, *(["--json"] if as_json else [])],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert ran.returncode == 130
    assert "interrupted" in ran.stderr
    if not as_json:
        assert "interrupted: only what ended before counts" in ran.stdout
        assert "median of 1 repeat " in ran.stdout
        return
    body = json.loads(ran.stdout)
    assert body["ok"] is False
    assert body["data"]["interrupted"] is True
    assert (body["data"]["repeats"], body["data"]["questions"]) == (1, 3)
    assert [row["system"] for row in body["data"]["rows"]] == ["latent", "text", "single"]


def test_an_interrupted_first_repeat_counts_as_far_as_it_came(hand_bundle: Path) -> None:
    from recmas_runtime.bench.measure import BenchSettings, Run, measure
    from recmas_runtime.bench.report import figures
    from recmas_runtime.core.progress import Silent

    system = rt.load(hand_bundle, threads=1)
    cases = make_cases([system], baselines=["text"])
    settings = BenchSettings(
        records=tuple(rt.Record(id=str(i), fields={"question": str(i)}) for i in range(3)),
        batch=1,
        warmup=0,
        repeats=2,
        sampling=system.plan.sampling,
    )
    runs: dict[tuple[int, int, int], Run] = {}
    measure(cases, settings, runs=runs, progress=Silent())
    partial = {key: run for key, run in runs.items() if key[1:] < (0, 2)}
    del partial[1, 0, 1]
    found = figures(cases, settings, partial)
    assert (found.repeats, found.questions) == (1, 1)
    assert found.rows[0].cost.seconds == (runs[0, 0, 0].ms / 1e3,)
    assert figures(cases, settings, {}).rows == ()
