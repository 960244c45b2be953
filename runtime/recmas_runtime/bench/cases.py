"""What is measured: a bundle's own system in one or more forms, and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recmas_runtime.formats.plan import Plan, ThinkStep
from recmas_runtime.running.baselines import LATENT
from recmas_runtime.running.system import System

UNTRAINED = "untrained-links"
TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table.

    Attributes:
        name: `latent`, `untrained-links`, or the baseline's name.
        rounds: Rounds that were asked for; a baseline may need fewer.
        latent_steps: Most latent steps of one rollout; 0 for none.
        system: What runs. Rows that would run the very same thing share one.
    """

    name: str
    rounds: int
    latent_steps: int
    system: System

    @property
    def writes_handover(self) -> bool:
        """Whether its agents hand over text in the graph and rounds of the latent system."""
        return self.name.partition("@")[0] == TEXT


def make_cases(
    systems: Sequence[System],
    *,
    baselines: Sequence[str],
    sweep: Sequence[System] = (),
    untrained: Sequence[System] = (),
) -> tuple[Case, ...]:
    """Return the rows of a table, all rows of one kind together.

    Args:
        systems: The system in different numbers of rounds.
        baselines: Names of what to measure beside each of them.
        sweep: The system in different numbers of latent steps.
        untrained: Systems with untrained links, like `systems`.

    Raises:
        RecmasError: RM508 for a baseline that does not exist or does not fit.
    """
    cases = [_case(LATENT, system) for system in (*systems, *sweep)]
    cases += [_case(UNTRAINED, system) for system in untrained]
    for name in dict.fromkeys(baselines):
        same_kind: list[Case] = []
        for system in systems:
            baseline = system.baseline(name)
            equal = (c.system for c in same_kind if c.system.plan == baseline.plan)
            case = _case(name, next(equal, baseline), rounds=system.plan.rounds)
            same_kind.append(case)
        cases += same_kind
    return tuple(cases)


def _case(name: str, system: System, *, rounds: int | None = None) -> Case:
    plan = system.plan
    return Case(
        name=name,
        rounds=plan.rounds if rounds is None else rounds,
        latent_steps=most_latent_steps(plan),
        system=system,
    )


def most_latent_steps(plan: Plan) -> int:
    """Return the latent steps of the plan's longest rollout."""
    thinks = (step for step in plan.steps if isinstance(step, ThinkStep))
    return max((plan.num_latent_steps(step) for step in thinks), default=0)
