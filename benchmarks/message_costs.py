"""What a hand-over costs, by kind of message: beside the prefill it rides on, and a latent step.

    python benchmarks/message_costs.py OUT [--kinds thoughts,context,cache,text] [--repeats 9]
        [--threads N]

Builds a reader and a solver on SmolLM2 for each kind of message in OUT, unless they are there: the
reader has a text of about 200 tokens in its prompt, the solver the question alone. All run one
record in turns, so that all see the same machine. Prints a Markdown table of medians, least and
most in brackets, in milliseconds, and ratios of one turn. `hand-over` is making the message and
sending it; rows of a cache are read there, and written to the receiver's cache as part of its
prompt, which counts too. `thoughts` is there for its latent steps; the sender's prefill of `cache`
keeps no states.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experts import call

import recmas_runtime as rt
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.running.run_trace import StepEvent
from recmas_runtime.sequences.sequence_batch import SequenceBatch

STEPS = 16
KINDS = {
    "thoughts": "{carries: thoughts, init: random}",
    "context": "{carries: context, init: random}",
    "cache": "{carries: cache}",
    "text": "{carries: text, max_tokens: 64}",
}
SPEC = """
recmas: 1
name: costs
latent_steps: NUM_STEPS
backbones: {smol: {source: "builtin:smollm2-135m-instruct"}}
agents:
  reader:
    backbone: smol
    inner: {init: random}
    prompt: |
      {{ context }}
      Tell all of this to a colleague in your own words, with every name and number.
  solver:
    backbone: smol
    prompt: |
      {{ latent.reader }}
      {{ question }}
links:
  reader -> solver: MESSAGE
answer: {agent: solver, max_new_tokens: 16}
build: {max_prompt_tokens: 640}
"""
TEXT = (
    "The harbour of Larnmouth was built in 1843 by the engineer Edith Marlow, who had drained "
    "the marshes north of the town two years before. It has three basins. The first one takes "
    "fishing boats, of which 140 were counted last summer; the second takes the ferry to Holm, "
    "which leaves at seven in the morning and at four in the afternoon; the third has been "
    "closed since a storm broke its outer wall in 1987. Repairs would cost 12 million pounds, "
    "and the council has put aside 5 million so far. Anna Reed, who runs the museum beside the "
    "first basin, keeps the plans that Marlow drew, and a bell of the ship Constance, which "
    "sank off the point with a load of copper."
)
RECORD = rt.Record(id="0", index=0, fields={"context": TEXT, "question": "Who built the harbour?"})


class Clock:
    """Adds up the milliseconds of the calls of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.ms = 0.0
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self._function(*arguments)
        self.ms += (time.perf_counter() - start) * 1e3
        return found


class Events:
    """Keeps the events of the last run."""

    def __init__(self) -> None:
        self.events: Sequence[StepEvent] = ()

    def add_batch(self, records: object, events: Sequence[StepEvent], messages: object) -> None:
        self.events = events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=physical_cores())
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kinds: list[str] = arguments.kinds
    systems = {
        kind: rt.load(built(arguments.out, kind), threads=arguments.threads) for kind in kinds
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for repeat in range(arguments.repeats + 1):
        for kind, system in systems.items():
            times = timed(system)
            if repeat > 0:  # the first one warms up
                found[kind].append(times)
    columns = tuple(found[kinds[0]][0])
    print("| message | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for kind, runs in found.items():
        cells = [spread([run[column] for run in runs]) for column in columns]
        print(f"| `{kind}` | " + " | ".join(cells) + " |")
    print("\nTurn by turn:")
    print("\n".join(ratios(found)))


def ratios(found: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    """Yield lines that compare kinds, run by run, where both were measured."""
    if {"context", "cache"} <= set(found):
        prefill = "sender's prefill"
        shares = [
            (sends[prefill] + sends["hand-over"]) / keeps[prefill]
            for sends, keeps in zip(found["context"], found["cache"], strict=True)
        ]
        yield f"prefill that sends its states, over the prefill alone: {spread(shares)}"
    if {"thoughts", "cache"} <= set(found):
        shares = [
            hands["hand-over"] / thinks["latent step"]
            for hands, thinks in zip(found["cache"], found["thoughts"], strict=True)
        ]
        yield f"hand-over of rows, over a latent step: {spread(shares)}"
    for kind in {"cache", "context"} & set(found) if "text" in found else ():
        pairs = list(zip(found["text"], found[kind], strict=True))
        for column in ("before the answer", "whole"):
            shares = [text[column] / other[column] for text, other in pairs]
            yield f"`text` over `{kind}`, {column}: {spread(shares)}"


def built(out: Path, kind: str) -> Path:
    """Return a bundle, built if it is not there."""
    bundle, spec = out / kind, out / f"{kind}.yaml"
    if not bundle.exists():
        steps = STEPS if kind == "thoughts" else 0
        text = SPEC.replace("MESSAGE", KINDS[kind]).replace("NUM_STEPS", str(steps))
        spec.write_text(text, encoding="utf-8")
        call("build", str(spec), "-o", str(bundle), "--quiet")
    return bundle


def timed(system: rt.System) -> dict[str, float]:
    """Run the record; returns tokens and milliseconds of what it did."""
    taking = Clock(SequenceBatch.take_rows)
    whole, events = SequenceBatch.take_rows, Events()
    # Measured where it happens: the executor counts it to the receiver's prompt.
    SequenceBatch.take_rows = lambda *arguments: taking(*arguments)  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        (answer,) = system.run_batch([RECORD], trace=events)
        total = (time.perf_counter() - start) * 1e3
    finally:
        SequenceBatch.take_rows = whole  # type: ignore[method-assign]
    assert isinstance(answer, rt.Answer), answer
    spent = {
        (event.op, event.agents[0]): event.ms for event in events.events if event.op != "decode"
    }
    return {
        "tokens read": answer.usage.prompt_tokens,
        "written": sum(sum(event.written_tokens) for event in events.events),
        "rows": sum(sum(event.handed_rows) for event in events.events),
        "sender's prefill": spent["prefill", "reader"],
        "latent step": spent.get(("think", "reader"), 0.0) / (STEPS - 1),
        "writing": spent.get(("write", "reader"), 0.0),
        "hand-over": spent["send", "reader"] + taking.ms,
        "receiver's prefill": spent["prefill", "solver"] - taking.ms,
        "before the answer": total - answer.timing_ms.decode,
        "whole": total,
    }


def spread(values: Sequence[float]) -> str:
    if min(values) == max(values):
        return f"{values[0]:.4g}"
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


if __name__ == "__main__":
    main()
