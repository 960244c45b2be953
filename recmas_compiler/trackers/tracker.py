"""What a tracker of experiments receives: how a run begins, its figures, its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

PROJECT: Final = "recmas"
"""What runs of recmas are under in trackers that know projects or experiments."""

Ending = Literal["finished", "interrupted", "failed"]
Figures = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A training or an evaluation.

    Attributes:
        name: What people call it.
        job: `train` or `eval`.
        settings: What it is made of: nested mappings of texts, numbers and lists.
    """

    name: str
    job: Literal["train", "eval"]
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """Writes one run somewhere; any of these may raise anything.

    None of them reaches the network unless the place that the user named is there.
    """

    def start(self, run: TrackedRun, *, run_id: str | None) -> str:
        """Begin a run, or go on with the one of this id; returns its id."""

    def log(self, group: str, figures: Figures, *, step: int) -> None:
        """Write figures of a step; every group, such as a stage of training, counts its own."""

    def finish(self, results: Figures, *, ending: Ending) -> None:
        """Write what came out, and let go of everything."""


def figures_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers of nested mappings, by their path: `after/latent`."""
    return {
        "/".join(path): float(value)
        for path, value in _leaves(found)
        if isinstance(value, int | float)
    }


def settings_of(found: Mapping[str, Any]) -> dict[str, str]:
    """Return all values of nested mappings as text, by their path: `train.outer.lr`."""
    return {".".join(path): str(value) for path, value in _leaves(found) if value is not None}


def _leaves(
    found: Mapping[str, Any], above: Sequence[str] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in found.items():
        path = (*above, str(name))
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, value
