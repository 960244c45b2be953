"""Checks a graph against the rules of its level."""

from __future__ import annotations

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level
from recmas_compiler.ir.rules import (
    PLANNED_RULES,
    SYSTEM_RULES,
    TOPOLOGY_RULES,
    UNROLLED_RULES,
    Rule,
)
from recmas_runtime.core.errors import Problem, RecmasError

RULES: dict[Level, tuple[Rule, ...]] = {
    Level.TOPOLOGY: (*SYSTEM_RULES, *TOPOLOGY_RULES),
    Level.UNROLLED: (*SYSTEM_RULES, *UNROLLED_RULES),
    Level.PLANNED: (*SYSTEM_RULES, *UNROLLED_RULES, *PLANNED_RULES),
}


def verify(graph: Graph, *, at: str) -> None:
    """Check that every rule of the graph's level holds.

    Args:
        graph: Any graph.
        at: Where in the pipeline it stands, for the message: `after UnrollRounds`.

    Raises:
        RecmasError: RM204 for each place where the first broken rule is broken.
    """
    for rule in RULES[graph.level]:
        places = list(dict.fromkeys(rule.broken_at(graph)))
        if places:
            raise RecmasError(_problem(rule, place, graph.level, at) for place in places)


def _problem(rule: Rule, place: str, level: Level, at: str) -> Problem:
    broken = f"rule {rule.name} of level {level.name} is broken at {place}"
    return Problem(
        code="RM204",
        message=f"{at}, {broken}: {rule.message}.",
        hint="This is a bug in recmas or in a pass of yours; --dump-ir DIR shows which pass.",
    )
