"""Agents that copy the beginning of their prompts from each other, against the same without.

    python benchmarks/shared_prompts.py BUNDLE [--batch 1,8] [--times 1,6] [--repeats N]

One plan is the bundle's, the other is the same without `prefix_from`; both run on the same engines,
in turn, so that both see the same machine. A question is a word problem, written one or more times.
Prints a Markdown table: prompt tokens that ran for a record, and medians of the seconds that all
records of a batch took, with one token of text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_phase import QUESTION
from msgspec import structs

import recmas_runtime as rt
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.plan import Plan, PrefillStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--times", type=numbers, default=[1, 6])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    arguments = parser.parse_args()

    sharing = rt.load(arguments.bundle, threads=arguments.threads)
    forms = {"copied": sharing, "computed by each": sharing.with_plan(without_copies(sharing.plan))}
    compare(forms, arguments.batch, arguments.times, arguments.repeats)


def compare(
    forms: Mapping[str, rt.System], batches: Sequence[int], lengths: Sequence[int], repeats: int
) -> None:
    """Print a Markdown table: prompt tokens of a record and seconds, of forms run in turn."""
    print("| records | question, times | beginnings are | prompt tokens | seconds |")
    print("|---|---|---|---|---|")
    for batch in batches:
        for times in lengths:
            seconds: dict[str, list[float]] = {name: [] for name in forms}
            tokens: dict[str, int] = {}
            for repeat in range(repeats + 1):
                for name, system in forms.items():
                    start = time.perf_counter()
                    tokens[name] = prompt_tokens(system, batch, times)
                    if repeat > 0:  # the first one warms up
                        seconds[name].append(time.perf_counter() - start)
            for name in forms:
                print(
                    f"| {batch} | {times} | {name} | {tokens[name]} "
                    f"| {statistics.median(seconds[name]):.2f} "
                    f"({min(seconds[name]):.2f} to {max(seconds[name]):.2f}) |",
                    flush=True,
                )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def without_copies(plan: Plan) -> Plan:
    """Return the plan in which every agent runs its own first prompt whole."""
    steps = (
        structs.replace(step, prefix_from=None) if isinstance(step, PrefillStep) else step
        for step in plan.steps
    )
    return structs.replace(plan, steps=tuple(steps))


def prompt_tokens(system: rt.System, batch: int, times: int) -> int:
    """Answer a batch of questions that differ in their first word; return one record's tokens."""
    questions = [f"{i}. {' '.join([QUESTION] * times)}" for i in range(batch)]
    sampling = structs.replace(system.plan.sampling, max_new_tokens=1)
    answers = system.run(questions, sampling=sampling)
    return answers[0].usage.prompt_tokens


if __name__ == "__main__":
    main()
