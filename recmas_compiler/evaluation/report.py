"""A report of an evaluation: what was asked, how, and what came of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recmas_compiler.evaluation.data.data_file import DataSet
from recmas_compiler.evaluation.identity import prompt_digest
from recmas_compiler.evaluation.protocol import Protocol
from recmas_compiler.evaluation.runner import Evaluation
from recmas_compiler.evaluation.summary import (
    Comparison,
    Saving,
    SystemSummary,
    compare,
    savings,
    summarize,
)
from recmas_runtime.formats.bundle import Bundle

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that an evaluation found out.

    Attributes:
        is_complete: Whether every system answered everything.
        protocol: The protocol, overrides included, and its digest.
        data: Which questions.
        bundle: Which system.
        made: When, where, with what.
        systems: In the order they were asked for.
        comparisons: Every other system against the first.
        savings: Every other system against the text system.
    """

    version: int = REPORT_VERSION
    is_complete: bool
    protocol: dict[str, Any]
    data: dict[str, Any]
    bundle: dict[str, Any]
    made: dict[str, Any]
    systems: tuple[SystemSummary, ...]
    comparisons: tuple[Comparison, ...]
    savings: tuple[Saving, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the form of `report.json`."""
        # Tuples become lists, as they are in the file.
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def make_report(
    evaluation: Evaluation,
    *,
    protocol: Protocol,
    data: DataSet,
    data_file: Path,
    bundle: Bundle,
    device: str,
    threads: int | None,
    date: str,
) -> Report:
    """Return the report of an evaluation.

    Args:
        evaluation: What was answered.
        protocol: How it was asked.
        data: What was asked.
        data_file: Where that is from.
        bundle: The system.
        device: Where it ran.
        threads: As given; None for the physical cores.
        date: ISO 8601.
    """
    answered = [system for system in evaluation.systems if system.judged]
    summaries = tuple(summarize(system) for system in answered)
    return Report(
        is_complete=not evaluation.interrupted and all(s.is_complete for s in summaries),
        protocol={**protocol.model_dump(mode="json"), "digest": protocol.digest()},
        data={
            "file": str(data_file),
            "digest": data.digest,
            "num_records": data.num_records,
            "num_questions": len(data.questions),
        },
        bundle={
            "path": str(bundle.root),
            "name": bundle.plan.name,
            "fingerprint": bundle.manifest.fingerprint,
            "prompt_digest": prompt_digest(bundle.plan),
            "rounds": bundle.plan.rounds,
            "latent_steps": {n: agent.latent_steps for n, agent in bundle.plan.agents.items()},
        },
        made={
            "date": date,
            "device": device,
            "threads": threads,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "recmas": _version("recmas"),
            "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
            "math_verify": _version("math-verify"),
        },
        systems=summaries,
        comparisons=compare(answered),
        savings=savings(summaries),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
