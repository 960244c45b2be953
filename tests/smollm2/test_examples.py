"""Every example runs and shows what it says; its engines, the reference and the naive form agree.

One file, so that the bundle of the real model is built in one process, once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recmas_runtime as rt
from recmas_compiler.backbones.sources import SMOLLM2, describe_backbone
from recmas_compiler.backbones.torch_model import load_backbone
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.precisions import TOLERANCES

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
    assert "sequential: 3 agents, rounds: 1" in shown
    assert "error: error[RM500]" in shown
    assert "answer: Answer(id='ok'" in shown


def test_a_text_is_as_likely_as_with_transformers(quickstart: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")[:3000]
    read = rt.load(quickstart / "bundle", device="cpu").read_text(text, top=5)
    backbone = load_backbone(describe_backbone(SMOLLM2, base_dir=Path()), progress=Silent())
    ids = backbone.tokenizer(text)["input_ids"]
    assert [token.id for token in read] == ids
    assert len(ids) > 600
    assert "".join(token.text for token in read) == text
    with torch.no_grad():
        logits = backbone.model(torch.tensor([ids])).logits[0].double()
    told = torch.log_softmax(logits, dim=-1).numpy()
    allowed = 2 * TOLERANCES["logits_relative"] * float(logits.abs().max())
    found = np.array([token.logprob for token in read[1:]], np.float64)
    assert np.abs(found - told[np.arange(len(ids) - 1), ids[1:]]).max() <= allowed
    best = np.sort(told[:-1], axis=-1)[:, :-6:-1]
    tops = np.array([[logprob for _, logprob in token.top] for token in read[1:]])
    assert np.abs(tops - best).max() <= allowed
    assert -4.0 < found.mean() < -1.0  # a model that knows English


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
