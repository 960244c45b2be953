"""What a loop took: parameters, memory, time. Read off its metrics, so that resumed runs count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Final

from torch import nn

from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.metrics import METRICS_NAME, read_metrics

COST_NAME: Final = "cost.json"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a loop took.

    Attributes:
        trainable_parameters: Numbers that learn.
        steps: Steps done.
        step_seconds: Median over the steps; measurements and checkpoints are not in it.
        total_seconds: Sum over the steps.
        tokens_per_step: Mean number of tokens with a loss.
        peak_memory_mb: Most memory of a process in MiB, measurements and loading included: of the
            GPU if one is used, else of the whole process.
        processes: How many shared the steps.
        device: `cpu` or `cuda`.
    """

    trainable_parameters: int
    steps: int
    step_seconds: float
    total_seconds: float
    tokens_per_step: float
    peak_memory_mb: float
    processes: int
    device: str


def write_cost(folder: Path, learning: Mapping[str, nn.Module], world: World) -> None:
    """Leave, beside the metrics in a loop's folder, what they tell about its cost, if anything."""
    steps = [entry for entry in read_metrics(folder / METRICS_NAME) if entry["kind"] == "step"]
    if not steps:  # the file was lost after the last one
        return
    seconds = [entry["tokens"] / entry["tokens_per_s"] for entry in steps]
    cost = Cost(
        trainable_parameters=sum(w.numel() for m in learning.values() for w in m.parameters()),
        steps=len(steps),
        step_seconds=median(seconds),
        total_seconds=sum(seconds),
        tokens_per_step=mean(entry["tokens"] for entry in steps),
        peak_memory_mb=max(entry["memory_mb"] for entry in steps),
        processes=world.size,
        device=world.device.type,
    )
    text = json.dumps(asdict(cost), indent=1)
    (folder / COST_NAME).write_text(text + "\n", encoding="utf-8")


def read_cost(folder: Path) -> Cost:
    """Return what `write_cost` left in a loop's folder."""
    return Cost(**json.loads((folder / COST_NAME).read_bytes()))
