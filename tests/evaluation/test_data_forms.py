"""Data files: our own form and the forms that data sets are published in, by the same protocol."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kit.files import WriteRecords
from recmas_compiler.evaluation.data.data_file import load_data
from recmas_compiler.evaluation.data.protocol import load_protocol
from recmas_runtime.core.errors import RecmasError

LIST = {"text": ["bank", "mall"], "label": ["A", "B"]}
GPQA = {
    "Record ID": "rec1",
    "Question": "What is it?",
    "Correct Answer": " right ",
    "Incorrect Answer 1": "one",
    "Incorrect Answer 2": "two",
    "Incorrect Answer 3": "three",
}

# protocol, record, what the check must see, what prompts must see besides question and id
FORMS: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("gsm8k", {"question": "Q", "answer": "1 + 1,233 = 1,234\n#### 1,234"}, {"answer": "1234"}, {}),
    (
        "gsm8k",
        {"id": "g", "question": "Q", "answer": "1234", "solution": "s"},
        {"answer": "1234"},
        {},
    ),
    ("math500", {"problem": "Q", "answer": "p - q", "unique_id": "u"}, {"answer": "p - q"}, {}),
    ("math500", {"id": "u", "question": "Q", "answer": "p - q"}, {"answer": "p - q"}, {}),
    ("aime", {"id": 60, "problem": "Q", "answer": "204"}, {"answer": "204"}, {}),
    ("aime", {"ID": "2024-I-1", "Problem": "Q", "Answer": 204}, {"answer": 204}, {}),
    (
        "medqa",
        {"question": "Q", "options": {"B": "y", "A": "x"}, "answer": "y", "answer_idx": "B"},
        {"answer": "B"},
        {"choices": ["x", "y"]},
    ),
    (
        "medqa",
        {"id": "m", "question": "Q", "choices": ["x", "y"], "answer": "B"},
        {"answer": "B"},
        {"choices": ["x", "y"]},
    ),
    (
        "arc_challenge",
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"answer": "B"},
        {"choices": ["x", "y"]},
    ),
    (
        "arc_easy",
        {"question": "Q", "choices": LIST, "answerKey": "A"},
        {"answer": "A"},
        {"choices": ["bank", "mall"]},
    ),
    (
        "commonsenseqa",
        {
            "question": "Q",
            "question_concept": "c",
            "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}],
            "answerKey": "B",
        },
        {"answer": "B"},
        {"choices": ["x", "y"]},
    ),
    (
        "medqa",
        {"query": "Q", "options": ["A. x", "B. HEART"], "answer": "heart"},
        {"answer": "B"},
        {"choices": ["x", "HEART"]},
    ),
    (
        "medqa",
        {"question": "Q", "options": ["x", "y"], "answer": "y"},
        {"answer": "B"},
        {"choices": ["x", "y"]},
    ),
    (
        "mmlu",
        {"question": "Q", "choices": ["3", "4"], "answer": 1},
        {"answer": "B"},
        {"choices": ["3", "4"]},
    ),
    (
        "mmlu",
        {"question": "Q", "choices": "['3', '4']", "answer": "B"},
        {"answer": "B"},
        {"choices": ["3", "4"]},
    ),
    (
        "mmlu",
        {"question": "Q", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "c"},
        {"answer": "C"},
        {"choices": ["3", "4", "5", "6"]},
    ),
    (
        "aqua_rat",
        {"question": "Q", "options": ["A)5", "B)7.5 m"], "rationale": "r", "correct": "B"},
        {"answer": "B"},
        {"choices": ["5", "7.5 m"]},
    ),
    (
        "arc_easy",
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": 1},
        {"answer": "A"},
        {"choices": ["x", "y"]},
    ),
    ("strategyqa", {"qid": "s", "question": "Q", "answer": "True"}, {"answer": "yes"}, {}),
    ("strategyqa", {"qid": "s", "question": "Q", "answer": True}, {"answer": "yes"}, {}),
    ("strategyqa", {"id": "s", "question": "Q", "answer": "no"}, {"answer": "no"}, {}),
    (
        "hotpotqa",
        {
            "id": "h",
            "question": "Q",
            "answer": "x",
            "context": {"title": ["T"], "sentences": [["A.", " B."]]},
        },
        {"answer": "x"},
        {"context": "T: A. B."},
    ),
    (
        "hotpotqa",
        {
            "_id": "h",
            "question": "Q",
            "answer": "x",
            "meta": {"context": [["T", ["A."]], ["U", ["B."]]]},
        },
        {"answer": "x"},
        {"context": "T: A.\n\nU: B."},
    ),
    ("bamboogle", {"Question": "Q", "Answer": "x"}, {"answer": "x"}, {}),
    (
        "bamboogle",
        {"id": "b", "question": "Q", "answer": "x", "meta": {"all_answers": ["x", "y"]}},
        {"answer": ["x", "y"]},
        {},
    ),
    (
        "humaneval",
        {"task_id": "h", "prompt": "Q", "entry_point": "f", "test": "def check(f): ..."},
        {"prompt": "Q", "entry_point": "f", "tests": ["def check(f): ...", "check(f)"]},
        {},
    ),
    (
        "humaneval",
        {"id": "h", "question": "Q", "meta": {"entry_point": "f", "test": "def check(f): ..."}},
        {"prompt": "Q", "entry_point": "f", "tests": ["def check(f): ...", "check(f)"]},
        {},
    ),
]


def load(path: Path, name: str, *overrides: str, shown: tuple[str, ...] = ("question",)) -> Any:
    return load_data(path, load_protocol(name, overrides=overrides), shown=shown)


@pytest.mark.parametrize(("name", "record", "gold", "fields"), FORMS)
def test_forms(
    write_records: WriteRecords,
    name: str,
    record: dict[str, Any],
    gold: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> None:
    everything = ("question", "choices", "context")
    (question,) = load(write_records([record]), name, shown=everything).questions
    assert question.gold == gold
    assert {**fields, "id": question.record.id, "question": "Q"} == question.record.fields


def test_what_the_prompts_do_not_show_is_added_to_the_question(write_records: WriteRecords) -> None:
    path = write_records([{"question": "Where?", "choices": LIST, "answerKey": "A"}])
    (question,) = load(path, "arc_easy").questions
    assert question.record.fields["question"] == "Where?\n\nChoices:\nA. bank\nB. mall"
    (question,) = load(path, "arc_easy", shown=("question", "choices")).questions
    assert question.record.fields["question"] == "Where?"


def test_gpqa_is_shuffled_the_same_way_every_time(write_records: WriteRecords) -> None:
    records = [{**GPQA, "Record ID": str(i), "Question": f"What is {i}?"} for i in range(20)]
    path = write_records(records)
    first, second = load(path, "gpqa"), load(path, "gpqa")
    assert first == second
    letters = [question.gold["answer"] for question in first.questions]
    assert len(set(letters)) > 1
    for question in first.questions:
        choices = question.record.fields["choices"]
        assert sorted(choices) == ["one", "right", "three", "two"]
        assert choices["ABCD".index(question.gold["answer"])] == "right"
        assert set(question.gold) == {"answer"}


def test_mbpp_and_its_longer_form(write_records: WriteRecords) -> None:
    asserts = ["assert f(1) == 2", "assert f(2) == 3"]
    hub = {
        "task_id": 2,
        "prompt": "Write f.",
        "test_list": asserts,
        "test_imports": ["import math"],
    }
    (question,) = load(write_records([hub]), "mbpp").questions
    assert question.gold["tests"] == ["import math", *asserts]
    assert question.record.fields["question"] == (
        "Write f.\n\nYour code must pass these tests:\nassert f(1) == 2\nassert f(2) == 3"
    )
    own = {
        "id": "2",
        "question": "Write f.",
        "meta": {"test_list": asserts, "test_setup_code": "x = 1"},
    }
    (question,) = load(write_records([own]), "mbpp").questions
    assert question.gold["tests"] == ["x = 1", *asserts]
    plus = {**hub, "test": "for i in range(99): assert f(i) == i + 1"}
    (question,) = load(write_records([plus]), "mbpp").questions
    assert question.gold["tests"] == ["import math", plus["test"]]
    assert "range(99)" not in question.record.fields["question"]


def packed(cases: object, protocol: int = 4) -> str:
    text = json.dumps(cases)
    return base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()


@pytest.mark.parametrize("pickled_with", [0, 2, 4, 5])
def test_livecodebench(write_records: WriteRecords, pickled_with: int) -> None:
    stdin = {"input": "1\n", "output": "2\n", "testtype": "stdin"}
    call = {"input": '[1, 2]\n"x"', "output": "3", "testtype": "functional"}
    record = {
        "question_id": "abc387_b",
        "question_content": "Add.",
        "starter_code": "class Solution:\n    def f(self): ...",
        "public_test_cases": json.dumps([stdin]),
        "private_test_cases": packed([call], pickled_with),
        "metadata": json.dumps({"func_name": "f"}),
    }
    (question,) = load(write_records([record]), "livecodebench").questions
    assert question.record.id == "abc387_b"
    assert question.gold["inputs"] == [{"input": "1\n", "output": "2\n"}]
    assert question.gold["calls"] == [{"arguments": [[1, 2], "x"], "result": 3}]
    assert question.gold["function"] == "f"
    assert "Begin with this code:\nclass Solution" in question.record.fields["question"]
    (question,) = load(write_records([{**record, "starter_code": ""}]), "livecodebench").questions
    assert question.record.fields["question"] == "Add."


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was executed",))


def test_pickled_code_is_refused_and_never_run(write_records: WriteRecords) -> None:
    trap = base64.b64encode(zlib.compress(pickle.dumps(Trap()))).decode()
    record = {"question_content": "Add.", "private_test_cases": trap}
    with pytest.raises(RecmasError, match="hold more than a text"):
        load(write_records([record]), "livecodebench")


def test_selection(write_records: WriteRecords) -> None:
    path = write_records([{"question": f"Q{i}", "answer": str(i)} for i in range(50)])
    assert len(load(path, "gsm8k").questions) == 50
    first = load(path, "gsm8k", "n=3").questions
    assert [question.record.index for question in first] == [0, 1, 2]
    sample = load(path, "gsm8k", "n=10", "selection.kind=sample").questions
    again = load(path, "gsm8k", "n=10", "selection.kind=sample").questions
    other = load(path, "gsm8k", "n=10", "selection.kind=sample", "selection.seed=1").questions
    indices = [question.record.index for question in sample]
    assert indices == sorted(indices)
    assert sample == again != other
    assert all(q.record.fields["question"] == f"Q{q.record.index}" for q in sample)


def test_a_json_list_and_a_byte_order_mark(tmp_path: Path) -> None:
    records = [{"question": "Q", "answer": "#### 1"}, {"question": "R\u2028", "answer": "#### 2"}]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(records))
    lines = tmp_path / "lines.jsonl"
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    lines.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(listed, "gsm8k").questions == load(lines, "gsm8k").questions


def test_csv_and_gzip_as_they_are_published(tmp_path: Path) -> None:
    gpqa = tmp_path / "gpqa.csv"
    gpqa.write_text(
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,"
        'Incorrect Answer 3\nr1,"Which gas,\nsay?",H,He,Ne,Ar\nr2,Which metal?,Hg,Fe,Pb,Sn\n'
    )
    first, second = load(gpqa, "gpqa").questions
    assert first.record.fields["question"].startswith("Which gas,\nsay?\n\nChoices:\nA. ")
    assert (first.record.id, first.line, second.line) == ("r1", 2, 4)
    assert first.record.fields["choices"]["ABCD".index(first.gold["answer"])] == "H"
    packed = tmp_path / "HumanEval.jsonl.gz"
    record = {"task_id": "h", "prompt": "Q", "entry_point": "f", "test": "def check(f): ..."}
    packed.write_bytes(gzip.compress(json.dumps(record).encode()))
    assert load(packed, "humaneval").questions[0].record.id == "h"
    bare = tmp_path / "algebra_test.csv"  # the authors' own files of MMLU have no line of names
    bare.write_text('What is 2 + 2?,3,4,5,6,B\n"Which, then?",x,y,z,w,D\n')
    questions = load(bare, "mmlu").questions
    assert [question.gold["answer"] for question in questions] == ["B", "D"]
    assert questions[1].record.fields["choices"] == ["x", "y", "z", "w"]


def test_prompts_show_choices_with_one_letter_each(write_records: WriteRecords) -> None:
    path = write_records([{"question": "Q", "options": ["A)5", "B)7"], "correct": "A"}])
    (question,) = load(path, "aqua_rat").questions
    assert question.record.fields["question"] == "Q\n\nChoices:\nA. 5\nB. 7"


def test_columns_and_links_out_of_the_folder(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_text(json.dumps({"question": ["Q", "R"], "answer": ["#### 1", "#### 2"]}))
    link = tmp_path / "snapshot" / "test.json"
    link.parent.mkdir()
    link.symlink_to(blob)
    assert [question.gold["answer"] for question in load(link, "gsm8k").questions] == ["1", "2"]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecmasError, match="not a regular file"):
        load(tmp_path / "pipe", "gsm8k")


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    from pyarrow import Table

    path = tmp_path / "test.parquet"
    parquet.write_table(Table.from_pylist([{"question": "Q", "answer": "#### 7"}]), path)
    assert load(path, "gsm8k").questions[0].gold == {"answer": "7"}


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(RecmasError, match="RM201") as refused:
        load(path, "gsm8k")
    assert "pip install pyarrow" in refused.value.problems[0].hint


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("gsm8k", ['{"question": "Q", "answer"'], "records.jsonl:1: error[RM601]: not valid JSON"),
        ("gsm8k", ["[1]"], "records.jsonl:1: error[RM601]: the line is not a JSON object"),
        ("gsm8k", ['{"answer": "1", "text": "Q"}'], "no question under question, but answer, text"),
        (
            "gsm8k",
            ['{"question": "Q"}'],
            "not of the form that 'after_hashes' reads; it has no answer",
        ),
        (
            "gsm8k",
            ['{"id": "a", "question": "Q", "answer": "1"}'] * 2,
            "records.jsonl:2: error[RM601]: id 'a' is already that of line 1",
        ),
        (
            "arc_easy",
            ['{"question": "Q", "answerKey": "C", "choices": {"text": ["x"], "label": ["A"]}}'],
            "not of the form that 'labelled_choices' reads",
        ),
        (
            "mmlu",
            ['{"question": "Q", "choices": ["1", "0", "2"], "answer": "1"}'],
            "the right answer '1' may be several of the 3 choices",
        ),
        ("mmlu", ['{"question": "Q", "choices": ["x", "y"], "answer": 2}'], "is none of the 2"),
        ("mmlu", ['{"question": "Q", "choices": "x", "answer": 2}'], "not a list"),
        ("livecodebench", ['{"question": "Q", "public_test_cases": "?"}'], "'contest' reads"),
        ("gsm8k", [""], "no records"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecmasError) as refused:
        load(path, name)
    assert message in str(refused.value)


def test_every_bad_line_is_told_at_once(write_records: WriteRecords) -> None:
    path = write_records([{"answer": "1"}, {"question": "Q", "answer": "1"}, {"answer": "2"}])
    with pytest.raises(RecmasError) as refused:
        load(path, "gsm8k")
    assert [problem.line for problem in refused.value.problems] == [1, 3]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecmasError, match="RM502"):
        load(tmp_path / "none.jsonl", "gsm8k")
