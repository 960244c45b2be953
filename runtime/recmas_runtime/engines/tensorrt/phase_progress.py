"""TensorRT's nested phases as stages of the project's progress."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Final

from recmas_runtime.core.progress import Advance, Progress

# Deeper phases come by the hundred and last milliseconds.
_DEPTH_SHOWN: Final = 2


class PhaseProgress:
    """Turns phase callbacks into stages; TensorRT calls from several threads.

    Args:
        progress: Where stages are shown.
        title: Put before the names of phases.
    """

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._title = title
        self._lock = threading.Lock()
        self._depths: dict[str, int] = {}
        self._shown: dict[str, tuple[ExitStack, Advance]] = {}
        self._interrupted = False

    def start(self, phase: str, parent: str | None, num_steps: int) -> None:
        """Open a stage, unless it lies too deep."""
        with self._lock:
            depth = self._depths.get(parent, 0) + 1 if parent else 1
            self._depths[phase] = depth
            if depth <= _DEPTH_SHOWN:
                stack = ExitStack()
                stage = self._progress.stage(f"{self._title}: {phase}", num_steps)
                self._shown[phase] = stack, stack.enter_context(stage)

    def step(self, phase: str) -> bool:
        """Count a step; returns False to make TensorRT give up."""
        with self._lock:
            if phase in self._shown:
                self._shown[phase][1]()
            return not self._interrupted

    def finish(self, phase: str) -> None:
        """Close a phase's stage."""
        with self._lock:
            self._depths.pop(phase, None)
            stack, _ = self._shown.pop(phase, (None, None))
            if stack is not None:
                stack.close()

    def interrupt(self) -> None:
        """Make TensorRT give up at its next step."""
        with self._lock:
            self._interrupted = True

    @property
    def was_interrupted(self) -> bool:
        """Whether `interrupt` was called."""
        return self._interrupted
