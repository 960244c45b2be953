"""From the answers of all cells to the table: accuracies and intervals beside published figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from paper_config import Cell, Grid, Row
from paper_run import folder_of, is_done, state_of

from recmas_compiler.evaluation.intervals import CONFIDENCE, Interval, bootstrap, wilson
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.running.baselines import LATENT


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A system on a benchmark.

    Attributes:
        value: Share of right answers, or of questions with a right one among the rollouts; the
            mean over runs.
        interval: Wilson's, over questions.
        sd: Over runs; None for one.
        num_failed: Questions that could not be asked, such as those over the longest prompt.
        minus_latent: Difference to the latent system on the same questions, with a paired
            bootstrap interval; None for that system itself.
    """

    value: float
    interval: Interval
    sd: float | None
    num_questions: int
    num_failed: int
    minus_latent: tuple[float, Interval] | None


def figures_of(grid: Grid, cell: Cell) -> dict[str, Figures]:
    """Return the figures of every system of a finished cell."""
    folder = folder_of(grid, cell)
    found: dict[str, Figures] = {}
    base: Mapping[str, float] = {}
    for system in dict.fromkeys((LATENT, *grid.config.systems)):
        by_run, num_failed = _read(folder / f"answers-{system}.jsonl", cell)
        runs = [mean(run.values()) for run in by_run.values()]
        by_question = {
            question: mean(run[question] for run in by_run.values())
            for question in next(iter(by_run.values()))
        }
        base = base or by_question
        value, num = mean(runs), len(by_question)
        differences = [by_question[question] - base[question] for question in base]
        found[system] = Figures(
            value=value,
            interval=wilson(value * num, num),
            sd=stdev(runs) if len(runs) > 1 else None,
            num_questions=num,
            num_failed=num_failed,
            minus_latent=None if system == LATENT else (mean(differences), bootstrap(differences)),
        )
    return found


def _read(path: Path, cell: Cell) -> tuple[dict[int, dict[str, float]], int]:
    """Return what each question is worth, by run, and how many questions could not be asked."""
    answers: defaultdict[int, defaultdict[str, list[bool]]]
    answers = defaultdict(lambda: defaultdict(list))
    failed = set()
    for line in read_json_lines(path):
        answers[line["seed"]][line["id"]].append(line["correct"])
        failed |= {line["id"]} if line["failure"] is not None else set()
    worth = any if cell.protocol.rollouts > 1 else mean
    return {
        seed: {question: float(worth(verdicts)) for question, verdicts in run.items()}
        for seed, run in answers.items()
    }, len(failed)


def table(grid: Grid) -> dict[str, Any]:
    """Return the whole table as JSON holds it."""
    return {
        "config": _plain(grid.config),
        "confidence": CONFIDENCE,
        "sources": {name: s.text for name, s in grid.published.sources.items()},
        "cells": [_cell(grid, cell) for cell in grid.cells],
    }


def _plain(config: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(config)


def _cell(grid: Grid, cell: Cell) -> dict[str, Any]:
    state = state_of(grid, cell)
    if is_done(grid, cell):
        status, measured = "done", figures_of(grid, cell)
    else:
        # What was asked for in another way says nothing about this one.
        is_current = state is not None and state.status != "done"
        status, measured = (state.status if state and is_current else "to do"), {}
    rows = [
        row
        for row in grid.published.rows
        if row.style == cell.style.name and cell.benchmark in row.values
    ]
    notes = [*cell.notes]
    if measured:
        first = measured[LATENT]
        asked = cell.about.questions
        if asked is not None and first.num_questions != asked:
            notes.append(f"{first.num_questions} questions, not {asked}")
        if first.num_failed:
            notes.append(f"{first.num_failed} questions could not be asked and count as wrong")
    return {
        "style": cell.style.name,
        "benchmark": cell.benchmark,
        "metric": _metric(cell),
        "status": status,
        "problems": [] if state is None else list(state.problems),
        "notes": notes,
        "systems": {name: asdict(figures) for name, figures in measured.items()},
        "published": [_published(grid, cell, row, measured) for row in rows],
    }


def _metric(cell: Cell) -> str:
    rollouts = cell.protocol.rollouts
    return f"pass@{rollouts}" if rollouts > 1 else "accuracy"


def _published(grid: Grid, cell: Cell, row: Row, measured: Mapping[str, Figures]) -> dict[str, Any]:
    """Return a published figure, and whether it lies outside of the interval measured here."""
    value = row.values[cell.benchmark] / 100
    own = measured.get(row.system or "")
    is_outside = None
    if own is not None:
        is_outside = not own.interval.low <= value <= own.interval.high
    return {
        "method": row.method,
        "system": row.system,
        "value": value,
        "of": grid.published.sources[row.origin].of,
        "from": row.origin,
        "outside": is_outside,
    }


def table_text(found: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    cells: Sequence[Mapping[str, Any]] = found["cells"]
    config = found["config"]
    done = sum(cell["status"] == "done" for cell in cells)
    lines = [
        "# The paper's tables, run again",
        "",
        f"{done} of {len(cells)} cells. {config['runs']} runs, {config['rounds']} rounds, "
        f"{config['latent_steps']} latent steps. Per cent, with Wilson's 95 % intervals over "
        "questions; AIME as pass@k of each run, the mean over runs. **outside**: the figure of the "
        "paper lies outside of the interval.",
        "`latent - shuffled` and `latent - mean` are what messages bring: paired bootstrap, 95 %.",
    ]
    for style in dict.fromkeys(cell["style"] for cell in cells):
        own = [cell for cell in cells if cell["style"] == style]
        lines += ["", f"## {style}", "", *_controls(own), "", *_methods(own)]
    lines += ["", "## Where published figures are from", ""]
    lines += [f"- {name}: {text}" for name, text in found["sources"].items()]
    return "\n".join(lines) + "\n"


CONTROLS = ("shuffled", "mean", "null")


def _controls(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| benchmark | n | latent | paper | | shuffled | mean | null | latent - shuffled "
        "| latent - mean | notes |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for cell in cells:
        systems = cell["systems"]
        latent = systems.get(LATENT)
        papers = [
            one for one in cell["published"] if (one["system"], one["of"]) == (LATENT, "paper")
        ]
        shown = [
            _name(cell),
            "" if latent is None else str(latent["num_questions"]),
            _share(latent),
            ", ".join(f"{one['value']:.1%}" for one in papers),
            _mark(papers),
            *(_share(systems.get(name)) for name in CONTROLS),
            *(_gain(systems.get(name)) for name in CONTROLS[:2]),
            _notes(cell),
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def _methods(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of all other methods: measured here, published, or both."""
    lines = ["| benchmark | method | here | published | | from |", "|---|---|---:|---:|---|---|"]
    for cell in cells:
        systems = cell["systems"]
        others = [
            one for one in cell["published"] if (one["system"], one["of"]) != (LATENT, "paper")
        ]
        for one in others:
            shown = [
                _name(cell),
                one["method"],
                _share(systems.get(one["system"])),
                f"{one['value']:.1%}",
                _mark([one]) if one["of"] == "paper" else "",
                one["from"],
            ]
            lines.append(f"| {' | '.join(shown)} |")
        named = {one["system"] for one in others}
        for name, figures in systems.items():
            if name not in (LATENT, *CONTROLS) and name not in named:
                lines.append(f"| {_name(cell)} | `{name}` | {_share(figures)} | | | |")
    return lines if len(lines) > 2 else []


def _name(cell: Mapping[str, Any]) -> str:
    metric = "" if cell["metric"] == "accuracy" else f" ({cell['metric']})"
    return f"{cell['benchmark']}{metric}"


def _share(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    low, high = figures["interval"]["low"], figures["interval"]["high"]
    return f"{figures['value']:.1%} ({low:.1%} to {high:.1%})"


def _gain(figures: Mapping[str, Any] | None) -> str:
    """Return by how many points the latent system is better than this one."""
    if figures is None or figures["minus_latent"] is None:
        return ""
    difference, interval = figures["minus_latent"]
    gain, low, high = (100 * (0 - x) for x in (difference, interval["high"], interval["low"]))
    return f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"


def _mark(published: Sequence[Mapping[str, Any]]) -> str:
    known = [one["outside"] for one in published if one["outside"] is not None]
    return "" if not known else "**outside**" if all(known) else "inside"


def _notes(cell: Mapping[str, Any]) -> str:
    status = [] if cell["status"] == "done" else [f"**{cell['status']}**"]
    reasons = cell["problems"] if cell["status"] == "failed" else []
    return "; ".join([*status, *reasons, *cell["notes"]]).replace("|", "/")
