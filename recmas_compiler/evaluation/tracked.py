"""What trackers of experiments receive of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recmas_compiler.evaluation.data.protocol import Protocol
from recmas_compiler.evaluation.identity import Identity
from recmas_compiler.evaluation.intervals import mean
from recmas_compiler.evaluation.report import Report
from recmas_compiler.evaluation.runner import ScoredAnswer
from recmas_compiler.trackers.tracker import TrackedRun
from recmas_compiler.trackers.tracking import Tracking
from recmas_runtime.formats.bundle import Bundle


def evaluation_run(
    identity: Identity, protocol: Protocol, bundle: Bundle, data: Path, systems: Sequence[str]
) -> TrackedRun:
    """Return the run: its settings are the protocol, and all that answers belong together by."""
    return TrackedRun(
        name=f"{bundle.plan.name} on {protocol.name}",
        job="eval",
        settings={
            "bundle": str(bundle.root),
            "data": str(data),
            "systems": list(systems),
            "protocol": protocol.model_dump(mode="json", exclude_none=True),
            "identity": asdict(identity),
        },
    )


def tell_answers(tracking: Tracking, system: str, scored: Sequence[ScoredAnswer]) -> None:
    """Tell what a system's answers say so far; the step is their number."""
    figures = {
        "accuracy": mean(one.correct for one in scored),
        "score": mean(one.score for one in scored),
    }
    losses = [one.loss for one in scored if one.loss is not None]
    if losses:
        figures["loss"] = mean(losses)
    tracking.log(system, figures, step=len(scored))


def evaluation_results(report: Report) -> dict[str, Any]:
    """Return the figures of every system, and how each compares with the first."""
    return {
        **{system.name: asdict(system) for system in report.systems},
        "differences": {each.system: asdict(each) for each in report.comparisons},
    }
