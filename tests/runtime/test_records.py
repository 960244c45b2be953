from __future__ import annotations

import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.hand_bundle import edit_json, rehash
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.running import records
from recmas_runtime.running.answer_file import AnswerWriter
from recmas_runtime.running.records import (
    Answer,
    FailedRecord,
    Record,
    Timing,
    Usage,
    count_records,
    open_records,
    question_record,
    read_records,
)
from recmas_runtime.tools.calls import ToolCall, ToolResult


def read(raw: bytes, *fields: str) -> list[Record | FailedRecord]:
    return list(read_records(io.BytesIO(raw), file="in.jsonl", fields=fields or ("question",)))


def answer(name: str | int = "a", text: str = "four") -> Answer:
    return Answer(
        id=name,
        record={"question": "2+2?", "answer": 4},
        answer=text,
        finish_reason="stop",
        rounds=2,
        usage=Usage(prompt_tokens=3, latent_steps=2, handover_tokens=0, completion_tokens=1),
        timing_ms=Timing(prefill=1.23456, think=2, send=0.5, write=0, decode=4, tools=1, total=9),
        batch_size=3,
        tool_calls=(ToolResult(ToolCall("search", "corn"), "ok", "14 rows", 1.00049),),
    )


def test_records_keep_their_fields_and_places() -> None:
    first, second = read(b'{"id": "x", "question": "q", "choices": ["a"]}\n{"question": "r"}')
    assert first == Record(id="x", fields={"id": "x", "question": "q", "choices": ["a"]}, index=0)
    assert second == Record(id="2", fields={"id": "2", "question": "r"}, index=1)
    assert first.given == {"id": "x", "question": "q", "choices": ["a"]}
    assert second.given == {"question": "r"}
    (third,) = read(b'{"id": 7, "question": "q"}')
    assert (third.id, type(third.id)) == (7, int)


@pytest.mark.parametrize(
    "raw",
    [
        b'\xef\xbb\xbf{"question": "q"}\n',
        b'{"question": "q"}\r\n',
        b'\n  \n{"question": "q", "id": 1}',
        b'{"question": "q", "id": 1}',
    ],
    ids=["byte order mark", "carriage return", "blank lines", "number as id"],
)
def test_what_is_tolerated(raw: bytes) -> None:
    (record,) = read(raw)
    assert isinstance(record, Record)
    assert (record.fields["question"], int(record.id) > 0) == ("q", True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'{"question": "q"', "not valid JSON: Expecting ',' delimiter at column 17"),
        (b'"text"', "the line is not a JSON object"),
        (b"[]", "the line is not a JSON object"),
        (b'{"question": "\xff"}', "not UTF-8 at byte 15 of the line"),
        (b'{"question": NaN}', "not valid JSON: NaN is no JSON number"),
        (b"[" * 100_000, "nested too deep to be read"),
        (
            b'{"question": "q", "x": ' + b"[" * 100 + b"]" * 100 + b"}",
            "nested more than 100 levels deep",
        ),
        (b'{"question": "q", "x": 1e999}', "a number is beyond the range of numbers"),
        (b'{"question": ""}', "record '2' has an empty question"),
        (b'{"question": " \\n "}', "record '2' has an empty question"),
        (b'{"question": null}', "record '2' has null in field 'question'"),
        (b'{"text": "q"}', "record '2' has no field 'question'"),
        (b'{"question": {}}', "record '2' field 'question' is neither text, number nor"),
        (b'{"question": "\\ud800"}', "record '2' field 'question' holds half a surrogate pair"),
        (b'{"question": "q", "id": {}}', "id {} is neither text nor an integer"),
        (b'{"question": "q", "id": ""}', 'id "" is neither text nor an integer'),
        (b'{"question": "q", "id": null}', "id null is neither text nor an integer"),
        (b'{"question": "q", "id": true}', "id true is neither text nor an integer"),
        (b'{"question": "q", "id": 1.5}', "id 1.5 is neither text nor an integer"),
        (
            b'{"question": "q", "id": "' + b"x" * 1025 + b'"}',
            "the id is longer than 1024 characters",
        ),
        (b'{"question": "q", "id": ' + b"9" * 1025 + b"}", "the id is longer than 1024 characters"),
        (b'{"question": "q", "id": "1"}', "id '1' is already that of line 1"),
        (b'{"question": "q", "id": 1}', "id 1 is already that of line 1"),
    ],
)
def test_a_bad_line_does_not_cost_the_others(line: bytes, message: str) -> None:
    first, failed, last = read(b'{"question": "q"}\n' + line + b'\n{"question": "r"}\n')
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(failed, FailedRecord)
    problem = failed.problem
    assert (problem.code, problem.file, problem.line) == ("RM500", "in.jsonl", 2)
    assert problem.message.startswith(message)


def test_a_line_whose_list_is_too_short_does_not_cost_the_others() -> None:
    lines = b'{"facts": ["a", "b"]}\n{"facts": ["a"]}\n{"facts": "ab"}\n{"facts": ["c", "d"]}\n'
    first, short, text, last = read(lines, "facts[0]", "facts[1]")
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert isinstance(short, FailedRecord)
    assert isinstance(text, FailedRecord)
    assert (short.problem.line, text.problem.line) == (2, 3)
    assert short.problem.message == (
        "record '2' field 'facts' has 1 entry, and the prompts use facts[1]"
    )
    assert (
        text.problem.message == "record '3' field 'facts' is no list, and the prompts use facts[0]"
    )


def test_what_the_prompts_use_is_named_with_lists_as_long_as_they_must_be() -> None:
    with pytest.raises(RecmasError) as caught:
        question_record("What?", ("question", "facts[0]", "facts[1]"))
    (problem,) = caught.value.problems
    assert problem.message == "record '1' has no field 'facts', which the prompts use"
    assert "--field 'facts[0]'=... --field 'facts[1]'=..." in (problem.hint or "")
    assert '{"question": "...", "facts": ["...", "..."]}' in (problem.hint or "")


def test_lines_without_end_are_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    long = b'{"question": "' + b"x" * 1000 + b'"}'
    _, failed, last = read(b'{"question": "q"}\n' + long + b'\n{"question": "r"}')
    assert isinstance(failed, FailedRecord)
    assert failed.problem.message == "the line is longer than 100 bytes"
    assert isinstance(last, Record)
    assert last.id == "3"


def test_fields_that_prompts_do_not_use_may_be_anything() -> None:
    (record,) = read(b'{"question": "q", "meta": {"deep": [null]}, "choices": null}')
    assert isinstance(record, Record)


def test_fields_that_prompts_use_must_be_there() -> None:
    (failed,) = read(b'{"question": "q"}', "question", "choices")
    assert isinstance(failed, FailedRecord)
    assert "no field 'choices'" in failed.problem.message
    assert failed.problem.hint == (
        "The prompts use question and choices: give --field question=... --field choices=..., or "
        '--input with lines such as {"question": "...", "choices": "..."}.'
    )


def test_a_failure_has_the_form_of_a_line() -> None:
    bad, other = read(b'{"id": 3, "question": " ", "gold": "x"}\n[1]\n')
    assert isinstance(bad, FailedRecord)
    assert bad.to_json() == {
        "id": 3,
        "record": {"id": 3, "question": " ", "gold": "x"},
        "error": {"code": "RM500", "message": "record 3 has an empty question"},
    }
    assert other.to_json() == {
        "id": "2",
        "record": None,
        "error": {"code": "RM500", "message": "the line is not a JSON object"},
    }


def test_an_input_that_never_ends_is_refused() -> None:
    for device in ("/dev/zero", "/dev/urandom"):
        with pytest.raises(RecmasError, match=r"RM502.*it is a device"):
            open_records(device)
    with open_records("/dev/null") as empty:
        assert empty.read() == b""


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "missing", "file/below", "loop", "n\0l"])
def test_inputs_that_cannot_be_opened_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RecmasError, match="RM502"):
        open_records(str(tmp_path / name))


def test_records_come_from_every_form_of_table(tmp_path: Path) -> None:
    rows = [{"id": 1, "question": "What?"}, {"id": 2, "question": "Why?"}]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    for name, raw in {
        "in.json": json.dumps(rows).encode(),
        "in.csv": b"id,question\n1,What?\n2,Why?\n",
        "in.jsonl.gz": packed,
    }.items():
        (tmp_path / name).write_bytes(raw)
        with open_records(str(tmp_path / name)) as stream:
            assert count_records(stream, name) is None
            found = list(read_records(stream, file=name, fields=("question",)))
        assert [record.fields["question"] for record in found] == ["What?", "Why?"]
        assert [str(record.id) for record in found] == ["1", "2"]


@pytest.mark.parametrize("raw", [b"", b"a", b"a\n", b"a\n\n \nb", b"\n\n", b"a\nb\n"])
def test_records_are_counted_beforehand(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "in").write_bytes(raw)
    with open_records(str(tmp_path / "in")) as stream:
        assert count_records(stream, "in") == len([x for x in raw.split(b"\n") if x.strip()])
        assert stream.read() == raw


def test_a_single_question_is_a_record() -> None:
    record = question_record("q", ("question",))
    assert (record.id, record.index, record.fields["question"]) == ("1", 0, "q")
    for bad in ("", " \n", "\udcff"):
        with pytest.raises(RecmasError, match="RM500"):
            question_record(bad, ("question",))
    with pytest.raises(RecmasError, match="no field 'choices'"):
        question_record("q", ("question", "choices"))


def test_an_input_that_cannot_be_read_is_reported() -> None:
    class Broken(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(RecmasError, match=r"in.jsonl: error.RM502.*Input/output error"):
        list(read_records(Broken(), file="in.jsonl", fields=()))


def test_an_answer_is_one_line_of_the_agreed_form(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    writer = AnswerWriter(path)
    writer.write(answer(text="caf\u00e9\n"))
    writer.close()
    raw = path.read_bytes()
    assert raw.count(b"\n") == 1
    assert json.loads(raw) == {
        "id": "a",
        "record": {"question": "2+2?", "answer": 4},
        "answer": "caf\u00e9\n",
        "finish_reason": "stop",
        "rounds": 2,
        "usage": {
            "prompt_tokens": 3,
            "latent_steps": 2,
            "handover_tokens": 0,
            "completion_tokens": 1,
        },
        "timing_ms": {
            "prefill": 1.235,
            "think": 2,
            "send": 0.5,
            "write": 0,
            "decode": 4,
            "tools": 1,
            "total": 9,
        },
        "batch_size": 3,
        "tool_calls": [
            {
                "name": "search",
                "argument": "corn",
                "status": "ok",
                "result": "14 rows",
                "ms": 1.0,
            }
        ],
    }


def test_each_answer_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = AnswerWriter(tmp_path / "out.jsonl")
    for number in range(3):
        writer.write(answer(str(number)))
        assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == number + 1
    writer.close()


def test_half_a_surrogate_pair_is_written_as_json_can(tmp_path: Path) -> None:
    writer = AnswerWriter(tmp_path / "out.jsonl")
    writer.write(answer("\ud800"))
    writer.close()
    assert json.loads((tmp_path / "out.jsonl").read_bytes())["id"] == "\ud800"


def failure(name: str) -> FailedRecord:
    problem = Problem(code="RM500", message="bad")
    return FailedRecord(id=name, record={"question": ""}, problem=problem)


def test_resuming_keeps_answers_and_cuts_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerWriter(path) as writer:
        for result in (answer("a"), failure("x"), answer(7), failure("y")):
            writer.write(result)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    with AnswerWriter(path, resume=True) as writer:
        assert (set(writer.finished), writer.num_dropped) == ({"a", "7"}, 2)
        writer.write(answer("x"))
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == ["a", 7, "x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_resuming_what_is_not_there_starts_it(tmp_path: Path) -> None:
    with AnswerWriter(tmp_path / "out.jsonl", resume=True) as writer:
        assert writer.finished == {}


def test_resuming_the_answers_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    this = {"fingerprint": "1", "sampling": {"seed": 0, "stop": []}}
    with AnswerWriter(path, identity=this) as writer:
        writer.write(answer())
    before = path.read_bytes()
    other = {"fingerprint": "2", "sampling": {"seed": 0, "stop": ["x"]}}
    with pytest.raises(RecmasError, match=r"RM521.*fingerprint was .1., is .2.; sampling.stop was"):
        AnswerWriter(path, identity=other, resume=True)
    AnswerWriter(path, identity=this, resume=True).close()
    (tmp_path / "out.jsonl.run.json").write_text("")
    with pytest.raises(RecmasError, match=r"RM521.*cannot tell whose"):
        AnswerWriter(path, identity=this, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b'{"id": 1.5, "answer": "x"}\n', b"{}\n"])
def test_resuming_another_file_is_refused_and_leaves_it_alone(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(line + b"rest")
    with pytest.raises(RecmasError, match="RM521"):
        AnswerWriter(path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "notes.txt.run.json").write_text('{"format": 2}')
    with pytest.raises(RecmasError) as caught:
        AnswerWriter(path, resume=True)
    (problem,) = caught.value.problems
    assert (problem.code, problem.file, problem.line) == ("RM502", str(path), 1)
    assert path.read_bytes() == line + b"rest"


def test_old_answers_are_replaced_only_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(RecmasError, match=r"RM520.*--force"):
        AnswerWriter(path)
    assert path.read_bytes() == b"old\n"
    AnswerWriter(path, force=True).close()
    assert path.read_bytes() == b""


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerWriter(path) as writer:
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(RecmasError, match=r"RM503.*another run writes here"):
                AnswerWriter(path, **options)
        writer.write(answer())
        with pytest.raises(RecmasError, match=r"RM503.*another run"):
            AnswerWriter(path, force=True)
    assert path.read_bytes().count(b"\n") == 1
    AnswerWriter(path, resume=True).close()


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing/out.jsonl", tmp_path / ("x" * 300)):
        with pytest.raises(RecmasError, match="RM503"):
            AnswerWriter(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_device_is_reported() -> None:
    writer = AnswerWriter(Path("/dev/full"))
    with pytest.raises(RecmasError, match=r"RM503.*No space left"):
        writer.write(answer())
    writer.close()


FULL_DISK = """
import signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_records import answer
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.running.answer_file import AnswerWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails instead
writer = AnswerWriter(Path({out!r}))
try:
    for number in range(100):
        writer.write(answer(str(number)))
except RecmasError as error:
    writer.close()
    print(number, error.problems[0].code)
"""


def test_a_disk_that_fills_up_keeps_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    here = Path(__file__).parent
    script = FULL_DISK.format(paths=[str(here), *sys.path], out=str(path))

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit_files,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    number, code = done.stdout.split()
    lines = path.read_bytes().splitlines(keepends=True)
    assert code == "RM503"
    assert len(lines) == int(number) > 0
    assert all(line.endswith(b"\n") and json.loads(line) for line in lines)


@pytest.fixture
def id_bundle(own_bundle: Path) -> Path:
    """A bundle whose answer agent is shown the record's id, at the end."""
    plan = json.loads((own_bundle / "plan.json").read_text())
    shown = [*plan["agents"]["solver"]["then"], {"kind": "field", "value": "id"}]
    edit_json(own_bundle / "plan.json", "agents/solver/then", shown)
    edit_json(own_bundle / "plan.json", "fields", ["question", "id"])
    rehash(own_bundle)
    return own_bundle


def test_prompts_may_show_an_id_wherever_the_record_comes_from(id_bundle: Path) -> None:
    system = rt.load(id_bundle)
    assert system.run("What?").answer == "b"
    assert "".join(system.stream("What?")) == "b"
    assert system.run({"question": "What?", "id": 7}).answer == "h"
    records: list[rt.Record | str] = [Record(id="3", fields={"question": "What?"}), "Why?"]
    assert [answer.answer for answer in system.run(records)] == ["d", "c"]
    assert system.run(question_record("What?", ("question", "id"))).answer == "b"
    (read_one,) = read(b'{"question": "What?"}', "question", "id")
    assert isinstance(read_one, Record)
    assert system.run(read_one).answer == "b"


def test_errors_name_records_without_an_id_by_their_number(id_bundle: Path) -> None:
    with pytest.raises(RecmasError, match="record '1' has no field 'question'"):
        rt.load(id_bundle).run({"text": "What?"})
