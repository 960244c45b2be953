"""Agents that run as one batch against the same agents one after another, in one process.

    python benchmarks/parallel_agents.py BUNDLE [--latent-steps N] [--repeats N] [--json FILE]

BUNDLE is one whose specialists share a backbone, such as that of benchmarks/specs/mixture.yaml. One
plan is what the compiler makes of its spec, the other what it makes without BatchParallelAgents;
both run on the same engines, in turn, so that both see the same machine. Prints a Markdown table of
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from latent_phase import QUESTION

import recmas_runtime as rt
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.lowering.plan import build_plan
from recmas_compiler.passes.batch_parallel_agents import BatchParallelAgents
from recmas_compiler.passes.pass_base import Pass
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_compiler.spec.spec import Spec, load_spec
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.plan import Plan, PrefillStep, ThinkStep
from recmas_runtime.running.run_trace import StepEvent

PHASES = {
    "specialists_think_ms": "latent steps of the agents in question",
    "specialists_ms": "their prompts and latent steps",
    "latent_phase_ms": "whole latent phase, all agents and rounds",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--spec", type=Path, help="default: the one in the bundle")
    parser.add_argument("--latent-steps", type=int, help="default: the spec's")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    steps = arguments.latent_steps
    spec = load_spec(
        arguments.spec or arguments.bundle / "spec.yaml",
        overrides=[] if steps is None else [f"latent_steps={steps}"],
    )
    system = rt.load(arguments.bundle, threads=arguments.threads)
    together = system.with_plan(plan_of(spec, PIPELINE))
    alone = tuple(p for p in PIPELINE if not isinstance(p, BatchParallelAgents))
    apart = system.with_plan(plan_of(spec, alone))
    agents = batched_agents(together)
    if not agents:
        parser.error("no agents of this bundle run as one batch")
    answers = [answer(system, arguments.question) for system in (together, apart)]
    assert answers[0] == answers[1], "the two forms answer differently"

    runs: dict[str, list[dict[str, float]]] = {"together": [], "apart": []}
    for repeat in range(arguments.repeats + 1):
        for name, system in (("together", together), ("apart", apart)):
            found = measure(system, agents, arguments.question)
            if repeat > 0:  # the first one warms up
                runs[name].append(found)
    medians = {
        name: {phase: statistics.median(run[phase] for run in found) for phase in PHASES}
        for name, found in runs.items()
    }
    figures: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {arguments.threads} threads",
        "rounds": together.plan.rounds,
        "agents": agents,
        "latent_steps": together.plan.agents[agents[0]].latent_steps,
        "repeats": arguments.repeats,
        **medians,
        "speedup": {
            phase: medians["apart"][phase] / medians["together"][phase] for phase in PHASES
        },
    }
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def plan_of(spec: Spec, passes: tuple[Pass, ...]) -> Plan:
    """Compile a spec to a plan."""
    return build_plan(run_pipeline(build_topology(spec), passes=passes))


def batched_agents(system: rt.System) -> tuple[str, ...]:
    """Return the agents of the largest batch."""
    groups = {s.agents for s in system.plan.steps if isinstance(s, PrefillStep | ThinkStep)}
    largest = max(groups, key=len)
    return largest if len(largest) > 1 else ()


def answer(system: rt.System, question: str) -> str:
    """Return the answer's first tokens."""
    return system.run(question, sampling=rt.SamplingPlan(max_new_tokens=16)).answer


def measure(system: rt.System, agents: tuple[str, ...], question: str) -> dict[str, float]:
    """Answer once, with a single token; returns milliseconds by phase."""
    events = Events()
    record = rt.Record(id="0", fields={"id": "0", "question": question})
    sampling = rt.SamplingPlan(max_new_tokens=1)
    (found,) = system.run_batch([record], sampling=sampling, trace=events)
    if isinstance(found, rt.RecmasError):
        raise found
    own = events.ms_of(set(agents))
    return {
        "specialists_think_ms": own["think"],
        "specialists_ms": own["think"] + own["prefill"],
        "latent_phase_ms": found.timing_ms.total - found.timing_ms.decode,
    }


class Events:
    """Keeps what steps took, in the place of a trace."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, frozenset[str], float]] = []

    def add_batch(self, records: object, events: Sequence[StepEvent], messages: object) -> None:
        """Keep the steps; messages are not looked at."""
        self.steps += ((event.op, frozenset(event.agents), event.ms) for event in events)

    def ms_of(self, agents: set[str]) -> dict[str, float]:
        """Return the time of prompts and latent steps of some agents."""
        return {
            wanted: sum(ms for op, who, ms in self.steps if op == wanted and who <= agents)
            for wanted in ("prefill", "think")
        }


def table(figures: dict[str, Any]) -> str:
    title = (
        f"{', '.join(figures['agents'])}: {figures['rounds']} rounds, {figures['latent_steps']} "
        f"latent steps; {figures['machine']}; {figures['date']}"
    )
    lines = [
        f"**{title}**",
        "",
        "| median of a run | one batch | one after another | times faster |",
        "|---|---|---|---|",
    ]
    for phase, what in PHASES.items():
        together, apart = figures["together"][phase], figures["apart"][phase]
        speedup = figures["speedup"][phase]
        lines.append(f"| {what} | {together:.1f} ms | {apart:.1f} ms | {speedup:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
