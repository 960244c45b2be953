"""Which agent calls a training step makes, read off the program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Decode, Level, Prefill
from recmas_compiler.ir.routing import deliveries
from recmas_compiler.lowering.materialize import inner_link_id
from recmas_runtime.formats.plan import Variant


@dataclass(frozen=True, kw_only=True)
class Site:
    """One agent's turn in one round.

    Attributes:
        arrivals: Slots that are filled, each with the round in which its message was sent.
    """

    agent: str
    round: int
    variant: Variant
    arrivals: tuple[tuple[str, int], ...]

    def links(self) -> Iterator[tuple[str, str, int]]:
        """Yield slot, link id and round of sending of each message that is seen here."""
        for slot, round_ in self.arrivals:
            yield slot, f"{slot}->{self.agent}", round_


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Turns that run as one batch: agents that share a backbone and think equally long."""

    sites: tuple[Site, ...]
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All that the answer needs, in order.

    Attributes:
        stages: Turns in which agents think.
        answer: The turn in which the answer agent writes, the last one.
    """

    stages: tuple[Stage, ...]
    answer: Site

    @property
    def thinking(self) -> tuple[Site, ...]:
        """The turns of all stages."""
        return tuple(site for stage in self.stages for site in stage.sites)

    @property
    def earlier_answers(self) -> tuple[Site, ...]:
        """The turns that the answer agent takes before the last one."""
        return tuple(site for site in self.thinking if site.agent == self.answer.agent)

    @property
    def links(self) -> frozenset[str]:
        """The ids of the links that messages pass on their way to the answer."""
        passed = {
            (inner_link_id(slot), link_id)
            for site in (*self.thinking, self.answer)
            for slot, link_id, _ in site.links()
        }
        return frozenset(link_id for both in passed for link_id in both)


def make_schedule(program: Graph) -> Schedule:
    """Return the calls that a program makes, whichever passes it went through.

    What the answer does not depend on is left out here too, so that the loss is the same with and
    without RemoveDeadSteps. Batches are those of the program.

    Args:
        program: Of level UNROLLED or PLANNED.
    """
    assert program.level >= Level.UNROLLED, "training runs programs"
    (decode,) = (op for _, op in program.in_order() if isinstance(op, Decode))
    turns = [
        tuple(_sites(program, step, op))
        for step, op in program.in_order()
        if isinstance(op, Prefill)
    ]
    sites = {(site.agent, site.round): site for turn in turns for site in turn}
    answer = sites[decode.agent, decode.round]
    needed: set[tuple[str, int]] = set()
    waiting = [answer]
    while waiting:
        for source in waiting.pop().arrivals:
            if source not in needed:
                needed.add(source)
                waiting.append(sites[source])
    stages = []
    for turn in turns:
        kept = tuple(site for site in turn if (site.agent, site.round) in needed)
        if kept:
            num_steps = program.system.agents[kept[0].agent].latent_steps
            stages.append(Stage(sites=kept, num_steps=num_steps))
    return Schedule(stages=tuple(stages), answer=answer)


def _sites(program: Graph, step: str, op: Prefill) -> Iterator[Site]:
    found = deliveries(program, step)
    for agent, variant in zip(op.agents, op.variants, strict=True):
        # Only agents that think have a Send, so an empty message is no arrival.
        arrivals = tuple((d.slot, d.round) for d in found if d.agent == agent)
        yield Site(agent=agent, round=op.round, variant=variant, arrivals=arrivals)
