"""How much faster greedy text is with drafts by prompt lookup, and whether it stays the same.

    python benchmarks/speculation.py BUNDLE --data gsm8k_test.jsonl --questions 40

Each question is answered without drafts and with them, in turn, whichever first; only the time of
the answer's text counts, prompts apart. Answers that end are told apart from those that do not: the
latter run in circles and are easily foretold. A bundle needs not declare drafts.

With `--threads 1` the processor time of that thread is told beside the clock, which is of use where
others run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from msgspec import structs
from numpy.typing import NDArray

import recmas_runtime as rt
from recmas_runtime.formats.plan import SpeculationPlan
from recmas_runtime.running.records import Record
from recmas_runtime.running.run_trace import StepEvent

GROUPS: Final = {"stop": "answers that end", "length": "answers that do not"}
_WAYS: Final = ("without", "with")


@dataclass
class Decodes:
    """A trace that keeps what the last answer's text took."""

    last: StepEvent | None = None

    def add_batch(
        self,
        records: Sequence[Record],
        events: Sequence[StepEvent],
        messages: Sequence[Mapping[str, NDArray[Any]]],
    ) -> None:
        """Receive a batch of one record."""
        self.last = next(event for event in events if event.op == "decode")


@dataclass
class Group:
    """Answers of one kind; seconds by way, with the clock and of the thread."""

    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_same: int = 0
    clock_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in _WAYS})
    thread_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in _WAYS})

    def to_json(self) -> dict[str, Any]:
        """Return its figures; ratios are without over with."""
        clock, thread = (
            {way: sum(taken[way]) for way in _WAYS} for taken in (self.clock_s, self.thread_s)
        )
        ratios = [a / b for a, b in zip(*(self.clock_s[way] for way in _WAYS), strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return {
            "answers": len(ratios),
            "identical": self.num_same,
            "tokens": self.num_tokens,
            "drafted": self.num_drafted,
            "accepted": self.num_accepted,
            "tokens_per_s": {way: self.num_tokens / clock[way] for way in _WAYS},
            "ratio": clock["without"] / clock["with"],
            "ratio_by_answer": quartiles,
            "ratio_of_thread_time": thread["without"] / thread["with"],
        }


def measure(
    systems: Mapping[str, rt.System],
    ways: Sequence[str],
    question: str,
    max_new_tokens: int,
    groups: Mapping[str, Group],
) -> bool:
    """Answer a question each way; returns whether its prompt is short enough for the bundle."""
    found: dict[str, tuple[rt.Answer, StepEvent, float]] = {}
    for way in ways:
        trace = Decodes()
        start = time.thread_time()
        (answer,) = systems[way].run_batch([question], trace=trace, max_new_tokens=max_new_tokens)
        thread_s = time.thread_time() - start
        if isinstance(answer, rt.RecmasError):
            return False
        assert trace.last is not None
        # Processor time of the prompts is not told apart, so their share by the clock is.
        share = answer.timing_ms.decode / answer.timing_ms.total
        found[way] = answer, trace.last, thread_s * share
    answer, decode, _ = found["with"]
    group = groups[answer.finish_reason]
    group.num_drafted += sum(decode.drafted_tokens)
    group.num_accepted += sum(decode.accepted_tokens)
    group.num_tokens += answer.usage.completion_tokens
    group.num_same += answer.answer == found["without"][0].answer
    for way, (told, _, thread_s) in found.items():
        group.clock_s[way].append(told.timing_ms.decode / 1e3)
        group.thread_s[way].append(thread_s)
    return True


def main() -> None:
    """Answer questions both ways, and print the figures of each group as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with `question`")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-draft", type=int, default=SpeculationPlan().max_draft)
    parser.add_argument("--min-match", type=int, default=SpeculationPlan().min_match)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    drafts = SpeculationPlan(max_draft=options.max_draft, min_match=options.min_match)
    system = rt.load(options.bundle, threads=options.threads)
    plans = {
        "without": structs.replace(system.plan, speculation=None),
        "with": structs.replace(system.plan, speculation=drafts),
    }
    systems = {way: system.with_plan(plan) for way, plan in plans.items()}
    lines = options.data.read_text(encoding="utf-8").splitlines()[: options.questions]
    groups = {reason: Group() for reason in GROUPS}
    num_refused = 0
    try:
        for place, line in enumerate(lines):
            ways = _WAYS if place % 2 else tuple(reversed(_WAYS))
            question = json.loads(line)["question"]
            num_refused += not measure(systems, ways, question, options.max_new_tokens, groups)
    except KeyboardInterrupt:
        print("interrupted: these are the questions so far", file=sys.stderr)
    told = {GROUPS[reason]: group.to_json() for reason, group in groups.items() if group.num_tokens}
    print(json.dumps({"bundle": str(options.bundle), "refused": num_refused, **told}, indent=2))


if __name__ == "__main__":
    main()
