"""lm-evaluation-harness and Inspect, unmodified, with bundles as models: `make test-harness`.

They are installed into `.harness/` by that target, with the runtime and without torch.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.commands import run_recmasc
from kit.fixtures import exports_once, one_thread
from kit.lm_eval_tasks import write_letter_tasks
from kit.specs import SEQUENTIAL
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.jsonl import read_json_lines

__all__ = ["exports_once", "one_thread"]

pytestmark = pytest.mark.harness

HERE = Path(__file__).parent
PYTHON = Path(__file__).parents[2] / ".harness/bin/python"
QUESTIONS = 10
TASKS = ["letters_written", "letters_chosen"]
# No data set is fetched, and no one is told anything.
ALONE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
PREFIXED = """\
task: prefixed
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
gen_prefix: "The letter is"
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(letter)}}"
metric_list: [{metric: acc}]
"""
# The same questions as a task, and as a protocol of `recmasc eval`.
WORDS = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
metric_list: [{metric: acc}]
"""
PROTOCOL = """\
name: words
version: 1
description: Exact words.
data:
  source: nowhere
  split: test
  fields: {question: [question], choices: [choices]}
  gold: {answer: [answer]}
max_new_tokens: 6
check: {kind: exact}
"""


def run(command: list[str | Path], folder: Path, *, status: int = 0) -> str:
    """Return what a program of the harnesses' environment prints."""
    ran = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env={**os.environ, **ALONE, "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == status, f"{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout if status == 0 else ran.stdout + ran.stderr


def asked(folder: Path, runs: Mapping[str, Any], tasks: list[str] = TASKS) -> dict[str, Any]:
    """Return what lm_eval finds in several runs of one process."""
    request = {"folder": str(folder), "tasks": tasks, "runs": runs}
    (folder / "request.json").write_text(json.dumps(request))
    told = run([PYTHON, HERE / "ask_lm_eval.py", folder / "request.json"], folder)
    return dict(json.loads(told.splitlines()[-1]))


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    write_letter_tasks(tmp_path, QUESTIONS)
    (tmp_path / "rolling.yaml").write_text(ROLLING)
    (tmp_path / "prefixed.yaml").write_text(PREFIXED)
    return tmp_path


def test_the_command_of_lm_eval(hand_bundle: Path, letters: Path) -> None:
    command = [PYTHON, "-m", "recmas_runtime.harness.lm_eval", "run", "--model", "recmas"]
    command += ["--model_args", f"bundle={hand_bundle},threads=1", "--include_path", letters]
    command += ["--tasks", ",".join(TASKS), "--output_path", letters / "out", "--log_samples"]
    run(command, letters)
    (file,) = (letters / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["letters_written"]["exact_match,none"] == 1.0
    assert found["results"]["letters_chosen"]["acc,none"] == 1.0
    assert found["n-samples"]["letters_chosen"]["effective"] == QUESTIONS
    assert found["config"]["recmas"]["name"] == "by-hand"
    wrong = [each if "bundle=" not in str(each) else "bundle=nowhere" for each in command]
    assert "error[RM400]: not a bundle: nowhere" in run(wrong, letters, status=5)


def test_tasks_of_ten_questions(hand_bundle: Path, letters: Path) -> None:
    model = {"bundle": str(hand_bundle), "threads": 1}
    chat = {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": True}
    runs = {
        "plain": {"model": model},
        "few at a time": {"model": {**model, "at_once": 2}},
        "chat": {"model": model, "evaluate": chat},
        "sampled": {
            "model": {**model, "baseline": "null", "rounds": 1},
            "evaluate": {"gen_kwargs": {"do_sample": True, "temperature": 0.1, "top_k": 1}},
        },
        "rolling": {"model": model, "tasks": ["rolling"]},
        "prefixed": {"model": model, "tasks": ["prefixed"], "evaluate": chat},
        "beams": {"model": model, "evaluate": {"gen_kwargs": {"num_beams": 4}}},
        "too many": {"model": model, "evaluate": {"batch_size": 64}},
        "no room": {"model": model, "evaluate": {"num_fewshot": 9}},
    }
    found = asked(letters, runs)
    for name in ("plain", "few at a time", "chat", "sampled"):
        assert found[name]["results"]["letters_written"]["exact_match,none"] == 1.0, name
        assert found[name]["results"]["letters_chosen"]["acc,none"] == 1.0, name
    # Every answer is a run of its own; four choices are read behind one run of their question.
    assert found["plain"]["ran"] == [1] * QUESTIONS + [4, 4, 2]
    assert found["few at a time"]["ran"] == [1] * QUESTIONS + [2] * 5
    assert found["plain"]["told"]["letters_chosen"][0][1][0][1] is True
    assert found["plain"]["model"]["at_once"] == 4
    errors = {name: each["error"] for name, each in found.items() if "error" in each}
    assert errors.keys() == {"rolling", "prefixed", "beams", "too many", "no room"}
    assert "RM543" in errors["rolling"]
    assert "local-completions" in errors["rolling"]
    assert "begins the answer itself (gen_prefix)" in errors["prefixed"]
    assert "generation_kwargs has 'num_beams'" in errors["beams"]
    assert "batch_size is 64, the bundle takes 1 to 4" in errors["too many"]
    assert "10 questions of 10 cannot be asked" in errors["no room"]


@pytest.fixture
def words(build_tiny: BuildTiny, tmp_path: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A bundle, and ten questions of which it has five right in words of its own."""
    built = build_tiny(SEQUENTIAL)
    records: list[dict[str, Any]] = [
        {"id": f"q{n}", "question": f"What is number {n}?"} for n in range(QUESTIONS)
    ]
    answers = built.system.run([r["question"] for r in records], max_new_tokens=6)
    for n, (record, answer) in enumerate(zip(records, answers, strict=True)):
        record["answer"] = answer.answer if n % 2 else f"answer {n}"
        record["choices"] = [record["answer"], f"other {n}", f"third {n} of all"]
    for name, text in (("words", WORDS), ("choices", CHOICES), ("protocol", PROTOCOL)):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "protocol.yaml").rename(tmp_path / "protocol.yml")  # no task of lm_eval's
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, records)))
    return built.bundle, tmp_path, records


def test_lm_eval_and_recmasc_eval_agree(
    words: tuple[Path, Path, list[dict[str, Any]]],
) -> None:
    """On the same questions and prompts: texts, accuracy, and every choice's likelihood."""
    bundle, folder, records = words
    systems = ("latent", "single", "null", "shuffled", "mean", "text@3")
    runs = {
        name: {"model": {"bundle": str(bundle), "baseline": name, "answer": "answer", "threads": 1}}
        for name in systems
    }
    found = asked(folder, runs, ["words", "choices"])
    for score in ("text", "candidates"):
        options = [option for name in systems for option in ("--baseline", name)]
        ran = run_recmasc(
            "eval", bundle, "--data", folder / "words.jsonl", "--score", score, "--quiet",
            "--protocol", folder / "protocol.yml", "--out", folder / score, "--threads", 1,
            "--set", "data.append={}", *options,
        )  # fmt: skip
        assert ran.exit_code == 0, ran.output
    for name in systems:
        told = found[name]["told"]
        written = [*read_json_lines(folder / "text" / f"answers-{name}.jsonl")]
        assert [one["answer"]["answer"] for one in written] == [r[0][0] for r in told["words"]]
        accuracy = sum(one["correct"] for one in written) / QUESTIONS
        assert found[name]["results"]["words"]["exact_match,none"] == pytest.approx(accuracy)
        scored = [*read_json_lines(folder / "candidates" / f"answers-{name}.jsonl")]
        for one, record, choices in zip(scored, records, told["choices"], strict=True):
            losses = dict(zip(one["answer"]["candidates"], one["answer"]["losses"], strict=True))
            ours = [-losses[choice] for choice in record["choices"]]
            assert [each[0][0] for each in choices] == pytest.approx(ours, abs=2e-5), name
    assert found["latent"]["results"]["words"]["exact_match,none"] >= 0.5
    likelihoods = {name: json.dumps(each["told"]["choices"]) for name, each in found.items()}
    assert likelihoods.pop("single") == likelihoods["null"], "the slot has no line of its own here"
    assert len(set(likelihoods.values())) == len(likelihoods), "a control that changes nothing"


def test_what_the_python_door_says(words: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    """`shuffled` takes messages of a document with another answer, as `System.over` does."""
    bundle, folder, records = words
    model = {"bundle": str(bundle), "baseline": "shuffled", "answer": "answer", "threads": 1}
    found = asked(folder, {"shuffled": {"model": model}}, ["choices"])
    with rt.load(bundle, threads=1) as system:
        questions = [r["question"] for r in records]
        answers = [(r["answer"],) for r in records]
        over = system.baseline("shuffled").over(questions, answers=answers)
        results = over.score_batch(questions, [r["choices"] for r in records])
        for result, told in zip(results, found["shuffled"]["told"]["choices"], strict=True):
            assert not isinstance(result, RecmasError)
            assert [-each[0][0] for each in told] == pytest.approx(result.losses, abs=2e-5)


def inspected(task: str, bundle: Path, folder: Path, *more: str, status: int = 0) -> dict[str, Any]:
    """Return the log of `inspect eval`, or with another exit status what it said."""
    command: list[str | Path] = [PYTHON.with_name("inspect"), "eval", HERE / f"letters.py@{task}"]
    command += ["--model", f"recmas/{bundle}", "-M", "threads=1", "--log-format", "json"]
    command += ["--log-dir", folder / "logs", "--display", "plain", *more]
    said = run(command, folder, status=status)
    logs = sorted((folder / "logs").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {"said": said} if not logs else {"said": said, **json.loads(logs[-1].read_text())}


def test_inspect(hand_bundle: Path, tmp_path: Path) -> None:
    log = inspected("letters", hand_bundle, tmp_path, "-M", "baseline=null", "-M", "rounds=1")
    assert log["status"] == "success"
    assert log["results"]["scores"][0]["metrics"]["accuracy"]["value"] == 1.0
    assert log["results"]["completed_samples"] == QUESTIONS
    (usage,) = log["stats"]["model_usage"].values()
    assert usage["output_tokens"] == 2 * QUESTIONS, "a letter and the end"
    assert usage["input_tokens"] + usage["input_tokens_cache_read"] > 100
    output = log["samples"][3]["output"]
    assert (output["completion"], output["choices"][0]["stop_reason"]) == ("d", "stop")
    (told,) = output["metadata"]["recmas"]
    assert (told["rounds"], told["latent_steps"]) == (1, 0)


def test_what_inspect_is_told(hand_bundle: Path, tmp_path: Path) -> None:
    log = inspected("conversations", hand_bundle, tmp_path, "--temperature", "0.0")
    assert log["results"]["scores"][0]["metrics"]["accuracy"]["value"] == 1.0
    log = inspected("long_questions", hand_bundle, tmp_path)
    assert log["samples"][0]["output"]["choices"][0]["stop_reason"] == "model_length"
    log = inspected("letters", hand_bundle, tmp_path, "--logprobs")
    assert log["status"] == "error"
    assert "RM505" in log["error"]["message"]
    log = inspected("letters", hand_bundle, tmp_path, "-M", "baseline=shuffled", status=1)
    assert "shuffled needs the messages of other samples" in log["said"]
    log = inspected("letters", hand_bundle, tmp_path, "-M", "nothing=1", status=1)
    assert "unknown field `nothing`" in log["said"]


def test_every_setting_of_inspect_is_followed_or_refused() -> None:
    """Those in neither list are Inspect's own: how it asks, not what is asked."""
    command = "from inspect_ai.model import GenerateConfig as G; "
    command += "from recmas_runtime.harness.inspect_ai import HONOURED, REFUSED; "
    command += "print(*sorted(set(G.model_fields) - set(HONOURED) - set(REFUSED)))"
    own = run([PYTHON, "-c", command], HERE).split()
    assert own == [
        "adaptive_connections",
        "attempt_timeout",
        "batch",
        "cache",
        "cache_prompt",
        "fail_on_refusal",
        "max_connections",
        "max_retries",
        "max_tool_output",
        "num_choices",
        "parallel_tool_calls",
        "reasoning_history",
        "stream_idle_timeout",
        "system_message",
        "timeout",
    ]
