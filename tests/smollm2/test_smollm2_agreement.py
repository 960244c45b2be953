"""On the real model: engines, reference, naive form and ragged batches agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smollm2
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

QUESTIONS = [
    "A box holds 12 eggs. How many eggs are in 5 boxes?",
    "Lena reads 20 pages on Monday and twice as many on Tuesday. On Wednesday she reads 15 pages "
    "fewer than on Tuesday. How many pages does she read in these three days?",
    "What is 9 + 10?",
]


def agree(bundle: Path, folder: Path, questions: list[str], max_new_tokens: int) -> str:
    data = folder / "questions.jsonl"
    lines = [json.dumps({"id": str(i), "question": q}) for i, q in enumerate(questions)]
    data.write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(BENCHMARKS / "agreement.py"), str(bundle), "--data", str(data)]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(max_new_tokens)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_engines_reference_and_naive_form(quickstart: Path, tmp_path: Path) -> None:
    shown = agree(quickstart / "bundle", tmp_path, QUESTIONS[:1], max_new_tokens=8)
    assert "engines and naive form:     1/1" in shown


@pytest.mark.heavy
def test_engines_reference_and_naive_form_on_more(quickstart: Path, tmp_path: Path) -> None:
    shown = agree(quickstart / "bundle", tmp_path, QUESTIONS, max_new_tokens=32)
    assert "engines and naive form:     3/3" in shown
