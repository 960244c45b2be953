"""Shapes that engines are built for: capacity buckets, and the two optimization profiles.

A profile gives every input a smallest, a typical and a largest shape. Kernels are chosen for the
typical one; anything from smallest to largest runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from recmas_runtime.formats.links import expected_tensors
from recmas_runtime.formats.manifest import Manifest
from recmas_runtime.formats.plan import Plan, cache_capacity

# Index of the optimization profile in every decoder engine.
PREFILL: Final = 0
STEP: Final = 1

Dims = tuple[int, ...]
Symbols = tuple[int | str, ...]
# by input: smallest, typical, largest shape
ProfileShapes = Mapping[str, tuple[Dims, Dims, Dims]]


@dataclass(frozen=True)
class Range:
    """Sizes of an axis: least, typical, most."""

    least: int
    typical: int
    most: int

    def __post_init__(self) -> None:
        assert 1 <= self.least <= self.typical <= self.most, f"{self} is no range"


Ranges = Mapping[str, Range]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What one backbone's engines must take.

    Attributes:
        capacities: Cache rows per sample, ascending; each is an engine of its own.
        max_rows: Most rows of a call: agents that run as one batch, times records.
        max_groups: Most agents that run as one batch.
        link_hidden: Hidden widths of the inner links.
        prompt_positions: Most positions of a prompt.
    """

    capacities: tuple[int, ...]
    max_rows: int
    max_groups: int
    link_hidden: tuple[int, int]
    prompt_positions: int


def shapes_of(plan: Plan, manifest: Manifest, backbone: str, *, case_positions: int) -> Shapes:
    """Return the shapes that a plan needs of a backbone at the limits of its bundle.

    A cache is an engine's input with a size that is fixed when the engine is built, so there is an
    engine for each capacity that the plan's caches have; see `CachePlan.capacity`. The largest also
    holds the backbone's parity case, which every engine has to pass.

    Args:
        plan: The plan.
        manifest: Of the same bundle.
        backbone: Whose engines.
        case_positions: Most positions of a call sequence in the backbone's parity case.
    """
    caches = [cache for cache in plan.caches.values() if cache.backbone == backbone]
    groups = max(len(cache.agents) for cache in caches)
    capacities = {cache.capacity for cache in caches}
    needed = max(*capacities, cache_capacity(case_positions))
    hidden = [
        expected_tensors(manifest.links[agent.inner])["proj1.weight"][0]
        for agent in plan.agents.values()
        if agent.backbone == backbone
    ]
    return Shapes(
        capacities=tuple(sorted(capacities - {max(capacities)} | {needed})),
        max_rows=groups * plan.limits.max_batch,
        max_groups=groups,
        link_hidden=(min(hidden), max(hidden)),
        prompt_positions=plan.limits.max_prompt_tokens,
    )


def decoder_ranges(shapes: Shapes, capacity: int) -> tuple[Ranges, Ranges]:
    """Return the ranges of a decoder's free axes: for prompts, and for single positions.

    One record is the typical batch, because that is where somebody waits for a step; every rows
    count is a multiple of the groups in all three shapes, as the graph's reshape wants it.
    """
    common = {
        "batch": Range(1, shapes.max_groups, shapes.max_rows),
        "groups": Range(1, shapes.max_groups, shapes.max_groups),
        "link_hidden": Range(shapes.link_hidden[0], shapes.link_hidden[1], shapes.link_hidden[1]),
    }
    typical = min(shapes.prompt_positions, capacity)
    prefill = {**common, "positions": Range(1, typical, capacity)}
    step = {**common, "positions": Range(1, 1, 1)}
    return prefill, step


def head_ranges(shapes: Shapes) -> Ranges:
    """Return the ranges of the head's free axes."""
    return {"batch": Range(1, 1, shapes.max_rows)}


def profile_shapes(inputs: Mapping[str, Symbols], ranges: Ranges) -> ProfileShapes:
    """Return the smallest, typical and largest shape of every input that has a free axis.

    Args:
        inputs: Shapes by input, free axes by their names in the graph.
        ranges: By axis name.
    """
    shapes = {}
    for name, dims in inputs.items():
        if all(isinstance(dim, int) for dim in dims):
            continue
        parts = [Range(dim, dim, dim) if isinstance(dim, int) else ranges[dim] for dim in dims]
        shapes[name] = (
            tuple(part.least for part in parts),
            tuple(part.typical for part in parts),
            tuple(part.most for part in parts),
        )
    return shapes


def choose_capacity(capacities: Sequence[int], needed: int) -> int | None:
    """Return the smallest capacity that holds `needed` positions: attention pays for every row."""
    return min((capacity for capacity in capacities if capacity >= needed), default=None)
