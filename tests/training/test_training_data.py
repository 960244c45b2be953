"""Training records: what is refused, with file and line, and how the sound ones are split."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pytest

from kit.training import SPEC, changed, lines, record, write_case
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.spec.spec import load_spec
from recmas_compiler.training.data.examples import (
    MAX_PROBLEMS,
    Examples,
    leave_out_long,
)
from recmas_compiler.training.settings import train_settings
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent


def load(folder: Path, text: str = SPEC, data: str | None = None) -> Examples:
    spec = load_spec(write_case(folder, text=text, data=data))
    return train_settings(spec).examples(spec)


# name -> the third line of the file, and what the finding says about it
WRONG = {
    "no_json": ("{'id': 3}", "not valid JSON"),
    "cut_off": ('{"id": "c", "question": "Wh', "not valid JSON"),
    "a_list": ("[1, 2]", "not a JSON object"),
    "a_number": ("7", "not a JSON object"),
    "nan": ('{"question": NaN}', "NaN is no JSON number"),
    "id_used_before": (record(0), "id 'r0' is already that of line 1"),
    "id_empty": (record(9, id=""), 'id "" is neither text nor an integer'),
    "id_a_list": (record(9, id=["a"]), "neither text nor an integer"),
    "no_question": (record(9, question=None), "has no field 'question', which the prompts use"),
    "question_empty": (record(9, question="  "), "has an empty question"),
    "question_a_mapping": (record(9, question={"a": 1}), "neither text, number nor a list"),
    "no_target": (record(9, plan=None), "has no field 'plan', which is the target of `planner`"),
    "no_answer": (record(9, solution=None), "has no field 'solution', which is the target of `sol"),
    "target_empty": (record(9, plan=""), "has an empty field 'plan'"),
    "target_blank": (record(9, solution=" \n\t"), "has an empty field 'solution'"),
    "target_null": ('{"id": "n", "question": "Why?", "plan": null, "solution": "x"}', "has empty"),
    "target_a_number": (record(9, solution=12), "has 12 in field 'solution', not text"),
    "target_a_list": (record(9, plan=["Add", "them"]), "has a list in field 'plan', not text"),
    "target_a_mapping": (record(9, plan={"text": "x"}), "has a mapping in field 'plan', not text"),
    "target_half_a_character": (
        '{"id": "h", "question": "Why?", "plan": "\\ud83d", "solution": "x"}',
        "half a surrogate pair",
    ),
    "not_utf8": (b'{"id": "u", "question": "\xff"}', "not UTF-8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_is_refused_with_its_line(name: str, case: Path) -> None:
    line, words = WRONG[name]
    data = lines(record(0), record(1)).encode()
    data += line + b"\n" if isinstance(line, bytes) else lines(line).encode()
    data += lines(record(3)).encode()
    spec = load_spec(case)
    (case.parent / "train.jsonl").write_bytes(data)
    with pytest.raises(RecmasError) as refused:
        train_settings(spec).examples(spec)
    (problem,) = refused.value.problems
    assert (problem.code, problem.line) == ("RM700", 3)
    assert problem.file == str((case.parent / "train.jsonl").absolute())
    assert words in problem.message
    assert problem.hint


def test_a_target_may_be_an_entry_of_a_list(tmp_path: Path) -> None:
    text = SPEC.replace("planner: plan,", "planner: 'plans[1]',")
    assert text != SPEC
    data = lines(*(record(n, plans=["No.", f"Plan {n}."]) for n in range(3)))
    assert {one.targets["planner"] for one in load(tmp_path, text, data).train} <= {
        "Plan 0.",
        "Plan 1.",
        "Plan 2.",
    }
    data = lines(*(record(n, plans=["No.", "Yes."][: 2 - n]) for n in range(3)))
    with pytest.raises(RecmasError) as refused:
        load(tmp_path, text, data)
    assert [problem.message for problem in refused.value.problems] == [
        "record 'r1' has no field 'plans[1]', which is the target of `planner`",
        "record 'r2' has no field 'plans[1]', which is the target of `planner`",
    ]


def test_all_wrong_lines_are_named_up_to_a_bound(tmp_path: Path) -> None:
    with pytest.raises(RecmasError) as refused:
        load(tmp_path, data=lines(record(0, plan=None, solution=""), "{", record(2)))
    assert [p.line for p in refused.value.problems] == [1, 1, 2]
    with pytest.raises(RecmasError) as refused:
        load(tmp_path, data="{\n" * (MAX_PROBLEMS + 5))
    assert len(refused.value.problems) == MAX_PROBLEMS + 1
    assert "5 more findings" in refused.value.problems[-1].message


@pytest.mark.parametrize("data", ["", "\n\n  \n"])
def test_no_records(tmp_path: Path, data: str) -> None:
    with pytest.raises(RecmasError, match="there are no records") as refused:
        load(tmp_path, data=data)
    assert refused.value.problems[0].code == "RM700"


@pytest.mark.parametrize(("setting", "place"), [("data", (23, 9)), ("held_out", (24, 13))])
def test_a_file_that_is_not_there_is_named_in_the_spec(
    tmp_path: Path, setting: str, place: tuple[int, int]
) -> None:
    piece = {"data": "data: train.jsonl", "held_out": "held_out: 0.25"}[setting]
    with pytest.raises(RecmasError, match="cannot be read: the file is missing") as refused:
        load(tmp_path, text=changed((piece, f"{setting}: missing.jsonl")))
    (problem,) = refused.value.problems
    assert problem.code == "RM700"
    assert (problem.line, problem.column) == place


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecmasError, match="this is not a regular file"):
        load(tmp_path, text=changed(("data: train.jsonl", "data: folder")))


def test_a_held_out_record_that_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(lines(record(40), record(2)))
    with pytest.raises(RecmasError, match="'r2' is in the training data too") as refused:
        load(tmp_path, text=changed(("held_out: 0.25", "held_out: held.jsonl")))
    (problem,) = refused.value.problems
    assert (problem.code, problem.line) == ("RM700", 2)
    assert problem.file == str((tmp_path / "held.jsonl").absolute())


def test_a_held_out_file_that_asks_the_same_is_warned_about(tmp_path: Path) -> None:
    held = lines(
        record(40, question="Another one?"),
        record(2, id="again"),
        record(3, id="other", solution="Another one."),
    )
    (tmp_path / "held.jsonl").write_text(held)
    examples = load(tmp_path, text=changed(("held_out: 0.25", "held_out: held.jsonl")))
    assert len(examples.train) == 16
    assert [e.id for e in examples.held_out] == ["r40", "again", "other"]
    (warning,) = examples.warnings
    assert warning.code == "RM752"
    assert "2 of 3 held-out records" in warning.message
    assert "1 of them for the same texts" in warning.message


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", "zero", "circle", "n" * 300):
        with pytest.raises(RecmasError, match="cannot be read: ") as refused:
            load(tmp_path, text=changed(("data: train.jsonl", f"data: {name}")))
        assert refused.value.problems[0].code == "RM700"


def test_data_as_they_are_published(tmp_path: Path) -> None:
    rows = [record(number) for number in range(6)]
    expected = load(tmp_path, text=changed(("0.25", "0")), data=lines(*rows)).train
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    written = {
        "rows.json": json.dumps(rows).encode(),
        "rows.csv": table.getvalue().encode(),
        "rows.jsonl.gz": gzip.compress(lines(*rows).encode()),
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
        text = changed(("data: train.jsonl", f"data: {name}"), ("0.25", "0"))
        assert [
            (e.id, dict(e.targets), e.fields["question"]) for e in load(tmp_path, text=text).train
        ] == [(e.id, dict(e.targets), e.fields["question"]) for e in expected]
    (tmp_path / "rows.csv").write_text("id,question,plan,solution\na,Q?,P,S\nb,Q?,,S\n")
    with pytest.raises(RecmasError) as refused:
        load(tmp_path, text=changed(("data: train.jsonl", "data: rows.csv")))
    (problem,) = refused.value.problems
    assert (problem.code, problem.line) == ("RM700", 3)
    assert problem.file == str(tmp_path / "rows.csv")


def test_an_id_with_half_a_character_is_an_id(tmp_path: Path) -> None:
    data = '{"id": "\\ud83d", "question": "Why?", "plan": "p", "solution": "s"}\n'
    examples = load(tmp_path, data=lines(record(1), record(2)) + data)
    assert len(examples.train + examples.held_out) == 3


def test_files_of_one_name_in_two_folders_both_count(tmp_path: Path) -> None:
    for name, number in (("a", 40), ("b", 50)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text(lines(record(number)))
    data = ("data: train.jsonl", "data: a/data.jsonl")
    text = changed(data, ("held_out: 0.25", "held_out: b/data.jsonl"))
    before = load(tmp_path, text=text).digests
    (tmp_path / "a" / "data.jsonl").write_text(lines(record(41)))
    after = load(tmp_path, text=text).digests
    assert before.keys() == after.keys() == {"train", "held_out"}
    assert before["held_out"] == after["held_out"]
    assert before["train"] != after["train"]


def test_the_split_is_that_of_the_seed_and_moves_little_when_data_grows(tmp_path: Path) -> None:
    examples = load(tmp_path)
    held = {e.id for e in examples.held_out}
    assert (len(examples.train), len(held)) == (12, 4)
    assert held.isdisjoint(e.id for e in examples.train)
    assert [e.id for e in load(tmp_path).held_out] == [e.id for e in examples.held_out]
    other = load(tmp_path, text=SPEC + "  seed: 1\n")
    assert {e.id for e in other.held_out} != held
    more = load(tmp_path, data=lines(*(record(n) for n in range(17))))
    assert len(held & {e.id for e in more.held_out}) >= 3


def test_something_is_always_held_out_and_something_trained_on(tmp_path: Path) -> None:
    two = lines(record(0), record(1))
    examples = load(tmp_path, text=changed(("0.25", "0.05")), data=two)
    assert (len(examples.train), len(examples.held_out)) == (1, 1)
    none = load(tmp_path, text=changed(("0.25", "0")), data=two)
    assert (len(none.train), len(none.held_out)) == (2, 0)
    alone = load(tmp_path, data=lines(record(0)))
    assert (len(alone.train), len(alone.held_out)) == (1, 0)


def test_records_keep_fields_and_targets(tmp_path: Path) -> None:
    first = load(tmp_path, text=changed(("0.25", "0")), data=lines({**record(0), "more": [1]}))
    (example,) = first.train
    assert example.targets == {"planner": record(0)["plan"], "solver": record(0)["solution"]}
    assert example.fields["more"] == [1]


def test_long_records_are_left_out_and_counted(tmp_path: Path) -> None:
    examples = load(tmp_path)

    def lengths(example: TrainExample) -> dict[tuple[str, int], int]:
        number = int(example.id[1:])
        return {("planner", 1): number, ("solver", 2): 99 if number == 3 else 1}

    kept = leave_out_long(examples, lengths, max_length=10, progress=Silent())
    assert {e.id for e in kept.train + kept.held_out} == {f"r{n}" for n in range(11) if n != 3}
    assert kept.left_out == {
        "a call of `planner` takes more than 10 positions": 5,
        "a call of `solver` takes more than 10 positions": 1,
    }
    assert {w.code for w in kept.warnings} == {"RM750"}
    with pytest.raises(RecmasError, match="no record is left to train on") as refused:
        leave_out_long(examples, lambda _: {("planner", 1): 11}, max_length=10, progress=Silent())
    assert refused.value.problems[0].code == "RM700"


def test_a_spec_without_training(tmp_path: Path) -> None:
    spec = load_spec(write_case(tmp_path, text=SPEC[: SPEC.index("train:")]))
    with pytest.raises(RecmasError, match="the spec has no `train`") as refused:
        train_settings(spec)
    assert refused.value.problems[0].code == "RM104"


def test_the_settings_that_a_stage_depends_on(tmp_path: Path) -> None:
    def digest(stage: str, *overrides: str) -> str:
        settings = train_settings(load_spec(write_case(tmp_path), overrides=overrides))
        return settings.digest(getattr(settings.section, stage))

    for stage, other in (("inner", "outer"), ("outer", "inner")):
        assert digest(stage) == digest(stage, f"train.{other}.lr=0.5")
        assert digest(stage) == digest(stage, "train.accumulation=3", "train.eval_every=1")
        assert digest(stage) != digest(stage, f"train.{stage}.lr=0.5")
        assert digest(stage) != digest(stage, "train.seed=3")
