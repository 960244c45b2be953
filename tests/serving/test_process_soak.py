"""The soak driver itself, for as long as a test may take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks/serving/soak_service.py"


def test_a_short_soak(hand_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    ran = subprocess.run(
        [sys.executable, str(SOAK), str(hand_bundle), "--requests", "50", "--clients", "8",
         "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    # Memory has no time to settle; the rest must hold.
    found = json.loads(report.read_text(encoding="utf-8"))
    assert (found["wrong"], found["lost"]) == ([], []), ran.stdout + ran.stderr
    assert sum(found["ended"].values()) == 50
    assert found["metrics"]["recmas_worker_restarts_total"] == 2
    assert found["metrics"]["recmas_requests_running"] == 0
