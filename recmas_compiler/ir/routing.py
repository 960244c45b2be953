"""Which message fills which slot of a Prefill."""

from __future__ import annotations

from dataclasses import dataclass

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Prefill, Send


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A message that a Prefill splices into a prompt.

    Attributes:
        agent: Whose prompt.
        slot: The agent that the slot is named after, and that the message is from.
        send: Id of the Send that yields it.
        round: Round of that Send: the Prefill's own, or the one before over a feedback link.
    """

    agent: str
    slot: str
    send: str
    round: int


def deliveries(graph: Graph, prefill_id: str) -> tuple[Delivery, ...]:
    """Return what flows into a Prefill, in the order of its agents and of their slots.

    A slot without a delivery stays empty. Two rounds' Sends of one source can flow into the same
    Prefill (a batch in which one agent is reached forward and another by feedback), so a message
    is told apart by its round: a feedback link delivers that of the round before.
    """
    op = graph.op(prefill_id)
    assert isinstance(op, Prefill), f"{prefill_id} is not a Prefill"
    messages: dict[tuple[str, int], str] = {}  # (link, round) -> Send
    for predecessor in graph.predecessors(prefill_id):
        send = graph.op(predecessor)
        if isinstance(send, Send):
            messages |= {(link, send.round): predecessor for link in send.links}
    found = []
    for agent, variant in zip(op.agents, op.variants, strict=True):
        for slot in dict.fromkeys(graph.system.agents[agent].slots(variant)):
            link = graph.system.links[f"{slot}->{agent}"]
            round_ = op.round - 1 if link.feedback else op.round
            source = messages.get((link.id, round_))
            if source is not None:
                found.append(Delivery(agent=agent, slot=slot, send=source, round=round_))
    return tuple(found)
