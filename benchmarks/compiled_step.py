"""Whether compiling pays: the time of a training step, compiled and eager, in turns.

    python benchmarks/compiled_step.py SPEC OUT [--mode rollout] [--dtype bfloat16]
        [--batches 4] [--repeats 3]

Forward and backward of the first batches of the spec's records, which differ in length. First all
of them once with both graphs, which compiles; then `--repeats` times, eager and compiled in turns.
Shows the medians, the ratio, how long compiling took and after how many more steps it has paid.

Writes OUT/compiled.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import recmas_compiler as rc
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.materialize import materialize_links
from recmas_compiler.lowering.reference import load_backbones
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.lowering.training_graph.latents import Mode
from recmas_compiler.training.settings import train_settings
from recmas_runtime.core.progress import Silent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mode", choices=("teacher_forced", "rollout"), default="teacher_forced")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    spec = rc.load_spec(arguments.spec)
    program = rc.compile(spec).graph
    settings = train_settings(spec)
    size = settings.section.outer.batch_size
    records = settings.examples(spec).train[: arguments.batches * size]
    batches = [records[first : first + size] for first in range(0, len(records), size)]
    found = {
        "mode": arguments.mode,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "batch_size": size,
        **measure(program, batches, arguments.mode, DTYPES[arguments.dtype], arguments.repeats),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "compiled.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))


def measure(
    program: Graph,
    batches: Sequence[Sequence[TrainExample]],
    mode: Mode,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, Any]:
    """Return seconds by batch for both graphs, and how far their losses are apart."""
    backbones = load_backbones(program, progress=Silent())
    made = materialize_links(program, backbones, progress=Silent())
    for backbone in backbones.values():
        backbone.model.to(dtype=dtype)
    links = {link_id: link.module for link_id, link in made.items()}
    graphs = {
        name: TrainingGraph(
            program,
            backbones=backbones,
            links=links,
            mode=mode,
            compile_calls=name == "compiled",
        )
        for name in ("eager", "compiled")
    }
    first = {name: [step(graph, some) for some in batches] for name, graph in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for some in batches:
            for name, graph in graphs.items():
                times[name].append(step(graph, some)[0])
    seconds = {name: median(found) for name, found in times.items()}
    both = zip(first["eager"], first["compiled"], strict=True)
    warm_up = sum(taken for taken, _ in first["compiled"]) - len(batches) * seconds["compiled"]
    return {
        "step_seconds": seconds,
        "fastest_seconds": {name: min(found) for name, found in times.items()},
        "compiling_seconds": warm_up,
        "largest_loss_difference": max(abs(one[1] - other[1]) for one, other in both),
    }


def step(graph: TrainingGraph, records: Sequence[TrainExample]) -> tuple[float, float]:
    """Return seconds and loss of one step."""
    graph.zero_grad()
    batch = graph.prepare(records)
    started = time.perf_counter()
    loss = graph(batch).mean
    loss.backward()
    return time.perf_counter() - started, loss.item()


def report(found: dict[str, Any]) -> str:
    seconds, fastest = found["step_seconds"], found["fastest_seconds"]
    gain = seconds["eager"] - seconds["compiled"]
    paid = f"{found['compiling_seconds'] / gain:.0f} steps" if gain > 0 else "never"
    rows = [
        ("step, eager", f"{seconds['eager']:.3f} s (fastest {fastest['eager']:.3f})"),
        ("step, compiled", f"{seconds['compiled']:.3f} s (fastest {fastest['compiled']:.3f})"),
        ("eager over compiled", f"{seconds['eager'] / seconds['compiled']:.3f}"),
        ("compiling", f"{found['compiling_seconds']:.0f} s"),
        ("has paid after", paid),
        ("largest difference of losses", f"{found['largest_loss_difference']:.1e}"),
    ]
    title = (
        f"{found['mode']}, {found['dtype']}, batch {found['batch_size']}, "
        f"{found['threads']} threads"
    )
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


if __name__ == "__main__":
    main()
