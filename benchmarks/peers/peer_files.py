"""What the race runs on: environments of the peers' packages, and models in their formats.

Everything is made on first use and kept: what is there is whole, for it is renamed to its name when
it is done.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import gguf
import numpy as np
import onnx
from contenders import (
    ENVIRONMENTS,
    GENAI,
    GENAI_PRECISIONS,
    GGUF_TYPES,
    LLAMA,
    OPENVINO,
    OPENVINO_TYPES,
    PEERS,
    SHARES_PACKAGES,
    TRANSFORMERS,
    Models,
)

HERE: Final = Path(__file__).parent
HUGGING_FACE: Final = HERE.parent / "frameworks/adapters/avp_weights.py"
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
# What transformers initializes such models with.
DEVIATION: Final = 0.02
BODY_ONLY: Final = ("exclude_embeds=true", "exclude_lm_head=true")


def make_environments(folder: Path, peers: Iterable[str]) -> None:
    """Install the packages of peers that have an environment of their own."""
    for peer in peers:
        if peer in ENVIRONMENTS:
            make_environment(folder / ENVIRONMENTS[peer], shares=peer in SHARES_PACKAGES)


def make_environment(folder: Path, *, shares: bool) -> None:
    """Install what the requirements of a folder's name pin, unless that is done."""
    requirements = HERE / "requirements" / f"{folder.name}.txt"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    ready = folder / ".ready"
    if ready.exists() and ready.read_text(encoding="ascii") == wanted:
        return
    _say(f"installing {requirements.name} into {folder}")
    _run(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    _run(python, "-m", "pip", "install", "--quiet", "--requirement", requirements)
    if shares:
        where = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        ours = sysconfig.get_path("purelib")
        # A folder of packages with .pth files of its own, which a plain line would leave out.
        line = f"import site; site.addsitedir({ours!r})\n"
        Path(where, "zz_this_program.pth").write_text(line, encoding="utf-8")
    ready.write_text(wanted, encoding="ascii")


def make_models(models: Models, environments: Path, peers: Iterable[str] = PEERS) -> None:
    """Make the files of one set of weights in every format that peers want."""
    models.folder.mkdir(parents=True, exist_ok=True)
    asked = set(peers)
    wants_folder = {GENAI, TRANSFORMERS} & asked
    if {LLAMA, OPENVINO} & asked:
        llama = environments / ENVIRONMENTS[LLAMA] / "bin/python"
        for kind in GGUF_TYPES:
            # Of what is quantized already, other types are made by way of float32.
            _make(
                models.gguf(kind.name),
                lambda new, number=kind.number: _run(  # type: ignore[misc]
                    llama, HERE / "adapters/llama_files.py", models.source, new, number
                ),
            )
    if OPENVINO in asked:
        openvino = environments / ENVIRONMENTS[OPENVINO] / "bin/python"
        for name in OPENVINO_TYPES:
            _make(
                models.openvino(name),
                lambda new, name=name: _run(  # type: ignore[misc]
                    openvino, HERE / "adapters/openvino_files.py", models.gguf(name), new
                ),
            )
    if wants_folder:
        _make(
            models.hugging_face,
            lambda new: _run(sys.executable, HUGGING_FACE, models.source, new),
        )
    if GENAI in asked:
        python = environments / ENVIRONMENTS[GENAI] / "bin/python"
        for precision, name in GENAI_PRECISIONS.items():
            weights = models.hugging_face

            def build(new: Path, *options: str, name: str = name, weights: Path = weights) -> None:
                command = ["-m", "onnxruntime_genai.models.builder", "-i", weights, "-o", new]
                command += ["-p", name, "-e", "cpu", "-c", new / "cache"]
                _run(python, *command, *(("--extra_options", *options) if options else ()))
                shutil.rmtree(new / "cache", ignore_errors=True)

            def whole(new: Path, build: Callable[..., None] = build) -> None:
                build(new, "prune_lm_head=true")
                write_every_logit(new / "model.onnx", new / "every.onnx")

            _make(models.genai(precision), whole)
            _make(models.genai_body(precision), lambda new, b=build: b(new, *BODY_ONLY))  # type: ignore[misc]


def write_every_logit(pruned: Path, path: Path) -> None:
    """Write the graph of a builder's model without what leaves one position to the head.

    Both share one file of weights.
    """
    model = onnx.load(str(pruned), load_external_data=False)
    makers = {name: node for node in model.graph.node for name in node.output}
    head = makers[next(value.name for value in model.graph.output if value.name == "logits")]
    while not head.op_type.startswith("MatMul"):
        head = makers[head.input[0]]
    chosen = makers[head.input[0]]
    while chosen.op_type in ("Unsqueeze", "Reshape", "Gather", "Slice"):
        head.input[0] = chosen.input[0]
        chosen = makers[head.input[0]]
    onnx.save(model, str(path))


def write_random(like: Path, path: Path) -> None:
    """Write a GGUF file in float32 with the shape of another one, its weights drawn at random.

    They are those of a model before its training: normal with one deviation, divided by the root
    of their number in matrices that write into the residual, and norms of ones. With the deviations
    of trained matrices, random ones make errors grow from layer to layer. No grid of integers fits
    such numbers, where those of a quantized model fit its own without loss.
    """
    shutil.copyfile(like, path)
    draw = np.random.default_rng(0)
    tensors = gguf.GGUFReader(path, "r+").tensors
    writers = {t.name for t in tensors if ".attn_output." in t.name or ".ffn_down." in t.name}
    for tensor in tensors:
        assert tensor.data.dtype == np.float32, f"{tensor.name} is not in float32"
        if tensor.data.ndim > 1:
            share = len(writers) ** -0.5 if tensor.name in writers else 1.0
            drawn = draw.standard_normal(tensor.data.shape, np.float32)
            tensor.data[...] = drawn * (share * DEVIATION)
        else:
            tensor.data[...] = 1.0
        tensor.data.flush()


def _make(path: Path, write: Callable[[Path], None]) -> None:
    """Make a file or folder that is not there."""
    if path.exists():
        return
    _say(f"making {path}")
    new = path.with_name(f"new-{path.name}")
    if new.is_dir():
        shutil.rmtree(new)
    write(new)
    new.rename(path)


def _run(*command: object) -> None:
    """Run a program; its words are shown only where it fails."""
    words = [str(word) for word in command]
    ran = subprocess.run(
        words, check=False, capture_output=True, text=True, env={**os.environ, **OFFLINE}
    )
    if ran.returncode:
        lines = (ran.stdout + ran.stderr).replace("\r", "\n").strip().splitlines()
        end = "\n".join(lines[-15:])
        raise SystemExit(f"`{' '.join(words)}` ended with {ran.returncode}:\n{end}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
