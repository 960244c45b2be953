"""Relays of any length: only the first agent sees the code, only the last is asked for it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

SMOL = "builtin:smollm2-135m-instruct"
MAKE_DATA = Path(__file__).parents[1] / "examples" / "relay" / "make_data.py"

READ = "{{ context }} Repeat it."
PASS = "{{ latent.%s }} Repeat it."
SAY = "{{ latent.%s }} Repeat the code, its digits only."


def relay_spec(
    *,
    agents: int = 2,
    rounds: int = 1,
    latent_steps: int = 4,
    sources: tuple[str, ...] = (SMOL,),
    train: dict[str, Any],
) -> str:
    """Return the text of a spec (JSON, which is YAML).

    With several rounds the last agent's thoughts go back to the first one, and only the first round
    shows the code: then it passes every link of every round.

    Args:
        agents: In a row, at least two.
        rounds: Times that the row is passed.
        latent_steps: Of every agent.
        sources: Backbones that the agents have in turn.
        train: The spec's `train`.
    """
    names = agent_names(agents)
    prompts: dict[str, Any] = {"reader": READ}
    if rounds > 1:
        prompts["reader"] = {"first": READ, "then": PASS % "speaker"}
    for before, name in pairwise(names):
        prompts[name] = (SAY if name == "speaker" else PASS) % before
    links: dict[str, Any] = {f"{a} -> {b}": {} for a, b in pairwise(names)}
    if rounds > 1:
        links["speaker -> reader"] = {"feedback": True}
    spec = {
        "recmas": 1,
        "name": "relay",
        "rounds": rounds,
        "latent_steps": latent_steps,
        "backbones": {f"b{i}": {"source": source} for i, source in enumerate(sources)},
        "agents": {
            name: {"backbone": f"b{i % len(sources)}", "prompt": prompts[name]}
            for i, name in enumerate(names)
        },
        "links": links,
        "answer": {"agent": "speaker", "max_new_tokens": 16},
        "train": train,
    }
    return json.dumps(spec, indent=1) + "\n"


def agent_names(agents: int) -> list[str]:
    """Return the names of a row of agents."""
    return ["reader", *(f"passer{i}" for i in range(1, agents - 1)), "speaker"]


def relay_targets(agents: int) -> dict[str, str]:
    """Return what each agent should think or say; it is what their inner links are aligned to."""
    return dict.fromkeys(agent_names(agents)[:-1], "context") | {"speaker": "code"}


def write_codes(path: Path, *, digits: int, records: int, seed: int) -> None:
    """Write the example's data into a file."""
    command = [sys.executable, str(MAKE_DATA), "--digits", str(digits)]
    command += ["--records", str(records), "--seed", str(seed)]
    with path.open("w") as file:
        subprocess.run(command, stdout=file, check=True)
