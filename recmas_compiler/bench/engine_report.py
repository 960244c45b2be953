"""The figures of `recmasc bench engines`: rows, JSON, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from recmas_compiler.bench.engines import Cell, EngineOptions, Measured, Timings, Worker
from recmas_runtime.bench.report import Spread, machine_facts
from recmas_runtime.core.text import markdown_table

_FIGURES: Final = (
    *("step_ms", "floor_ms", "floor_share", "outside_share"),
    *("prefill_tokens_per_s", "decode_tokens_per_s"),
)


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """One engine in one cell, with the most resident memory of its process.

    Figures go by the names in `_FIGURES`; an engine that cannot do something lacks it. The share of
    the floor is that of each visit: its fastest read over its step. 1 is as fast as memory allows.
    """

    worker: Worker
    cell: Cell
    figures: Mapping[str, Spread]
    memory_mb: float

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        key = self.worker.key
        medians = {name: self.figures.get(name) for name in _FIGURES}
        return {
            "engine": key.engine,
            "precision": self.worker.about["precision"],
            "bundle": key.bundle,
            "backbone": key.backbone,
            "genai": key.genai,
            "batch": self.cell.batch,
            "capacity": self.cell.capacity,
            "used": self.cell.used,
            **{n: None if s is None else round(s.median, 4) for n, s in medians.items()},
            "memory_mb": round(self.memory_mb, 1),
            "step_mb": round(self.worker.about["step_bytes"] / 1e6, 1),
            "spread": {n: None if s is None else s.to_json() for n, s in medians.items()},
        }


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """What came of a run: engine by engine, cells from small to large."""

    about: Mapping[str, Any]
    rows: tuple[EngineRow, ...]
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints and `engines.json` holds."""
        return {
            **self.about,
            "interrupted": self.interrupted,
            "rows": [row.to_json() for row in self.rows],
        }

    def to_markdown(self) -> str:
        """Return a table that reads well as plain text too."""
        about = self.about
        packages = {"python": about["machine"]["python"], **about["machine"]["packages"]}
        bandwidth = ", ".join(
            f"{read['mb']:.0f} MB in {read['ms']:.2f} ms ({read['gb_per_s']:.1f} GB/s)"
            for read in about["reads"]
        )
        lines = [
            f"- {about['date']}, {about['machine']['cpu']}, {about['device']}, "
            f"{about['threads']} threads",
            "- " + ", ".join(f"{name} {v}" for name, v in packages.items() if v is not None),
            f"- fastest read of a step's weights: {bandwidth}",
            f"- medians of {about['repeats']} (least to most) after {about['warmup']} to warm up; "
            f"{about['steps']} steps or tokens each; engines took turns",
        ]
        if self.interrupted:
            lines.append("- **interrupted: only what ended before counts**")
        if not self.rows:
            return "\n".join([*lines, "", "Nothing was measured."])
        return "\n".join([*lines, "", markdown_table(_HEAD, map(_line, self.rows))])


def engine_report(options: EngineOptions, found: Measured) -> EngineReport:
    """Return the rows of a run, whether it ended or was interrupted."""
    floors = {num_bytes: min(seconds) for num_bytes, seconds in found.reads.items()}
    rows = (
        _row(found.workers[place], cell, timings)
        for (place, cell), timings in sorted(found.timings.items(), key=lambda item: item[0][0])
        if timings.prefill_s
    )
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": found.device,
        "threads": found.threads,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "steps": options.steps,
        "reads": [
            {"mb": n / 1e6, "ms": 1e3 * seconds, "gb_per_s": n / seconds / 1e9}
            for n, seconds in sorted(floors.items(), reverse=True)
        ],
        "machine": machine_facts(),
    }
    return EngineReport(about=about, rows=tuple(rows), interrupted=found.interrupted)


def _row(worker: Worker, cell: Cell, timings: Timings) -> EngineRow:
    # An engine that takes no steps has floors, and no share of them.
    floors = zip(timings.floor_s, timings.step_s, strict=False)
    in_all = {
        "step_ms": [1e3 * seconds for seconds in timings.step_s],
        "floor_ms": [1e3 * seconds for seconds in timings.floor_s],
        "floor_share": [floor / step for floor, step in floors],
        "outside_share": timings.outside_share,
        "prefill_tokens_per_s": [cell.batch * cell.used / s for s in timings.prefill_s],
        "decode_tokens_per_s": [cell.batch / seconds for seconds in timings.token_s],
    }
    return EngineRow(
        worker=worker,
        cell=cell,
        figures={name: Spread.of(values) for name, values in in_all.items() if values},
        memory_mb=timings.memory_bytes / 1e6,
    )


_HEAD: Final = (
    *("engine", "precision", "batch", "capacity", "used", "ms per step", "of the floor", "outside"),
    *("prompt tokens/s", "text tokens/s", "memory MB"),
)


def _line(row: EngineRow) -> Sequence[str]:
    outside = row.figures.get("outside_share")
    return [
        row.worker.key.engine,
        row.worker.about["precision"],
        str(row.cell.batch),
        "" if row.cell.capacity is None else str(row.cell.capacity),
        str(row.cell.used),
        _text(row.figures.get("step_ms"), ".2f"),
        _text(row.figures.get("floor_share"), ".0%"),
        "" if outside is None else f"{outside.median:.1%}",
        _text(row.figures.get("prefill_tokens_per_s"), ".0f"),
        _text(row.figures.get("decode_tokens_per_s"), ".1f"),
        f"{row.memory_mb:.0f}",
    ]


def _text(spread: Spread | None, form: str) -> str:
    return "" if spread is None else spread.to_text(form)
