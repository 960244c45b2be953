"""Prompts that go on from snapshots of layer states, against prompts that run whole.

    python benchmarks/snapshots.py FOLDER [--layers 8] [--batch 1,4] [--times 1,6] [--repeats N]

Makes a random model of the layers of Qwen3.5-0.8B in FOLDER, three of gated DeltaNet to one of
attention, with SmolLM2's tokenizer, and the bundle of a planner, a critic and a solver over three
rounds, unless they are there. One plan is the bundle's, in the other nothing is kept of a prompt;
both run on the same engines, in turn. A question is a word problem, written one or more times.
Prints two Markdown tables: prompt tokens that ran for a record and the seconds of the batch, with
one token of text; and what the snapshots take, in bytes and in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from msgspec import structs
from shared_prompts import compare, numbers
from transformers import AutoConfig, AutoModelForCausalLM

import recmas_compiler as rc
import recmas_runtime as rt
from recmas_compiler.backbones.sources import SMOLLM2, describe_backbone
from recmas_compiler.backbones.torch_model import load_backbone
from recmas_runtime.core.progress import Silent
from recmas_runtime.core.text import human_bytes
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.plan import Plan, PrefillStep

_SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_SPEC = """
recmas: 1
name: states
rounds: 3
latent_steps: 8
backbones: {deltas: {source: model}}
agents:
  planner:
    backbone: deltas
    inner: {init: random}
    prompt:
      first: "{{ question }} Make a plan."
      then: "{{ question }} So far: {{ latent.solver }} Make a better plan."
  critic:
    backbone: deltas
    inner: {init: random}
    prompt: "{{ question }} Judge this: {{ latent.planner }}"
  solver:
    backbone: deltas
    inner: {init: random}
    prompt: "{{ question }} Answer with {{ latent.critic }}"
links:
  planner -> critic: {init: random}
  critic -> solver: {init: random}
  solver -> planner: {init: random, feedback: true}
answer: {agent: solver, max_new_tokens: 16}
build: {max_prompt_tokens: 1024, max_batch: 8}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=numbers, default=[1, 4])
    parser.add_argument("--times", type=numbers, default=[1, 6])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    arguments = parser.parse_args()

    bundle = made(arguments.folder, arguments.layers)
    system = rt.load(bundle, threads=arguments.threads)
    forms = {
        "gone on from": system,
        "run again": system.with_plan(forgetting(system.plan)),
    }
    compare(forms, arguments.batch, arguments.times, arguments.repeats)
    print("\n| records | bytes of a snapshot | of all at once, at most | ms to save | to restore |")
    print("|---|---|---|---|---|")
    for batch in arguments.batch:
        print(copies(system, batch), flush=True)


def made(folder: Path, layers: int) -> Path:
    """Return a bundle in a folder, made if it is not there."""
    bundle = folder / f"bundle-{layers}"
    if bundle.exists():
        return bundle
    write_model(folder / "model", layers)
    spec = folder / "spec.yaml"
    spec.write_text(_SPEC, encoding="utf-8")
    rc.build(rc.compile(rc.load_spec(spec)), out=bundle)
    return bundle


def write_model(folder: Path, layers: int, vocabulary: int | None = None) -> None:
    """Write the random model, in place of what is there, as Hugging Face does.

    The vocabulary is the tokenizer's unless a larger one is given.
    """
    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    like = load_backbone(describe_backbone(SMOLLM2, base_dir=folder.parent), progress=Silent())
    config = AutoConfig.for_model(
        "qwen3_5_text",
        num_hidden_layers=layers,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        vocab_size=like.facts.vocab_size if vocabulary is None else vocabulary,
        eos_token_id=like.eos_token_ids[0],
        **_SHAPE,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A wide table, so that the likeliest token does not hang on the rounding of int4.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(like.tokenizer_json, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(like.chat_template, encoding="utf-8")
    end = like.special_tokens["eos_token"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def forgetting(plan: Plan) -> Plan:
    """Return the plan in which every prompt runs whole."""
    steps = tuple(
        structs.replace(step, reuse_prefix=False, prefix_from=None, restore=None, snapshots=())
        if isinstance(step, PrefillStep)
        else step
        for step in plan.steps
    )
    return structs.replace(plan, steps=steps, snapshots={})


def copies(system: rt.System, batch: int) -> str:
    """Return the row of a table: what snapshots of a batch take."""
    (engine,) = system.loaded.engines.backbones.values()
    cache = engine.new_cache(batch, 1024)
    rows = {row: row for row in range(batch)}
    saving, restoring = [], []
    for _ in range(20):
        start = time.perf_counter()
        saved = cache.save_states()
        middle = time.perf_counter()
        cache.restore_states(saved, rows)
        saving.append(middle - start)
        restoring.append(time.perf_counter() - middle)
    sizes = [snapshot.bytes_per_sample for snapshot in system.plan.snapshots.values()]
    save_ms, restore_ms = (statistics.median(each) * 1e3 for each in (saving, restoring))
    return (
        f"| {batch} | {human_bytes(batch * sizes[0])} | {human_bytes(batch * sum(sizes))} "
        f"| {save_ms:.1f} | {restore_ms:.1f} |"
    )


if __name__ == "__main__":
    main()
