"""What training brings: links before and after both stages, controls, LoRA, full fine-tuning.

    python benchmarks/training_table.py SPEC OUT [--rounds 1,2,3] [--methods lora]
        [--steps N] [--data test.jsonl --protocol gsm8k --limit 200]

Runs what is missing and goes on with what was stopped: the inner stage once, the outer stage for
every number of rounds, every method; then the held-out loss with generated thoughts under every
control; then, with --data, the accuracy of built bundles on their engines. Everything is in OUT;
writes OUT/table.json and table.md. SPEC must have a `train` section with held-out records.

Losses are in nats per token of the answer. Accuracies have Wilson's 95 % interval; the runtime has
no control `mean`, so there is a loss for it only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recmas_compiler as rc
from recmas_compiler.training.loop.distributed import joined_world
from recmas_compiler.training.loop.metrics import COST_NAME, METRICS_NAME, read_cost
from recmas_compiler.training.session import open_session
from recmas_compiler.training.settings import train_settings
from recmas_compiler.training.tasks.outer import CONTROLS, OuterTask
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.progress import Silent

RECMASC = (sys.executable, "-m", "recmas_cli.main")
# How the runtime calls what the slots hold; it has no `mean`.
BASELINES = {"latent": "latent", "null": "null", "shuffled": "shuffled"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system of the table.

    Attributes:
        name: What it is called.
        overrides: Of the spec.
        links: Folder with its trained links; None for the untrained start.
        loops: Folders of the loops that made it.
        method: `lora` or `sft` for the answer agent alone; None for a system of links.
    """

    name: str
    overrides: tuple[str, ...]
    links: Path | None = None
    loops: tuple[Path, ...] = field(default=())
    method: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=numbers, default=[1, 2, 3])
    parser.add_argument("--methods", type=names, default=["lora"], help="none if empty")
    parser.add_argument("--steps", type=int, help="of every stage and method")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--protocol")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.protocol is None):
        parser.error("--data and --protocol belong together")

    out: Path = arguments.out.resolve()
    rows = train_all(arguments, out)
    found: list[dict[str, Any]] = []
    for row in rows:
        figures = {"name": row.name, "loss": losses(arguments.spec, row, out)}
        figures |= {"cost": cost(row), "accuracy": {}}
        if arguments.data is not None:
            figures["accuracy"] = accuracies(arguments, row, out)
        found.append(figures)
        text = json.dumps({"spec": str(arguments.spec), "rows": found}, indent=1)
        (out / "table.json").write_text(text + "\n")
        (out / "table.md").write_text(table(found) + "\n")
    print(table(found))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def train_all(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Train what is not trained yet; return the rows of the table."""
    most = max(arguments.rounds)
    steps = () if arguments.steps is None else ("--steps", str(arguments.steps))

    def train(folder: Path, rounds: int, *more: str) -> tuple[str, ...]:
        overrides = (*arguments.overrides, f"rounds={rounds}", f"train.links_dir={folder}/given")
        recmasc(
            "train", arguments.spec, "--out", folder, "--resume", *steps, *sets(overrides), *more
        )
        return overrides

    inner = out / "inner"
    common = train(inner, most, "--stage", "inner")
    loops = tuple(path.parent for path in sorted((inner / "inner").glob(f"*/{COST_NAME}")))
    rows = [
        Row(name=f"untrained, {most} rounds", overrides=common),
        Row(
            name=f"inner only, {most} rounds",
            overrides=common,
            links=inner / "inner" / "links",
            loops=loops,
        ),
    ]
    for rounds in arguments.rounds:
        folder = out / f"rounds-{rounds}"
        # The outer stage starts from the inner links in its own folder.
        shutil.copytree(inner / "inner" / "links", folder / "inner" / "links", dirs_exist_ok=True)
        overrides = train(folder, rounds, "--stage", "outer")
        rows.append(
            Row(
                name=f"outer, {rounds} rounds",
                overrides=overrides,
                links=folder / "outer" / "links",
                loops=(folder / "outer",),
            )
        )
    for method in arguments.methods:
        folder = out / method
        overrides = train(folder, most, "--method", method)
        loop = folder / method
        rows.append(Row(name=method, overrides=overrides, loops=(loop,), method=method))
    return rows


def sets(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for override in overrides for part in ("--set", override))


def recmasc(*arguments: object) -> None:
    command = [*RECMASC, *map(str, arguments)]
    print("$ recmasc", *command[len(RECMASC) :], file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)


def losses(spec: Path, row: Row, out: Path) -> Mapping[str, float]:
    """Return the held-out loss under every control, computed once."""
    if row.method is not None:
        (loop,) = row.loops
        measured = [e for e in read_json_lines(loop / METRICS_NAME) if e["kind"] == "eval"]
        return {"alone": measured[-1]["alone"], "alone before": measured[0]["alone"]}
    path = out / "losses" / f"{row.name.replace(', ', '-').replace(' ', '-')}.json"
    if path.exists():
        kept: Mapping[str, float] = json.loads(path.read_text())
        return kept
    loaded = rc.load_spec(spec, overrides=row.overrides)
    settings = train_settings(loaded)
    with joined_world() as world:
        session = open_session(
            loaded, rc.compile(loaded).graph, settings, world=world, progress=Silent()
        )
        # An untrained system is what a build without training is.
        session.start(trained=row.links, as_built=row.links is None)
        section = settings.section
        held_out = session.examples.held_out[: section.eval_records]
        task = OuterTask(
            session.graph, {}, train=(), held_out=held_out, batch_size=section.outer.batch_size
        )
        figures = task.measure(world)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def cost(row: Row) -> dict[str, float] | None:
    """Return what the loops that made a row took, all together."""
    costs = [read_cost(folder) for folder in row.loops]
    if not costs:
        return None
    return {
        "trainable_parameters": sum(c.trainable_parameters for c in costs),
        "peak_memory_mb": max(c.peak_memory_mb for c in costs),
        "step_seconds": max(c.step_seconds for c in costs),
        "total_seconds": sum(c.total_seconds for c in costs),
        "steps": max(c.steps for c in costs),
    }


def accuracies(arguments: argparse.Namespace, row: Row, out: Path) -> dict[str, Any]:
    """Return right answers under every control that the runtime has, from a built bundle."""
    name = row.name.replace(", ", "-").replace(" ", "-")
    bundle, folder = out / "bundles" / name, out / "answers" / name
    overrides = row.overrides
    frozen: tuple[str, ...] = ()
    baselines = BASELINES
    if row.method is not None:
        loaded = rc.load_spec(arguments.spec)
        backbone = loaded.document.agents[loaded.document.answer.agent].backbone
        (loop,) = row.loops
        overrides = (*overrides, f"backbones.{backbone}.source={loop / 'model'}")
        baselines = {"alone": "single"}
    elif row.links is not None:
        overrides = (*overrides, f"train.links_dir={row.links}")
    else:
        frozen = ("--untrained-links",)
    report = folder / "report.json"
    if not report.exists() or not json.loads(report.read_text())["is_complete"]:
        recmasc("build", arguments.spec, "-o", bundle, *frozen, *sets(overrides))
        chosen = [part for b in baselines.values() for part in ("--baseline", b)]
        limit = () if arguments.limit is None else ("--limit", str(arguments.limit))
        asked = ("--data", arguments.data, "--protocol", arguments.protocol, *limit)
        recmasc("eval", bundle, *asked, *chosen, "--out", folder, "--resume")
    systems = {s["name"]: s for s in json.loads(report.read_text())["systems"]}
    kept = ("accuracy", "interval", "num_right", "num_questions")
    return {
        control: {key: systems[baseline][key] for key in kept}
        for control, baseline in baselines.items()
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the table: a line for every system and, below it, one for each control."""
    lines = [
        "| system | held-out loss | accuracy (95 %) | trainable parameters | peak memory "
        "| s/step | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        spent = row["cost"]
        costs = "- | - | - | -"
        if spent is not None:
            costs = (
                f"{spent['trainable_parameters']:,} | {spent['peak_memory_mb']:.0f} MiB "
                f"| {spent['step_seconds']:.2f} | {spent['total_seconds'] / 60:.1f} min"
            )
        for control, loss in row["loss"].items():
            is_first = control in ("latent", "alone")
            name = row["name"] if is_first else f"... {control}"
            accuracy = accuracy_text(row["accuracy"].get(control))
            shown = costs if is_first else " | | |"
            lines.append(f"| {name} | {loss:.4f} | {accuracy} | {shown} |")
    return "\n".join(lines)


def accuracy_text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]["low"], found["interval"]["high"]
    return f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%}, n={found['num_questions']})"


if __name__ == "__main__":
    assert next(iter(CONTROLS)) == "latent"
    main()
