"""Every framework's adapter against a running endpoint of a tiny model: `make test-frameworks`."""

from __future__ import annotations

from typing import Any

import pytest

from kit.race import QUESTIONS, TOKENS, Run

pytestmark = pytest.mark.frameworks


@pytest.mark.parametrize("system", ["langgraph", "crewai", "autogen"])
def test_a_framework_sends_the_same_and_answers_the_same(ask: Run, system: str) -> None:
    (mine,), (loop,) = ask(system, 2), ask("plain", 2)
    assert [call["messages"] for call in mine["asked"]] == [
        [{"role": m["role"], "content": m["content"]} for m in call["messages"]]
        for call in loop["asked"]
    ]
    assert mine["answer"] == loop["answer"]
    for call in mine["asked"]:
        limit = call["sampling"].get("max_tokens") or call["sampling"]["max_completion_tokens"]
        assert (limit, call["sampling"]["temperature"]) == (TOKENS, 0)
        assert "stop" not in call["sampling"]
    assert mine["outside"] == []


@pytest.mark.parametrize("system", ["langgraph", "crewai", "autogen"])
def test_a_framework_with_questions_at_once(ask: Run, system: str) -> None:
    mine, loop = ask(system, 1, QUESTIONS), ask("plain", 1, QUESTIONS)
    assert [_said(row) for row in mine] == [_said(row) for row in loop]
    assert [row["calls"] for row in mine] == [3, 3, 3]


def _said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["messages"][-1]["content"], call["text"]) for call in row["asked"]]


def test_prompts_of_crewai_itself_are_longer(ask: Run) -> None:
    (own,), (given,) = ask("crewai-own", 1), ask("crewai", 1)
    assert own["calls"] == given["calls"] == 3
    assert own["prompt_tokens"] > given["prompt_tokens"]


def test_avp_thinks_and_answers(ask: Run) -> None:
    (found,) = ask("avp", 2)
    assert found["calls"] == 6
    assert found["latent_steps"] == 5 * 4
    assert found["answer"]
    assert found["outside"] == []
