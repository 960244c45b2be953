"""What `recmasc bench engines` does with its options and with what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from recmas_cli.console import Outcome
from recmas_compiler.bench.engines.measure import EngineOptions, measure_engines
from recmas_compiler.bench.engines.plot import draw_engines
from recmas_compiler.bench.engines.report import engine_report
from recmas_runtime.bench.command import make_folder, unwritable
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.bundle import write_json_atomic

JSON_NAME: Final = "engines.json"
MARKDOWN_NAME: Final = "engines.md"
PLOT_NAME: Final = "engines.png"


def bench_engines(options: EngineOptions, *, out: Path | None, progress: Progress) -> Outcome:
    """Measure engines, write the report, and return it.

    Args:
        options: What to measure, and how.
        out: Folder of the report; None for none.
        progress: Is told of every visit.

    Raises:
        RecmasError: As `measure_engines`; RM503 if the report cannot be written.
    """
    make_folder(out)
    report = engine_report(options, measure_engines(options, progress=progress))
    if out is not None:
        try:
            write_json_atomic(out / JSON_NAME, report.to_json())
            (out / MARKDOWN_NAME).write_text(report.to_markdown() + "\n", encoding="utf-8")
            draw_engines(report, out / PLOT_NAME)
        except OSError as error:
            raise unwritable(out, error) from error
    return Outcome(text=report.to_markdown(), data=report.to_json(), interrupted=report.interrupted)
