"""The team of `team.json` as a spec of recmas, and its model alone, as an endpoint serves it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

TEAM = Path(__file__).parent / "team.json"
SMOLLM2 = "builtin:smollm2-135m-instruct"


def team_spec(
    team: dict[str, Any],
    *,
    rounds: int,
    latent_steps: int,
    precision: str,
    source: str = SMOLLM2,
) -> str:
    """Return the team as a spec: each agent hands thoughts to the next, the last to the first."""
    names = [agent["name"] for agent in team["agents"]]
    agents = {}
    for agent, before in zip(team["agents"], [names[-1], *names], strict=False):
        then = _prompt(agent["then"], before)
        prompt = (
            {"first": _prompt(agent["first"], before), "then": then} if "first" in agent else then
        )
        agents[agent["name"]] = {"backbone": "smol", "system": team["system"], "prompt": prompt}
    links: dict[str, dict[str, object]] = {
        f"{source} -> {target}": {"kind": "projected", "init": "aligned"}
        for source, target in pairwise(names)
    }
    links[f"{names[-1]} -> {names[0]}"] = {"kind": "projected", "init": "aligned", "feedback": True}
    more = {"rounds": rounds, "latent_steps": latent_steps, "links": links}
    return _written("team", source, agents, names[-1], more, precision)


def endpoint_spec(*, precision: str, source: str = SMOLLM2) -> str:
    """Return a system of one agent that answers conversations as they are."""
    agents = {"model": {"backbone": "smol", "prompt": "{{ question }}"}}
    return _written("single", source, agents, "model", {"serve": {"history": "turns"}}, precision)


def _prompt(text: str, before: str) -> str:
    slot = "{{ latent." + before + " }}"
    return text.replace("{question}", "{{ question }}").replace("{text}", slot)


def _written(
    name: str,
    source: str,
    agents: dict[str, Any],
    answers: str,
    more: dict[str, Any],
    precision: str,
) -> str:
    spec = {
        "recmas": 1,
        "name": name,
        "backbones": {"smol": {"source": source}},
        "agents": agents,
        **more,
        "answer": {"agent": answers, "max_new_tokens": 96, "temperature": 0.0},
        "build": {"precision": precision, "max_prompt_tokens": 768, "max_batch": 8},
    }
    return json.dumps(spec, indent=1) + "\n"  # JSON is YAML
