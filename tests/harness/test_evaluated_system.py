"""Systems as harnesses see them: texts become records, and are scored behind them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.harness.evaluated_system import Asked, EvaluatedSystem, SystemArguments
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.prompts.render import Tokens
from recmas_runtime.running.executor import Execution


@pytest.fixture
def tested(hand_bundle: Path) -> Iterator[EvaluatedSystem]:
    found = load(hand_bundle)
    yield found
    found.system.close()


def load(bundle: Path, **given: Any) -> EvaluatedSystem:
    return EvaluatedSystem.load(SystemArguments.of({"bundle": bundle, "threads": 1, **given}))


def asked(*texts: str, **document: Any) -> list[Asked]:
    return [
        Asked(
            id=f"task/{place}", turns=(EarlierTurn(role="user", content=text),), document=document
        )
        for place, text in enumerate(texts)
    ]


def test_texts_are_scored_as_the_backbone_reads_them(hand_bundle: Path) -> None:
    """`single` has one agent whose whole prompt and text a backbone can read in one piece."""
    tested = load(hand_bundle, baseline="single")
    assert tested.continues_context
    questions, texts = asked("say 7", "and 12"), [["h", " h", "hb", "\n"], ["c", "ccc"]]
    found = dict(tested.likelihoods(questions, texts, at_once=2))
    for place, record in enumerate(tested.records(questions)):
        (item,) = tested.system.prompts(record).get("solver", "then", {}).items
        assert isinstance(item, Tokens)
        tokenizer = tested.system.loaded.chats["one"].tokenizer
        for text in texts[place]:
            written = tokenizer.encode(text)
            read = tested.system.read_text([*item.ids, *written])[len(item.ids) :]
            likelihood, greedy = found[place][text]
            assert likelihood == pytest.approx(sum(token.logprob or 0.0 for token in read))
            assert greedy == (text in ("h", "c"))


def test_white_space_counts_where_a_text_goes_on(tested: EvaluatedSystem) -> None:
    (record,) = tested.records(asked("say 7"))
    (verbatim,) = tested.system.score_batch([record], [[" h", "h"]], verbatim=True)
    (as_answer,) = tested.system.score_batch([record], [["h"]])
    assert not isinstance(verbatim, RecmasError)
    assert not isinstance(as_answer, RecmasError)
    assert verbatim.num_tokens == (2, 1)
    assert as_answer.losses == pytest.approx(verbatim.losses[:1]), "the prompt ends in a line"


def test_a_question_is_run_once_for_all_its_texts(
    tested: EvaluatedSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    run_rounds = Execution.run_rounds
    monkeypatch.setattr(Execution, "run_rounds", lambda self: (ran.append(1), run_rounds(self))[1])
    texts = [["a", "b", "c", "d"]] * 6
    found = dict(tested.likelihoods(asked(*(f"q {n}" for n in range(6))), texts, at_once=3))
    assert len(ran) == 2
    assert [*found[0]] == texts[0]


def test_answers_come_in_order(tested: EvaluatedSystem) -> None:
    texts = [f"say {n}" for n in (7, 1, 4, 0, 9)]
    assert [*tested.answers(asked(*texts), {"max_new_tokens": 4}, at_once=2)] == [*"hbeaj"]


def test_questions_that_cannot_be_asked_are_all_found_before(tested: EvaluatedSystem) -> None:
    long = "x" * 400
    with pytest.raises(RecmasError) as raised:
        tested.records(asked("fine 1", *[long] * 7, ""))
    told = [problem.message for problem in raised.value.problems]
    assert len(told) == 6
    assert told[0].startswith("record 'task/1': the prompt of agent 'planner' takes 407 positions")
    assert told[-1] == "8 questions of 9 cannot be asked"


def test_controls_are_over_all_questions(hand_bundle: Path) -> None:
    tested = load(hand_bundle, baseline="shuffled", answer="letter")
    some = [*asked("say 7", letter="h"), *asked("say 1", letter="h"), *asked("x 2", letter="c")]
    questions = [
        Asked(id=f"t/{place}", turns=one.turns, document=one.document)
        for place, one in enumerate(some)
    ]
    records = tested.records(questions)
    covered = tested.over(records, questions).covered
    assert covered is not None
    assert {covered.sender(record).id for record in records[:2]} == {"t/2"}
    with pytest.raises(RecmasError, match="'task/0' has no field 'letter'"):
        tested.over(records[:1], asked("say 7"))
    with pytest.raises(RecmasError, match="RM508"):
        [*tested.answers(asked("say 7", letter="h"), {}, at_once=1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nothing": 1}, r"RM506.*unknown field `nothing`.*They are bundle, baseline"),
        ({"rounds": "two"}, r"RM506.*Expected `int \| null`, got `str`"),
        ({"rounds": 3}, "RM506.*the bundle has 2"),
        ({"baseline": "other"}, "RM508.*there is no baseline 'other'"),
        ({"field": "text"}, "RM500.*has no field 'question': the prompts use question, its"),
        ({"bundle": "nowhere"}, "RM400.*nowhere"),
    ],
)
def test_arguments_that_are_refused(hand_bundle: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecmasError, match=message):
        load(**{"bundle": hand_bundle, **given}).records(asked("say 7"))
