"""`recmasc train --method text`: the agents of a text system learn what the data has for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.training import SPEC, changed
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.ops import Think, Write
from recmas_compiler.ir.text_links import with_text_links, writing_agents
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.errors import Exit
from test_train_command import recmasc

ONE_BACKBONE = changed(
    ("{tiny: {source: llama}, other: {source: qwen2}}", "{tiny: {source: llama}}"),
    ("backbone: other", "backbone: tiny"),
)


@pytest.fixture
def here(case: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The spec with both agents on one backbone; commands run beside it."""
    monkeypatch.chdir(case.parent)
    case.write_text(ONE_BACKBONE)
    return Path(case.name)


def test_a_topology_as_a_text_system(here: Path) -> None:
    topology = with_text_links(build_topology(load_spec(here)))
    assert writing_agents(topology.system) == ("planner", "solver")
    steps = run_pipeline(topology).nodes().values()
    assert not [op for op in steps if isinstance(op, Think)]
    assert {op.max_tokens for op in steps if isinstance(op, Write)} == {12}


def plain_loss(records: list[dict[str, str]]) -> float:
    """Return the mean loss over all turns, written out with transformers' own template."""
    model = AutoModelForCausalLM.from_pretrained("llama").eval()
    tokenizer = AutoTokenizer.from_pretrained("llama")
    total, tokens = 0.0, 0
    for record in records:
        question, plan, solution = record["question"], record["plan"], record["solution"]
        turns = (
            (f"{question} Make a plan.", plan),
            (f"{question} Seen: {solution} Better plan.", plan),
            (f"{question} Use {plan} and answer.", solution),
        )
        for asked, said in turns:
            messages = [{"role": "user", "content": asked}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            whole = tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": said}], return_dict=False
            )
            labels = torch.tensor([whole])
            labels[:, : len(prompt)] = -100
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([whole]), labels=labels).loss
            total += float(loss) * (len(whole) - len(prompt))
            tokens += len(whole) - len(prompt)
    return total / tokens


def test_all_agents_learn_their_texts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()[:3]]
    for number, record in enumerate(held_out):
        record["id"] = f"other-{number}"
    Path("held_out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held_out))
    more = ("--set", "train.sft.lr=1e-2", "--set", "train.held_out=held_out.jsonl")
    data = recmasc(capsys, "train", here, "--quiet", "--method", "text", *more)["data"]
    figures = data["stages"]["text"]
    assert figures["before"]["given texts"] == pytest.approx(plain_loss(held_out), rel=1e-4)
    assert figures["after"]["given texts"] < figures["before"]["given texts"] - 0.1
    assert data["model"] == "out/pair-training/text/model"
    assert (Path(data["model"]) / "model.safetensors").is_file()
    assert not Path("links").exists(), "links are as they were"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            ONE_BACKBONE.replace("{planner: plan, solver", "{solver"),
            "nothing says what `planner` should write: it has no target.",
        ),
        (SPEC, "--method text trains one backbone, and the agents are on `other`, `tiny`."),
    ],
)
def test_what_it_cannot_train(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    here.write_text(text)
    more = ("--set", "train.outer.mode=rollout")
    printed = recmasc(
        capsys, "train", here, "--quiet", "--method", "text", *more, status=Exit.USAGE
    )
    (problem,) = printed["problems"]
    assert (problem["code"], problem["message"]) == ("RM705", told)
    assert problem["line"]
