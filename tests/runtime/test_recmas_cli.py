"""`recmas` from the outside, on a bundle with real engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kit.hand_bundle import edit_json, rehash
from recmas_runtime.checking.machine import verdict
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import how_to_install
from recmas_runtime.running.batch import PHASES

RECMAS = [sys.executable, "-m", "recmas_runtime.cli.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def json_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    body: dict[str, Any] = json.loads(out)
    assert body.keys() == {"ok", "data", "problems"}
    return body


def write_questions(path: Path, *questions: str) -> Path:
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    return path


def answers_of(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(a["id"], a["answer"]) for a in map(json.loads, lines) if "answer" in a]


def failures_of(path: Path) -> list[tuple[Any, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(a["id"], a["error"]["code"]) for a in map(json.loads, lines) if "error" in a]


def test_one_question_is_answered_as_plain_text(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(hand_bundle), "What is 7"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "h\n"
    assert printed.err.startswith(
        "[stop] 2 rounds, 58 prompt tokens, 6 latent steps, 2 answer tokens | "
    )


def test_quiet_says_nothing_else(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(hand_bundle), "What is 7", "--quiet"]) == 0
    assert capsys.readouterr() == ("h\n", "")


def test_json_is_one_object(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(hand_bundle), "7", "--json"]) == 0
    body = json_of(capsys)
    assert (body["ok"], body["problems"]) == (True, [])
    (answer,) = body["data"]["answers"]
    assert answer["timing_ms"].keys() == (set(PHASES) | {"total"}) - {"ask"}  # nobody was asked
    del answer["timing_ms"]
    assert answer == {
        "id": "1",
        "record": {"question": "7"},
        "answer": "h",
        "finish_reason": "stop",
        "rounds": 2,
        "usage": {
            "prompt_tokens": 34,
            "latent_steps": 6,
            "handover_tokens": 0,
            "completion_tokens": 2,
        },
        "batch_size": 1,
        "tool_calls": [],
    }


def test_a_file_of_questions_becomes_a_file_of_answers(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "q.jsonl", *"0123456789")
    out = tmp_path / "a.jsonl"
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]
    assert main([*arguments, "--batch", "3"]) == 0
    assert answers_of(out) == [(str(i + 1), "abcdefghij"[i]) for i in range(10)]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("answered 10 records in ")


def test_bad_lines_are_reported_and_the_others_answered(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        '{"question": "1"}\n{broken\n{"question": "%s"}\n{"question": "2"}' % ("x" * 200)
    )
    out = tmp_path / "a.jsonl"
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]
    assert main([*arguments, "--json"]) == 1
    body = json_of(capsys)
    assert body["ok"] is False
    assert [a.get("answer") for a in body["data"]["answers"]] == ["b", None, None, "c"]
    assert {(p["code"], p["line"]) for p in body["problems"]} == {("RM500", 2), ("RM501", None)}
    assert answers_of(out) == [("1", "b"), ("4", "c")]
    assert failures_of(out) == [("2", "RM500"), ("3", "RM501")]
    last = json.loads(out.read_text().splitlines()[2])
    assert last["record"] == {"question": "x" * 200}


def test_standard_streams_carry_json_lines(hand_bundle: Path) -> None:
    done = subprocess.run(
        [*RECMAS, "run", str(hand_bundle), "--input", "-", "--output", "-"],
        input=b'{"id": "\xc3\xa9", "question": "1"}\n',
        capture_output=True,
        check=True,
        env={**ENVIRONMENT, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["id"] == "\u00e9"
    assert done.stderr.startswith(b"answered 1 record in ")


def test_resuming_answers_only_what_is_missing(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "q.jsonl", "1", "2", "3")
    out = tmp_path / "a.jsonl"
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]
    assert main(arguments) == 0
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"id": "3", "ans')
    capsys.readouterr()
    assert main([*arguments, "--resume", "--json"]) == 0
    assert [a["id"] for a in json_of(capsys)["data"]["answers"]] == ["3"]
    assert answers_of(out) == [("1", "b"), ("2", "c"), ("3", "d")]


def test_sampling_does_not_depend_on_batches_or_resuming(hand_bundle: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", *"123456")
    hot = ["--temperature", "3", "--seed", "5", "--max-new-tokens", "6", "--quiet"]
    texts = []
    for batch in ("1", "4"):
        out = tmp_path / f"a{batch}.jsonl"
        arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]
        assert main([*arguments, *hot, "--batch", batch]) == 0
        texts.append(answers_of(out))
    assert texts[0] == texts[1]
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[:2]), encoding="utf-8")
    assert main([*arguments, *hot, "--batch", "3", "--resume"]) == 0
    assert answers_of(out) == texts[0]


def test_answers_of_another_run_are_not_gone_on_with(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "q.jsonl", "1", "2")
    out = tmp_path / "a.jsonl"
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]
    assert main([*arguments, "--quiet"]) == 0
    whole = out.read_bytes()
    for more, code, message in (
        ([], "RM520", "holds"),
        (["--resume", "--baseline", "text"], "RM521", 'baseline was "latent", is "text"'),
        (["--resume", "--max-new-tokens", "4"], "RM521", "sampling.max_new_tokens was 8, is 4"),
    ):
        capsys.readouterr()
        assert main([*arguments, *more, "--json"]) == 2
        (problem,) = json_of(capsys)["problems"]
        assert problem["code"] == code
        assert message in problem["message"]
        assert out.read_bytes() == whole
    assert main([*arguments, "--force", "--max-new-tokens", "1", "--quiet"]) == 0
    assert [json.loads(line)["finish_reason"] for line in out.read_text().splitlines()] == [
        "length",
        "length",
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([{"id": "a", "question": "1"}], [{"id": "a", "question": "2"}]),
        ([{"question": "1"}, {"question": "2"}], [{"question": "0"}, {"question": "1"}]),
        ([{"id": "a", "question": "1", "gold": 1}], [{"id": "a", "question": "1", "gold": 2}]),
        ([{"id": 1, "question": "1"}], [{"id": "1", "question": "1"}]),
    ],
    ids=["another question", "a line more", "another gold answer", "an id that reads alike"],
)
def test_answers_to_other_records_are_not_gone_on_with(
    hand_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: list[dict[str, object]],
    after: list[dict[str, object]],
) -> None:
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]

    def ask(records: list[dict[str, object]], *more: str) -> int:
        questions.write_text("".join(json.dumps(record) + "\n" for record in records))
        return main([*arguments, *more, "--json"])

    assert ask(before) == 0
    whole = out.read_bytes()
    capsys.readouterr()
    assert ask(after, "--resume") == 2
    (problem,) = json_of(capsys)["problems"]
    assert problem["code"] == "RM521"
    assert problem["message"].endswith("is to another record of this id")
    assert out.read_bytes() == whole
    shuffled = [dict(reversed(record.items())) for record in before]
    assert ask([*shuffled, {"id": "z", "question": "3"}], "--resume") == 0
    assert out.read_bytes().startswith(whole)
    assert len(answers_of(out)) == len(before) + 1


def test_another_question_does_not_get_the_old_answer(hand_bundle: Path, tmp_path: Path) -> None:
    arguments = ["run", str(hand_bundle), "--output", str(tmp_path / "a.jsonl"), "--resume"]
    assert main([*arguments, "1"]) == 0
    assert main([*arguments, "1"]) == 0
    assert main([*arguments, "2"]) == 2
    assert answers_of(tmp_path / "a.jsonl") == [("1", "b")]


def test_a_date_in_prompts_is_a_part_of_a_run(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = own_bundle / "backbones/one/chat_template.jinja"
    dated = "{{ strftime_now('%d') }}" + template.read_text(encoding="utf-8")
    template.write_text(dated, encoding="utf-8")
    rehash(own_bundle)
    questions, out = write_questions(tmp_path / "q.jsonl", "1", "2"), tmp_path / "a.jsonl"
    arguments = ["run", str(own_bundle), "--input", str(questions), "--output", str(out), "--json"]
    assert main([*arguments, "--date", "2026-11-29"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--date", "2026-11-30", "--resume"]) == 2
    (problem,) = json_of(capsys)["problems"]
    assert problem["code"] == "RM521"
    assert 'date was "2026-11-29", is "2026-11-30"' in problem["message"]
    assert main([*arguments, "--date", "2026-11-29", "--resume"]) == 0


def test_records_that_failed_are_tried_again(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": 1, "question": "1"}\n{"id": "x", "question": ""}\n')
    out = tmp_path / "a.jsonl"
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]
    assert main(arguments) == 1
    assert (answers_of(out), failures_of(out)) == ([(1, "b")], [("x", "RM500")])
    assert main([*arguments, "--resume"]) == 1
    assert (answers_of(out), failures_of(out)) == ([(1, "b")], [("x", "RM500")])
    assert ", 1 failed, 1 there already\n" in capsys.readouterr().err
    questions.write_text(questions.read_text().replace('""', '"2"'))
    assert main([*arguments, "--resume"]) == 0
    assert (answers_of(out), failures_of(out)) == ([(1, "b"), ("x", "c")], [])


def test_answers_keep_what_records_hold(hand_bundle: Path, tmp_path: Path) -> None:
    records = [
        {"id": 17, "question": "1", "answer": "gold", "meta": {"k": [1, None, "\u00e9"]}},
        {"question": "2", "x": 1.5},
    ]
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "a.jsonl"
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--output", str(out)]
    assert main([*arguments, "--quiet"]) == 0
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["record"] for line in found] == records
    assert [(line["id"], line["answer"], line["batch_size"]) for line in found] == [
        (17, "b", 1),
        ("2", "c", 1),
    ]


@pytest.mark.parametrize("kind", ["hard link", "link", "by standard input", "by standard output"])
def test_an_input_is_never_written_over(hand_bundle: Path, tmp_path: Path, kind: str) -> None:
    questions = write_questions(tmp_path / "q.jsonl", "1", "2")
    before = questions.read_bytes()
    other = tmp_path / "other"
    if kind == "hard link":
        os.link(questions, other)
    elif kind == "link":
        other.symlink_to(questions)
    source, target = str(questions), str(other)
    with questions.open("rb") as stdin, questions.open("ab") as stdout:
        if kind == "by standard input":
            source, target = "-", str(questions)
        if kind == "by standard output":
            target = "-"
        done = subprocess.run(
            [*RECMAS, "run", str(hand_bundle), "--input", source, "--output", target, "--force"],
            stdin=stdin,
            stdout=stdout if target == "-" else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
            env=ENVIRONMENT,
        )
    assert done.returncode == 2
    assert b"error[RM506]: --input and --output are the same file" in done.stderr
    assert questions.read_bytes() == before


@pytest.mark.parametrize("option", ["--output", "--trace"])
@pytest.mark.parametrize("place", ["plan.json", "backbones", "new", "by a link", "a link out"])
def test_nothing_is_written_into_the_bundle(
    hand_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    place: str,
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(hand_bundle, bundle)
    target = bundle / place
    if place == "by a link":
        target = tmp_path / "link"
        target.symlink_to(bundle / "manifest.json")
    elif place == "a link out":  # beside which other files would be written
        target.symlink_to(tmp_path / "out")
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    questions = write_questions(tmp_path / "questions.jsonl", "1")
    arguments = ["run", str(bundle), "--input", str(questions), option, str(target), "--force"]
    assert main(arguments) == 2
    assert f"error[RM506]: {option} {target} is inside the bundle" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert after == before


def test_a_bench_writes_nothing_into_the_bundle(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(hand_bundle.rglob("*"))
    assert main(["bench", str(hand_bundle), "--out", str(hand_bundle / "figures")]) == 2
    assert "is inside the bundle" in capsys.readouterr().err
    assert sorted(hand_bundle.rglob("*")) == before


def test_a_trace_does_not_write_over_input_or_output(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "trace.jsonl", "1")
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--trace", str(tmp_path)]
    assert main([*arguments, "--output", str(tmp_path / "a"), "--force"]) == 2
    assert "--input and --trace (trace.jsonl) are the same file" in capsys.readouterr().err
    assert questions.stat().st_size > 0


def test_two_runs_into_one_output(hand_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    command = [*RECMAS, "run", str(hand_bundle), "--input", "-", "--output", str(out), "--batch=1"]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, env=ENVIRONMENT)
    assert first.stdin is not None
    first.stdin.write(b'{"question": "1"}\n')
    first.stdin.flush()
    while not (out.exists() and out.read_bytes().endswith(b"\n")):
        assert first.poll() is None
    for more in ("--resume", "--force"):
        second = subprocess.run(
            [*command, more], input=b"", capture_output=True, check=False, env=ENVIRONMENT
        )
        assert second.returncode == 1
        assert b"error[RM503]: another run writes here" in second.stderr
    first.communicate(b'{"question": "2"}\n', timeout=60)
    assert first.returncode == 0
    assert answers_of(out) == [("1", "b"), ("2", "c")]


def test_a_trace_holds_every_message_and_step(hand_bundle: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", "1", "22", "333")
    arguments = ["run", str(hand_bundle), "--input", str(questions), "--quiet"]
    folder = tmp_path / "trace"
    assert (
        main([*arguments, "--output", str(tmp_path / "a"), "--batch", "2", "--trace", str(folder)])
        == 0
    )
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    assert [(line["id"], line["file"], line["batch_size"]) for line in lines] == [
        ("1", "000001.npz", 1),
        ("2", "000002.npz", 1),
        ("3", "000003.npz", 1),
    ]
    for line in lines:
        messages = np.load(folder / line["file"], allow_pickle=False)
        assert {name: messages[name].shape for name in messages} == {
            "planner->solver@1": (2, 260),
            "solver->planner@1": (2, 260),
            "planner->solver@2": (2, 260),
        }
        assert len(line["steps"]) == 11
        assert [e["op"] for e in line["steps"][:3]] == ["prefill", "think", "send"]
    again = [line["steps"][6] for line in lines]
    assert {(e["op"], e["round"], *e["agents"]) for e in again} == {("prefill", 2, "planner")}
    assert [e["reused_tokens"] for e in again] == [
        len("<") + len("Plan: 1"), len("<") + len("Plan: 22"), len("<") + len("Plan: 333"),
    ]  # fmt: skip


def test_a_question_with_a_trace_is_answered_as_text(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(hand_bundle), "4", "--trace", str(tmp_path / "t"), "--quiet"]
    assert main(arguments) == 0
    assert capsys.readouterr() == ("e\n", "")


def test_sampling_settings_reach_the_decode(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra, answer, reason in (
        (["--max-new-tokens", "1"], "h", "length"),
        (["--stop", "x", "--stop", "h"], "", "stop"),
        (["--temperature", "1", "--top-k", "1"], "h", "stop"),
        (["--temperature", "9", "--min-p", "1"], "h", "stop"),
        (["--temperature", "9", "--top-p", "0.0001"], "h", "stop"),
    ):
        assert main(["run", str(hand_bundle), "7", "--json", *extra]) == 0
        (found,) = json_of(capsys)["data"]["answers"]
        assert (found["answer"], found["finish_reason"]) == (answer, reason)


@pytest.mark.parametrize(
    ("arguments", "status", "code", "message"),
    [
        ([], 2, "RM506", "required: COMMAND"),
        (["frobnicate"], 2, "RM506", "invalid choice: 'frobnicate'"),
        (["run"], 2, "RM506", "required: BUNDLE"),
        (["run", "B"], 2, "RM506", "give a QUESTION, --field or --input"),
        (["run", "B", "q", "--input", "x"], 2, "RM506", "not both"),
        (["run", "B", "q", "--resume"], 2, "RM506", "--resume needs --output FILE"),
        (["run", "B", "--input", "x", "--output", "./x"], 2, "RM506", "are the same file"),
        (["run", "B", "q", "--output", "-"], 2, "RM506", "already prints"),
        (["run", "B", "q", "--top-k", "many"], 2, "RM506", "invalid int value: 'many'"),
        (["run", "B", "q", "--threads", "0"], 2, "RM506", "'0' is not a number from 1 to 4096"),
        (["run", "B", "q", "--device", "tpu"], 2, "RM506", "invalid choice: 'tpu'"),
        (["run", "B", "q", "--batch", "5"], 2, "RM506", "--batch 5, the bundle takes 1 to 4"),
        (["run", "B", "q", "--temperature", "-1"], 2, "RM505", "temperature is -1.0"),
        (["run", "B", "q", "--temperature", "nan"], 2, "RM505", "temperature is nan"),
        (["run", "B", "q", "--stop", ""], 2, "RM505", "stop is ('',)"),
        (["run", "B", "q", "--temperature", "50"], 2, "RM505", "temperature is 50.0"),
        (["run", "B", "q", "--repetition-penalty", "11"], 2, "RM505", "repetition_penalty is 11.0"),
        (["run", "B", "q", "--seed", str(2**63)], 2, "RM505", f"seed is {2**63}"),
        (["run", "B", "q", "--resume", "--force", "--output", "x"], 2, "RM506", "not both"),
        (["run", "B", "q", "--date", "2026-13-01"], 2, "RM506", "is no day as YYYY-MM-DD"),
        (["run", "B", "--input", "/dev/zero"], 1, "RM502", "it is a device"),
        (["run", "missing", "q"], 5, "RM400", "is not a folder"),
        (["run", "B", ""], 1, "RM500", "empty question"),
        (["run", "B", "\udcff"], 1, "RM500", "half a surrogate pair"),
        (["run", "B", "x" * 200], 1, "RM501", "the bundle allows 128"),
        (["run", "B", "--input", "missing"], 1, "RM502", "No such file or directory"),
        (["run", "B", "--input", "."], 1, "RM502", "Is a directory"),
        (["run", "B", "q", "--output", "missing/x"], 1, "RM503", "No such file or directory"),
        (["run", "B", "q", "--output", "/dev/full"], 1, "RM503", "No space left on device"),
        (["run", "B", "q", "--trace", "/dev/null/x"], 1, "RM503", "cannot be written"),
        (["verify", "missing"], 5, "RM400", "is not a folder"),
        (["inspect", "missing"], 5, "RM400", "is not a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_once(
    hand_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    code: str,
    message: str,
) -> None:
    arguments = [str(hand_bundle) if a == "B" else a for a in arguments]
    assert main([*arguments, "--json"]) == status
    body = json_of(capsys)
    (problem,) = body["problems"]
    assert body["ok"] is False
    assert problem["code"] == code
    assert message in problem["message"]
    if "already prints" not in message:
        assert main(arguments) == status
        printed = capsys.readouterr()
        assert f"error[{code}]: " in printed.err
        assert "Traceback" not in printed.err
        assert printed.out.strip() == ""


def test_a_device_that_is_not_there(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    assert main(["run", str(hand_bundle), "q", "--device", "cuda", "--json"]) == 4
    assert json_of(capsys)["problems"][0]["code"] == "RM504"


def test_debug_shows_where(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(hand_bundle), "", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_graph_that_is_no_graph_is_an_engine_failure(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_bundle / "backbones/one/decoder.onnx").write_bytes(b"not a graph")
    rehash(own_bundle)
    assert main(["run", str(own_bundle), "q", "--json"]) == 1
    (problem,) = json_of(capsys)["problems"]
    assert problem["code"] == "RM507"
    assert problem["file"].endswith("decoder.onnx")


def test_interruption_keeps_finished_answers(hand_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    process = subprocess.Popen(
        [
            *RECMAS,
            "run",
            str(hand_bundle),
            "--input",
            "-",
            "--output",
            str(out),
            "--batch",
            "1",
            "--json",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        # A test run in the background ignores the signal, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None
    process.stdin.write(b'{"question": "1"}\n')
    process.stdin.flush()
    while not (out.exists() and out.read_bytes().endswith(b"\n")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.decode().endswith(
        f"interrupted; finished answers are kept in {out}: the same command with --resume goes on\n"
    )
    assert b"Traceback" not in stderr
    body = json.loads(stdout)
    assert (body["ok"], [a["answer"] for a in body["data"]["answers"]]) == (False, ["b"])
    assert answers_of(out) == [("1", "b")]


def test_a_reader_that_goes_away_is_no_error(hand_bundle: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", *"12345678")
    process = subprocess.Popen(
        [*RECMAS, "run", str(hand_bundle), "--input", str(questions), "--batch", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_verify_finds_a_bundle_right(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(hand_bundle)]) == 0
    assert capsys.readouterr().out == (
        "files   15 hashes are right\n"
        "probe   probe_absolute 0.0e+00 (allowed 1e-06)\n"
        "parity  one: hidden_relative 0.0e+00 (allowed 1e-04), logits_relative 0.0e+00 "
        "(allowed 1e-05), embeds_relative 0.0e+00 (allowed 1e-06), link_relative 0.0e+00 "
        "(allowed 1e-05); greedy text equal\n"
        "the bundle is whole and right on cpu\n"
    )


@pytest.mark.parametrize(("graph", "figure"), [("head", "logits"), ("embed", "embeds")])
def test_verify_finds_engines_that_compute_something_else(
    own_bundle: Path, capsys: pytest.CaptureFixture[str], graph: str, figure: str
) -> None:
    path = own_bundle / f"backbones/one/{graph}.onnx"
    model = onnx.load(path)
    (weights,) = model.graph.initializer
    wrong = np.roll(numpy_helper.to_array(weights), 1, axis=0)
    weights.CopyFrom(numpy_helper.from_array(wrong, weights.name))
    onnx.save(model, path)
    rehash(own_bundle)
    assert main(["verify", str(own_bundle), "--json"]) == 5
    body = json_of(capsys)
    assert body["ok"] is False
    assert body["data"]["cases"][0]["greedy_tokens_equal"] is False
    assert [(p["code"], p["file"]) for p in body["problems"]] == [
        ("RM405", "parity/one.safetensors"),
        ("RM405", "parity/one.safetensors"),
    ]
    assert body["problems"][0]["message"].startswith(f"{figure}_relative is 1.00e+00, allowed")


def test_verify_wants_whole_parity_cases(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recmas_runtime.formats.safetensors_file import read_tensors, write_tensors

    path = own_bundle / "parity/one.safetensors"
    tensors, metadata = read_tensors(path)
    kept = {name: tensor.copy() for name, tensor in tensors.items() if name != "hidden"}
    write_tensors(path, kept, {"inner": "nobody"} if metadata else {})
    rehash(own_bundle)
    assert main(["verify", str(own_bundle), "--json"]) == 5
    (problem,) = json_of(capsys)["problems"]
    assert problem["message"] == (
        "the parity case lacks tensors ['hidden'] or names unknown links ['nobody']"
    )


def test_inspect_tells_what_is_in_a_bundle(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(hand_bundle)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("by-hand: 2 agents, 2 rounds, 15 files, ")
    assert "  prefill solver (then), reuse prefix\n  decode solver\n" in text
    assert "  solver->planner  projected 260 -> 260  random  feedback\n" in text
    assert main(["inspect", str(hand_bundle), "--json"]) == 0
    data = json_of(capsys)["data"]
    assert data["agents"]["solver"] == {"backbone": "one", "latent_steps": 2, "answers": True}
    assert data["limits"] == {"max_prompt_tokens": 128, "max_batch": 4}
    assert len(data["steps"]) == 11


def test_inspect_names_what_is_wrong(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(own_bundle / "manifest.json", "version", 3)
    assert main(["inspect", str(own_bundle)]) == 4
    assert capsys.readouterr().err.startswith("manifest.json: error[RM403]: format version 3; ")


def test_doctor_tells_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    data = json_of(capsys)["data"]
    assert "CPUExecutionProvider" in data["providers"]
    assert data["telemetry"] is False
    assert data["default_threads"] >= 1
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "telemetry       off\n" in shown
    assert shown.splitlines()[-1].startswith("This machine can run bundles on the CPU")


def test_doctor_says_what_is_missing() -> None:
    assert verdict("run bundles", ["numpy", "jinja2"], extra="cpu") == (
        "This machine cannot run bundles: numpy and jinja2 are not installed. "
        f"{how_to_install('cpu')}"
    )


@pytest.fixture
def desk_bundle(own_bundle: Path) -> Path:
    """A bundle whose prompts show a ticket and a customer, and no question."""
    text = (own_bundle / "plan.json").read_text(encoding="utf-8")
    plan = json.loads(text.replace('"value": "question"', '"value": "ticket"'))
    plan["agents"]["solver"]["then"].insert(0, {"kind": "field", "value": "customer"})
    plan["fields"] = ["ticket", "customer"]
    (own_bundle / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    rehash(own_bundle)
    return own_bundle


def test_fields_are_given_by_name(desk_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", str(desk_bundle), "--json", "--field"]
    assert main([*run, "ticket=7", "--field", "customer=A=B"]) == 0
    (answer,) = json_of(capsys)["data"]["answers"]
    assert answer["record"] == {"ticket": "7", "customer": "A=B"}
    assert answer["answer"] == "h"
    for arguments, code, words in (
        (["ticket=7"], "RM500", "has no field 'customer', which the prompts use"),
        (["ticket"], "RM506", "is not NAME=VALUE"),
        (["=x"], "RM506", "is not NAME=VALUE"),
        (["ticket=7", "--input", "x"], "RM506", "not both"),
    ):
        assert main([*run, *arguments]) != 0
        (problem,) = json_of(capsys)["problems"]
        assert problem["code"] == code
        assert words in problem["message"]
    assert main(["run", str(desk_bundle), "7", "--json"]) == 1
    (problem,) = json_of(capsys)["problems"]
    assert "--field ticket=... --field customer=..." in problem["hint"]


def test_a_question_that_no_prompt_shows_is_refused(
    desk_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(desk_bundle), "What?", "--field", "ticket=7", "--field", "customer=A"]
    assert main([*run, "--json"]) == 1
    (problem,) = json_of(capsys)["problems"]
    assert problem["code"] == "RM500"
    assert problem["message"] == (
        "record '1' has a question, and no prompt shows it: the prompts use ticket and customer"
    )


def test_entries_of_a_list_are_given_in_order(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.jsonl"
    run = ["run", str(own_bundle), "7", "--field", "facts[0]=a=b"]
    assert main([*run, "--output", str(out), "--quiet"]) == 0
    assert json.loads(out.read_text())["record"] == {"facts": ["a=b"], "question": "7"}
    for second in ("facts[0]=c", "facts[2]=c"):
        assert main([*run, "--field", second, "--json"]) == 2
        (problem,) = json_of(capsys)["problems"]
        assert problem["code"] == "RM506"
        assert problem["message"] == f"--field {second!r} does not give the next entry of 'facts'"
    assert main(["run", str(own_bundle), "7", "--field", "facts=a", "--field", "facts[1]=b"]) == 2


def test_a_name_given_twice_is_a_list(own_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    run = ["run", str(own_bundle), "7", "--field", "choices=a", "--field", "choices=b"]
    assert main([*run, "--output", str(out), "--quiet"]) == 0
    assert json.loads(out.read_text())["record"] == {"choices": ["a", "b"], "question": "7"}


def test_bench_wants_data_for_other_fields(
    desk_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(desk_bundle), "--json"]) == 2
    (problem,) = json_of(capsys)["problems"]
    assert problem["code"] == "RM506"
    assert "the prompts of this bundle use ticket and customer" in problem["message"]
    assert '{"ticket": "...", "customer": "..."}' in problem["hint"]
    data = tmp_path / "data.csv"
    data.write_text("ticket,customer\n7,A\n8,B\n")
    bench = ["bench", str(desk_bundle), "--data", str(data), "--repeats", "1", "--json"]
    assert main([*bench, "--batch", "2", "--warmup", "0"]) == 0
    body = json_of(capsys)["data"]
    assert body["questions"] == 2
    latency = body["rows"][0]["latency"]
    assert latency["requests_per_s"] > 0
    first, whole = latency["time_to_first_token_ms"], latency["latency_ms"]
    assert 0 < first["p50"] <= first["p90"] <= first["p99"] <= whole["p99"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "recmas" in capsys.readouterr().out


def test_the_question_may_come_after_options(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for order in (["7", "--seed", "1"], ["--seed", "1", "7"]):
        assert main(["run", str(hand_bundle), *order, "--json"]) == 0
        (answer,) = json_of(capsys)["data"]["answers"]
        assert answer["record"] == {"question": "7"}
    assert main(["run", str(hand_bundle), "--seed", "1", "7", "8"]) == 2
    assert "unrecognized arguments: 8" in capsys.readouterr().err
