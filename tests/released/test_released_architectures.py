"""Every released style in the architectures of its models, tiny, all the way to answers."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import recmas_runtime as rt
from kit.bundles import Built
from kit.commands import run_recmasc
from kit.traced import run_traced
from recmas_compiler import api
from recmas_compiler.released.styles import STYLES
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import Exit
from recmas_runtime.formats.precisions import TOLERANCES
from released_form import edit_json, write_release

# role -> model type of the zoo; Qwen3.5 and Gemma 3 as published, inside models that see
ARCHITECTURES = {
    "sequential_light": {"planner": "qwen3", "critic": "llama", "solver": "qwen2"},
    "sequential_scaled": {"planner": "gemma3", "critic": "llama", "solver": "qwen3_5"},
    "mixture": {
        "math": "qwen2",
        "code": "qwen2",
        "science": "mistral",
        "summarizer": "qwen3_5",
    },
    "distillation": {"expert": "qwen3_5", "learner": "qwen3_5_text"},
    "deliberation": {"reflector": "qwen3_5", "toolcaller": "qwen3_5"},
}
QUESTIONS = (
    "What is 7 * 8?",
    "Anna has three plans and an orange. Which of the plans is the best one, and why is it so?",
    "Hm?",
)
RECORDS = [{"id": str(i), "question": question} for i, question in enumerate(QUESTIONS)]
SMALL = ("latent_steps=3", "answer.max_new_tokens=40", "build.max_batch=4")
# The zoo's Mistral looks back 12 positions in every layer and would see neither question nor
# messages; this is shorter than its prompts and lets both in.
WINDOW = 96


@pytest.mark.families
@pytest.mark.parametrize("name", STYLES)
def test_a_style_in_its_own_architectures(name: str, tmp_path: Path) -> None:
    """Import, check, build, verify, run: engine, reference and a rollout without cache agree."""
    write_release(tmp_path / "released", STYLES[name], types=ARCHITECTURES[name])
    for role, model_type in ARCHITECTURES[name].items():
        if model_type == "mistral":
            config = tmp_path / "released" / STYLES[name].agent_repository(role) / "config.json"
            edit_json(config, lambda values: values.update(sliding_window=WINDOW))
    spec = tmp_path / "spec.yaml"
    given = ("--from", tmp_path / "released", "-o", spec, "--quiet")
    for command in (("import", "released", name, *given), ("check", spec)):
        ran = run_recmasc(*command)
        assert ran.exit_code == Exit.OK, ran.output
    program = api.compile(load_spec(spec, overrides=SMALL))
    assert program.graph.system.rounds == 3
    bundle = api.build(program, tmp_path / "bundle")
    assert main(["verify", str(bundle)]) == 0
    built = Built(
        bundle=bundle,
        topology=program.topology,
        program=program.graph,
        system=rt.load(bundle, threads=1),
    )
    together, messages = run(built.system, tmp_path / "batch", batch=4)
    alone, others = run(built.system, tmp_path / "alone", batch=1)
    naive, reference = built.naive(RECORDS), built.reference(RECORDS)
    assert set(messages) == set(naive.messages)
    assert any(message.endswith("@2") for message in messages)
    for key, expected in naive.messages.items():
        # Records differ in every message, or a comparison could not tell their rows apart.
        apart = min(float((m - n).abs().max()) for m, n in combinations(expected, 2))
        assert apart > 10 * TOLERANCES["message_absolute"], (key, apart)
        for found in (messages[key], others[key], reference.messages[key].numpy()):
            assert np.abs(found - expected.numpy()).max() <= TOLERANCES["message_absolute"]
    assert together == alone == reference.texts == naive.texts
    assert len(set(together)) > 1
    assert answers_of_a_run(bundle, tmp_path) == together


def answers_of_a_run(bundle: Path, folder: Path) -> list[str]:
    """Answer by the command."""
    source, target = folder / "questions.jsonl", folder / "answers.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    command = ["run", str(bundle), "--input", str(source), "--output", str(target), "--quiet"]
    assert main(command) == 0
    return [json.loads(line)["answer"] for line in target.read_text().splitlines()]


def run(system: rt.System, folder: Path, *, batch: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Answer in batches; returns texts and messages [records, m, d]."""
    answers, messages = run_traced(system, folder, RECORDS, batch=batch)
    return [answer.answer for answer in answers], messages
