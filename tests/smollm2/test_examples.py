"""Every example runs and shows what it says; its engines, the reference and the naive form agree.

One file, so that the bundle of the real model is built in one process, once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smollm2
EXAMPLES = Path(__file__).parents[2] / "examples"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(quickstart: Path) -> None:
    answers = [json.loads(line) for line in (quickstart / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["pens", "apples"]
    for answer in answers:
        assert answer["usage"]["latent_steps"] == 0, "rows of caches are handed over"
        assert answer["answer"].strip()
    assert "the bundle is whole and right" in (quickstart / "stdout.txt").read_text()


def test_compile_api_gives_the_engines_text(quickstart: Path) -> None:
    shown = run_example("compile_api.py", str(quickstart / "spec.yaml"), str(quickstart / "bundle"))
    lines = dict(line.split(":", 1) for line in shown.splitlines() if line[:9] in TITLES)
    engines = lines["engines"].strip().rpartition(" Usage(")[0]
    reference = lines["reference"].strip().rpartition(" (")[0]
    assert engines == reference


TITLES = ("engines: ", "reference")


def test_run_without_torch(quickstart: Path) -> None:
    shown = run_example("run_without_torch.py", str(quickstart / "bundle"))
    assert "sequential: 3 agents, 3 rounds" in shown
    assert "error: error[RM500]" in shown
    assert "answer: Answer(id='ok'" in shown


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text() + (Path(__file__).parent / "conftest.py").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".sh"):
            assert path.name in tested, f"{path.name} is run by no test"


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
    shown = agree(quickstart / "bundle", tmp_path, QUESTIONS[2:], max_new_tokens=8)
    assert "engines and naive form:     1/1" in shown


@pytest.mark.heavy
def test_engines_reference_and_naive_form_on_more(quickstart: Path, tmp_path: Path) -> None:
    shown = agree(quickstart / "bundle", tmp_path, QUESTIONS, max_new_tokens=32)
    assert "engines and naive form:     3/3" in shown
