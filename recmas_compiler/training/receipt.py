"""What a training leaves for builds: the links, and the receipt that confirms them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from recmas_compiler.links.link_set import RECEIPT_NAME, replaced_links
from recmas_compiler.links.modules import save_link
from recmas_compiler.links.trained import RECEIPT_VERSION, learned_with
from recmas_compiler.lowering.materialize import MaterializedLink
from recmas_compiler.lowering.prompt_trial import template_digests
from recmas_compiler.training.loop.checkpoint import writing
from recmas_compiler.training.session import Session
from recmas_runtime.checking.machine import package_versions
from recmas_runtime.core.errors import Problem
from recmas_runtime.core.files import sha256_of, write_whole
from recmas_runtime.formats.ids import link_file_name

_VERSIONS: Final = ("recmas", "torch", "transformers", "tokenizers", "numpy")


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        starts: By link id: where its weights came from before the last stage.
        trained: Ids of the links that learned, in this folder's earlier runs too.
        warnings: What was found in the spec, in the data and in the run's folder.
    """

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    interrupted: bool = False
    warnings: tuple[Problem, ...] = ()


def keep_links(
    session: Session,
    links: Mapping[str, MaterializedLink],
    report: RunReport,
    *,
    folders: Sequence[Path],
    run: Path,
) -> None:
    """Write links with their receipt into folders; what was there stays until all of it is written.

    Args:
        run: The folder of the run, which is its own until it ends.

    Raises:
        RecmasError: RM303.
    """
    if session.world.is_main:
        for folder in folders:
            with writing(folder), replaced_links(folder, held=run) as staged:
                _write(staged, session, links, report)
    session.world.wait()


def _write(
    staged: Path, session: Session, links: Mapping[str, MaterializedLink], report: RunReport
) -> None:
    entries = {}
    for link_id, link in links.items():
        path = staged / link_file_name(link_id)
        save_link(path, session.graph.link(link_id), source=link.source, target=link.target)
        entries[link_id] = {
            "file": path.name,
            "sha256": sha256_of(path),
            "start": report.starts[link_id],
            "trained": link_id in report.trained,
        }
    text = json.dumps({**_receipt(session, report), "links": entries}, indent=1, ensure_ascii=False)
    content = f"{text}\n".encode("utf-8", "backslashreplace")
    write_whole(staged / RECEIPT_NAME, content)


def _receipt(session: Session, report: RunReport) -> dict[str, Any]:
    """Return what a trained bundle says about its training, without the links' own entries.

    It holds no times, so that the same training gives the same receipt.
    """
    settings, examples = session.settings.section, session.examples
    return {
        "receipt": RECEIPT_VERSION,
        "name": session.spec.document.name,
        "system": session.spec.digest,
        "learned_with": learned_with(session.spec, template_digests(session.program.system)),
        "data": {
            "sha256": dict(examples.digests),
            "train": len(examples.train),
            "held_out": len(examples.held_out),
            "left_out": dict(examples.left_out),
        },
        "settings": settings.model_dump(
            mode="json", exclude={"data", "links_dir"}, exclude_none=True
        ),
        "stages": {name: dict(figures) for name, figures in report.stages.items()},
        "processes": session.world.size,
        "device": session.world.device.type,
        "backbone_dtype": session.dtype,
        "versions": {
            "python": platform.python_version(),
            **{name: version or "unknown" for name, version in package_versions(_VERSIONS).items()},
        },
    }
