"""The fingerprint of a build: equal inputs, equal value; nothing is loaded to compute it.

It hashes whole texts (the printed program, passes with their options, the resolved spec) and whole
files (weights, the sources of recmas itself), never a hand-kept list of fields that would miss one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from recmas_compiler.backbones.sources import ResolvedSource
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.passes.pipeline import PIPELINE
from recmas_runtime.core.files import sha256_of
from recmas_runtime.formats.manifest import MANIFEST_VERSION
from recmas_runtime.formats.plan import PLAN_VERSION

# What turns a model into graphs, or runs the graphs that parity is measured with.
TOOLS: Final = (
    "numpy",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "tokenizers",
    "torch",
    "transformers",
)

# What a Hugging Face folder may hold that a loaded model depends on.
_SOURCE_SUFFIXES: Final = frozenset({".json", ".py", ".txt", ".yaml"})
_MODEL_SUFFIXES: Final = (".bin", ".jinja", ".json", ".model", ".safetensors", ".txt")


def fingerprint(
    program: Graph,
    *,
    spec_yaml: str,
    backbones: Mapping[str, str],
    links: Mapping[str, str],
    corpus: str | None = None,
    loss_text: str | None = None,
    receipts: Sequence[str] = (),
) -> str:
    """Return the sha256 that identifies a build.

    Args:
        program: The program after all passes.
        spec_yaml: The resolved spec.
        backbones: Digest of the weights by backbone name, see `source_digest`.
        links: Digest of the weights by link id, where there are weights before the build.
        corpus: Digest of the passages to search, if there are any.
        loss_text: Digest of the text that losses are measured over, if one is.
        receipts: Digests of the training receipts that the bundle carries.
    """
    inputs: dict[str, Any] = {
        "program": print_graph(program),
        "passes": [repr(p) for p in PIPELINE],
        "spec": spec_yaml,
        "backbones": dict(backbones),
        "links": dict(links),
        "corpus": corpus,
        "loss_text": loss_text,
        "receipts": list(receipts),
        "tools": tool_versions(),
        "formats": [MANIFEST_VERSION, PLAN_VERSION],
    }
    return sha256_text(json.dumps(inputs, sort_keys=True))


def source_digest(source: ResolvedSource) -> str:
    """Return a digest over the files that a backbone is loaded from; paths do not count."""
    if source.gguf_file is not None:
        return _digest_of_files([source.folder / source.gguf_file])
    files = (p for p in source.folder.iterdir() if p.suffix in _MODEL_SUFFIXES and p.is_file())
    return _digest_of_files(sorted(files))


@cache
def tool_versions() -> dict[str, str]:
    """Return the versions of what builds bundles, by name.

    recmas itself counts with its sources and their data files: between releases its version says
    too little.
    """
    own = []
    for package in ("recmas_compiler", "recmas_export"):
        found = find_spec(package)  # by its files, not by importing the package's own door
        assert found is not None
        for folder in found.submodule_search_locations or ():
            own += sorted(p for p in Path(folder).rglob("*") if p.suffix in _SOURCE_SUFFIXES)
    versions = {name: _version(name) for name in TOOLS}
    versions["python"] = platform.python_version()
    versions["recmas"] = f"{_version('recmas')}+{_digest_of_files(own)[:12]}"
    return dict(sorted(versions.items()))


def sha256_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of_files(files: Iterable[Path]) -> str:
    return sha256_text("".join(f"{path.name} {sha256_of(path)}\n" for path in files))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # onnxruntime-gpu provides the same module under another name; a checkout has no metadata.
        return "unknown"
