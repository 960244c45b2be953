"""The example of a relay, in small: after a few steps messages carry a digit of the real model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recmas_compiler import api
from recmas_compiler.spec.spec import load_spec
from recmas_compiler.training.loop.distributed import joined_world
from recmas_compiler.training.run import RunOptions, run_stages
from recmas_compiler.training.session import open_session
from recmas_compiler.training.settings import train_settings
from recmas_compiler.training.tasks.outer import exact_answers
from recmas_runtime.core.progress import Silent

RELAY = Path(__file__).parents[2] / "examples" / "relay"


@pytest.mark.heavy
@pytest.mark.smollm2
def test_a_digit_comes_through(tmp_path: Path) -> None:
    shutil.copy(RELAY / "spec.yaml", tmp_path)
    command = [sys.executable, RELAY / "make_data.py", "--digits", "1", "--records", "320"]
    with (tmp_path / "train.jsonl").open("w") as file:
        subprocess.run(command, stdout=file, check=True)
    changes = (
        "train.outer.steps=100",
        "train.outer.batch_size=8",
        "train.outer.lr=5e-4",
        "train.eval_every=100",
    )
    spec = load_spec(tmp_path / "spec.yaml", overrides=changes)
    program = api.compile(spec).graph
    with joined_world() as world:
        session = open_session(spec, program, train_settings(spec), world=world, progress=Silent())
        options = RunOptions(folder=tmp_path / "run", resume=False)
        figures = run_stages(session, "outer", options).stages["outer"]["after"]
        exact = exact_answers(session.graph, session.examples.held_out, batch_size=8)
    assert figures["latent"] < figures["shuffled"] - 0.5
    assert figures["latent"] < figures["mean"] - 0.5
    shares = {name: sum(right) / len(right) for name, right in exact.items()}
    assert shares["latent"] >= 0.7
    assert shares["shuffled"] <= 0.5
    assert shares["null"] <= 0.5
