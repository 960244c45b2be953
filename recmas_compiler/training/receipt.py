"""The folder of trained links: one file per link, and the receipt that vouches for them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from recmas_compiler.links.modules import save_link
from recmas_compiler.links.trained import (
    RECEIPT_NAME,
    RECEIPT_VERSION,
)
from recmas_compiler.spec.spec import Spec
from recmas_compiler.training.data.examples import Examples
from recmas_compiler.training.loop.checkpoint import unwritable
from recmas_compiler.training.settings import TrainSettings
from recmas_runtime.formats.ids import link_file_name

_VERSIONS = ("recmas", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class TrainedLink:
    """A link to be kept.

    Attributes:
        module: Its weights.
        source: Identity of the backbone it reads from.
        target: Identity of the backbone it writes for.
        start: Where its weights came from before training: `file`, `aligned` or `random`.
        trained: Whether it learned since then.
    """

    module: nn.Module
    source: str
    target: str
    start: str
    trained: bool


def write_links(folder: Path, links: Mapping[str, TrainedLink], receipt: Mapping[str, Any]) -> None:
    """Write link files and, last, the receipt; each is complete or not there.

    Args:
        folder: Made if it is not there.
        links: By link id.
        receipt: From `make_receipt`.

    Raises:
        RecmasError: RM303 if the disk is full or not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECEIPT_NAME).unlink(missing_ok=True)  # it does not vouch for what comes now
        entries = {}
        for link_id, link in links.items():
            path = folder / link_file_name(link_id)
            staged = path.with_name(f".{path.name}.writing")
            save_link(staged, link.module, source=link.source, target=link.target)
            staged.replace(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries[link_id] = {
                "file": path.name,
                "sha256": digest,
                "start": link.start,
                "trained": link.trained,
            }
        text = json.dumps({**receipt, "links": entries}, indent=1, ensure_ascii=False)
        staged = folder / f".{RECEIPT_NAME}.writing"
        staged.write_text(text + "\n", encoding="utf-8")
        staged.replace(folder / RECEIPT_NAME)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error


def make_receipt(
    spec: Spec,
    settings: TrainSettings,
    examples: Examples,
    *,
    stages: Mapping[str, Mapping[str, Any]],
    num_processes: int,
    device: str,
) -> dict[str, Any]:
    """Return what a trained bundle tells about its training, but for the links' hashes.

    It holds no times, so that the same training gives the same receipt.

    Args:
        spec: What was trained.
        settings: How.
        examples: On what.
        stages: Figures by stage.
        num_processes: How many shared the work.
        device: What they computed on.
    """
    return {
        "receipt": RECEIPT_VERSION,
        "name": spec.document.name,
        "system": spec.digest,
        "data": {
            "sha256": dict(examples.digests),
            "train": len(examples.train),
            "held_out": len(examples.held_out),
            "left_out": dict(examples.left_out),
        },
        "settings": settings.section.model_dump(mode="json", exclude={"data", "links_dir"}),
        "stages": {name: dict(figures) for name, figures in stages.items()},
        "processes": num_processes,
        "device": device,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _VERSIONS},
        },
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # a checkout that was never installed has no metadata
