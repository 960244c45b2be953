"""A process that holds one model and times it when asked: JSON lines in, JSON lines out.

    python peer_worker.py ADAPTER OPTIONS

ADAPTER is a module beside this file with a class `Model`, OPTIONS its arguments as JSON. What runs
here is what the peer's own environment has: nothing but numpy is taken for granted.

Shape legend: S positions of a call, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
# The first tokens are marks of turns.
FIRST_TOKEN = 300
HEAD_CALLS = 5


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model says of itself.

    Attributes:
        step_bytes: Of the weights that a step reads, but for those of a graph that the race counts.
        head_in_prompt: Whether a prompt computes the logits of its last position.
        head_in_step: Whether a latent step computes logits that nobody needs.
    """

    version: str
    vocabulary: int
    step_bytes: int = 0
    head_in_prompt: bool = True
    head_in_step: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


class PeerModel(ABC):
    """One model of one peer, open."""

    about: About

    @abstractmethod
    def prompt(self, ids: Sequence[int]) -> None:
        """Run a prompt in an empty cache, up to what comes behind it."""

    @abstractmethod
    def fill(self, rows: int, ids: Sequence[int]) -> None:
        """Let each of so many rows have the prompt in its cache."""

    @abstractmethod
    def rewind(self) -> None:
        """Go back behind the prompts."""

    @abstractmethod
    def step(self, count: int) -> None:
        """Take latent steps with all rows: the state behind a position is the next one's input."""

    @abstractmethod
    def drop(self) -> None:
        """Let go of the rows."""

    @abstractmethod
    def write(self, ids: Sequence[int], count: int) -> float:
        """Write tokens behind a prompt, the likeliest each time; returns the seconds of one."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Logits:
        """Return the logits [S, V] behind every position of a text."""

    def step_logits(self, ids: Sequence[int]) -> Logits:
        """Return the same of a text read token by token, where a step has weights of its own."""
        raise NotImplementedError

    def head(self, rows: int) -> None:
        """Compute the logits of so many rows' states, where the head is a call of its own."""
        raise NotImplementedError


class Asked:
    """Answers requests about a model."""

    def __init__(self, model: PeerModel) -> None:
        self._model = model
        self._filled: tuple[int, int] | None = None
        self._prompts = 0

    def prompt(self, *, positions: int) -> dict[str, float]:
        # Another one each time: some peers keep what they have read, and would read nothing.
        self._prompts += 1
        ids = self._ids(positions, self._prompts)
        return {"seconds": seconds(lambda: self._model.prompt(ids)), **self._head(1)}

    def steps(self, *, rows: int, used: int, count: int) -> dict[str, float]:
        if self._filled != (rows, used):
            self.drop()
            self._model.fill(rows, self._ids(used))
            self._filled = rows, used
        self._model.rewind()
        return {
            "seconds": seconds(lambda: self._model.step(count)) / count,
            **self._head(rows),
        }

    def text(self, *, used: int, count: int) -> dict[str, float]:
        return {"seconds": self._model.write(self._ids(used), count)}

    def drop(self) -> dict[str, float]:
        if self._filled is not None:
            self._model.drop()
            self._filled = None
        return {}

    def losses(self, *, texts: Sequence[Sequence[int]]) -> dict[str, float]:
        """Return the mean loss of all tokens but the first of each text, in nats."""
        together = np.concatenate(
            [token_losses(self._model.logits(ids[:-1]), ids[1:]) for ids in texts]
        )
        found = {"loss": float(together.mean()), "tokens": len(together)}
        with contextlib.suppress(NotImplementedError):
            one_by_one = [token_losses(self._model.step_logits(t[:-1]), t[1:]) for t in texts]
            found["step_loss"] = float(np.concatenate(one_by_one).mean())
        return found

    def logits(self, *, ids: Sequence[int], to: str) -> dict[str, float]:
        np.save(to, self._model.logits(ids))
        return {}

    def _ids(self, positions: int, number: int = 0) -> list[int]:
        """Return a prompt, the same for every peer that was asked as often."""
        last = self._model.about.vocabulary
        first = min(FIRST_TOKEN, last // 2)
        drawn = np.random.default_rng((positions, number)).integers(first, last, positions)
        return [int(token) for token in drawn]

    def _head(self, rows: int) -> dict[str, float]:
        """Return the time of a head that is a call of its own."""
        with contextlib.suppress(NotImplementedError):
            self._model.head(rows)
            return {
                "head_s": median(seconds(lambda: self._model.head(rows)) for _ in range(HEAD_CALLS))
            }
        return {}


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def token_losses(logits_SV: Logits, ids: Sequence[int]) -> NDArray[np.float64]:
    """Return the negative log likelihood of each token, in nats."""
    assert len(logits_SV) == len(ids), f"{len(logits_SV)} rows of logits for {len(ids)} tokens"
    shifted = logits_SV - logits_SV.max(axis=-1, keepdims=True)
    totals = np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64))
    found: NDArray[np.float64] = totals - shifted[np.arange(len(ids)), np.asarray(ids)]
    return found


def main() -> None:
    """Answer requests until the input ends."""
    if len(sys.argv) != 3:
        print("usage: peer_worker ADAPTER OPTIONS")
        sys.exit(0 if "--help" in sys.argv else 2)
    with _answers() as answers:
        module = importlib.import_module(sys.argv[1])
        options = json.loads(sys.argv[2])
        start = time.perf_counter()
        model: PeerModel = module.Model(**options)
        opened = time.perf_counter() - start
        _say(answers, {"open_s": opened, "about": vars(model.about)})
        asked = Asked(model)
        for line in sys.stdin:
            request = json.loads(line)
            _say(answers, getattr(asked, request.pop("do"))(**request))


def _answers() -> TextIO:
    """Return the real stdout, and let everything that libraries print go to stderr instead."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _say(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    # Adapters import this module by name: that must not be a second one.
    sys.modules["peer_worker"] = sys.modules["__main__"]
    # The parent may have ended before the answer.
    with contextlib.suppress(BrokenPipeError):
        main()
