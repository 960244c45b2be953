"""`recmasc eval` from the outside: complete, interrupted, resumed, refused."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import recmas_compiler as rc
import recmas_runtime as rt
from kit.files import WriteRecords
from recmas_cli.evaluate import shown
from recmas_compiler.evaluation.checks.text import extract_words
from recmas_compiler.evaluation.data.protocol import protocol_names
from recmas_compiler.evaluation.evaluate import AnswerOpening, EvalOptions, evaluate
from recmas_compiler.evaluation.runner import AnswerLog, ScoredAnswer
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.core.files import exclusive, sha256_of
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import Bundle, open_bundle
from recmas_runtime.tools.sandbox import find_sandbox

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
max_new_tokens: 12
check: {kind: exact}
"""
NUM = 11
# What differs between two runs of one evaluation.
TIMES = ("ms", "made", "savings")

Evaluate = Callable[..., Any]


@pytest.fixture(scope="module")
def answers(tiny_bundle: Path) -> list[str]:
    """What the tiny system answers to "Q0" to "Q10", as the check reads it."""
    system = rt.load(tiny_bundle, threads=1)
    texts = [answer.answer for answer in system.run([f"Q{i}" for i in range(NUM)])]
    return [extract_words(text) or "" for text in texts]


@pytest.fixture
def data(write_records: WriteRecords, answers: Sequence[str]) -> Path:
    """Records of which the tiny system has exactly the even ones right."""
    return write_records(
        [
            {"id": f"q{i}", "question": f"Q{i}", "answer": said if i % 2 == 0 else "no such thing"}
            for i, said in enumerate(answers)
        ]
    )


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    path = tmp_path / "words.yaml"
    path.write_text(PROTOCOL)
    return path


@pytest.fixture
def run(tiny_bundle: Path, data: Path, protocol: Path, tmp_path: Path) -> Evaluate:
    """Evaluate in this process."""

    def call(out: str = "out", **changes: Any) -> Any:
        given: dict[str, Any] = {
            "bundle": tiny_bundle,
            "data": data,
            "protocol": str(protocol),
            "baselines": (),
            "untrained_bundle": None,
            "overrides": (),
            "batch": 4,
            "out": tmp_path / out,
            "resume": False,
            "device": "cpu",
            "threads": 1,
        }
        return shown(evaluate(EvalOptions(**(given | changes)), progress=Silent()))

    return call


def arguments(bundle: Path, data: Path, protocol: Path, out: Path, *, batch: int = 4) -> list[str]:
    return [
        sys.executable, "-m", "recmas_cli.main", "eval", str(bundle), "--data", str(data),
        "--protocol", str(protocol), "--out", str(out), "--threads", "1", "--batch", str(batch),
    ]  # fmt: skip


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    systems = [{k: v for k, v in s.items() if k not in TIMES} for s in report["systems"]]
    return {k: v for k, v in report.items() if k not in TIMES} | {"systems": systems}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_evaluation(run: Evaluate, tmp_path: Path, tiny_bundle: Path) -> None:
    outcome = run(baselines=("latent", "single"))
    assert not outcome.interrupted
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report == outcome.data
    assert report["is_complete"] is True
    latent, single = report["systems"]
    assert (latent["name"], latent["num_right"], latent["num_answers"]) == ("latent", 6, NUM)
    assert latent["accuracy"] == pytest.approx(6 / NUM)
    assert latent["interval"]["low"] < 6 / NUM < latent["interval"]["high"]
    assert latent["usage"]["latent_steps"] == 8 * 4
    assert latent["usage"]["handover_tokens"] == 0
    assert single["usage"]["latent_steps"] == 0
    (comparison,) = report["comparisons"]
    assert comparison["num_only_against"] - comparison["num_only_system"] == (
        latent["num_right"] - single["num_right"]
    )
    assert report["bundle"]["fingerprint"] == rt.load(tiny_bundle, threads=1).manifest.fingerprint
    scored = lines(out / "answers-latent.jsonl")
    assert [one["id"] for one in scored] == [f"q{i}" for i in range(NUM)]
    # Records share engine calls, and their times are their own shares.
    assert [one["batch_size"] for one in scored] == [1] * NUM
    spent = sum(one["answer"]["timing_ms"]["total"] for one in scored)
    assert latent["ms"]["total"] == pytest.approx(spent / NUM)
    text = (out / "report.md").read_text()
    assert "| latent | " in text
    assert "54.5%" in text
    assert "Partial" not in outcome.text


def test_a_picture(run: Evaluate, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="extra `eval` is not installed")
    run(overrides=("n=2",))
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_text_hand_overs_are_counted_and_compared(run: Evaluate) -> None:
    report = run(baselines=("latent", "text@3"), overrides=("n=4",)).data
    text = report["systems"][1]
    assert text["usage"]["handover_tokens"] > 0
    (saving,) = report["savings"]
    assert (saving["system"], saving["against"]) == ("latent", "text@3")
    assert saving["written_tokens"] < 0


def test_seeds_and_rollouts(run: Evaluate, tmp_path: Path) -> None:
    sampled = ("n=4", "temperature=1.0", "seeds=[0, 7]", "rollouts=2")
    (system,) = run(overrides=sampled).data["systems"]
    assert system["num_answers"] == 16
    assert set(system["by_seed"]) == {"0", "7"}
    assert system["sd"] is not None
    assert list(system["pass_at"]) == ["1", "2", "4"]
    scored = lines(tmp_path / "out" / "answers-latent.jsonl")
    runs = [[o["answer"]["answer"] for o in scored[i : i + 4]] for i in range(0, 16, 4)]
    assert len({tuple(texts) for texts in runs}) == 4
    (again,) = run(out="again", overrides=sampled).data["systems"]
    assert again["by_seed"] == system["by_seed"]


def test_records_that_cannot_run_count_and_are_listed(
    run: Evaluate, write_records: WriteRecords, answers: Sequence[str]
) -> None:
    records = [{"question": "Q0", "answer": answers[0]}, {"question": "x" * 4000, "answer": "x"}]
    outcome = run(data=write_records(records))
    (system,) = outcome.data["systems"]
    assert (system["num_right"], system["num_answers"], system["accuracy"]) == (1, 2, 0.5)
    (failed,) = system["failed"]
    assert failed["id"] == "2"
    assert "the bundle allows" in failed["reason"]


def test_controls_need_two_usable_records_with_different_answers(
    run: Evaluate, write_records: WriteRecords
) -> None:
    records = [{"question": "Q0", "answer": "x"}, {"question": "x" * 4000, "answer": "y"}]
    with pytest.raises(RecmasError, match=r"RM508.*there is only one"):
        run(data=write_records(records), baselines=("shuffled",))
    records = [{"question": f"Q{i}", "answer": "Yes"} for i in range(3)]
    with pytest.raises(RecmasError, match=r"RM508.*all others have the answer 'Yes'"):
        run(data=write_records(records), baselines=("shuffled",), out="same")


def test_shuffled_is_over_the_whole_set_in_any_batches(
    run: Evaluate, tmp_path: Path, answers: Sequence[str], write_records: WriteRecords
) -> None:
    records = [
        {"id": f"q{i}", "question": f"Q{i}", "answer": said or "x"}
        for i, said in enumerate(answers)
    ]
    data = write_records(records)
    whole = run(data=data, baselines=("shuffled-latents",), batch=8).data["systems"]
    parts = run(data=data, baselines=("shuffled",), batch=3, out="parts").data["systems"]
    assert whole[0]["name"] == parts[0]["name"] == "shuffled"
    texts = [
        [one["answer"]["answer"] for one in lines(tmp_path / out / "answers-shuffled.jsonl")]
        for out in ("out", "parts")
    ]
    assert texts[0] == texts[1]


def test_whose_messages_were_used_is_told(
    run: Evaluate, tmp_path: Path, write_records: WriteRecords
) -> None:
    given = ["yes", "yes", "yes", "no", "yes"]
    records = [{"id": f"q{i}", "question": f"Q{i}", "answer": a} for i, a in enumerate(given)]
    outcome = run(data=write_records(records), baselines=("shuffled", "latent"), batch=2)
    scored = lines(tmp_path / "out" / "answers-shuffled.jsonl")
    senders = [given[int(one["sender"].removeprefix("q"))] for one in scored]
    assert senders == ["no", "no", "no", "yes", "no"]
    (shuffled, latent) = outcome.data["systems"]
    assert (shuffled["num_repeated"], shuffled["num_same_input"]) == (3, 0)
    assert "shuffled: 3 questions with the messages of a record that sends" in outcome.text
    assert lines(tmp_path / "out" / "answers-latent.jsonl")[0]["sender"] is None
    assert latent["num_repeated"] == 0


CANDIDATES = ("score.by=candidates", "score.candidates=3")


def test_right_answers_are_ranked_among_candidates(
    run: Evaluate, tmp_path: Path, tiny_bundle: Path, data: Path, write_records: WriteRecords
) -> None:
    names = ["Paris", "Rome", "Oslo", "Berlin", "Madrid"]
    records = [{"id": f"q{i}", "question": f"Q{i}", "answer": n} for i, n in enumerate(names)]
    baselines = ("latent", "null", "shuffled", "mean", "single", "all-context")
    outcome = run(data=write_records(records), overrides=CANDIDATES, baselines=baselines, batch=2)
    report = outcome.data
    assert report["receiver"] == "answer-only"
    assert [one["name"] for one in report["systems"]] == list(baselines)
    system = rt.load(tiny_bundle, threads=1)
    for summary in report["systems"]:
        scored = lines(tmp_path / "out" / f"answers-{summary['name']}.jsonl")
        assert [one["id"] for one in scored] == [f"q{i}" for i in range(5)]
        for one in scored:
            drawn = one["answer"]["candidates"]
            assert len(drawn) == one["num_candidates"] == 3
            assert drawn[0] == one["target"] in names
            means = [
                loss / count
                for loss, count in zip(
                    one["answer"]["losses"], one["answer"]["num_tokens"], strict=True
                )
            ]
            assert one["loss"] == pytest.approx(means[0], abs=1e-5)
            assert one["rank"] == 1 + sum(mean < means[0] for mean in means)
            assert one["correct"] == (one["rank"] == 1)
        assert summary["loss"] == pytest.approx(sum(one["loss"] for one in scored) / 5)
        low, high = summary["loss_interval"]["low"], summary["loss_interval"]["high"]
        assert low < summary["loss"] < high
        assert summary["chance"] == pytest.approx(1 / 3)
        assert summary["usage"]["completion_tokens"] == 0
    first = lines(tmp_path / "out" / "answers-latent.jsonl")[0]
    (alone,) = system.score_batch([{"question": "Q0"}], [first["answer"]["candidates"]])
    assert first["answer"]["losses"] == pytest.approx(alone.losses, rel=1e-4)
    for comparison in report["comparisons"]:
        assert comparison["loss"]["interval"]["low"] <= comparison["loss"]["mean"]
    assert "by chance" in outcome.text
    assert "nats/token" in outcome.text
    assert "answer-only receiver" in outcome.text
    assert "McNemar" in outcome.text


def test_scores_are_resumed(run: Evaluate, tmp_path: Path, write_records: WriteRecords) -> None:
    records = [{"question": f"Q{i}", "answer": f"Name{i}"} for i in range(5)]
    data = write_records(records)
    given = {"data": data, "overrides": CANDIDATES, "baselines": ("shuffled", "mean"), "batch": 2}
    whole = run(out="whole", **given).data
    run(**given)
    for name in ("shuffled", "mean"):
        path = tmp_path / "out" / f"answers-{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    resumed = run(resume=True, **given).data
    assert timeless(resumed) == timeless(whole)
    with pytest.raises(RecmasError, match=r"RM603.*the protocol"):
        run(resume=True, **given | {"overrides": (*CANDIDATES, "score.seed=1")})


def test_the_likelihood_of_right_answers_alone(run: Evaluate) -> None:
    outcome = run(overrides=("score.by=likelihood",), baselines=("latent", "null"))
    latent, null = outcome.data["systems"]
    assert latent["loss"] > 0
    assert latent["chance"] is None
    (comparison,) = outcome.data["comparisons"]
    assert comparison["loss"]["mean"] == pytest.approx(null["loss"] - latent["loss"])
    assert "accuracy" not in outcome.text
    assert "McNemar" not in outcome.text


def test_receivers_that_write_at_length_are_told_apart(run: Evaluate) -> None:
    assert run(overrides=("n=2",)).data["receiver"] == "answer-only"
    free = run(overrides=("n=2", "max_new_tokens=33"), out="free")
    assert free.data["receiver"] == "free-writing"
    assert "free-writing receiver" in free.text


def test_killed_and_resumed_is_as_if_never_killed(
    run: Evaluate, tiny_bundle: Path, data: Path, protocol: Path, tmp_path: Path
) -> None:
    # One at a time, and written down after four: 11 records in three parts, as even as can be.
    whole = run(out="whole", batch=1).data
    out = tmp_path / "killed"
    process = subprocess.Popen(
        arguments(tiny_bundle, data, protocol, out, batch=1), stderr=subprocess.DEVNULL
    )
    log = out / "answers-latent.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    # What a kill in the middle of a write leaves: a whole line and half a line of the next batch.
    kept = log.read_bytes().splitlines(keepends=True)[:3]
    more = lines(tmp_path / "whole" / "answers-latent.jsonl")[3:5]
    torn = "".join(json.dumps(one) + "\n" for one in more)[:-20]
    log.write_bytes(b"".join(kept) + torn.encode())
    resumed = run(out="killed", resume=True, batch=1).data
    assert timeless(resumed) == timeless(whole)
    assert (lines(log))[:3] == [json.loads(line) for line in kept]
    again = run(out="killed", resume=True, batch=1).data
    assert timeless(again) == timeless(whole)


def test_ctrl_c_keeps_what_is_done(
    tiny_bundle: Path, data: Path, protocol: Path, tmp_path: Path, run: Evaluate
) -> None:
    out = tmp_path / "stopped"
    protocol.write_text(PROTOCOL.replace("max_new_tokens: 12", "max_new_tokens: 100"))
    command = arguments(tiny_bundle, data, protocol, out)
    # More than can be done before the signal comes.
    command += ["--set", "rollouts=200", "--set", "temperature=1.0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores the signal, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "answers-latent.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == Exit.INTERRUPTED, stderr
    assert stdout.startswith("Partial: the run was interrupted.")
    assert "latent (partial)" in stdout
    report = json.loads((out / "report.json").read_text())
    assert report["is_complete"] is False
    assert report["systems"][0]["num_answers"] == len(lines(log)) > 0
    assert "Partial" in (out / "report.md").read_text()


def test_resuming_another_evaluation_is_refused(
    run: Evaluate, data: Path, protocol: Path, tmp_path: Path
) -> None:
    run(overrides=("n=2",))
    with pytest.raises(RecmasError, match="RM302"):
        run(overrides=("n=2",))
    for changes, word in (
        ({"overrides": ("n=3",)}, "the protocol was"),
        ({"overrides": ("n=2",), "batch": 2}, "the batch size was 4 and is 2"),
    ):
        with pytest.raises(RecmasError, match="RM603") as refused:
            run(resume=True, **changes)
        assert word in str(refused.value)
    data.write_text(data.read_text() + "\n")
    with pytest.raises(RecmasError, match="RM603") as refused:
        run(resume=True, overrides=("n=2",))
    assert "the data was" in str(refused.value)


def test_two_evaluations_do_not_share_a_folder(run: Evaluate, tmp_path: Path) -> None:
    run(overrides=("n=2",))
    with (
        exclusive(tmp_path / "out", code="RM503", what="evaluation"),
        pytest.raises(RecmasError, match="another evaluation writes here"),
    ):
        run(resume=True, overrides=("n=2",))


def test_nothing_is_written_into_the_bundle(run: Evaluate, tiny_bundle: Path) -> None:
    before = sorted(tiny_bundle.rglob("*"))
    with pytest.raises(RecmasError, match=r"RM506.*is inside the bundle"):
        run(out=tiny_bundle / "figures")
    assert sorted(tiny_bundle.rglob("*")) == before


def test_a_folder_that_was_cut_off_at_its_start_can_be_begun(run: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").touch()
    assert run(overrides=("n=2",)).data["is_complete"]


def test_answers_have_the_right_one_beside_them(run: Evaluate, tmp_path: Path) -> None:
    run(overrides=("n=2",))
    second = lines(tmp_path / "out" / "answers-latent.jsonl")[1]
    assert second["target"] == "no such thing"


def test_systems_take_turns(run: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    append = AnswerLog.append

    def noted(log: AnswerLog, scored: Sequence[ScoredAnswer]) -> None:
        asked.append(log._path.stem.removeprefix("answers-"))
        append(log, scored)

    monkeypatch.setattr(AnswerLog, "append", noted)
    run(baselines=("latent", "single"), batch=1)
    assert asked == ["latent", "single"] * 3


def test_whose_limit_of_tokens_holds_is_said_first(run: Evaluate) -> None:
    text = run(overrides=("n=2", "max_new_tokens=5")).text
    own = r"the bundle's own limit is \d+"
    assert re.match(
        rf".* on words: 2 questions, at most 5 new tokens \(the protocol's; {own}\)", text
    )


def test_tables_fit_a_terminal(run: Evaluate) -> None:
    sampled = ("n=2", "temperature=1.0", "rollouts=8")
    text = run(overrides=sampled, baselines=("latent", "shuffled")).text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert "pass@8" in text
    assert max(map(len, table)) <= 100


def with_template(bundle: Path, copy: Path, change: Callable[[str], str]) -> Bundle:
    """Open a copy of a bundle with another chat template, which its manifest knows."""
    shutil.copytree(bundle, copy)
    path = next(copy.rglob("*.jinja"))
    path.write_text(change(path.read_text()))
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = manifest["files"][str(path.relative_to(copy))]
    entry.update(size_bytes=path.stat().st_size, sha256=sha256_of(path))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return open_bundle(copy, verify_hashes=False)


def test_an_answer_that_a_template_lets_think_needs_an_end(
    run: Evaluate, tiny_bundle: Path, tmp_path: Path, answers: Sequence[str]
) -> None:
    opened = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    bundle = with_template(tiny_bundle, tmp_path / "thinking", lambda text: text + opened)
    assert AnswerOpening.of(bundle).thinking == "<think>\n"
    assert AnswerOpening.of(open_bundle(tiny_bundle, verify_hashes=False)).thinking == ""
    (system,) = run(bundle=bundle.root, overrides=("n=2",)).data["systems"]
    assert (system["num_right"], system["num_no_answer"]) == (0, 2)


def test_a_date_in_prompts_belongs_to_the_evaluation(
    run: Evaluate, tiny_bundle: Path, tmp_path: Path
) -> None:
    date = "{{ strftime_now('%Y-%m-%d') }}"
    bundle = with_template(tiny_bundle, tmp_path / "dated", lambda text: date + text)
    assert AnswerOpening.of(bundle).date == datetime.date.today().isoformat()
    assert AnswerOpening.of(open_bundle(tiny_bundle, verify_hashes=False)).date is None
    run(bundle=bundle.root, overrides=("n=2",))
    path = tmp_path / "out" / "evaluation.json"
    path.write_text(path.read_text().replace(datetime.date.today().isoformat(), "2001-02-03"))
    with pytest.raises(RecmasError, match="the date in the prompts was 2001-02-03"):
        run(bundle=bundle.root, overrides=("n=2",), resume=True)


def test_from_python(
    tiny_bundle: Path, data: Path, protocol: Path, tmp_path: Path, run: Evaluate
) -> None:
    done = rc.evaluate(
        tiny_bundle, data, protocol=str(protocol), limit=3, out=tmp_path / "py", threads=1, batch=4
    )
    assert timeless(done.report.to_json()) == timeless(run(overrides=("n=3",)).data)


def test_the_protocols_are_listed() -> None:
    command = [sys.executable, "-m", "recmas_cli.main", "eval", "--protocol", "list"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == Exit.OK, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines()] == list(protocol_names())


CODE_PROTOCOL = PROTOCOL.replace(
    "answer: [answer]", "tests: [tests]\n    solution: [solution]"
).replace("{kind: exact}", "{kind: code}")


def test_records_whose_own_solution_fails_are_refused_or_left_out(
    run: Evaluate, write_records: WriteRecords, tmp_path: Path
) -> None:
    if find_sandbox() is None:
        pytest.skip("this machine has no sandbox")
    path = tmp_path / "code.yaml"
    path.write_text(CODE_PROTOCOL)
    right = {"question": "Q", "tests": ["assert f() == 1"], "solution": "def f():\n    return 1"}
    wrong = {**right, "solution": "def f():\n    return 2"}
    data = write_records([right, wrong])
    with pytest.raises(RecmasError) as refused:
        run(protocol=str(path), data=data)
    assert "records.jsonl:2: error[RM601]: record '2': its own solution" in str(refused.value)
    assert not (tmp_path / "out").exists()
    outcome = run(protocol=str(path), data=data, skip_broken=True)
    assert outcome.data["systems"][0]["num_answers"] == 1
    assert [problem.code for problem in outcome.problems] == ["RM651"]


def test_records_that_are_no_questions_are_told(run: Evaluate, tmp_path: Path) -> None:
    stories = tmp_path / "qa.txt"
    stories.write_text(
        "1 A is in B.\n2 C is in D.\n3 Where is A?\tB\t1\n4 Where are they?\tB,D\t1 2\n"
    )
    done = run(data=stories, protocol="babi_split", overrides=("max_new_tokens=4",))
    (warning,) = done.problems
    assert (warning.code, warning.file) == ("RM652", str(stories))
    assert warning.message == "1 record left out: 1 needs 1 fact, not two"
    assert [system["num_questions"] for system in done.data["systems"]] == [1]
    assert done.data["data"]["left_out"] == {"needs 1 fact, not two": 1}
    assert "`; 1 left out: needs 1 fact, not two" in (tmp_path / "out" / "report.md").read_text()


def test_answers_of_something_else_are_not_resumed(run: Evaluate, tmp_path: Path) -> None:
    run(overrides=("n=2",))
    log = tmp_path / "out" / "answers-latent.jsonl"
    log.write_text(log.read_text().replace('"q0"', '"other"'))
    with pytest.raises(RecmasError, match="not an answer of this evaluation"):
        run(resume=True, overrides=("n=2",))
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    with pytest.raises(RecmasError, match="does not say which evaluation"):
        run(resume=True, overrides=("n=2",))


def test_another_baseline_may_join_later(run: Evaluate) -> None:
    run(overrides=("n=2",))
    report = run(resume=True, overrides=("n=2",), baselines=("latent", "null")).data
    assert [system["name"] for system in report["systems"]] == ["latent", "null"]


def test_other_prompts_than_the_protocol_names_are_told(run: Evaluate) -> None:
    outcome = run(overrides=("n=1", f'prompt_digest="{"0" * 64}"'))
    assert [problem.code for problem in outcome.problems] == ["RM650"]
    digest = outcome.data["bundle"]["prompt_digest"]
    same = run(out="same", overrides=("n=1", f'prompt_digest="{digest}"'))
    assert same.problems == ()


def test_untrained_links_come_from_a_bundle_of_their_own(run: Evaluate, tiny_bundle: Path) -> None:
    report = run(
        baselines=("latent", "untrained-links"), untrained_bundle=tiny_bundle, overrides=("n=2",)
    ).data
    assert [system["name"] for system in report["systems"]] == ["latent", "untrained-links"]
    (comparison,) = report["comparisons"]
    assert (comparison["num_only_system"], comparison["p"]) == (0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baselines": ("nonsense",)}, "RM508"),
        ({"baselines": ("untrained-links",)}, "without --untrained-bundle"),
        ({"untrained_bundle": Path("x")}, "without --baseline untrained-links"),
        ({"batch": 99}, "--batch 99, the bundle takes 1 to 8"),
        ({"protocol": "gsm"}, "no protocol is called 'gsm'"),
        ({"data": Path("nowhere.jsonl")}, "RM502"),
        ({"overrides": ("max_new_tokens=1000000",)}, "RM505"),
    ],
)
def test_refusals(run: Evaluate, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecmasError) as refused:
        run(**changes)
    assert message in str(refused.value)


def test_the_command_line(tiny_bundle: Path, data: Path, protocol: Path, tmp_path: Path) -> None:
    command = arguments(tiny_bundle, data, protocol, tmp_path / "out")
    command += ["--limit", "3", "--seeds", "5", "--baseline", "latent", "--json", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == Exit.OK, ran.stderr
    assert ran.stderr == ""
    envelope = json.loads(ran.stdout)
    assert envelope["ok"] is True
    assert envelope["data"] == json.loads((tmp_path / "out" / "report.json").read_text())
    assert envelope["data"]["protocol"]["seeds"] == [5]
    assert envelope["data"]["data"]["num_questions"] == 3
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert again.returncode == Exit.USAGE
    assert json.loads(again.stdout)["problems"][0]["code"] == "RM302"


def test_evaluation_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "import recmas_compiler.evaluation\n"
        "import recmas_compiler.evaluation.checks.code\n"
        "heavy = ('torch', 'transformers', 'onnx', 'matplotlib', 'math_verify', 'sympy')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
