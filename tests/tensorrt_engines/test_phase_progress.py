"""TensorRT's phases on the project's progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from recmas_runtime.core.progress import Advance
from recmas_runtime.engines.tensorrt.phase_progress import PhaseProgress


class Recorded:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, done: int = 0) -> Iterator[Advance]:
        self.told.append(f"open {title} /{total}")
        yield lambda num_units=1, *, note="": self.told.append(f"step {title}")
        self.told.append(f"close {title}")


def test_two_levels_of_phases_are_shown() -> None:
    progress = Recorded()
    phases = PhaseProgress(progress, "smol.576")
    phases.start("Build", None, 2)
    phases.start("Timing", "Build", 9)
    phases.start("Tactic", "Timing", 500)
    assert phases.step("Tactic")
    phases.finish("Tactic")
    assert phases.step("Timing")
    phases.finish("Timing")
    assert phases.step("Build")
    phases.finish("Build")
    assert progress.told == [
        "open smol.576: Build /2",
        "open smol.576: Timing /9",
        "step smol.576: Timing",
        "close smol.576: Timing",
        "step smol.576: Build",
        "close smol.576: Build",
    ]


def test_an_interrupt_ends_the_build_at_the_next_step() -> None:
    phases = PhaseProgress(Recorded(), "smol.576")
    phases.start("Build", None, 2)
    assert phases.step("Build")
    assert not phases.was_interrupted
    phases.interrupt()
    assert not phases.step("Build")
    assert phases.was_interrupted
