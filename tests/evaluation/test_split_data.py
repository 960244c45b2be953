"""Data sets whose information is split between agents: published forms, our lines, left out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.commands import run_recmasc
from recmas_compiler.evaluation.checks import make_check
from recmas_compiler.evaluation.checks.text import SQUAD, F1Check, f1, normalize
from recmas_compiler.evaluation.data.data_file import DataSet, Question, load_data
from recmas_compiler.evaluation.data.data_writer import write_questions
from recmas_compiler.evaluation.data.protocol import load_protocol
from recmas_runtime.core.errors import RecmasError

SQUAD_FILE = {
    "version": "1.1",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Lomba runs east. It is short.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Where does the Lomba run? ",
                            "answers": [
                                {"text": "east", "answer_start": 15},
                                {"text": "east", "answer_start": 15},
                                {"text": "runs east", "answer_start": 10},
                            ],
                        },
                        {"id": "q2", "question": "How deep is it?", "answers": []},
                    ],
                },
                {
                    "context": "The Tarn is long.",
                    "qas": [
                        {
                            "id": "q3",
                            "question": "Which one is long?",
                            "answers": [{"text": "The Tarn", "answer_start": 0}],
                        }
                    ],
                },
            ],
        }
    ],
}
HOTPOT = {
    "_id": "h1",
    "question": "In which year was the town of Ada's school founded?",
    "answer": "1755",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Ada", 0], ["Ada", 2], ["Town", 1]],
    "context": [
        ["Elsewhere", ["Nothing of use."]],
        ["Town", ["A town.", " It was founded in 1755.", " It has a mill."]],
        ["Ada", ["Ada went to school in Town.", " She sang.", " The school is old."]],
    ],
}
DERIVATIONS = {
    "h1": [
        [["Ada", 0, ["Ada", "went to school in", "Town"]], ["Town", 1, ["Town", "is of", "1755"]]],
        [["Town", 1, ["Town", "was founded in", "1755"]]],
    ],
    "h2": [[["Bo", 0, ["Bo", "is", "a cook."]], ["Cy", 0, ["Cy", "knows", "Bo"]]]],
}
BABI = (
    "1 Mary got the milk there.\n"
    "2 John moved to the bedroom.\n"
    "3 Sandra went back to the kitchen.\n"
    "4 Mary travelled to the hallway.\n"
    "5 Where is the milk? \thallway\t1 4\n"
    "6 John got the football there.\n"
    "7 Where is John? \tbedroom\t2\n"
    "8 Where is the football? \tbedroom\t6 2\n"
    "1 Lily is a swan.\n"
    "2 Lily is gray.\n"
    "3 Greg is a swan.\n"
    "4 What color is Greg?\tgray\t3 1 2\n"
    "5 What color is Lily?\tgray\t1 2\n"
)


def load(path: Path, name: str, *overrides: str, beside: Path | None = None) -> DataSet:
    protocol = load_protocol(name, overrides=overrides)
    return load_data(path, protocol, shown=tuple(protocol.data.fields), beside=beside)


def written(path: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def fields_of(question: Question, *names: str) -> list[object]:
    return [question.record.fields[name] for name in names]


# SQuAD


def test_squad_as_it_is_published(tmp_path: Path) -> None:
    data = load(written(tmp_path / "dev.json", SQUAD_FILE), "squad")
    first, third = data.questions
    assert fields_of(first, "id", "question", "title") == [
        "q1",
        "Where does the Lomba run?",
        "Rivers",
    ]
    assert first.record.fields["context"] == "The Lomba runs east. It is short."
    assert first.gold == {"answer": ["east", "runs east"]}
    assert third.gold == {"answer": "The Tarn"}
    assert (data.num_records, data.left_out) == (3, {"no answer stands in the passage": 1})


def test_squad_without_a_version_and_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "dev.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": SQUAD_FILE["data"]}).encode()))
    assert [one.record.id for one in load(path, "squad").questions] == ["q1", "q3"]


@pytest.mark.parametrize(
    "answers",
    [{"text": ["east", "east"], "answer_start": [15, 15]}, ["east"], "east", '["east"]'],
)
def test_squad_as_tables_have_it(tmp_path: Path, answers: object) -> None:
    row = {"id": "q", "question": "Q", "context": "C", "answers": answers}
    (question,) = load(written(tmp_path / "r.jsonl", row), "squad").questions
    assert question.gold == {"answer": "east"}


def test_the_first_n_are_of_those_that_are_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "dev.json", SQUAD_FILE)
    assert [one.record.id for one in load(path, "squad", "n=2").questions] == ["q1", "q3"]
    drawn = load(path, "squad", "n=1", "selection.kind=sample")
    assert drawn.questions[0].record.id in ("q1", "q3")
    assert drawn.left_out == {"no answer stands in the passage": 1}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"title": "x"}, "article 2 has no list `paragraphs`"),
        ({"paragraphs": [{"context": "c"}]}, "a paragraph of article 2 has no list `qas`"),
        (
            {"paragraphs": [{"context": "c", "qas": [{"id": 1, "question": "Q"}]}]},
            "not of the form that 'answers' reads; it has no answer",
        ),
        (
            {"paragraphs": [{"qas": [{"id": 1, "question": "Q", "answers": [{"t": 1}]}]}]},
            "not of the form that 'answers' reads",
        ),
        (
            {"paragraphs": [{"qas": [{"id": 1, "question": 3, "answers": [{"text": "a"}]}]}]},
            "not of the form that 'answers' reads",
        ),
        ({"paragraphs": [{"qas": [{"id": 1, "answers": [{"text": "a"}]}]}]}, "'answers' reads"),
    ],
)
def test_malformed_articles_are_told(tmp_path: Path, found: object, expected: str) -> None:
    path = written(tmp_path / "dev.json", {"data": [*SQUAD_FILE["data"], found]})
    with pytest.raises(RecmasError) as refused:
        load(path, "squad")
    assert expected in str(refused.value)
    assert "error[RM601]" in str(refused.value)


@pytest.mark.parametrize(
    "content", ['{"data": [{"paragraphs": ', '{"data": {}}', "[[1]]", "\ud800"]
)
def test_what_is_no_squad_is_read_as_a_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "dev.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecmasError, match="RM601"):
        load(path, "squad")


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    path = tmp_path / "dev.json.gz"
    path.write_bytes(gzip.compress(json.dumps(SQUAD_FILE).encode())[:-20])
    with pytest.raises(RecmasError, match=r"RM502|RM601"):
        load(path, "squad")


@pytest.mark.parametrize(
    ("gold", "said", "correct", "score"),
    [
        (["east", "runs east"], "runs east.", True, 1.0),
        (["east", "runs east"], "It runs East", False, 0.8),
        (["The Tarn"], "tarn", True, 1.0),
        (["no"], "no one", False, 2 / 3),  # the script of HotpotQA gives nothing
        (["the \u201cTarn\u201d"], "Tarn", False, 0.0),  # printed quotes stay, as in the script
        (["308"], "309", False, 0.0),
    ],
)
def test_the_check_of_squad(
    ask: Callable[..., Question], gold: list[str], said: str, correct: bool, score: float
) -> None:
    with make_check(load_protocol("squad").check) as check:
        verdict = check(said, ask(gold))
    assert verdict.correct is correct
    assert verdict.score == pytest.approx(score)


def test_the_scripts_differ_where_they_are_known_to() -> None:
    assert f1("no one", "no", SQUAD) == pytest.approx(2 / 3)
    assert f1("no one", "no") == 0.0
    assert normalize("A \u201cTarn\u201d!", SQUAD) == "\u201ctarn\u201d"
    assert normalize("A \u201cTarn\u201d!") == "tarn"
    assert isinstance(make_check(load_protocol("hotpotqa_split").check), F1Check)


# HotpotQA and R4C


def test_hotpotqa_gives_each_article_an_entry(tmp_path: Path) -> None:
    (question,) = load(written(tmp_path / "h.json", [HOTPOT]), "hotpotqa_split").questions
    assert question.record.id == "h1"
    assert question.gold == {"answer": "1755"}
    assert question.record.fields["facts"] == [
        "Ada: Ada went to school in Town. The school is old.",
        "Town: It was founded in 1755.",
    ]
    assert question.record.fields["paragraphs"] == [
        "Ada: Ada went to school in Town. She sang. The school is old.",
        "Town: A town. It was founded in 1755. It has a mill.",
    ]
    assert str(question.record.fields["context"]).startswith("Elsewhere: Nothing of use.\n\nTown:")


def test_hotpotqa_as_the_hub_has_it(tmp_path: Path) -> None:
    context, facts = HOTPOT["context"], HOTPOT["supporting_facts"]
    row = {
        **HOTPOT,
        "id": "h1",
        "context": {"title": [t for t, _ in context], "sentences": [s for _, s in context]},
        "supporting_facts": {"title": [t for t, _ in facts], "sent_id": [n for _, n in facts]},
    }
    (hub,) = load(written(tmp_path / "h.jsonl", row), "hotpotqa_split").questions
    (own,) = load(written(tmp_path / "h.json", [HOTPOT]), "hotpotqa_split").questions
    assert hub.record == own.record


def test_facts_of_ours_are_put_together_by_title(tmp_path: Path) -> None:
    row = {
        "id": "h",
        "question": "Q",
        "answer": "A",
        "context": "text",
        "facts": ["One.", "Two.", "Three."],
        "meta": {"fact_titles": ["B", "A", "B"]},
    }
    path = written(tmp_path / "h.jsonl", row)
    (hotpot,) = load(path, "hotpotqa_split").questions
    assert hotpot.record.fields["facts"] == ["B: One. Three.", "A: Two."]
    assert hotpot.record.fields["context"] == "text"
    (short,) = load(path, "r4c").questions
    assert short.record.fields["facts"] == ["One. Three.", "Two."]


def test_hotpotqa_of_one_article_is_left_out(tmp_path: Path) -> None:
    beyond = {**HOTPOT, "_id": "h2", "supporting_facts": [["Ada", 0], ["Town", 9]]}
    data = load(written(tmp_path / "h.json", [HOTPOT, beyond]), "hotpotqa_split")
    assert [one.record.id for one in data.questions] == ["h1"]
    assert data.left_out == {"needs 1 article, not two": 1}
    with pytest.raises(RecmasError, match="no records; 1 left out: needs 1 article, not two"):
        load(written(tmp_path / "h.json", [beyond]), "hotpotqa_split")


@pytest.mark.parametrize(
    "changes",
    [
        {"supporting_facts": [["Nobody", 0], ["Town", 1]]},
        {"supporting_facts": [["Ada", "x"], ["Town", 1]]},
        {"supporting_facts": 3},
        {"context": [["Ada"]]},
        {"context": "a text"},
        {"context": None},
    ],
)
def test_malformed_hotpotqa_is_told(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(RecmasError) as refused:
        load(written(tmp_path / "h.json", [{**HOTPOT, **changes}]), "hotpotqa_split")
    assert "not of the form that 'supporting_facts' reads" in str(refused.value)


def test_r4c_is_joined_with_its_questions(tmp_path: Path) -> None:
    path = written(tmp_path / "dev_csf.json", DERIVATIONS)
    beside = written(tmp_path / "hotpot.json", [HOTPOT])
    data = load(path, "r4c", beside=beside)
    (question,) = data.questions
    assert fields_of(question, "id", "question") == ["h1", HOTPOT["question"]]
    assert question.record.fields["facts"] == ["Ada went to school in Town.", "Town is of 1755."]
    assert question.record.fields["context"] == "Ada went to school in Town. Town is of 1755."
    assert question.gold == {"answer": "1755"}
    assert data.left_out == {"the file beside has no such question": 1}


def test_r4c_alone_says_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path / "dev_csf.json", DERIVATIONS)
    with pytest.raises(RecmasError, match="recmasc data PROTOCOL FILE --beside QUESTIONS"):
        load(path, "r4c")
    with pytest.raises(RecmasError, match="RM506"):
        load(written(tmp_path / "h.json", [HOTPOT]), "hotpotqa_split", beside=path)


@pytest.mark.parametrize("content", [{}, {"h1": []}, {"h1": [[["Ada", 0]]]}, {"h1": "x"}, []])
def test_what_is_no_r4c_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(RecmasError, match="RM601"):
        load(written(tmp_path / "x.json", content), "r4c")


# bAbI


def test_stories_are_cut_with_a_needed_fact_in_each_part(tmp_path: Path) -> None:
    data = load(written(tmp_path / "qa2_test.txt", BABI), "babi_split")
    milk, football, lily = data.questions
    assert fields_of(milk, "id", "question") == ["qa2_test-1", "Where is the milk?"]
    assert milk.record.fields["facts"] == [
        "Mary got the milk there. John moved to the bedroom.",
        "Sandra went back to the kitchen. Mary travelled to the hallway.",
    ]
    # 1-based 6 and 2: of five facts the second and the last, whatever their order in the file.
    assert football.record.fields["facts"] == [
        "Mary got the milk there. John moved to the bedroom.",
        "Sandra went back to the kitchen. Mary travelled to the hallway. "
        "John got the football there.",
    ]
    assert lily.record.fields["facts"] == ["Lily is a swan.", "Lily is gray. Greg is a swan."]
    assert (milk.line, football.line, lily.line) == (5, 8, 13)
    assert [one.gold["answer"] for one in data.questions] == ["hallway", "bedroom", "gray"]
    assert data.left_out == {"needs 1 fact, not two": 1, "needs 3 facts, not two": 1}
    for one in data.questions:
        parts = one.record.fields["facts"]
        assert isinstance(parts, list)
        assert " ".join(parts) == one.record.fields["context"]


def test_stories_may_have_the_line_ends_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "qa.txt"
    path.write_bytes(BABI.replace("\n", "\r\n").encode())
    plain = load(written(tmp_path / "plain" / "qa.txt", BABI), "babi_split")
    assert load(path, "babi_split").questions == plain.questions


def test_stories_of_ours_are_cut_too(tmp_path: Path) -> None:
    row = {"id": "s", "question": "Q", "answer": "A", "facts": ["a", "b", "c", "d"]}
    for support, parts in (([3, 2], ["a b c", "d"]), ([0, 1], ["a", "b c d"])):
        path = written(tmp_path / "s.jsonl", {**row, "support": support})
        assert load(path, "babi_split").questions[0].record.fields["facts"] == parts


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("1 A.\n3 B.\n", 2, "not the next one of a story"),
        ("1 A.\nB.\n", 2, "not the next one of a story"),
        ("1 A.\n2 Where?\tx\n", 2, "needs an answer, and numbers of lines"),
        ("1 A.\n2 Where?\t\t1\n", 2, "needs an answer, and numbers of lines"),
        ("1 A.\n2 Where?\tx\t3\n", 2, "needs an answer, and numbers of lines"),
        ("1 A.\n2 Where?\tx\t1\n3 Where?\tx\t2\n", 3, "needs an answer, and numbers of lines"),
        ("1 A.\n2 Where?\tx\t1\t2\n", 2, "needs an answer, and numbers of lines"),
    ],
)
def test_malformed_stories_are_told_with_their_line(
    tmp_path: Path, text: str, line: int, expected: str
) -> None:
    path = written(tmp_path / "qa.txt", text)
    with pytest.raises(RecmasError) as refused:
        load(path, "babi_split")
    assert f"{path}:{line}: error[RM601]" in str(refused.value)
    assert expected in str(refused.value)


@pytest.mark.parametrize("text", ["2 A.\n", "Hello.\n", "1\n", ""])
def test_what_is_no_story_is_read_as_a_table(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecmasError, match="RM601"):
        load(written(tmp_path / "qa.txt", text), "babi_split")


# KVComm, and records of one's own


def test_tipsheets_and_countries(tmp_path: Path) -> None:
    notes = {
        "prompt_A": "Ion LLC grows. Glint LLC shrinks.",
        "prompt_B": "Which do you choose from Ion LLC, Glint LLC?",
        "options": ["Ion LLC", "Glint LLC"],
        "label": "Ion LLC",
        "attitudes": {"Ion LLC": "positive", "Glint LLC": "negative"},
    }
    (tips,) = load(written(tmp_path / "t.jsonl", notes), "tipsheets").questions
    assert fields_of(tips, "question", "context", "options") == [
        notes["prompt_B"],
        notes["prompt_A"],
        notes["options"],
    ]
    assert tips.gold == {"answer": "Ion LLC"}
    with make_check(load_protocol("tipsheets").check) as check:
        assert check("Ion LLC.", tips).correct
        assert not check("Glint LLC", tips).correct
    where = {
        "id": "countries_0000",
        "person": "Uma",
        "landmark": "Mahaffie House",
        "country": "United States",
        "prompt_A": "Uma is at the Mahaffie House.",
        "prompt_B": "Which country is Uma located in?",
        "y": "United States",
    }
    (country,) = load(written(tmp_path / "c.jsonl", where), "countries").questions
    assert fields_of(country, "id", "question", "context") == [
        "countries_0000",
        where["prompt_B"],
        where["prompt_A"],
    ]
    assert country.gold == {"answer": "United States"}


def test_records_of_ones_own(tmp_path: Path) -> None:
    row: dict[str, Any] = {"id": "m", "question": "Q", "answer": "A", "facts": ["a", "b", "c"]}
    row["meta"] = {"answers": ["A", "An A"]}
    (question,) = load(written(tmp_path / "m.jsonl", row), "split_qa").questions
    assert question.gold == {"answer": ["A", "An A"]}
    assert question.record.fields["facts"] == ["a", "b", "c"]


# `recmasc data`


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("squad", "dev.json", SQUAD_FILE),
        ("hotpotqa_split", "h.json", [HOTPOT]),
        ("babi_split", "qa2_test.txt", BABI),
    ],
)
def test_what_is_written_reads_as_the_published_file(
    tmp_path: Path, name: str, file: str, content: object
) -> None:
    path, out = written(tmp_path / file, content), tmp_path / "out.jsonl"
    ran = run_recmasc("data", name, path, "-o", out)
    assert ran.exit_code == 0, ran.output
    published, lines = load(path, name), load(out, name)
    assert [(q.record.fields, q.gold) for q in lines.questions] == [
        (q.record.fields, q.gold) for q in published.questions
    ]
    assert lines.left_out == {}
    again = write_questions(out, load_protocol(name))
    assert again.text == out.read_text(encoding="utf-8")


def test_several_answers_are_written_beside_the_first(tmp_path: Path) -> None:
    made = write_questions(written(tmp_path / "dev.json", SQUAD_FILE), load_protocol("squad"))
    first, last = map(json.loads, made.text.splitlines())
    assert (first["answer"], first["answers"]) == ("east", ["east", "runs east"])
    assert (last["answer"], "answers" in last) == ("The Tarn", False)
    assert (made.num_written, made.left_out) == (2, {"no answer stands in the passage": 1})


def test_questions_of_another_file_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "dev.json", SQUAD_FILE)
    protocol = load_protocol("squad")
    by_id = written(tmp_path / "id.jsonl", {"id": "q3", "question": "Other?"})
    made = write_questions(path, protocol, without=[by_id])
    assert [json.loads(line)["id"] for line in made.text.splitlines()] == ["q1"]
    assert made.left_out["asked in a file of --without"] == 1
    words = {"id": "x", "question": "Which one is long?", "context": "The Tarn is long."}
    made = write_questions(path, protocol, without=[written(tmp_path / "w.jsonl", words)])
    assert [json.loads(line)["id"] for line in made.text.splitlines()] == ["q1"]
    # The same words about another text are another question.
    other = written(tmp_path / "o.jsonl", {**words, "context": "The Lot is long."})
    assert write_questions(path, protocol, without=[other]).num_written == 2
    with pytest.raises(RecmasError, match="no question is left"):
        write_questions(path, protocol, without=[path])
    story = written(tmp_path / "qa2_test.txt", BABI)
    copy = written(tmp_path / "qa2_train.txt", BABI.replace("Lily", "Mia"))
    made = write_questions(copy, load_protocol("babi_split"), without=[story])
    assert [json.loads(line)["id"] for line in made.text.splitlines()] == ["qa2_train-5"]
    nameless = written(tmp_path / "n.jsonl", {"question": "Which one is long?"})
    with pytest.raises(RecmasError, match="the record has no id, by which it could be left out"):
        write_questions(path, protocol, without=[nameless])
    # The limit counts what is left.
    first = written(tmp_path / "f.jsonl", {"id": "q1", "question": "Other?"})
    made = write_questions(path, protocol, without=[first], limit=1)
    assert [json.loads(line)["id"] for line in made.text.splitlines()] == ["q3"]
    broken = written(tmp_path / "b.jsonl", "{")
    with pytest.raises(RecmasError, match="not valid JSON"):
        write_questions(path, protocol, without=[broken])


def test_the_command_tells_what_it_left_out_and_overwrites_nothing(tmp_path: Path) -> None:
    path, out = written(tmp_path / "qa2_test.txt", BABI), tmp_path / "out.jsonl"
    ran = run_recmasc("data", "babi_split", path, "-o", out, "--limit", "1")
    assert "Wrote 1 question" in ran.output
    assert "warning[RM652]: 2 records left out: 1 needs 1 fact, not two; 1 needs" in ran.output
    short = tmp_path / "short.jsonl"
    ran = run_recmasc("data", "babi_split", path, "-o", short, "--max-words", "11")
    assert [json.loads(line)["id"] for line in short.read_text().splitlines()] == ["qa2_test-5"]
    assert "2 more than 11 words to read" in ran.output
    ran = run_recmasc("data", "babi_split", path, "-o", short, "--max-words", "9", "--force")
    assert (ran.exit_code, "no question is left" in ran.output) == (1, True)
    assert run_recmasc("data", "babi_split", path, "-o", out).exit_code == 2
    assert len(out.read_text().splitlines()) == 1
    assert run_recmasc("data", "babi_split", path, "-o", out, "--force").exit_code == 0
    assert len(out.read_text().splitlines()) == 3
    assert "squad" in run_recmasc("data", "list").output
    assert "RM600" in run_recmasc("data", "squat", path, "-o", tmp_path / "x").output
