"""Tables and picture of a race beside other engines, and the section of the documentation.

    python benchmarks/peers/peer_table.py [JSON] [--page docs/performance.md]

JSON is what `peer_race.py` wrote; without one, the committed `results.json`, which a given one
replaces. The section stands between two comments of the page, and holds nothing written by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from contenders import LOAD, PRECISIONS, PROMPTS, RECMAS, ROWS, TEXT, USED

from recmas_compiler.analysis.plots import COLOURS, Panel, save_figure
from recmas_runtime.bench.report import Spread
from recmas_runtime.core.text import counted, markdown_table

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results.json"
PAGE: Final = HERE.parents[1] / "docs/performance.md"
BEGIN: Final = "<!-- written by benchmarks/peers/peer_table.py: begin -->"
END: Final = "<!-- written by benchmarks/peers/peer_table.py: end -->"
UNMEASURED: Final = "Not measured on a quiet machine yet."
# Of a processor; above it the machine is not called quiet.
QUIET: Final = 0.05

Figures = Mapping[str, Any]
Cell = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    if not given.json.exists():
        raise SystemExit(f"{given.json} is missing: peer_race.py writes one")
    if given.json.resolve() != RESULTS and given.page.resolve() == PAGE:
        shutil.copyfile(given.json, RESULTS)
    figures = json.loads(given.json.read_text(encoding="utf-8"))
    page = given.page.read_text(encoding="utf-8")
    given.page.write_text(with_section(page, section(figures)), encoding="utf-8")
    print(f"{given.page}: section written from {given.json}")


def committed() -> str:
    """Return the section of the committed figures."""
    if not RESULTS.exists():
        return UNMEASURED
    return section(json.loads(RESULTS.read_text(encoding="utf-8")))


def with_section(page: str, text: str) -> str:
    """Return a page with its section replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page has no section between {BEGIN} and {END}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def section(figures: Figures) -> str:
    """Return all tables, as Markdown."""
    parts = {
        "Times as fast as each, turn by turn: a peer's time over that of recmas in the same "
        "precision.": ratios_table(figures),
        "What everyone took:": figures_table(figures),
        f"A latent step of several rows, {USED} positions in each row's cache, "
        "milliseconds:": rows_table(figures),
        "What everyone loaded, and what its precision costs:": files_table(figures),
    }
    tables = [f"{title}\n\n{table}" for title, table in parts.items() if table]
    return "\n\n".join([_circumstances(figures), *tables])


def _circumstances(figures: Figures) -> str:
    machine, texts = figures["machine"], figures["texts"]
    versions = {c["version"]: None for c in figures["contenders"].values() if "version" in c}
    turns = {len(cell["turns"]) for cell in figures["cells"].values()}
    others = max((cell["others"] for cell in figures["cells"].values()), default=0.0)
    quiet = "**The machine was busy**: others had" if others > QUIET else "Others had"
    lines = [
        f"{machine['cpu']}, {figures['threads']} threads, {figures['date']}. {quiet} "
        f"{others:.2f} of a processor at most while a cell ran.",
        ", ".join(versions) + f", onnxruntime {machine['packages']['onnxruntime']}.",
        f"Medians; turns of a cell: {_range(turns)}. Least and most in brackets.",
        f"Losses are of {counted(texts['number'], 'text')} of {texts['name']}, {texts['tokens']} "
        f"tokens; {texts['longer_than_read']} of the texts went on behind what was read of them.",
    ]
    return "\n".join(lines)


def _range(numbers: Iterable[int]) -> str:
    least, most = min(numbers, default=0), max(numbers, default=0)
    return str(most) if least == most else f"{least} to {most}"


def _cells(figures: Figures) -> Iterator[tuple[str, Cell]]:
    """Yield the cells of ratios that are there, with their titles."""
    titles = {
        **{f"prompt-{n}": f"prompt {n}" for n in PROMPTS},
        **{f"rows-{n}": f"step, {n} row{'s' if n > 1 else ''}" for n in (1, 8)},
        TEXT: "text",
    }
    for name, title in titles.items():
        if name in figures["cells"]:
            yield title, figures["cells"][name]


def ratios_table(figures: Figures) -> str:
    """Return how many times as fast recmas is as every peer of its precision."""
    cells = dict(_cells(figures))
    rows = []
    for precision in PRECISIONS:
        own = _own(figures, precision)
        for name, facts in _of(figures, precision):
            if facts["peer"] == RECMAS or own is None:
                continue
            spreads = (_spread(ratios(cell, facts, name, own)) for cell in cells.values())
            rows.append([name, precision, *(_text(spread, ".2f") for spread in spreads)])
    return markdown_table(["recmas beside", "precision", *cells], rows) if rows else ""


def ratios(cell: Cell, facts: Figures, peer: str, own: str) -> list[float]:
    """Return a peer's time over ours turn by turn, the head counted on both sides or on none.

    A peer that cannot leave out its head has that of ours added to ours.
    """
    what = "head_in_step" if cell["request"].get("do") == "steps" else "head_in_prompt"
    counts_head = facts.get(what, False)
    found = []
    for turn in cell["turns"]:
        if peer in turn and own in turn:
            head = turn[own].get("head_s", 0.0) if counts_head else 0.0
            found.append(turn[peer]["seconds"] / (turn[own]["seconds"] + head))
    return found


def figures_table(figures: Figures) -> str:
    """Return the figures of everyone."""
    cells = figures["cells"]
    head = ["engine", "precision", *(f"prompt {n}, tokens/s" for n in PROMPTS), "step, ms"]
    head += ["with our head", "of the floor", "step of 8, ms", "text, tokens/s", "load, s"]
    head += ["memory, MiB"]

    def values(cell: str, name: str, of: Callable[[Figures], float]) -> Spread | None:
        turns = cells.get(cell, {}).get("turns", ())
        return _spread([of(turn[name]) for turn in turns if name in turn])

    rows = []
    for precision in PRECISIONS:
        for name, facts in _of(figures, precision):
            own_head = facts["peer"] == RECMAS
            prompts = [
                values(f"prompt-{n}", name, lambda r, n=n: n / r["seconds"])  # type: ignore[misc]
                for n in PROMPTS
            ]
            rows.append(
                [
                    name,
                    precision,
                    *(_text(spread, ".0f") for spread in prompts),
                    _text(values("rows-1", name, _milliseconds), ".2f"),
                    _text(values("rows-1", name, _with_head), ".2f") if own_head else "",
                    _text(values("rows-1", name, lambda r: r["floor_s"] / r["seconds"]), ".0%"),
                    _text(values("rows-8", name, _milliseconds), ".2f"),
                    _text(values(TEXT, name, lambda r: 1 / r["seconds"]), ".0f"),
                    _text(values(LOAD, name, lambda r: r["seconds"]), ".2f"),
                    f"{facts['memory_mib']:.0f}" if "memory_mib" in facts else "",
                ]
            )
    return markdown_table(head, rows)


def rows_table(figures: Figures) -> str:
    """Return the milliseconds of a step by its number of rows, and how they grow."""
    there = [n for n in ROWS if f"rows-{n}" in figures["cells"]]
    if not there:
        return ""
    rows = []
    for precision in PRECISIONS:
        for name, _ in _of(figures, precision):
            points = [_median_ms(figures, n, name) for n in there]
            rows.append([name, precision, *(f"{p:.2f}" if p else "" for p in points)])
    return markdown_table(["engine", "precision", *(f"{n} rows" for n in there)], rows)


def files_table(figures: Figures) -> str:
    """Return what everyone runs on."""
    head = ["engine", "made by", "MiB", "read by a step, MB", "loss", "token by token"]
    head += ["error on random weights"]
    rows = [
        [
            name,
            facts["made"],
            f"{facts['file_mib']:.0f}",
            f"{facts['step_bytes'] / 1e6:.0f}" if "step_bytes" in facts else "",
            f"{facts['loss']:.4f}" if "loss" in facts else "",
            f"{facts['step_loss']:.4f}" if "step_loss" in facts else "",
            f"{facts['error']:.4f}" if "error" in facts else "",
        ]
        for precision in PRECISIONS
        for name, facts in _of(figures, precision)
    ]
    return markdown_table(head, rows)


def draw(figures: Figures, path: Path) -> bool:
    """Draw milliseconds by rows, a panel for each precision."""

    def panel(precision: str) -> Panel:
        def curves(axes: Any) -> None:
            for (name, _), colour in zip(_of(figures, precision), COLOURS, strict=False):
                points = [(n, _median_ms(figures, n, name)) for n in ROWS]
                known = [(n, ms) for n, ms in points if ms is not None]
                axes.plot(*zip(*known, strict=True), marker="o", color=colour, label=name)
            axes.set_title(precision)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("rows")
            axes.set_ylabel("ms of a latent step")
            axes.legend(frameon=False, fontsize="x-small")

        return curves

    measured = any(f"rows-{n}" in figures["cells"] for n in ROWS)
    panels = [panel(p) for p in PRECISIONS if list(_of(figures, p))] if measured else []
    footnote = f"{figures['machine']['cpu']}, {figures['threads']} threads, {figures['date']}"
    title = "A latent step by its rows, SmolLM2-135M"
    return save_figure(path, panels, panel_size=(4.4, 4.2), title=title, footnote=footnote)


def _of(figures: Figures, precision: str) -> Iterator[tuple[str, Figures]]:
    for name, facts in figures["contenders"].items():
        if facts["precision"] == precision:
            yield name, facts


def _own(figures: Figures, precision: str) -> str | None:
    return next((n for n, facts in _of(figures, precision) if facts["peer"] == RECMAS), None)


def _median_ms(figures: Figures, rows: int, name: str) -> float | None:
    turns = figures["cells"].get(f"rows-{rows}", {}).get("turns", ())
    spread = _spread([_milliseconds(turn[name]) for turn in turns if name in turn])
    return None if spread is None else spread.median


def _milliseconds(reply: Figures) -> float:
    return 1e3 * float(reply["seconds"])


def _with_head(reply: Figures) -> float:
    return 1e3 * float(reply["seconds"] + reply["head_s"])


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


def _text(spread: Spread | None, form: str) -> str:
    return "" if spread is None else spread.to_text(form)


if __name__ == "__main__":
    main()
