"""`recmasc train --method lora|sft`: the answer agent alone learns, and links stay as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kit.models import LoadTiny, load_folder
from kit.training import examples, on_one
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.training_graph.calls import CallWriter
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.metrics import METRICS_NAME
from recmas_compiler.training.tasks.finetuning import SingleAgentTask
from recmas_runtime.core.errors import Exit
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.running.baselines import without_slots
from test_train_command import COMMAND, ENVIRONMENT, recmasc

NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
METHODS = [pytest.param("lora", marks=NEEDS_PEFT), "sft"]

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture
def here(case: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The spec; commands run beside it."""
    monkeypatch.chdir(case.parent)
    return Path(case.name)


def alone(backbone: TorchBackbone, *, checkpointed: bool = False) -> SingleAgentTask:
    """Return the task of the last agent of a chain, without anything that learns."""
    graph = on_one("self_loop", backbone)
    records = examples(graph)
    return SingleAgentTask(
        CallWriter(graph.system, {"tiny": backbone}),
        "solver",
        backbone,
        {},
        train=records,
        held_out=records,
        batch_size=2,
        checkpointed=checkpointed,
        compute=torch.float32,
    )


def test_the_prompt_is_that_of_the_runtimes_baseline() -> None:
    def parts(*named: str) -> tuple[PromptPart, ...]:
        pairs = [name.split(":", 1) for name in named]
        return tuple(PromptPart(kind=kind, value=value) for kind, value in pairs)

    prompt = parts(
        "field:q", "text:\nSeen: ", "slot:a", "text:\nWith ", "field:b", "text: ", "slot:a"
    )
    assert without_slots(prompt) == parts("field:q", "text:\n", "text:With ", "field:b", "text: ")
    # Where every line is about a message, they stay without it: an empty prompt asks nothing.
    prompt = parts("text:Use ", "slot:a", "text: to answer.")
    assert without_slots(prompt) == parts("text:Use ", "text: to answer.")
    assert without_slots(parts("slot:a")) == ()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_loss_is_transformers_own(tiny: LoadTiny, checkpointed: bool) -> None:
    backbone = tiny("llama")
    task = alone(backbone, checkpointed=checkpointed)
    graph = on_one("self_loop", backbone)
    total, tokens = 0.0, 0
    for record in examples(graph):
        call = CallWriter(graph.system, {"tiny": backbone}).write("solver", "then", "turn", record)
        ids = torch.tensor([[i for item in call.items for i in getattr(item, "ids", ())]])
        labels = ids.clone()
        labels[:, : -call.num_target_tokens] = -100
        with torch.no_grad():
            loss = backbone.model(input_ids=ids, labels=labels).loss
        total += float(loss) * call.num_target_tokens
        tokens += call.num_target_tokens
    found = task.loss([0, 1, 2])
    assert found.tokens == tokens
    assert float(found.total) == pytest.approx(total, rel=1e-5)
    assert task.measure(ALONE)["alone"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_method(here: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    faster = ("--set", f"train.{method}.lr=1e-2")
    data = recmasc(capsys, "train", here, "--quiet", "--method", method, *faster)["data"]
    assert data["agent"] == "solver"
    figures = data["stages"][method]
    assert figures["steps"] == 8
    assert figures["after"]["alone"] < figures["before"]["alone"] - 0.1
    assert not Path("links").exists(), "links are as they were"

    run = Path("out/pair-training") / method
    steps = [e for e in read_json_lines(run / METRICS_NAME) if e["kind"] == "step"]
    assert steps[0]["grad_norm"].keys() == {f"solver.{method}"}
    cost = json.loads((run / "cost.json").read_text())
    assert data["costs"][method] == cost
    assert cost["steps"] == 8
    assert min(cost["step_seconds"], cost["peak_memory_mb"], cost["tokens_per_step"]) > 0

    # What was saved is what was trained: the same held-out loss, from the folder.
    before = AutoModelForCausalLM.from_pretrained("llama")
    num_weights = sum(weight.numel() for weight in before.parameters())
    assert (cost["trainable_parameters"] == num_weights) == (method == "sft")
    here.write_text(here.read_text().replace("{source: llama}", f"{{source: {data['model']}}}"))
    again = recmasc(capsys, "train", here, "--quiet", "--method", method, "--out", "again")["data"]
    assert again["stages"][method]["before"] == pytest.approx(figures["after"], rel=1e-4)


@NEEDS_PEFT
def test_lora_is_saved_as_peft_saves_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    arguments = ("--set", "train.lora.lr=1e-2", "--set", "train.lora.rank=2")
    recmasc(capsys, "train", here, "--quiet", "--method", "lora", *arguments)
    run = Path("out/pair-training/lora")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {2}
    base = load_folder(Path("llama").resolve()).model
    adapted = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained("llama")(ids).logits
    assert not torch.allclose(plain, merged(ids).logits, atol=1e-2)


@NEEDS_PEFT
def test_additions_to_bfloat16_weights_are_not_rounded(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    more = ("--steps", "2", "--set", "train.backbone_dtype=bfloat16")
    recmasc(capsys, "train", here, "--quiet", "--method", "lora", *more)
    run = Path("out/pair-training/lora")
    base = load_folder(Path("llama").resolve()).model.to(torch.bfloat16).float()
    adapted = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().state_dict()
    for name, weight in load_file(run / "model" / "model.safetensors").items():
        torch.testing.assert_close(weight, adapted[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_has_its_code(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def write(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("recmas_compiler.training.tasks.finetuning._save_model", write)
    more = ("--quiet", "--steps", "1", "--method", method)
    printed = recmasc(capsys, "train", here, *more, status=Exit.RUN_FAILED)
    (problem,) = printed["problems"]
    assert problem["code"] == "RM303"
    assert "No space left on device" in problem["message"]


def test_the_same_records_in_the_same_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens per step are those of the links' run: the same targets in every batch."""
    recmasc(capsys, "train", here, "--quiet", "--stage", "outer")
    recmasc(capsys, "train", here, "--quiet", "--method", "sft")
    run = Path("out/pair-training")
    tokens = [
        [entry["tokens"] for entry in read_json_lines(run / name / METRICS_NAME) if "lr" in entry]
        for name in ("outer", "sft")
    ]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1


# In `make test-heavy`: a process of its own, killed and started anew, takes a while. Links, whose
# loop is the same one, are killed in `make test`.
@pytest.mark.heavy
@pytest.mark.parametrize("method", [pytest.param("lora", marks=NEEDS_PEFT), "sft"])
def test_resume_after_kill_9(case: Path, method: str) -> None:
    arguments = [*COMMAND, str(case), "--quiet", "--method", method, "--steps", "30"]

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*arguments, "--out", out, *more],
            cwd=case.parent, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    assert start("whole").wait() == 0
    running = start("killed")
    metrics = case.parent / "killed" / method / METRICS_NAME
    while running.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b'"kind": "step"') >= 10:
            os.kill(running.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    assert running.wait() == -signal.SIGKILL
    assert start("killed", "--resume").wait() == 0
    files = [
        case.parent / out / method / "model" / "model.safetensors" for out in ("whole", "killed")
    ]
    whole, resumed = map(load_file, files)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@NEEDS_PEFT
def test_what_does_not_go_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (("--eval-only",), ("--stage", "inner")):
        printed = recmasc(capsys, "train", here, "--method", "lora", *more, status=Exit.USAGE)
        assert [p["code"] for p in printed["problems"]] == ["RM506"]
    recmasc(capsys, "train", here, "--quiet", "--method", "lora", "--steps", "2")
    again = ("train", here, "--quiet", "--method", "lora", "--steps", "2")
    printed = recmasc(capsys, *again, status=Exit.USAGE)
    assert printed["problems"][0]["code"] == "RM302"
    other = ("--resume", "--set", "train.lora.rank=3")
    printed = recmasc(capsys, *again, *other, status=Exit.USAGE)
    assert printed["problems"][0]["code"] == "RM703"
    assert "the settings" in printed["problems"][0]["message"]


def test_without_peft(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    printed = recmasc(capsys, "train", here, "--quiet", "--method", "lora", status=Exit.ENVIRONMENT)
    assert printed["problems"][0]["code"] == "RM201"
