"""The files of a report."""

from __future__ import annotations

import json
from pathlib import Path

from recmas_compiler.evaluation.plot import draw_report
from recmas_compiler.evaluation.report import Report
from recmas_compiler.evaluation.report_text import report_markdown
from recmas_runtime.core.errors import fail


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json`, `report.md` and, where matplotlib is installed, `report.png`.

    Returns:
        What was written.

    Raises:
        RecmasError: RM503 if the folder cannot be written.
    """
    texts = {
        folder / "report.json": json.dumps(report.to_json(), indent=2) + "\n",
        folder / "report.md": report_markdown(report),
    }
    picture = folder / "report.png"
    try:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return [*texts, *([picture] if draw_report(report, picture) else [])]
    except OSError as error:
        raise fail(
            "RM503",
            f"cannot write to {folder}: {error.strerror}",
            hint="Choose another --out, or make room.",
        ) from error
