"""The adapters that need no other packages, as processes, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kit.race import QUESTIONS, RACE, TOKENS, Run


def test_texts_of_recmas_are_those_of_a_loop_of_requests(ask: Run) -> None:
    (loop,), (text,) = ask("plain", 2), ask("text", 2)
    assert loop["answer"] == text["answer"]
    assert loop["written_tokens"] == text["written_tokens"] == 6 * TOKENS
    assert loop["calls"] == text["calls"] == 6
    assert 0 < text["prompt_tokens"] < loop["prompt_tokens"], "recmas reuses beginnings"

    team = json.loads((RACE / "team.json").read_text(encoding="utf-8"))
    planner, critic = team["agents"][:2]
    calls = loop["asked"]
    assert [call["messages"][0] for call in calls] == 6 * [
        {"role": "system", "content": team["system"]}
    ]
    shown = [call["messages"][1]["content"] for call in calls]
    question = QUESTIONS[0]["question"]
    assert shown[0] == planner["first"].replace("{question}", question)
    assert shown[1] == critic["then"].replace("{question}", question).replace(
        "{text}", calls[0]["text"]
    )
    assert shown[3] == planner["then"].replace("{question}", question).replace(
        "{text}", calls[2]["text"]
    )
    assert calls[-1]["text"] == loop["answer"]


def test_thoughts_write_only_the_answer(ask: Run) -> None:
    (latent,) = ask("latent", 3)
    assert latent["written_tokens"] == TOKENS
    assert latent["latent_steps"] == 8 * 4
    assert latent["peak_kib"] > 0
    assert latent["outside"] == []


@pytest.mark.parametrize("system", ["plain", "text", "latent"])
def test_questions_at_once_are_answered_as_one_by_one(ask: Run, system: str) -> None:
    together = ask(system, 1, QUESTIONS)
    assert [row["id"] for row in together] == ["0", "1", "2"]
    assert [row["calls"] for row in together] == [3, 3, 3]
    assert len({row["seconds"] for row in together}) == 1, "each has its share of the same time"
    (last,) = ask(system, 1, QUESTIONS[-1:])
    assert together[-1]["answer"] == last["answer"]
    if system == "plain":
        one, other = (
            [(c["messages"], c["text"]) for c in r["asked"]] for r in (together[-1], last)
        )
        assert one == other


def test_an_adapter_that_asks_outside_is_refused_and_found_out() -> None:
    """As telemetry that nobody switched off would be."""
    program = """if True:
        import sys, urllib.request
        sys.path.insert(0, sys.argv[1])
        from lockstep import answer_questions
        def ask(question):
            try:
                urllib.request.urlopen("http://telemetry.example/", timeout=5)
            except OSError as error:
                return {"answer": str(error)}
        sys.argv = ["ask", "--team", sys.argv[2], "--rounds", "1", "--max-tokens", "1"]
        answer_questions(lambda settings: ask)
    """
    done = subprocess.run(
        [sys.executable, "-c", program, RACE / "adapters", RACE / "team.json"],
        input=json.dumps({"questions": ["Who is there?"]}) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ready, row = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": True}
    assert row["outside"] == ["telemetry.example"]
    assert "asks nobody outside" in row["answers"][0]["answer"]
