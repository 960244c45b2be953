"""What a loop trains, how it goes, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from recmas_compiler.spec.schema.train import (
    InnerStageSection,
    OuterStageSection,
    TrainSection,
)
from recmas_compiler.training.loop.distributed import World

Sink = Callable[[Mapping[str, Any]], None]
"""Sees every entry of the metrics file."""

Watch = Callable[[int, float], None]
"""Sees the number of steps done and the last loss."""


class StepLoss(Protocol):
    """The loss of some records: a sum over tokens, so that parts of a batch can be added up."""

    @property
    def total(self) -> Tensor:
        """The sum, a scalar with gradients."""

    @property
    def tokens(self) -> int:
        """What to divide it by for the mean."""


class Task(Protocol):
    """What a loop trains."""

    @property
    def name(self) -> str:
        """Names it in messages."""

    @property
    def links(self) -> Mapping[str, nn.Module]:
        """What learns, by link id."""

    @property
    def num_examples(self) -> int:
        """Records to learn from."""

    def loss(self, places: Sequence[int]) -> StepLoss:
        """Return the loss of the records at these places."""

    def measure(self, world: World) -> Mapping[str, Any]:
        """Return figures on what is held out; empty if nothing is."""

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return figures about the last step's gradients, besides their norms by link.

        Args:
            tokens: Of the step; losses were sums until now.
        """


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How a loop goes; see `train` in the language."""

    steps: int
    lr: float
    batch_size: int
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    accumulation: int
    eval_every: int
    checkpoint_every: int
    seed: int

    @staticmethod
    def of(section: TrainSection, stage: InnerStageSection | OuterStageSection) -> LoopSettings:
        """Return the settings of one stage."""
        return LoopSettings(
            steps=stage.steps,
            lr=stage.lr,
            batch_size=stage.batch_size,
            warmup_steps=section.warmup_steps,
            betas=section.betas,
            weight_decay=section.weight_decay,
            clip=section.clip,
            accumulation=section.accumulation,
            eval_every=section.eval_every,
            checkpoint_every=section.checkpoint_every,
            seed=section.seed,
        )


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How a loop ended.

    Attributes:
        steps: Steps done.
        interrupted: Whether somebody stopped it before the last one.
        loss: Running mean of the training loss.
        first: The first measurement, before any step.
        last: The last one.
    """

    steps: int
    interrupted: bool
    loss: float | None
    first: Mapping[str, Any]
    last: Mapping[str, Any]
