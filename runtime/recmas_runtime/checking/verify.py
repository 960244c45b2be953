"""`recmas verify`: is a bundle whole, and does it compute here what it did where it was built?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recmas_runtime.checking.placement import StrayNode, find_stray_nodes
from recmas_runtime.core.errors import Exit, Problem, RecmasError, fail
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.engines.interface import Backbone, Operands
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.formats.bundle import Bundle, open_bundle, unlisted_files
from recmas_runtime.formats.links import read_operands
from recmas_runtime.formats.manifest import ParityEntry
from recmas_runtime.formats.precisions import beyond_tolerance
from recmas_runtime.formats.safetensors_file import read_tensors
from recmas_runtime.running.open_engines import open_engines
from recmas_runtime.running.parity import (
    BACKBONE_CASE,
    case_links,
    measure_backbone_parity,
    measure_link_parity,
    measure_probe,
)


@dataclass(frozen=True, kw_only=True)
class CaseReport:
    """What one parity case gave here; the figures are those of `TOLERANCES`."""

    backbone: str
    precision: str
    figures: Mapping[str, float]
    greedy_tokens_equal: bool


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found out about a bundle; the probe's figure is its distance from the answer."""

    num_files: int
    device: str
    probe_absolute: float
    cases: tuple[CaseReport, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints; a difference that is not finite is null."""
        return {
            "num_files": self.num_files,
            "device": self.device,
            "probe_absolute": _finite(self.probe_absolute),
            "cases": [
                {
                    "backbone": case.backbone,
                    "precision": case.precision,
                    "figures": {name: _finite(value) for name, value in case.figures.items()},
                    "greedy_tokens_equal": case.greedy_tokens_equal,
                }
                for case in self.cases
            ],
        }


def verify_bundle(
    path: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Hash every file, run the known-answer probe and every parity case.

    Args:
        device: `auto`, `cpu`, `cuda` or `tensorrt`.
        threads: Threads within an operator; None takes the physical cores.

    Raises:
        RecmasError: If the bundle cannot be opened or run at all; figures out of tolerance are
            problems of the report instead.
    """
    watcher = progress or Silent()
    bundle = open_bundle(path, verify_hashes=True, progress=watcher)
    opened = open_engines(bundle, device=device, threads=threads)
    problems = [*opened.problems]
    problems += [
        Problem(
            code="RM401",
            message="the manifest does not list this file",
            hint="Nothing reads it; delete it or build the bundle again.",
            severity="warning",
            file=relative,
        )
        for relative in unlisted_files(bundle)
    ]
    with watcher.stage("Running known cases", 1 + len(bundle.manifest.parity)) as advance:
        where = opened.provider
        probe, file = math.inf, bundle.manifest.probe
        with _failures_as_findings(file, problems):
            probe = measure_probe(bundle.file(file), threads=threads, device=where)
            figures = {"probe_absolute": probe}
            problems += out_of_tolerance(file, figures, precision="float32")
        advance()
        cases = []
        operands = read_operands(bundle.file, bundle.manifest.links)
        for entry in bundle.manifest.parity:
            with _failures_as_findings(entry.file, problems):
                backbone = opened.backbones[entry.backbone]
                case = _run_case(bundle, entry, backbone, opened.link, operands)
                precision = bundle.manifest.backbones[entry.backbone].precision
                problems += out_of_tolerance(entry.file, case.figures, precision=precision)
                # Quantized kernels round differently from one processor to another.
                is_exact = precision == "float32" and entry.greedy_tokens_equal
                if is_exact and not case.greedy_tokens_equal:
                    problems.append(
                        _disagrees(entry.file, "another greedy continuation than built")
                    )
                decoder = bundle.manifest.backbones[entry.backbone].decoder_on(where)
                stray = find_stray_nodes(bundle.file(decoder), threads=threads, device=where)
                problems += [_misplaced(decoder, node) for node in stray]
                cases.append(case)
            advance()
    return VerifyReport(
        num_files=len(bundle.manifest.files),
        device=opened.device,
        probe_absolute=probe,
        cases=tuple(cases),
        problems=tuple(problems),
    )


def _run_case(
    bundle: Bundle,
    entry: ParityEntry,
    backbone: Backbone[Any],
    link: LinkEngine,
    operands: Mapping[str, Operands],
) -> CaseReport:
    tensors, inner = read_case(bundle, entry)
    parity = measure_backbone_parity(backbone, tensors, operands[inner])
    link_relative = measure_link_parity(link, tensors, operands)
    return CaseReport(
        backbone=entry.backbone,
        precision=bundle.manifest.backbones[entry.backbone].precision,
        figures={**parity.figures, "link_relative": link_relative},
        greedy_tokens_equal=parity.greedy_tokens_equal,
    )


def read_case(bundle: Bundle, entry: ParityEntry) -> tuple[Mapping[str, Any], str]:
    """Return a parity case's tensors and the id of its inner link.

    Raises:
        RecmasError: RM404 for a case that lacks what is measured.
    """
    tensors, metadata = read_tensors(bundle.file(entry.file))
    inner = metadata.get("inner", "")
    lacking = sorted(BACKBONE_CASE - tensors.keys())
    unknown = sorted({*case_links(tensors), inner} - bundle.manifest.links.keys())
    if lacking or unknown:
        raise fail(
            "RM404",
            f"the parity case lacks tensors {lacking} or names unknown links {unknown}",
            file=entry.file,
            hint="Build the bundle again with one version of recmas.",
        )
    return tensors, inner


def out_of_tolerance(file: str, figures: Mapping[str, float], *, precision: str) -> list[Problem]:
    """Return an error for each figure beyond the tolerance of a precision."""
    return [_disagrees(file, what) for what in beyond_tolerance(figures, precision=precision)]


@contextmanager
def _failures_as_findings(file: str, problems: list[Problem]) -> Iterator[None]:
    """Note engines that fail on a file: that is what a verification is to find out."""
    try:
        yield
    except RecmasError as error:
        if error.exit_code != Exit.RUN_FAILED:
            raise
        problems += [_disagrees(file, problem.message) for problem in error.problems]


def _disagrees(file: str, message: str) -> Problem:
    return Problem(
        code="RM405",
        message=message,
        hint="Upgrade onnxruntime or try --device cpu; do not trust this bundle's answers here.",
        file=file,
    )


def _misplaced(file: str, node: StrayNode) -> Problem:
    return Problem(
        code="RM304",
        message=f"an operator of a step does not run on the device: {node}",
        hint="Upgrade onnxruntime; answers are right, but slow.",
        severity="warning",
        file=file,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
