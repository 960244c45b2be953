"""How much a message carries: codes of some digits through a relay of trained links.

    python benchmarks/relay_capacity.py OUT [--digits 1,2,3,4,5,6] [--latent-steps 1,2,4,8]
        [--relays one,two,three,feedback,mixed] [--steps 300] [--inner-steps 0] [--other SOURCE]

Trains the links of one relay per cell by rollout, from aligned links or, with --inner-steps, from
those of an inner stage, and measures on held-out records how often greedy decoding writes the code
exactly: with the record's own messages (latent), with none (null), with those of another record
(shuffled), with the others' mean (mean). A code that the last agent could only guess is right once
in 10^digits.

Relays: one, two, three links in a row; feedback (two agents, two rounds, the code is shown in the
first one only: it passes a link, comes back, and passes it again); mixed (one link between two
backbones, needs --other).

OUT/cells holds one folder per cell; what is there is not run again, and a cell that was stopped
goes on from its last checkpoint. Writes OUT/relay.json, relay.md and, with matplotlib, relay.png,
about all cells that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relay_specs import SMOL, relay_spec, relay_targets, write_codes

import recmas_compiler as rc
from recmas_compiler.evaluation.intervals import wilson
from recmas_compiler.training.loop.distributed import joined_world
from recmas_compiler.training.loop.metrics import read_cost
from recmas_compiler.training.run import RunOptions, run_stages
from recmas_compiler.training.session import open_session
from recmas_compiler.training.settings import train_settings
from recmas_compiler.training.tasks.outer import CONTROLS, exact_answers
from recmas_runtime.core.progress import LineProgress

# Agents and rounds of each relay.
RELAYS = {"one": (2, 1), "two": (3, 1), "three": (4, 1), "feedback": (2, 2), "mixed": (2, 1)}


@dataclass(frozen=True)
class Cell:
    """One training."""

    relay: str
    digits: int
    latent_steps: int

    @property
    def name(self) -> str:
        return f"{self.relay}-{self.digits}-digits-{self.latent_steps}-steps"


@dataclass(frozen=True)
class Plan:
    """What all cells have in common."""

    source: str
    other: str | None
    steps: int
    inner_steps: int
    batch_size: int
    lr: float
    records: int
    held_out: int
    seed: int
    backbone_dtype: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--digits", type=numbers, default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--latent-steps", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--relays", type=lambda text: text.split(","), default=list(RELAYS)[:4])
    parser.add_argument("--source", default=SMOL, help="backbone of all agents")
    parser.add_argument("--other", help="backbone of the first agent of `mixed`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--inner-steps", type=int, default=0, help="of an inner stage before")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--records", type=int, default=2400)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone-dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    if not set(arguments.relays) <= set(RELAYS):
        parser.error(f"relays are {', '.join(RELAYS)}")
    if "mixed" in arguments.relays and arguments.other is None:
        parser.error("the relay `mixed` needs --other")

    plan = Plan(**{name: getattr(arguments, name) for name in Plan.__annotations__})
    for cell in cells(arguments.relays, arguments.digits, arguments.latent_steps):
        measure(cell, plan, arguments.out / "cells" / cell.name)
        found = read_cells(arguments.out)
        write_report(found, plan, arguments.out)
    print(table(found))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def cells(
    relays: Sequence[str], digits: Sequence[int], latent_steps: Sequence[int]
) -> Iterator[Cell]:
    for relay in relays:
        for steps in latent_steps:
            for number in digits:
                yield Cell(relay=relay, digits=number, latent_steps=steps)


def measure(cell: Cell, plan: Plan, folder: Path) -> None:
    """Write a cell's figures into a file, unless it was run before with the same plan."""
    path = folder / "cell.json"
    asked = {"cell": asdict(cell), "plan": asdict(plan)}
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if {name: kept[name] for name in asked} != asked:
            raise SystemExit(f"{path} was run with other settings: use another OUT")
        return
    folder.mkdir(parents=True, exist_ok=True)
    figures = asked | train_cell(cell, plan, folder)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Return the figures of all cells, also those of earlier runs."""
    found = [json.loads(path.read_text()) for path in (out / "cells").glob("*/cell.json")]
    order = list(RELAYS)
    return sorted(
        found,
        key=lambda f: (
            order.index(f["cell"]["relay"]),
            f["cell"]["latent_steps"],
            f["cell"]["digits"],
        ),
    )


def train_cell(cell: Cell, plan: Plan, folder: Path) -> dict[str, Any]:
    """Train the cell's links and measure them."""
    agents, rounds = RELAYS[cell.relay]
    sources = (plan.source,)
    if cell.relay == "mixed":
        assert plan.other is not None, "checked before"
        sources = (plan.other, plan.source)
    seeds = {"train": plan.seed, "held_out": plan.seed + 1_000_000}
    counts = {"train": plan.records, "held_out": plan.held_out}
    for part, seed in seeds.items():
        write_codes(folder / f"{part}.jsonl", digits=cell.digits, records=counts[part], seed=seed)
    spec = folder / "spec.yaml"
    spec.write_text(
        relay_spec(
            agents=agents,
            rounds=rounds,
            latent_steps=cell.latent_steps,
            sources=sources,
            train={
                "data": "train.jsonl",
                "held_out": "held_out.jsonl",
                "targets": relay_targets(agents),
                "inner": {"steps": max(1, plan.inner_steps)},
                "outer": {
                    "mode": "rollout",
                    "steps": plan.steps,
                    "batch_size": plan.batch_size,
                    "lr": plan.lr,
                },
                "eval_every": max(1, plan.steps // 3),
                "checkpoint_every": max(1, plan.steps // 3),
                "seed": plan.seed,
                "backbone_dtype": plan.backbone_dtype,
            },
        )
    )
    loaded = rc.load_spec(spec)
    program = rc.compile(loaded).graph
    with joined_world() as world:
        session = open_session(
            loaded, program, train_settings(loaded), world=world, progress=LineProgress()
        )
        options = RunOptions(folder=folder, resume=True)
        report = run_stages(session, "all" if plan.inner_steps else "outer", options)
        if report.interrupted:
            raise SystemExit("stopped; the same command goes on")
        held_out = session.examples.held_out
        exact = exact_answers(session.graph, held_out, batch_size=plan.batch_size)
    known = {example.targets["speaker"] for example in session.examples.train}
    codes = [example.targets["speaker"] for example in held_out]
    return {
        "num": len(codes),
        "seen_in_training": sum(code in known for code in codes) / len(codes),
        "right": {name: sum(right) for name, right in exact.items()},
        "loss": report.stages["outer"]["after"],
        "loss_before": report.stages["outer"]["before"],
        "cost": asdict(read_cost(folder / "outer")),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| relay | digits | latent steps | exact (95 %) | null | shuffled | mean | chance "
        "| codes seen in training | loss | s/step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for figures in found:
        cell, num, right = figures["cell"], figures["num"], figures["right"]
        interval = wilson(right["latent"], num)
        shares = " | ".join(f"{right[name] / num:.1%}" for name in ("null", "shuffled", "mean"))
        lines.append(
            f"| {cell['relay']} | {cell['digits']} | {cell['latent_steps']} "
            f"| **{right['latent'] / num:.1%}** ({interval.low:.1%} to {interval.high:.1%}) "
            f"| {shares} | {10.0 ** -cell['digits']:.4%} | {figures['seen_in_training']:.0%} "
            f"| {figures['loss']['latent']:.3f} | {figures['cost']['step_seconds']:.2f} |"
        )
    return "\n".join(lines)


def write_report(found: Sequence[dict[str, Any]], plan: Plan, out: Path) -> None:
    """Write all that is known so far."""
    (out / "relay.json").write_text(
        json.dumps({"plan": asdict(plan), "cells": list(found)}, indent=1) + "\n"
    )
    title = f"Relay: {plan.steps} steps of {plan.batch_size} records, {plan.source}"
    (out / "relay.md").write_text(f"# {title}\n\n{table(found)}\n")
    draw(found, title, out / "relay.png")


def draw(found: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    relays = list(dict.fromkeys(figures["cell"]["relay"] for figures in found))
    figure = Figure(figsize=(4 * len(relays) + 1, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(relays), squeeze=False, sharey=True)[0]
    for axes, relay in zip(panels, relays, strict=True):
        own = [figures for figures in found if figures["cell"]["relay"] == relay]
        for steps in sorted({figures["cell"]["latent_steps"] for figures in own}):
            points = sorted(
                (figures["cell"]["digits"], *(figures["right"][name] / figures["num"]
                                              for name in ("latent", "shuffled")))
                for figures in own
                if figures["cell"]["latent_steps"] == steps
            )  # fmt: skip
            digits, exact, shuffled = zip(*points, strict=True)
            (line,) = axes.plot(digits, exact, "o-", label=f"{steps} latent steps")
            axes.plot(digits, shuffled, ":", color=line.get_color(), linewidth=1)
        axes.set_title(relay)
        axes.set_xlabel("digits of the code")
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("exact answers (dotted: shuffled messages)")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    assert set(CONTROLS) == {"latent", "null", "shuffled", "mean"}
    main()
