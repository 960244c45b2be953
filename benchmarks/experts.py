"""A mixture of experts: its steps and prompts beside transformers', and its memory beside the plan.

    python benchmarks/experts.py OUT [--layers 4] [--experts 16] [--taken 4] [--width 1024]
        [--expert-width 768] [--used 128] [--repeats 5]

Makes a random Qwen3-MoE with SmolLM2's tokenizer in OUT/model, builds a bundle of one agent from it
in float32 and in int4, and measures both: `recmasc bench engines` beside transformers on the same
threads, and `benchmarks/memory.py`. What is in OUT already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from recmas_compiler.backbones.sources import describe_backbone
from recmas_compiler.backbones.torch_model import load_backbone
from recmas_runtime.core.progress import Silent

BUILTIN = "builtin:smollm2-135m-instruct"
PRECISIONS = ("float32", "int4")
SPEC = """
recmas: 1
name: experts
rounds: 1
latent_steps: 8

backbones:
  moe: {source: "MODEL"}

agents:
  thinker: {backbone: moe, prompt: "{{ question }}", inner: {init: random}}
  writer: {backbone: moe, prompt: "{{ question }} {{ latent.thinker }}", inner: {init: random}}

links:
  thinker -> writer: {init: random}

build: {max_prompt_tokens: 512}
answer: {agent: writer, max_new_tokens: 32}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, usual in (("layers", 4), ("experts", 16), ("taken", 4), ("width", 1024)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    for name, usual in (("expert-width", 768), ("used", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    arguments = parser.parse_args()
    out: Path = arguments.out
    if not (out / "model").exists():
        write_model(out / "model", arguments)
    (out / "spec.yaml").write_text(SPEC.replace("MODEL", str((out / "model").resolve())))
    bundles = [str(out / precision) for precision in PRECISIONS]
    for bundle, precision in zip(bundles, PRECISIONS, strict=True):
        call("build", str(out / "spec.yaml"), "-o", bundle, "--precision", precision)
    shape = ("--used", str(arguments.used), "--repeats", str(arguments.repeats))
    engines = ("--engine", "onnx", "--engine", "huggingface", "--out", str(out / "engines"))
    call("bench", "engines", bundles[0], "--bundle", bundles[1], *shape, *engines)
    memory = str(Path(__file__).with_name("memory.py"))
    run([sys.executable, memory, *bundles, "--batch", "1,4", "--words", "20,300"])


def write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the model as Hugging Face does."""
    facts = describe_backbone(BUILTIN, base_dir=folder.parent)
    like = load_backbone(facts, progress=Silent())
    config = Qwen3MoeConfig(
        vocab_size=like.facts.vocab_size,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 256,
        head_dim=64,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.taken,
        moe_intermediate_size=arguments.expert_width,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        norm_topk_prob=True,
        eos_token_id=like.eos_token_ids[0],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A wide table, so that the likeliest token does not hang on the rounding of int4.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(like.tokenizer_json)
    (folder / "chat_template.jinja").write_text(like.chat_template)
    end = like.special_tokens["eos_token"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def call(*arguments: str) -> None:
    """Run recmasc."""
    run([str(Path(sys.executable).with_name("recmasc")), *arguments])


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


if __name__ == "__main__":
    main()
