"""Models of the Hugging Face hub, fetched from one on this machine by the hub's own library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from kit.hub_server import COMMIT, Hub, serving
from kit.models import write_tiny_backbone

SPEC = """\
recmas: 1
name: one
backbones:
  small: {source: "hf:SOURCE"}
agents:
  writer: {backbone: small, prompt: "{{ question }}"}
answer: {agent: writer, max_new_tokens: 4}
build: {max_prompt_tokens: 64}
"""

# What `recmasc build` and `train` do with backbones, and how it went.
RUN = """\
import sys
from recmas_compiler.api import load_and_compile, to_torch
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import LineProgress

class Terminal:
    def isatty(self): return True
    def write(self, text): sys.stderr.write(text)
    def flush(self): pass

try:
    program = load_and_compile("spec.yaml", progress=LineProgress(Terminal()), offline=OFFLINE)
    if LOADS:
        to_torch(program)
    print("has", program.graph.system.backbones["small"].facts.identity)
except RecmasError as error:
    print(error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_tiny_backbone(tmp_path / "tiny", "llama")
    weights = load_file(folder / "model.safetensors")
    parts: dict[str, dict[str, object]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for number, (name, weight) in enumerate(sorted(weights.items())):
        parts[f"model-{number % 2 + 1}.safetensors"][name] = weight
    index = {name: file for file, held in parts.items() for name in held}
    for file, held in parts.items():
        save_file(held, folder / file, metadata={"format": "pt"})  # type: ignore[arg-type]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    # what a repository holds besides
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    for name in (
        "pytorch_model.bin",
        "original/model.safetensors",
        "onnx/config.json",
        "README.md",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    with serving(Hub({"org/tiny": folder})) as served:
        yield served


def said(
    hub: Hub,
    folder: Path,
    source: str,
    *,
    offline: bool = False,
    loads: bool = False,
    **env: str,
) -> str:
    """Compile a source in a process of its own: the hub's library reads its address once."""
    (folder / "spec.yaml").write_text(SPEC.replace("SOURCE", source))
    environment = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), **env}
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("OFFLINE", str(offline)).replace("LOADS", str(loads))],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_model_is_fetched_with_what_is_used_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    told = said(hub, tmp_path, "org/tiny@main", loads=True)
    assert f"has hf:org/tiny@{COMMIT}" in told
    assert "Fetching org/tiny: " in told
    names = [name for name, _ in hub.fetched]
    assert sorted(names) == sorted(
        {
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "model-1.safetensors",
            "model-2.safetensors",
        }
    )
    hub.fetched.clear()
    assert "has hf:" in said(hub, tmp_path, f"org/tiny@{COMMIT}")
    assert "has hf:" in said(hub, tmp_path, "org/tiny@main", offline=True)
    assert "has hf:" in said(hub, tmp_path, "org/tiny@main", HF_HUB_OFFLINE="1")
    assert not hub.fetched


def test_a_download_that_broke_off_goes_on(hub: Hub, tmp_path: Path) -> None:
    with (hub.folders["org/tiny"] / "model-2.safetensors").open("ab") as file:
        file.write(bytes(12_000_000))
    hub.breaks_at["model-2.safetensors"] = 11_000_000
    assert "has hf:" in said(hub, tmp_path, "org/tiny@main")
    begins = [begin for name, begin in hub.fetched if name == "model-2.safetensors"]
    assert begins == [0, 10 * 2**20]  # the library writes pieces of this size


def test_offline_names_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    for options in ({"offline": True}, {"HF_HUB_OFFLINE": "1"}):
        told = said(hub, tmp_path, "org/tiny@main", **options)  # type: ignore[arg-type]
        assert "error[RM200]: org/tiny at main is not whole in the local cache" in told
        assert "hf download org/tiny --revision main" in told
    assert not hub.fetched


def test_what_a_repository_lacks_is_told_before_anything_large(hub: Hub, tmp_path: Path) -> None:
    folder = hub.folders["org/tiny"]
    told = said(hub, tmp_path, "org/gone@main")
    assert "RM200" in told
    assert "there is no repository org/gone, or it is private" in told
    assert "org/tiny has no revision `v2`" in said(hub, tmp_path, "org/tiny@v2")
    hub.gated.add("org/tiny")
    told = said(hub, tmp_path, "org/tiny@main")
    assert "RM202" in told
    assert "org/tiny is gated: its owner has not let you in" in told
    assert (
        f"Accept its terms on {'https://huggingface.co/org/tiny'} and run `hf auth login`" in told
    )
    hub.gated.clear()
    (folder / "model.safetensors.index.json").unlink()
    told = said(hub, tmp_path, "org/tiny@main")
    assert "has its weights in pytorch_model.bin and in no safetensors file" in told
    (folder / "config.json").unlink()
    (folder / "tiny-q8_0.gguf").touch()
    told = said(hub, tmp_path, "org/tiny@main")
    assert "is a repository of GGUF files, such as tiny-q8_0.gguf" in told
    assert "hf download org/tiny tiny-q8_0.gguf" in told
    assert not [name for name, _ in hub.fetched if name.endswith((".safetensors", ".bin"))]
