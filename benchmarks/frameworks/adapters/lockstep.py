"""What every adapter has: questions come in, a line each, answers go out, nobody else is asked.

Standard library alone, for it runs in the environment of each framework.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCAL = ("127.0.0.1", "::1", "localhost", None, "", b"127.0.0.1", b"localhost")


@dataclass(frozen=True)
class Agent:
    """One agent of the team; without `first` it sees a text in every round."""

    name: str
    first: str | None
    then: str

    def prompt(self, question: str, text: str | None) -> str:
        """Return the user message: of a first round if there is no text yet."""
        if text is None:
            assert self.first is not None, f"{self.name} needs a text"
            return self.first.replace("{question}", question)
        # The question first: texts may spell a slot.
        before, after = self.then.split("{text}")
        return before.replace("{question}", question) + text + after


@dataclass(frozen=True)
class Settings:
    """What the driver tells an adapter; see `--help` of any of them."""

    system: str
    agents: tuple[Agent, ...]
    rounds: int
    max_tokens: int
    url: str
    model: str
    bundle: str
    baseline: str
    threads: int
    latent_steps: int
    at_once: int


Ask = Callable[[str], dict[str, Any]]
"""Takes a question; returns `answer`, and counts that no endpoint sees."""
AskAll = Callable[[list[str]], list[dict[str, Any]]]


def answer_questions(make: Callable[[Settings], Ask]) -> None:
    """Answer JSON lines `{"questions": [...]}`, the questions of a line at once, each in a thread.

    A line comes back for each, with what came of every question and what they took together.
    """

    def make_all(settings: Settings) -> AskAll:
        ask = make(settings)
        pool = ThreadPoolExecutor(settings.at_once)

        def ask_all(questions: list[str]) -> list[dict[str, Any]]:
            if settings.at_once == 1:  # as anybody would call it
                return [ask(question) for question in questions]
            return list(pool.map(ask, questions))

        return ask_all

    answer_together(make_all)


def answer_together(make: Callable[[Settings], AskAll]) -> None:
    """The same for what takes several questions by itself."""
    outside: list[str] = []
    sys.addaudithook(lambda event, arguments: _refuse_outside(event, arguments, outside))
    # Frameworks print; what the driver reads is what standard output was at the start.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ask_all = make(_settings())
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        questions = json.loads(line)["questions"]
        wall, processor = time.perf_counter(), time.process_time()
        found: dict[str, Any] = {"answers": ask_all(questions)}
        found |= {
            "seconds": time.perf_counter() - wall,
            "processor_s": time.process_time() - processor,
            "peak_kib": _peak_kib(),
            "outside": sorted(set(outside)),
        }
        print(json.dumps(found), file=out, flush=True)


def _settings() -> Settings:
    parser = argparse.ArgumentParser()
    parser.add_argument("--team", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--url", default="", help="an endpoint of OpenAI's form")
    parser.add_argument("--model", default="")
    parser.add_argument("--bundle", default="", help="or a folder: a bundle, or weights")
    parser.add_argument("--baseline", default="latent")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--latent-steps", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=1)
    given = parser.parse_args()
    team = json.loads(given.team.read_text(encoding="utf-8"))
    return Settings(
        system=team["system"],
        agents=tuple(Agent(a["name"], a.get("first"), a["then"]) for a in team["agents"]),
        rounds=given.rounds,
        max_tokens=given.max_tokens,
        url=given.url,
        model=given.model,
        bundle=given.bundle,
        baseline=given.baseline,
        threads=given.threads,
        latent_steps=given.latent_steps,
        at_once=given.at_once,
    )


def _refuse_outside(event: str, arguments: tuple[Any, ...], outside: list[str]) -> None:
    """Refuse names and addresses that are not this machine's, and remember them."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in LOCAL:
        outside.append(str(host))
        raise PermissionError(f"this benchmark asks nobody outside this machine: {host}")


def _peak_kib() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0
