"""How the time of the latent phase grows with agents, rounds, latent steps and prompt length.

    python benchmarks/growth.py BUNDLE [--repeats 2] [--threads N] [--json FILE]

Engines and weights are the bundle's; only plans and questions differ: a ring of agents on one
backbone, each hearing the one before it, the last one answering. One of the four grows at a time.

The exponent p is that of t = a + b n^p, fitted by least squares of relative errors. The slope of
log t over log n alone would mix in what does not grow (a > 0 makes it too small) and what is left
out once (the last agent of the last round writes and does not think: a < 0 makes it too large);
with a on its own, p tells how the growing part grows, which is what a limit of 1.05 is about.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

import recmas_runtime as rt
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.plan import (
    AgentPlan,
    CachePlan,
    DecodeStep,
    Limits,
    LinkPlan,
    Message,
    Plan,
    PrefillStep,
    PromptPart,
    SendStep,
    Step,
    ThinkStep,
)

THEORY = {
    "agents": "linear",
    "rounds": "linear",
    "latent steps": "linear, and attention over what the steps themselves add",
    "prompt tokens": "linear, and attention over the prompt: up to quadratic",
}


@dataclass(frozen=True)
class Size:
    """One system and one question."""

    agents: int = 2
    rounds: int = 2
    latent_steps: int = 8
    words: int = 32


AXES: dict[str, tuple[Sequence[int], Callable[[int], Size]]] = {
    "agents": ((2, 4, 8, 12), lambda n: Size(agents=n)),
    "rounds": ((2, 4, 8, 12), lambda n: Size(rounds=n)),
    "latent steps": ((8, 16, 32, 64, 96), lambda n: Size(latent_steps=n)),
    "prompt tokens": ((64, 128, 256, 384), lambda n: Size(latent_steps=2, words=n)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = rt.load(arguments.bundle, threads=arguments.threads)
    figures: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {arguments.threads} threads",
    }
    for axis, (counts, size_of) in AXES.items():
        seconds = measure(base, [size_of(n) for n in counts], arguments.repeats)
        fixed, factor, exponent = fit(counts, seconds)
        figures[axis] = {
            "n": list(counts),
            "seconds": seconds,
            "fixed_s": fixed,
            "factor_s": factor,
            "exponent": exponent,
        }
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(base: rt.System, sizes: Sequence[Size], repeats: int) -> list[float]:
    """Return the median seconds of the latent phase of each size; sizes take turns."""
    found: list[list[float]] = [[] for _ in sizes]
    systems = [on_ring(base, size) for size in sizes]
    one_token = structs.replace(base.plan.sampling, max_new_tokens=1)
    systems[0].run("warm up", sampling=one_token)
    for _ in range(repeats):
        for size, system, seconds in zip(sizes, systems, found, strict=True):
            timing = system.run("word " * size.words, sampling=one_token).timing_ms
            seconds.append((timing.total - timing.decode) / 1e3)
    return [statistics.median(seconds) for seconds in found]


def on_ring(base: rt.System, size: Size) -> rt.System:
    """Return a ring of agents on the engines of a system; all its links weigh the same."""
    (link, *_) = (step.links[0] for step in base.plan.steps if isinstance(step, SendStep))
    loaded = base.loaded
    operands = loaded.engines.operands
    shared = {**operands, **dict.fromkeys(ring_links(size), operands[link])}
    engines = replace(loaded.engines, operands=shared)
    return rt.System(ring(base.plan, size), replace(loaded, engines=engines))


def ring_links(size: Size) -> list[str]:
    return [f"a{i}->a{(i + 1) % size.agents}" for i in range(size.agents)]


def ring(plan: Plan, size: Size) -> Plan:
    """Return the plan of a ring of agents; they are like a given plan's answer agent."""
    like, links = plan.agents[plan.answer_agent], ring_links(size)
    positions = size.words + size.latent_steps + 64
    agents, caches, steps = {}, {}, list[Step]()
    for i in range(size.agents):
        question = PromptPart(kind="field", value="question")
        slot = PromptPart(kind="slot", value=f"a{(i - 1) % size.agents}")
        agents[f"a{i}"] = AgentPlan(
            backbone=like.backbone,
            system=(),
            first=(question,) if i == 0 else None,
            then=(question, slot),
            inner=like.inner,
            latent_steps=size.latent_steps,
        )
        caches[f"a{i}"] = CachePlan(
            backbone=like.backbone, agents=(f"a{i}",), capacity=positions, bytes_per_sample=0
        )
    for round_ in range(1, size.rounds + 1):
        for i in range(size.agents):
            name, is_last = f"a{i}", round_ == size.rounds and i == size.agents - 1
            variant = "first" if round_ == 1 and i == 0 else "then"
            steps.append(
                PrefillStep(
                    round=round_, agents=(name,), variants=(variant,), reuse_prefix=round_ > 1,
                    cache=name,
                    messages=() if variant == "first" else (
                        Message(
                            agent=name, slot=f"a{(i - 1) % size.agents}", link=links[i - 1],
                            round=round_ - 1 if i == 0 else round_,
                        ),
                    ),
                )
            )  # fmt: skip
            if is_last:
                steps.append(DecodeStep(round=round_, agent=name, cache=name))
            else:
                steps.append(ThinkStep(round=round_, agents=(name,), fused=True, cache=name))
                steps.append(
                    SendStep(
                        round=round_, source=name, targets=(f"a{(i + 1) % size.agents}",),
                        links=(links[i],), apply_inner=False,
                    )
                )  # fmt: skip
    return structs.replace(
        plan,
        rounds=size.rounds,
        answer_agent=f"a{size.agents - 1}",
        agents=agents,
        links={
            link: LinkPlan(source=f"a{i}", target=f"a{(i + 1) % size.agents}", carries="thoughts")
            for i, link in enumerate(links)
        },
        caches=caches,
        steps=tuple(steps),
        limits=Limits(max_prompt_tokens=positions, max_batch=1),
        fields=("question",),
        stop_when=None,
        tools=None,
    )


def fit(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fit t = a + b n^p; returns a, b and p, the best of a grid."""
    n, t = np.array(counts, float), np.array(seconds)
    best = (np.inf, 0.0, 0.0, 0.0)
    for exponent in np.arange(0.5, 2.5, 0.005):
        # Each equation over its t: relative errors count.
        columns = np.stack([1 / t, n**exponent / t], axis=1)
        fixed, factor = np.linalg.lstsq(columns, np.ones_like(t), rcond=None)[0]
        error = float(np.sum((columns @ [fixed, factor] - 1) ** 2))
        best = min(best, (error, float(fixed), float(factor), float(exponent)))
    return best[1:]


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"**{figures['machine']}; {figures['date']}**",
        "",
        "| grows | n | seconds | exponent | theory |",
        "|---|---|---|---|---|",
    ]
    for axis, theory in THEORY.items():
        found = figures[axis]
        n, seconds = (
            ", ".join(texts)
            for texts in (map(str, found["n"]), (f"{s:.2f}" for s in found["seconds"]))
        )
        lines.append(f"| {axis} | {n} | {seconds} | {found['exponent']:.2f} | {theory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
