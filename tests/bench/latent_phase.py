"""The latent phase of a built system against the same weights in plain torch, in one process.

    python tests/bench/latent_phase.py BUNDLE [--question TEXT] [--repeats N] [--json FILE]

Prints a Markdown table: the read bandwidth of this machine, the time of a latent step against the
time of reading its weights once, the share of Python in it, the whole latent phase (everything
before the answer's text) against Hugging Face without a cache (the naive form) and with one (the
reference), and the prompt tokens that each round prefills.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import recmas_runtime as rt
from recmas_compiler import api
from recmas_compiler.links.checkpoint import load_link
from recmas_compiler.lowering.naive import run_naive
from recmas_compiler.lowering.reference import TorchSystem, load_backbones
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.onnx_session import physical_cores
from recmas_runtime.progress import Silent
from recmas_runtime.trace import StepEvent

# 61 tokens: about what a grade-school word problem has.
QUESTION = (
    "A baker makes 24 loaves in the morning and half as many in the afternoon. Each loaf sells "
    "for 3 dollars, and 5 loaves are left at the end of the day. He also sells 8 cakes for 12 "
    "dollars each. How much money does he take?"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    threads = physical_cores()
    torch.set_num_threads(threads)
    system = rt.load(arguments.bundle)
    figures: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{cpu_name()}, {threads} cores, {platform.system()}",
        "rounds": system.plan.rounds,
        "agents": len(system.plan.agents),
        "latent_steps": max(a.latent_steps for a in system.plan.agents.values()),
    }
    figures |= measure_step(system, arguments.bundle, arguments.repeats)
    figures |= measure_latent_phase(system, arguments)
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure_step(system: rt.System, bundle: Path, repeats: int) -> dict[str, Any]:
    """Time latent steps and weight reads in turn, so that both see the same machine."""
    agent = system.plan.agents[system.plan.answer_agent]
    engine = system._machinery.engines.backbones[agent.backbone]
    inner = {
        name: array[None] for name, array in system._machinery.engines.operands[agent.inner].items()
    }
    num_bytes = weight_bytes(bundle / engine.entry.decoder) + sum(a.nbytes for a in inner.values())
    block = np.ones(num_bytes // 4, np.float32)
    timed = TimedSession(engine.decoder)
    start, num_steps = 200, 33
    thought = np.random.default_rng(0).standard_normal((1, 1, engine.entry.width), np.float32)
    cache = engine.new_cache(1, 320)
    cache.session = timed
    steps, reads, overheads = [], [], []
    for repeat in range(repeats + 1):
        reads += [timed_call(lambda: read(block, physical_cores())) for _ in range(3)]
        timed.seconds = 0.0
        begin = time.perf_counter()
        engine.rollout(cache, thought, thought, np.array([start]), inner, num_steps)
        wall = time.perf_counter() - begin
        if repeat > 0:  # the first one warms up
            steps.append(wall / (num_steps - 1))
            overheads.append(1 - timed.seconds / wall)
    # The floor is the fastest read seen, the step the median: noise counts against the engine.
    read_s, step_s = min(reads), statistics.median(steps)
    return {
        "step_weights_mb": num_bytes / 1e6,
        "read_bandwidth_gb_s": num_bytes / read_s / 1e9,
        "floor_ms": read_s * 1e3,
        "step_ms": step_s * 1e3,
        "step_over_floor": step_s / read_s,
        "overhead_share": statistics.median(overheads),
    }


def measure_latent_phase(system: rt.System, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time everything before the answer's text, in three forms."""
    spec = load_spec(arguments.bundle / "spec.yaml")
    program = api.compile(spec)
    backbones = load_backbones(program.graph, progress=Silent())
    links = {
        name: load_link(arguments.bundle / entry.file)
        for name, entry in system.manifest.links.items()
    }
    record = {"id": "0", "question": arguments.question}
    sampling = replace(system.plan.sampling, max_new_tokens=1)
    events: dict[int, list[int]] = defaultdict(lambda: [0, 0])

    class Tokens:
        """Counts prompt tokens per round in the place of a trace."""

        def add_event(self, event: StepEvent, *, batch: int) -> None:
            events[event.round][0] += sum(event.prefilled_tokens)
            events[event.round][1] += sum(event.reused_tokens)

        def add_messages(self, messages: Any) -> None:
            self.messages = messages

    tokens = Tokens()
    question = rt.Record(id="0", fields=record)
    system.run_batch([question], sampling=sampling, trace=tokens)
    runs = []
    for _ in range(arguments.repeats):
        timing = system.run(record, sampling=sampling).timing_ms
        runs.append((timing.total - timing.decode) / 1e3)
    engine_s = statistics.median(runs)

    reference = TorchSystem(program.graph, backbones=backbones, links=links)
    with torch.no_grad():
        reference(record)
        cached_s = statistics.median(timed_call(lambda: reference(record)) for _ in range(3))
    # One token: the naive form runs the answer's prompt too, as the engines do.
    naive: list[Any] = []
    naive_s = timed_call(
        lambda: naive.append(
            run_naive(
                program.topology, [record], backbones=backbones, links=links, max_new_tokens=1
            )
        )
    )
    differences = [
        float(np.abs(message - naive[0].messages[name].numpy()).max())
        for name, message in tokens.messages.items()
    ]
    return {
        "latent_phase_s": {"engines": engine_s, "torch_cached": cached_s, "naive": naive_s},
        "speedup_over_naive": naive_s / engine_s,
        "speedup_over_torch_cached": cached_s / engine_s,
        "largest_message_difference": max(differences),
        "prompt_tokens": {
            round_: {"prefilled": prefilled, "without_reuse": prefilled + reused}
            for round_, (prefilled, reused) in sorted(events.items())
        },
    }


class TimedSession:
    """Adds up the time spent inside the engine."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.seconds = 0.0

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(binding, options)
        self.seconds += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def weight_bytes(graph: Path) -> int:
    """Bytes of the weights that a graph reads, each once."""
    model = onnx.load(str(graph), load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            places[place["offset"]] = int(place["length"])
    return sum(places.values())


def read(block: np.ndarray, threads: int) -> None:
    """Read an array once, each thread its part."""
    parts = np.array_split(block, threads)
    workers = [threading.Thread(target=np.add.reduce, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def timed_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or os.uname().machine


def table(f: dict[str, Any]) -> str:
    phase, tokens = f["latent_phase_s"], f["prompt_tokens"]
    rows = [
        ("read bandwidth", f"{f['read_bandwidth_gb_s']:.1f} GB/s"),
        ("weights of a latent step", f"{f['step_weights_mb']:.0f} MB"),
        ("floor: reading them once", f"{f['floor_ms']:.2f} ms"),
        ("latent step", f"{f['step_ms']:.2f} ms ({f['step_over_floor']:.2f} x floor)"),
        ("of it outside the engine", f"{f['overhead_share']:.2%}"),
        ("latent phase, engines", f"{phase['engines']:.2f} s"),
        (
            "latent phase, torch with cache",
            f"{phase['torch_cached']:.2f} s ({f['speedup_over_torch_cached']:.1f} x)",
        ),
        (
            "latent phase, naive (no cache)",
            f"{phase['naive']:.2f} s ({f['speedup_over_naive']:.1f} x)",
        ),
        ("largest message difference to naive", f"{f['largest_message_difference']:.1e}"),
    ]
    for round_, count in tokens.items():
        rows.append(
            (
                f"prompt tokens prefilled in round {round_}",
                f"{count['prefilled']} ({count['without_reuse']} without reuse)",
            )
        )
    title = (
        f"{f['agents']} agents, {f['rounds']} rounds, {f['latent_steps']} latent steps; "
        f"{f['machine']}; {f['date']}"
    )
    lines = [f"**{title}**", "", "| figure | value |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


if __name__ == "__main__":
    main()
