"""Layers take the place of a share of them, in links that hand rows over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from msgspec import structs

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import chosen_count
from recmas_compiler.passes.plan_caches import PlanCaches
from recmas_runtime.formats.manifest import LayerScores


def name_layers(program: Graph, scores: Mapping[str, LayerScores]) -> Graph:
    """Return the program with the best layers named where links say only how many.

    Args:
        scores: By the shared name of each backbone on which there is such a link.
    """
    system = program.system
    named = {}
    for name, link in system.links.items():
        if link.layer_share is not None:
            of_backbone = scores[system.backbone_of(link.target).name]
            form = structs.replace(link.form, layers=best_layers(of_backbone, link.layer_share))
            named[name] = replace(link, form=form, layer_share=None)
    if not named:
        return program
    found = program.replaced(system=replace(system, links=system.links | named))
    return PlanCaches()(found) if system.caches else found  # there may be more masks, or fewer


def backbones_with_chosen_layers(program: Graph) -> tuple[str, ...]:
    """Return the shared names of the backbones on which links say only how many layers."""
    system = program.system
    names = (
        system.backbone_of(link.target).name
        for link in system.links.values()
        if link.layer_share is not None
    )
    return tuple(dict.fromkeys(names))


def best_layers(scores: LayerScores, share: float) -> tuple[int, ...]:
    """Return the layers with the highest scores, in order; of equal ones the first."""
    able = [(-score, layer) for layer, score in enumerate(scores.scores) if score is not None]
    count = chosen_count(share, len(scores.scores))
    return tuple(sorted(layer for _, layer in sorted(able)[:count]))
