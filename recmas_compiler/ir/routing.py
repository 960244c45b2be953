"""Which message fills which slot, and what the last round takes from the round before it."""

from __future__ import annotations

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Decode, Prefill, Send
from recmas_runtime.formats.ids import outer_link_id
from recmas_runtime.formats.plan import Message, SentMessage


def route_messages(graph: Graph, prefill_id: str) -> dict[Message, str]:
    """Return what a Prefill takes, each message with the Send that yields it.

    Messages are in the order of the Prefill's agents and of their slots; a slot without one stays
    empty. Two rounds' Sends of one source can flow into the same Prefill (a batch in which one
    agent is reached forward and another by feedback), so a message is told apart by its round.
    """
    op = graph.op(prefill_id)
    assert isinstance(op, Prefill), f"{prefill_id} is not a Prefill"
    sends: dict[tuple[str, int], str] = {}  # (link, round)
    for predecessor in graph.predecessors(prefill_id):
        send = graph.op(predecessor)
        if isinstance(send, Send):
            sends |= {(link, send.round): predecessor for link in send.links}
    found = {}
    for agent, variant in zip(op.agents, op.variants, strict=True):
        for slot in dict.fromkeys(graph.system.agents[agent].slots(variant)):
            link = graph.system.links[outer_link_id(slot, agent)]
            round_ = link.sent_in(op.round)
            if (link.id, round_) in sends:
                message = Message(agent=agent, slot=slot, link=link.id, round=round_)
                found[message] = sends[link.id, round_]
    return found


def find_exits(graph: Graph) -> tuple[SentMessage, ...]:
    """Return the messages that the last round takes from the round before it.

    Empty for fewer than three rounds: none is ever left out, because the messages of two have to be
    compared before the last one may follow.
    """
    system = graph.system
    if system.rounds < 3:
        return ()
    (decode,) = (step for step, op in graph.nodes().items() if isinstance(op, Decode))
    needed = graph.ancestors(decode)
    taken = (
        message
        for step, op in graph.in_order()
        if step in needed and isinstance(op, Prefill) and op.round == system.rounds
        for message in route_messages(graph, step)
    )
    return tuple(
        SentMessage(link=message.link, round=message.round)
        for message in taken
        if message.round < system.rounds
    )
