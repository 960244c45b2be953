"""Rows, table and picture of the cells of a race."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from cells import IN_PROCESS, RACERS, RECMAS

from recmas_compiler.analysis.plots import COLOURS, save_figure
from recmas_compiler.evaluation.checks.math import equal_numbers, extract_math, read_number
from recmas_runtime.core.text import markdown_table

FRAMEWORKS = ("langgraph", "crewai", "autogen")
TITLES = {
    "plain": "no framework",
    "langgraph": "LangGraph",
    "crewai": "CrewAI",
    "crewai-own": "CrewAI, its own prompts",
    "autogen": "AutoGen",
    "avp": "AVP, float32",
    "text": "recmas, text",
    "latent": "recmas, latent",
}
MIB = 1024


@dataclass(frozen=True, kw_only=True)
class Row:
    """A system on an endpoint at a number of rounds; figures are means over questions.

    Attributes:
        processor_s: Of the system's own process, and of the endpoint's.
        peak_mib: The same, the most that either ever held.
        same_messages: Questions at which every message that reached the endpoint is that of the
            first system of the same endpoint and rounds; None in process.
        same_answers: The same of the answers; those of recmas' texts are held against the endpoint
            that `recmas serve` is. None where other answers are meant to come.
        times_as_fast: As the fastest framework on any endpoint at these rounds, as many questions
            at once, on those that both answered; below 1 for what is slower.
        saved: Share of that framework's written tokens that are not written.
    """

    system: str
    endpoint: str
    rounds: int
    at_once: int
    questions: int
    seconds: float
    slowest_s: float
    processor_s: tuple[float, float]
    peak_mib: tuple[float, float]
    calls: float
    prompt_tokens: float
    cached_tokens: float
    written_tokens: float
    latent_steps: float
    right: int
    same_messages: int | None
    same_answers: int | None
    outside: tuple[str, ...]
    times_as_fast: float | None
    saved: float | None


Answered = dict[str, dict[str, Any]]  # what was answered, by the question's id
Key = tuple[int, int, str, str]  # rounds, questions at once, endpoint, system


def write_report(folder: Path, questions: Sequence[Mapping[str, str]]) -> str:
    """Write `race.json`, `race.md` and `race.png` beside the cells; returns the table."""
    cells = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder / "cells").glob("*.json"))
    ]
    rows = rows_of(cells, {question["id"]: question["answer"] for question in questions})
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    figures = {"settings": settings, "rows": [asdict(row) for row in rows]}
    (folder / "race.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = table_of(rows)
    (folder / "race.md").write_text(table + "\n", encoding="utf-8")
    _draw(rows, settings, folder / "race.png")
    return table


def rows_of(cells: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> list[Row]:
    """Return a row for each system, endpoint and number of rounds; `answers` are the right ones."""
    answered: dict[Key, Answered] = defaultdict(dict)
    for cell in cells:
        where = cell["cell"]
        key = (where["rounds"], where["at_once"], where["endpoint"], where["system"])
        answered[key] |= {row["id"]: row for row in cell["rows"]}
    names = list(RACERS)
    order = sorted(
        answered,
        key=lambda key: (*key[:2], key[2] == IN_PROCESS, key[2], names.index(key[3])),
    )
    return [_row(key, answered, order, answers) for key in order]


def _row(
    key: Key, answered: Mapping[Key, Answered], order: Sequence[Key], answers: Mapping[str, str]
) -> Row:
    rounds, at_once, endpoint, system = key
    mine = answered[key]

    def mean(name: str) -> float:
        return statistics.fmean(row.get(name, 0) for row in mine.values())

    def most_mib(name: str) -> float:
        return max(row.get(name, 0) for row in mine.values()) / MIB

    alike = _alike(key, answered, order)
    fastest = _fastest(key, mine, answered)
    return Row(
        system=system,
        endpoint=endpoint,
        rounds=rounds,
        at_once=at_once,
        questions=len(mine),
        seconds=mean("seconds"),
        slowest_s=max(row["seconds"] for row in mine.values()),
        processor_s=(mean("processor_s"), mean("server_processor_s")),
        peak_mib=(most_mib("peak_kib"), most_mib("server_peak_kib")),
        calls=mean("calls"),
        prompt_tokens=mean("prompt_tokens"),
        cached_tokens=mean("cached_tokens"),
        written_tokens=mean("written_tokens"),
        latent_steps=mean("latent_steps"),
        right=sum(is_right(row["answer"], answers[id_]) for id_, row in mine.items()),
        same_messages=None if endpoint == IN_PROCESS else _same(mine, alike, messages_of),
        same_answers=_same(mine, alike, lambda row: row["answer"]),
        outside=tuple(sorted({host for row in mine.values() for host in row["outside"]})),
        times_as_fast=_ratio(fastest, mine, "seconds"),
        saved=_saved(fastest, mine),
    )


def _alike(key: Key, answered: Mapping[Key, Answered], order: Sequence[Key]) -> Answered | None:
    """Return the answers that a system's should be equal to."""
    rounds, at_once, endpoint, system = key
    if system == "text":
        endpoint = RECMAS
    elif endpoint == IN_PROCESS or system == "crewai-own":
        return None
    where = (rounds, at_once, endpoint)
    return next((answered[other] for other in order if other[:3] == where), None)


def messages_of(row: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """Return who says what in every request of a question."""
    return [[(m["role"], m["content"]) for m in call["messages"]] for call in row["asked"]]


def is_right(text: str, wanted: str) -> bool:
    """Tell whether the number that a text ends with is the one that is wanted."""
    found = extract_math(text, wants_number=True)
    number, right = read_number(found) if found else None, read_number(wanted)
    return number is not None and right is not None and equal_numbers(right, number)


def _same(mine: Answered, alike: Answered | None, what: Any) -> int | None:
    if alike is None:
        return None
    return sum(what(row) == what(alike[id_]) for id_, row in mine.items() if id_ in alike)


def _fastest(key: Key, mine: Answered, answered: Mapping[Key, Answered]) -> Answered | None:
    """Return the fastest framework that answered all of these questions."""
    found = [
        rows
        for other, rows in answered.items()
        if other[:2] == key[:2] and other[3] in FRAMEWORKS and mine.keys() <= rows.keys()
    ]
    return min(found, key=lambda rows: _sum(rows, mine, "seconds"), default=None)


def _sum(rows: Answered, ids: Answered, name: str) -> float:
    return sum(float(rows[id_].get(name, 0)) for id_ in ids)


def _ratio(other: Answered | None, mine: Answered, name: str) -> float | None:
    return None if other is None else _sum(other, mine, name) / _sum(mine, mine, name)


def _saved(other: Answered | None, mine: Answered) -> float | None:
    if other is None:
        return None
    return 1 - _sum(mine, mine, "written_tokens") / _sum(other, mine, "written_tokens")


def table_of(rows: Sequence[Row]) -> str:
    """Return the table as Markdown."""
    head = ["system", "endpoint", "rounds", "at once", "s", "times as fast", "processor s", "calls"]
    head += ["prompt", "cached", "written", "saved", "steps", "MiB", "right", "same"]
    return markdown_table(head, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    in_process = row.endpoint == IN_PROCESS
    return [
        TITLES[row.system],
        row.endpoint,
        str(row.rounds),
        str(row.at_once),
        f"{row.seconds:.2f}",
        "" if row.times_as_fast is None else f"{row.times_as_fast:.2f}",
        _pair(row.processor_s, ".2f", in_process),
        f"{row.calls:.0f}",
        f"{row.prompt_tokens:.0f}",
        "" if in_process else f"{row.cached_tokens:.0f}",
        f"{row.written_tokens:.0f}",
        "" if row.saved is None else f"{row.saved:.0%}",
        f"{row.latent_steps:.0f}" if row.latent_steps else "",
        _pair(row.peak_mib, ".0f", in_process),
        f"{row.right}/{row.questions}",
        ", ".join(str(n) for n in (row.same_messages, row.same_answers) if n is not None),
    ]


def _pair(pair: tuple[float, float], form: str, in_process: bool) -> str:
    return f"{pair[0]:{form}}" if in_process else f"{pair[0]:{form}} + {pair[1]:{form}}"


def _draw(rows: Sequence[Row], settings: Mapping[str, Any], path: Path) -> bool:
    """Draw seconds and written tokens by rounds, a line for each system on each endpoint.

    Only those of one question at a time, unless there are no others.
    """
    fewest = min((row.at_once for row in rows), default=1)
    rows = [row for row in rows if row.at_once == fewest]

    def panel(name: str, axes: Any) -> None:
        lines = list(dict.fromkeys((row.system, row.endpoint) for row in rows))
        colours = dict(
            zip(dict.fromkeys(system for system, _ in lines), cycle(COLOURS), strict=False)
        )
        styles = {IN_PROCESS: "-", "llama.cpp": "--", "recmas serve": ":"}
        for system, endpoint in lines:
            points = [row for row in rows if (row.system, row.endpoint) == (system, endpoint)]
            label = TITLES[system] + ("" if endpoint == IN_PROCESS else f", {endpoint}")
            axes.plot(
                [row.rounds for row in points],
                [getattr(row, name) for row in points],
                styles[endpoint],
                color=colours[system],
                marker="o",
                markersize=4,
                label=label,
            )
        axes.set_xlabel("rounds")
        axes.set_xticks(sorted({row.rounds for row in rows}))
        axes.set_ylim(bottom=0)

    def seconds(axes: Any) -> None:
        panel("seconds", axes)
        axes.set_ylabel("seconds per question")

    def written(axes: Any) -> None:
        panel("written_tokens", axes)
        axes.set_ylabel("written tokens per question")
        axes.legend(frameon=False, fontsize="x-small")

    title = f"SmolLM2-135M in {settings['precision']}, {settings['threads']} threads"
    footnote = f"{settings['cpu']}, texts of at most {settings['max_tokens']} tokens"
    panels = [seconds, written] if rows else []
    return save_figure(path, panels, panel_size=(5.2, 4.4), title=title, footnote=footnote)
