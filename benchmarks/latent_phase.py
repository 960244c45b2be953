"""The latent phase of built systems, everything before the answer's text, by batch size.

    python benchmarks/latent_phase.py BUNDLE [BUNDLE ...] [--batch 1,2,4,8] [--repeats 3]
        [--beside naive,cached,torch] [--question TEXT] [--threads N] [--json FILE]

BUNDLEs are of one system in different precisions. Prints a Markdown table: seconds, those of
prompts and of latent steps among them, processor seconds (with `--threads 1` a busy machine changes
them little), records a second against batch 1, and how many times as fast per record as the naive
form. `--beside` adds, on the same weights and links: the naive form (Hugging Face, no cache, one
record), Hugging Face with a cache (the reference, one record), and the torch engine, at every batch
size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs

import recmas_runtime as rt
from recmas_compiler import api
from recmas_compiler.bench.open_torch import load_bundle_backbones
from recmas_compiler.links.modules import load_link
from recmas_compiler.lowering.reference import TorchSystem
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.running.run_trace import StepEvent

# The numeric oracle and the torch system are the tests' own.
sys.path.extend(str(folder / "tests") for folder in Path(__file__).parents[1:3])
from kit.naive import run_naive
from kit.torch_system import load_torch_system

# 61 tokens: about what a grade-school word problem has.
QUESTION = (
    "A baker makes 24 loaves in the morning and half as many in the afternoon. Each loaf sells "
    "for 3 dollars, and 5 loaves are left at the end of the day. He also sells 8 cakes for 12 "
    "dollars each. How much money does he take?"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--beside", type=lambda text: text.split(","), default=[])
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not set(arguments.beside) <= {"naive", "cached", "torch"}:
        parser.error("--beside knows naive, cached and torch")

    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    first = arguments.bundles[0]
    naive_s, expected = None, {}
    if "naive" in arguments.beside:
        naive_s, expected = time_naive(first, arguments.question)
        rows.append({"form": "naive", "batch": 1, "seconds": naive_s})
    if "cached" in arguments.beside:
        rows.append(
            {"form": "cached", "batch": 1, "seconds": time_cached(first, arguments.question)}
        )
    for bundle in arguments.bundles:
        system = rt.load(bundle, threads=arguments.threads)
        rows += time_system(str(bundle), system, arguments, expected)
        if bundle == first:
            tokens = count_tokens(system, arguments.question)
        del system
    if "torch" in arguments.beside:
        rows += time_system("torch engine", load_torch_system(first), arguments, expected)
    figures = {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {arguments.threads} threads",
        "prompt_tokens": tokens,
        "rows": add_ratios(rows, naive_s),
    }
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def time_system(
    form: str, system: rt.System, arguments: argparse.Namespace, expected: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Time every batch size; sizes take turns, so that all see the same machine."""
    one_token = structs.replace(system.plan.sampling, max_new_tokens=1)
    seconds: dict[int, list[float]] = {batch: [] for batch in arguments.batch}
    parts: dict[int, list[dict[str, float]]] = {batch: [] for batch in arguments.batch}
    messages = Messages()
    for repeat in range(arguments.repeats + 1):
        for batch, found in seconds.items():
            asked = records(arguments.question, batch)
            messages.seconds = {}
            processor = time.process_time()
            (answer, *_) = system.run_batch(asked, sampling=one_token, trace=messages)
            processor = time.process_time() - processor
            assert isinstance(answer, rt.Answer), answer
            if repeat > 0:  # the first one warms up
                found.append((answer.timing_ms.total - answer.timing_ms.decode) / 1e3)
                parts[batch].append({**messages.seconds, "processor": processor})
    differences = [np.abs(messages.found[k][0] - m[0]).max() for k, m in expected.items()]
    return [
        {
            "form": form,
            "batch": batch,
            "seconds": statistics.median(found),
            "least": min(found),
            "most": max(found),
            **{
                part: statistics.median(repeat[part] for repeat in parts[batch])
                for part in ("prefill", "think", "processor")
            },
            "message_difference": float(max(differences)) if differences else None,
        }
        for batch, found in seconds.items()
    ]


def time_naive(bundle: Path, question: str) -> tuple[float, dict[str, Any]]:
    """Time the naive form once; returns seconds and messages [1, M, e]."""
    program = api.compile(load_spec(bundle / "spec.yaml"))
    backbones, links = in_torch(bundle)
    record = {"id": "0", "question": question}
    start = time.perf_counter()
    # One token: the naive form runs the answer's prompt too, as the engines do.
    found = run_naive(
        program.topology, [record], backbones=backbones, links=links, max_new_tokens=1
    )
    seconds = time.perf_counter() - start
    return seconds, {name: message.numpy() for name, message in found.messages.items()}


def time_cached(bundle: Path, question: str) -> float:
    program = api.compile(load_spec(bundle / "spec.yaml"))
    backbones, links = in_torch(bundle)
    reference = TorchSystem(program.graph, backbones=backbones, links=links)
    record = {"id": "0", "question": question}
    with torch.no_grad():
        reference(record)
        return statistics.median(timed(lambda: reference(record)) for _ in range(3))


def in_torch(bundle: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest = open_bundle(bundle).manifest
    links = {
        name: load_link(bundle / link.file, link.kind, link.role, link.in_dim, link.out_dim)
        for name, link in manifest.links.items()
    }
    return load_bundle_backbones(bundle), links


class Messages:
    """Keeps the last run's messages and seconds by kind of step, and each round's prompt tokens."""

    def __init__(self) -> None:
        self.found: Mapping[str, Any] = {}
        self.tokens: dict[int, list[int]] = {}
        self.seconds: dict[str, float] = {}

    def add_batch(
        self,
        records: object,
        events: Sequence[StepEvent],
        messages: Sequence[Mapping[str, Any]],
    ) -> None:
        for event in events:
            counts = self.tokens.setdefault(event.round, [0, 0])
            counts[0] += sum(event.prefilled_tokens)
            counts[1] += sum(event.reused_tokens)
            self.seconds[event.op] = self.seconds.get(event.op, 0.0) + event.ms / 1e3
        self.found = {name: np.stack([m[name] for m in messages]) for name in messages[0]}


def count_tokens(system: rt.System, question: str) -> dict[int, dict[str, int]]:
    """Return by round the prompt tokens that run, and how many would without reuse."""
    messages = Messages()
    one_token = structs.replace(system.plan.sampling, max_new_tokens=1)
    system.run_batch(records(question, 1), sampling=one_token, trace=messages)
    return {
        round_: {"prefilled": prefilled, "without_reuse": prefilled + reused}
        for round_, (prefilled, reused) in sorted(messages.tokens.items())
    }


def records(question: str, batch: int) -> list[rt.Record]:
    return [rt.Record(id=str(i), fields={"question": question}, index=i) for i in range(batch)]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def add_ratios(rows: list[dict[str, Any]], naive_s: float | None) -> list[dict[str, Any]]:
    """Add throughput against batch 1 of the same form, and against the naive form."""
    alone = {row["form"]: row["seconds"] for row in rows if row["batch"] == 1}
    for row in rows:
        per_record = row["seconds"] / row["batch"]
        if row["form"] in alone:
            row["throughput"] = alone[row["form"]] / per_record
        if naive_s is not None:
            row["over_naive"] = naive_s / per_record
    return rows


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"**{figures['machine']}; {figures['date']}**",
        "",
        "| form | records | seconds | prompts | steps | processor | records/s against 1 "
        "| against naive | message difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        spread = f" ({row['least']:.2f} to {row['most']:.2f})" if "least" in row else ""
        difference = row.get("message_difference")
        cells = (
            row["form"],
            str(row["batch"]),
            f"{row['seconds']:.2f}{spread}",
            *(
                f"{row[part]:.2f}" if part in row else ""
                for part in ("prefill", "think", "processor")
            ),
            f"{row['throughput']:.2f} x" if "throughput" in row else "",
            f"{row['over_naive']:.1f} x" if "over_naive" in row else "",
            "" if difference is None else f"{difference:.1e}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    tokens = ", ".join(
        f"{count['prefilled']} of {count['without_reuse']} in round {round_}"
        for round_, count in figures["prompt_tokens"].items()
    )
    return "\n".join([*lines, "", f"Prompt tokens that ran: {tokens}."])


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
