"""The adapters that need no other packages, as processes, on a tiny model."""

from __future__ import annotations

import json

from kit.race import QUESTION, RACE, TOKENS, Run


def test_texts_of_recmas_are_those_of_a_loop_of_requests(ask: Run) -> None:
    loop, text = ask("plain", 2), ask("text", 2)
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
    question = QUESTION["question"]
    assert shown[0] == planner["first"].replace("{question}", question)
    assert shown[1] == critic["then"].replace("{question}", question).replace(
        "{text}", calls[0]["text"]
    )
    assert shown[3] == planner["then"].replace("{question}", question).replace(
        "{text}", calls[2]["text"]
    )
    assert calls[-1]["text"] == loop["answer"]


def test_thoughts_write_only_the_answer(ask: Run) -> None:
    latent = ask("latent", 3)
    assert latent["written_tokens"] == TOKENS
    assert latent["latent_steps"] == 8 * 4
    assert latent["peak_kib"] > 0
    assert latent["outside"] == []
