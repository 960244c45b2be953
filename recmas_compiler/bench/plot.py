"""The picture of a measurement, in the form of the paper's: time and tokens by rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from recmas_runtime.bench.figures import Row, Spread
from recmas_runtime.bench.report import PAPER, PAPER_SOURCE, BenchReport
from recmas_runtime.core.text import counted
from recmas_runtime.running.baselines import LATENT

# Okabe and Ito's colours, which people with colour blindness tell apart.
COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
)  # fmt: skip
_WIDTH_OF_A_GROUP: Final = 0.8


def draw_report(report: BenchReport, path: Path) -> bool:
    """Draw time and tokens per question by rounds, and time by latent steps where they vary.

    Returns:
        Whether there is a picture: not without matplotlib, and not without figures.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = report.figures.rows
    if not rows:
        return False
    swept = _swept(rows)
    by_rounds = [row for row in rows if row not in swept[1:]]
    # Not pyplot: it keeps figures and picks a window system.
    num_panels = 3 if swept else 2
    figure = Figure(figsize=(5.2 * num_panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_panels)
    _bars(panels[0], by_rounds, lambda row: Spread.of(row.cost.seconds), _speed_up)
    panels[0].set_ylabel("seconds per question")
    panels[0].legend(frameon=False, fontsize="small")
    _bars(panels[1], by_rounds, _generated, _saved)
    panels[1].set_ylabel("generated tokens per question")
    if swept:
        _sweep(panels[2], swept, rows)
    partial = ", interrupted" if report.interrupted else ""
    questions = counted(report.figures.questions, "question")
    figure.suptitle(
        f"{report.about['name']}, {questions}{partial}; "
        "labels: against the text system of the same rounds"
    )
    figure.supxlabel(f"paper: {PAPER_SOURCE}; its own models and hardware", fontsize="x-small")
    figure.savefig(path, dpi=150)
    return True


def _swept(rows: Sequence[Row]) -> list[Row]:
    """Return the latent rows that differ in their steps alone, the one as built first."""
    latent = [row for row in rows if row.case.name == LATENT]
    most_rounds = max(row.case.rounds for row in latent)
    found = [row for row in latent if row.case.rounds == most_rounds]
    return found if len(found) > 1 else []


def _bars(
    axes: Any,
    rows: Sequence[Row],
    height: Callable[[Row], Spread],
    label: Callable[[Row], tuple[str, str]],
) -> None:
    """Draw groups of bars by rounds; a label over a bar, and under the latent one the paper's."""
    names = list(dict.fromkeys(row.case.name for row in rows))
    rounds = sorted({row.case.rounds for row in rows})
    width = _WIDTH_OF_A_GROUP / len(names)
    papers = dict.fromkeys(rounds, "")
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        mine = [row for row in rows if row.case.name == name]
        offset = (names.index(name) - (len(names) - 1) / 2) * width
        places = [rounds.index(row.case.rounds) + offset for row in mine]
        spreads = [height(row) for row in mine]
        middles = [spread.median for spread in spreads]
        axes.bar(places, middles, width, color=colour, label=name)
        if any(spread.min < spread.max for spread in spreads):
            errors = [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
            axes.errorbar(places, middles, yerr=errors, fmt="none", ecolor="black", capsize=2)
        for row, place, spread in zip(mine, places, spreads, strict=True):
            ours, paper = label(row)
            papers[row.case.rounds] = papers[row.case.rounds] or paper
            axes.annotate(
                ours, (place, spread.max), (0, 3), ha="center", fontsize="small",
                textcoords="offset points",
            )  # fmt: skip
    axes.set_xticks(
        range(len(rounds)),
        [f"{counted(count, 'round')}\n{papers[count]}" for count in rounds],
    )
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _speed_up(row: Row) -> tuple[str, str]:
    if row.comparison is None:
        return "", ""
    paper = f"paper: {PAPER[row.case.rounds][0]:.1f} x" if _has_paper(row) else ""
    return f"{row.comparison.speed_up.median:.1f} x", paper


def _saved(row: Row) -> tuple[str, str]:
    if row.comparison is None:
        return "", ""
    paper = f"paper: {-PAPER[row.case.rounds][1]:+.1%}" if _has_paper(row) else ""
    return f"{-row.comparison.token_reduction:+.0%}", paper


def _has_paper(row: Row) -> bool:
    return row.case.name == LATENT and row.case.rounds in PAPER


def _generated(row: Row) -> Spread:
    return Spread.of([row.cost.generated_tokens])


def _sweep(axes: Any, swept: Sequence[Row], rows: Sequence[Row]) -> None:
    """Draw time by latent steps, and the text system's beside it."""
    ordered = sorted(swept, key=lambda row: row.case.latent_steps)
    steps = [row.case.latent_steps for row in ordered]
    spreads = [Spread.of(row.cost.seconds) for row in ordered]
    middles = [spread.median for spread in spreads]
    errors = [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
    axes.errorbar(steps, middles, yerr=errors, fmt="o-", color=COLOURS[0], capsize=3, label=LATENT)
    rounds = ordered[0].case.rounds
    text = next((r for r in rows if r.case.writes_handover and r.case.rounds == rounds), None)
    if text is not None:
        seconds = Spread.of(text.cost.seconds).median
        axes.axhline(seconds, color=COLOURS[1], linestyle="--", label=text.case.name)
    axes.set_xlabel(f"latent steps, {counted(rounds, 'round')}")
    axes.set_ylabel("seconds per question")
    axes.set_xticks(steps)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
