"""Sources that are no whole model, each refused with the true reason, before weights are loaded.

What a folder's config says wrong is in tests/spec/test_sources.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from safetensors.numpy import load_file, save_file

from kit.gguf_models import write_gguf, write_values
from kit.models import write_tiny_backbone
from recmas_compiler.api import compile as compile_spec
from recmas_compiler.api import to_torch
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError

SPEC = """\
recmas: 1
name: one
backbones:
  small: {source: "SOURCE"}
agents:
  writer: {backbone: small, prompt: "{{ question }}"}
answer: {agent: writer, max_new_tokens: 4}
build: {max_prompt_tokens: 64}
"""

Wrong = Callable[[Path], str]


@cache
def whole() -> Path:
    return write_tiny_backbone(Path(mkdtemp()), "llama")


def folder(at: Path) -> Path:
    return Path(shutil.copytree(whole(), at / "model"))


def gguf_with(**options: object) -> Wrong:
    def write(at: Path) -> str:
        write_gguf(folder(at), at / "model.gguf", **options)  # type: ignore[arg-type]
        return "gguf:model.gguf"

    return write


def gguf_values(architecture: str | None, **values: object) -> Wrong:
    def write(at: Path) -> str:
        write_values(at / "model.gguf", architecture, **values)
        return "gguf:model.gguf"

    return write


def gguf_bytes(change: Callable[[bytes], bytes]) -> Wrong:
    def write(at: Path) -> str:
        path = write_gguf(folder(at), at / "model.gguf")
        path.write_bytes(change(path.read_bytes()))
        return "gguf:model.gguf"

    return write


def folder_with(change: Callable[[Path], object]) -> Wrong:
    def write(at: Path) -> str:
        change(folder(at))
        return "model"

    return write


def without(name: str) -> Wrong:
    return folder_with(lambda model: (model / name).unlink())


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def adapter_alone(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (model / "adapter_model.safetensors").touch()


def config_with(**entries: object) -> Wrong:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return folder_with(change)


def small_table(model: Path) -> None:
    """Cut rows off the embedding table, below the ids of tokens that templates write."""
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.ascontiguousarray(weights[name][:260])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 260}))


def with_nan(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


ROWS = {"token_embd.weight": np.zeros((100, 64), dtype=np.float32)}
STATE = {"blk.0.ssm_a.weight": np.zeros((4, 64), dtype=np.float32)}
FREQUENCIES = {"rope_freqs.weight": np.full(8, 3.0, dtype=np.float32)}

WRONG: dict[str, Wrong] = {
    "gguf: no such file": lambda at: "gguf:model.gguf",
    "gguf: a folder": lambda at: f"gguf:{folder(at).name}",
    "gguf: another format": gguf_bytes(lambda raw: b"GGML" + raw[4:]),
    "gguf: old version": gguf_bytes(lambda raw: raw[:4] + b"\1\0\0\0" + raw[8:]),
    "gguf: empty": gguf_bytes(lambda raw: b""),
    "gguf: cut off in its header": gguf_bytes(lambda raw: raw[:2000]),
    "gguf: cut off in its weights": gguf_bytes(lambda raw: raw[:-1000]),
    "gguf: part 2 of 3": gguf_values(None, split__no=1, split__count=3),
    "gguf: adapter": gguf_values("llama", general__type="adapter"),
    "gguf: projector": gguf_values("clip", general__type="mmproj"),
    "gguf: no architecture": gguf_values(None),
    "gguf: unknown architecture": gguf_values("rwkv7", tokenizer__ggml__tokens=["a"]),
    "gguf: no dimension": gguf_with(without=("llama.block_count",)),
    "gguf: unknown value": gguf_with(llama__attention__clamp_kqv=8.0),
    "gguf: experts": gguf_with(llama__expert_count=8),
    "gguf: unknown scaling": gguf_with(llama__rope__scaling__type="longrope"),
    "gguf: frequencies": gguf_with(more=FREQUENCIES),
    "gguf: lacks a tensor": gguf_with(without=("blk.1.ffn_up.weight",)),
    "gguf: another tensor": gguf_with(more=STATE),
    "gguf: another shape": gguf_with(llama__feed_forward_length=128),
    "gguf: more tokens than rows": gguf_with(more=ROWS),
    "gguf: no vocabulary": gguf_with(without=("tokenizer.ggml.tokens",)),
    "gguf: no merges": gguf_with(without=("tokenizer.ggml.merges",)),
    "gguf: unknown tokenizer": gguf_with(tokenizer__ggml__model="bert"),
    "gguf: unknown split": gguf_with(tokenizer__ggml__pre="from-the-future"),
    "gguf: no template": gguf_with(without=("tokenizer.chat_template",)),
    "folder: adapter without its base": folder_with(adapter_alone),
    "folder: pickled weights": folder_with(pickled),
    "folder: quantized": config_with(quantization_config={"quant_method": "gptq", "bits": 4}),
    "folder: no architecture": config_with(model_type=None, architectures=None),
    "folder: unknown architecture": config_with(
        model_type="gpt9", architectures=["Gpt9ForCausalLM"]
    ),
    "folder: no config": without("config.json"),
    "folder: no tokenizer": without("tokenizer.json"),
    "folder: more tokens than rows": folder_with(small_table),
    "folder: no template": without("chat_template.jinja"),
}
# What only the weights tell.
WRONG_WEIGHTS: dict[str, Wrong] = {
    "weights: NaN": folder_with(with_nan),
    "weights: none": without("model.safetensors"),
    "weights: of another shape": config_with(intermediate_size=128),
}


def refusal(name: str, write: Wrong, place: Path, *, loads: bool) -> str:
    at = place / name.replace(" ", "-").replace(":", "")
    at.mkdir()
    spec = parse_spec(SPEC.replace("SOURCE", write(at)), base_dir=at)
    try:
        program = compile_spec(spec)
        if loads:
            to_torch(program)
    except RecmasError as error:
        assert loads or "program" not in locals()
        return f"{name}\n    {str(error).replace(str(at), 'TMP')}\n"
    return f"{name}\n    passes\n"


def test_wrong_sources_are_refused_with_the_true_reason(
    tmp_path: Path, golden: Callable[..., None]
) -> None:
    said = [refusal(name, write, tmp_path, loads=False) for name, write in WRONG.items()]
    said += [refusal(name, write, tmp_path, loads=True) for name, write in WRONG_WEIGHTS.items()]
    assert not [text for text in said if text.endswith("passes\n")]
    golden("".join(said))
