"""The figures of a report, on answers made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recmas_cli.console import LINE_EVERY_S, RichProgress
from recmas_compiler.evaluation.intervals import Interval, bootstrap, wilson
from recmas_compiler.evaluation.runner import ScoredAnswer, SystemAnswers
from recmas_compiler.evaluation.summary import compare, savings, summarize
from recmas_runtime.core.text import markdown_table


def scored(
    question: int, *, correct: bool, seed: int = 0, rollout: int = 0, **changes: object
) -> ScoredAnswer:
    answer = {
        "finish_reason": changes.get("finish_reason", "stop"),
        "rounds": 3,
        "usage": {
            "prompt_tokens": 100,
            "latent_steps": 48,
            "handover_tokens": changes.get("handover", 0),
            "completion_tokens": 50,
        },
        "timing_ms": {"decode": 300.0, "total": changes.get("total", 400.0)},
    }
    failure = changes.get("failure")
    return ScoredAnswer(
        id=f"q{question}",
        seed=seed,
        rollout=rollout,
        correct=correct,
        extracted=None if changes.get("silent") or failure else "x",
        score=float(correct),
        batch_size=0 if failure else 4,
        answer=None if failure else answer,
        failure=None if failure is None else str(failure),
    )


def system(name: str, answers: list[ScoredAnswer], wanted: int | None = None) -> SystemAnswers:
    wanted = len(answers) if wanted is None else wanted
    return SystemAnswers(name=name, scored=tuple(answers), num_wanted=wanted)


def test_failed_and_silent_answers_stay_in_the_denominator() -> None:
    answers = [
        scored(0, correct=True),
        scored(1, correct=False, failure="too long"),
        scored(2, correct=False, silent=True),
        scored(3, correct=False, finish_reason="length"),
    ]
    summary = summarize(system("latent", answers))
    assert (summary.num_right, summary.num_answers, summary.accuracy) == (1, 4, 0.25)
    assert (summary.num_no_answer, summary.num_cut_off) == (1, 1)
    assert summary.failed == ({"id": "q1", "reason": "too long"},)
    # a batch of four took 400 ms; the failed record took part in none
    assert summary.ms == {"decode": 75.0, "total": 100.0}
    assert summary.usage["latent_steps"] == 48
    assert (summary.sd, summary.pass_at, summary.is_complete) == (None, {}, True)


def test_nothing_but_failures() -> None:
    summary = summarize(system("latent", [scored(0, correct=False, failure="x")], wanted=2))
    assert (summary.accuracy, summary.ms, summary.rounds) == (0.0, {}, None)
    assert not summary.is_complete


def test_seeds_and_pass_at_k() -> None:
    right = {(0, 0), (0, 1), (1, 0)}
    answers = [
        scored(question, correct=(question, seed) in right, seed=seed)
        for seed in (0, 1)
        for question in (0, 1)
    ]
    summary = summarize(system("latent", answers))
    assert summary.by_seed == {"0": 1.0, "1": 0.5}
    assert summary.sd == pytest.approx(0.5**0.5 / 2)
    assert summary.accuracy == 0.75
    assert summary.pass_at == {"1": 0.75, "2": 1.0}
    # two questions, not four: answering twice asks nothing new
    assert summary.interval == wilson(1.5, 2)


def test_three_answers_give_pass_at_1_2_and_3() -> None:
    answers = [scored(0, correct=i == 0, rollout=i) for i in range(3)]
    assert summarize(system("latent", answers)).pass_at == pytest.approx(
        {"1": 1 / 3, "2": 2 / 3, "3": 1.0}
    )


def test_comparison_is_by_question() -> None:
    first = [scored(i, correct=i < 6) for i in range(10)]
    second = [scored(i, correct=i in (0, 9)) for i in range(9)] + [scored(9, correct=True)]
    (comparison,) = compare([system("latent", first), system("single", second)])
    assert (comparison.system, comparison.against) == ("single", "latent")
    assert (comparison.num_only_system, comparison.num_only_against) == (1, 5)
    assert comparison.p == pytest.approx(2 * 7 / 64)


def test_comparison_of_a_partial_system_uses_shared_questions() -> None:
    first = [scored(i, correct=True) for i in range(10)]
    second = [scored(i, correct=False) for i in range(4)]
    (comparison,) = compare([system("latent", first), system("single", second, wanted=10)])
    assert (comparison.num_questions, comparison.num_only_against) == (4, 4)


def test_losses_are_compared_question_by_question() -> None:
    first = [replace(scored(i, correct=True), loss=1.0 + i, num_candidates=4) for i in range(3)]
    second = [replace(scored(i, correct=False), loss=1.5 + i, num_candidates=4) for i in range(3)]
    second += [replace(scored(3, correct=False, failure="too long"), num_candidates=4)]
    summary = summarize(system("latent", first))
    assert (summary.loss, summary.chance, summary.num_other_kind) == (2.0, 0.25, 0)
    assert summary.loss_interval == bootstrap([1.0, 2.0, 3.0])
    (comparison,) = compare([system("latent", first), system("shuffled", second)])
    assert comparison.loss is not None
    assert (comparison.loss.mean, comparison.loss.interval) == (0.5, Interval(0.5, 0.5))
    assert (comparison.accuracy.mean, comparison.accuracy.interval) == (-1.0, Interval(-1.0, -1.0))
    assert comparison.score is None
    without = summarize(system("latent", [scored(0, correct=True)]))
    assert (without.loss, without.loss_interval, without.chance) == (None, None, None)


def test_degrees_are_compared_where_a_check_knows_them() -> None:
    first = [replace(scored(i, correct=False), score=0.5) for i in range(4)]
    second = [scored(i, correct=False) for i in range(4)]
    (comparison,) = compare([system("latent", first), system("null", second)])
    assert comparison.score is not None
    assert comparison.score.interval == Interval(-0.5, -0.5)
    assert comparison.loss is None


def test_several_answers_count_as_one_question() -> None:
    first = [scored(0, correct=True, rollout=r) for r in range(4)]
    second = [scored(0, correct=r == 0, rollout=r) for r in range(4)]
    (comparison,) = compare([system("latent", first), system("single", second)])
    assert (comparison.num_only_system, comparison.num_only_against) == (0, 1)


def test_savings() -> None:
    latent = summarize(system("latent", [scored(0, correct=True, total=200.0)]))
    text = summarize(system("text@64", [scored(0, correct=True, handover=150, total=480.0)]))
    (saving,) = savings([latent, text])
    assert saving.speed_up == pytest.approx(2.4)
    assert saving.written_tokens == pytest.approx(-0.75)
    assert saving.all_tokens == pytest.approx(-0.5)
    assert savings([latent]) == ()


def test_an_aligned_table() -> None:
    table = markdown_table(["system", "n"], [["latent", "5"], ["single", "10"]])
    assert table.splitlines() == [
        "| system |  n |",
        "|--------|---:|",
        "| latent |  5 |",
        "| single | 10 |",
    ]


def test_a_line_every_half_minute_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    with RichProgress(clock=lambda: now).stage("gsm8k latent", 8, done=2) as advance:
        assert capsys.readouterr().err == "gsm8k latent ...\n"
        now = LINE_EVERY_S - 1
        advance(note="100.0% right")
        assert capsys.readouterr().err == ""
        now = LINE_EVERY_S
        advance(note="75.0% right")
        # two in half a minute: the other four take a minute
        assert capsys.readouterr().err == "gsm8k latent: 4/8, 75.0% right, 1.0 min left\n"
        now = LINE_EVERY_S + 1
        advance(note="60.0% right")
    assert capsys.readouterr().err == "gsm8k latent: 5/8, 60.0% right, 31 s\n"


def test_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with RichProgress().stage("gsm8k latent", 2) as advance:
        advance(2, note="50.0% right")
    shown = capsys.readouterr().err
    assert "gsm8k latent" in shown
    assert "2/2" in shown
    assert "50.0% right" in shown
