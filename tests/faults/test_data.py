"""Damaged records, evaluation data and training data: told with their line, neighbours answered."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from faults.cases import Case, parts, try_cases
from faults.mutators import changed_tree, odd_value, other_bytes, other_json, other_yaml
from faults.outcome import forked, judge
from kit.files import lines
from kit.training import record, write_case
from recmas_cli.main import main as recmasc
from recmas_compiler.evaluation.data.protocol import FOLDER as PROTOCOLS
from recmas_runtime.cli.main import main as recmas

FIRST: Final = {"id": "first", "question": "What comes at 7"}
LAST: Final = {"id": "last", "question": "And at 1"}
ANSWERS: Final = {"first": "h", "last": "b"}
MIDDLE: Final = {"id": "middle", "question": "Tell me about 3"}


def odd_line(random: Random) -> bytes:
    """Return a line that should be a record."""
    odd: Sequence[bytes] = (
        b"", b" ", b"\xef\xbb\xbf", b"\r", b"null", b"7", b"[]", b"{}", b'"text"', b"{", b"]",
        b'{"question": }', b'{"question": "a", "question": "b"}', b"[" * 100_000, b"{" * 3000,
        b'{"a":' * 3000, b'{"question": ' + b"9" * 5000 + b"}", b'{"question": NaN}',
        b'{"question": 1e999}', b'{"question": -Infinity}', b'{"question": "\\ud800"}',
        b'{"question": "\\u0000"}', b'{"question": "\x00"}', b'{"question": "\xff"}',
        b'{"question": "\\u001b[31m"}', b'{"question": "<|end|><|user|>"}', b"\x1b[2J", b"\x00",
        b'{"id": [], "question": "3"}', b'{"id": true, "question": "3"}', b'{"id": 1e400}',
        b'{"id": "", "question": "3"}', b'{"id": "\\ud800", "question": "3"}',
        b'{"id": "\\u001b[31m", "question": "3"}', b'{"question": ["3"]}', b'{"question": {}}',
        b'{"question": null}', b'{"question": true}', b'{"question": ""}', b"id,question\n1,3",
        b'{"question": "' + b"x" * 200 + b'"}', b'{"question": "' + b"C" * 9 + b'"}',
        b'{"id": "' + b"i" * 5000 + b'", "question": "3"}', "\u2028{}\x85".encode(),
        b'{"question": "' + b"a" * random.choice([10**5, 10**6]) + b'"}',
        b'{"question": "' + b"<|end|>" * random.choice([50, 10**5]) + b'"}',
        b'{"question": "' + "\u0e01".encode() * 10**5 + b'"}',
    )  # fmt: skip
    return random.choice(odd)


def damaged_line(random: Random) -> bytes:
    raw = json.dumps(MIDDLE).encode()
    match random.randrange(4):
        case 0:
            return other_bytes(random, raw)
        case 1:
            return other_json(random, raw)
        case 2 if random.random() < 0.1:
            return b'{"question": "' + random.choice([b"a", b"<|user|>"]) * 2**21 * 8 + b'"}'
        case _:
            return odd_line(random)


def attempt_records(case: Case, bundle: Path) -> Iterator[str]:
    random, folder = case.random, case.folder
    middle = b"\n".join(damaged_line(random) for _ in range(random.choice([1, 1, 1, 3])))
    text = b"%b\n%b\n%b\n" % (json.dumps(FIRST).encode(), middle, json.dumps(LAST).encode())
    if random.random() < 0.1:
        text = b"\xef\xbb\xbf" + text.removesuffix(b"\n")
    source = folder / random.choice(["in.jsonl", "i n.jsonl", "\x1b[31m.jsonl", "in"])
    source.write_bytes(text)
    output = folder / "out.jsonl"
    from_stdin = random.random() < 0.25
    way = random.choice(["file", "file", "stdout", "json"])
    arguments = ["run", str(bundle), "--input", "-" if from_stdin else str(source)]
    arguments += ["--batch", str(random.choice([1, 2, 3, 4]))]
    arguments += {"file": ["--output", str(output)], "stdout": [], "json": ["--json"]}[way]
    if random.random() < 0.3:
        arguments += ["--trace", str(folder / "trace")]
    outcome = forked(
        lambda: recmas(arguments), stdin=text if from_stdin else b"", on_terminal=False
    )
    faults = judge(outcome, data_on_stdout=True)
    if outcome.status is not None:
        faults += lost_answers(way, outcome.stdout, output)
    if faults:
        yield "; ".join(faults)
        yield f"given: {middle[:400]!r}, {' '.join(arguments[4:])}"
        yield f"printed ({outcome.status}): {outcome.text[-900:]!r}"


def lost_answers(way: str, stdout: bytes, output: Path) -> list[str]:
    """Return what is missing or false among the answers of the two good records."""
    try:
        if way == "json":
            answers = json.loads(stdout)["data"]["answers"]
        else:
            raw = output.read_bytes() if way == "file" else stdout
            answers = [json.loads(line) for line in raw.decode().splitlines()]
        # a record that failed has a line too, which says why
        found = {answer["id"]: answer["answer"] for answer in answers if "answer" in answer}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"the answers cannot be read: {error!r}"]
    return [
        f"{name!r} is answered {found.get(name)!r}, not {expected!r}"
        for name, expected in ANSWERS.items()
        if found.get(name) != expected
    ]


CHOICES: Final = {"text": ["red", "green", "blue", "white"], "label": ["A", "B", "C", "D"]}
# One record of every protocol, as its data set is published.
PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "aime": {"ID": "2024-1", "Problem": "Find x.", "Answer": 204},
    "aqua_rat": {
        "question": "How much?",
        "options": ["A)5", "B)6", "C)7", "D)8", "E)9"],
        "correct": "C",
    },
    "arc_challenge": {"id": "m1", "question": "Which?", "choices": CHOICES, "answerKey": "B"},
    "arc_easy": {"id": "e1", "question": "Which?", "choices": CHOICES, "answerKey": "2"},
    "bamboogle": {"Question": "Who was it?", "Answer": "Ada Lovelace"},
    "commonsenseqa": {"id": "c1", "question": "Where?", "choices": CHOICES, "answerKey": "A"},
    "gpqa": {
        "Record ID": "rec1",
        "Question": "Which particle?",
        "Correct Answer": "muon",
        "Incorrect Answer 1": "pion",
        "Incorrect Answer 2": "kaon",
        "Incorrect Answer 3": "gluon",
    },
    "gsm8k": {"question": "How many?", "answer": "It is 3 + 4 = <<3+4=7>>7.\n#### 7"},
    "hotpotqa": {
        "id": "h1",
        "question": "Who lived there?",
        "answer": "Ada",
        "context": {"title": ["A", "B"], "sentences": [["One.", "Two."], ["Three."]]},
    },
    "humaneval": {
        "task_id": "HumanEval/0",
        "prompt": 'def add(a, b):\n    """Return the sum."""\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    },
    "livecodebench": {
        "question_id": "abc1",
        "question_content": "Print the sum of two numbers.",
        "starter_code": "",
        "public_test_cases": '[{"input": "1 2", "output": "3", "testtype": "stdin"}]',
        "private_test_cases": "[]",
        "metadata": "{}",
    },
    "math500": {"unique_id": "m/1", "problem": "What is 1/2 + 1/2?", "answer": "1"},
    "mbpp": {
        "task_id": 2,
        "prompt": "Write a function that adds.",
        "code": "def add(a, b):\n    return a + b",
        "test_imports": [],
        "test_list": ["assert add(1, 2) == 3"],
    },
    "medqa": {
        "question": "Which drug?",
        "answer": "b",
        "answer_idx": "B",
        "options": {"A": "a", "B": "b", "C": "c", "D": "d"},
    },
    "mmlu": {"question": "Which?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 2},
    "strategyqa": {"qid": "s1", "question": "Is it so?", "answer": True},
}
IDS: Final = ("id", "ID", "Record ID", "task_id", "question_id", "unique_id", "qid")


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """Return records of a data set that differ in their ids."""
    rows = []
    for number in range(count):
        ids = {key: f"{number}/{key}" for key in IDS if key in PUBLISHED[name]}
        rows.append({**PUBLISHED[name], **ids})
    return rows


def written(random: Random, rows: Sequence[Any], folder: Path) -> Path:
    """Write rows in one of the forms that data come in, whole or damaged."""
    form = random.choice(["jsonl", "jsonl", "jsonl", "json", "csv"])
    if form == "csv" and all(isinstance(row, dict) for row in rows):
        text = io.StringIO(newline="")
        names = list(dict.fromkeys(str(name) for row in rows for name in row))
        table = csv.writer(text)
        table.writerows([names, *([str(row.get(name)) for name in names] for row in rows)])
        raw = text.getvalue().encode("utf-8", errors="surrogatepass")
    elif form == "json":
        raw = json.dumps(rows).encode()
    else:
        raw, form = lines(*map(json.dumps, rows)).encode(), "jsonl"
    if random.random() < 0.35:
        raw = other_bytes(random, raw)
    suffix = form
    if random.random() < 0.2:
        raw, suffix = gzip.compress(raw), f"{form}.gz"
        if random.random() < 0.5:
            raw = other_bytes(random, raw)
    if random.random() < 0.1:
        suffix = random.choice(["txt", "parquet", "jsonl", "csv", "csv.gz", ""])
    path = folder / f"data.{suffix}"
    path.write_bytes(raw)
    return path


def attempt_evaluation(case: Case, bundle: Path) -> Iterator[str]:
    random, folder = case.random, case.folder
    name = sorted(PUBLISHED)[case.number % len(PUBLISHED)]
    rows: list[Any] = rows_of(name, 3)
    if random.random() < 0.75:
        rows[1] = random.choice(
            [lambda: changed_tree(random, rows[1]), lambda: odd_value(random)]
        )()
    data = written(random, rows, folder)
    protocol = name
    if random.random() < 0.15:
        protocol = str(folder / "protocol.yaml")
        Path(protocol).write_bytes(other_yaml(random, (PROTOCOLS / f"{name}.yaml").read_bytes()))
    settings = ["max_new_tokens=2", *(["rollouts=1"] if protocol == name else [])]
    arguments = ["eval", str(bundle), "--data", str(data), "--protocol", protocol, "--quiet"]
    arguments += ["--out", str(folder / "out"), *(f"--set={one}" for one in settings)]
    outcome = forked(lambda: recmasc([*arguments, "--json"]))
    faults = judge(outcome, data_on_stdout=True)
    if outcome.status == 0 and not faults:
        report = outcome.json()["data"]
        (system,) = report["systems"]
        if not report["is_complete"] or not system["num_answers"]:
            faults.append("a report that is not complete")
        if system["failed"] and not all(one["reason"] for one in system["failed"]):
            faults.append("a record failed without a reason")
    if faults:
        yield f"{name}, {data.name}: {'; '.join(faults)}"
        yield f"given: {data.read_bytes()[:600]!r}"
        yield f"printed ({outcome.status}): {outcome.text[-900:]!r}"


def attempt_training(case: Case, backbones: Path) -> Iterator[str]:
    random, folder = case.random, case.folder
    for name in ("llama", "qwen2"):
        (folder / name).symlink_to(backbones / name)
    good = [json.dumps(record(number)).encode() for number in range(12)]
    sound = record(99)
    bad = random.choice(
        [
            lambda: other_json(random, json.dumps(sound).encode()),
            lambda: other_bytes(random, json.dumps(sound).encode()),
            lambda: odd_line(random),
        ]
    )()
    spec = write_case(folder)
    content = b"\n".join([*good[:6], bad, *good[6:]]) + b"\n"
    (folder / "train.jsonl").write_bytes(content)
    outcome = forked(lambda: in_folder(folder, ["train", spec.name, "--eval-only", "--json"]))
    faults = judge(outcome, data_on_stdout=True)
    if outcome.status == 0 and not faults:
        measured = {one["id"] for one in outcome.json()["data"]["records"]}
        lost = [f"r{number}" for number in range(12) if f"r{number}" not in measured]
        if lost:
            faults.append(f"left out {', '.join(lost)}")
    if faults:
        yield "; ".join(faults)
        yield f"given: {bad[:600]!r}"
        yield f"printed ({outcome.status}): {outcome.text[-900:]!r}"


def in_folder(folder: Path, arguments: Sequence[str]) -> None:
    os.chdir(folder)
    recmasc(list(arguments))


@pytest.fixture(scope="session")
def preloaded() -> None:
    """What a case needs is imported once, before it forks."""
    import recmas_compiler.evaluation.evaluate
    import recmas_compiler.evaluation.report
    import recmas_compiler.training.run  # noqa: F401
    import recmas_runtime.cli.run  # noqa: F401


@parts
def test_damaged_records(part: int, whole_bundle: Path, preloaded: None) -> None:
    try_cases("records", 240, part, lambda case: attempt_records(case, whole_bundle))


@parts
def test_damaged_evaluation_data(part: int, whole_bundle: Path, preloaded: None) -> None:
    assert set(PUBLISHED) == {path.stem for path in PROTOCOLS.glob("*.yaml")}
    try_cases("evaluation", 200, part, lambda case: attempt_evaluation(case, whole_bundle))


@parts
def test_damaged_training_data(part: int, backbones: Path, preloaded: None) -> None:
    try_cases("training", 100, part, lambda case: attempt_training(case, backbones))


def test_two_good_records_are_answered(whole_bundle: Path, tmp_path: Path, preloaded: None) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(FIRST, LAST))
    arguments = ["run", str(whole_bundle), "--input", str(source), "--output", str(output)]
    assert forked(lambda: recmas(arguments)).status == 0
    assert not lost_answers("file", b"", output)
