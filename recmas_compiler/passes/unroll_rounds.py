"""Unrolling: the declared graph, which may be cyclic, becomes the steps of all its rounds."""

from __future__ import annotations

from dataclasses import dataclass

from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import (
    Agent,
    Ask,
    Decode,
    Flow,
    Level,
    NodeOp,
    Prefill,
    Send,
    System,
    Think,
    Write,
    ask_id,
    decode_id,
    prefill_id,
    send_id,
    think_id,
    write_id,
)
from recmas_compiler.passes.pass_base import Pass
from recmas_runtime.formats.ids import outer_link_id
from recmas_runtime.formats.plan import Variant


@dataclass(frozen=True)
class UnrollRounds(Pass):
    """Turn the topology into a program: an acyclic graph of steps.

    1. Rounds follow each other. Within a round agents take turns in topological order of the
       links that are not feedback; ties go to the agent declared first.
    2. A turn is Prefill, then Think and Write where a link's messages are made of thoughts or of
       what is written, and one Send per outgoing link.
    3. An agent without latent steps has nothing to think, and no thoughts to send: such messages
       are empty but count as sent.
    4. In the last round the answer agent's turn is Prefill and Decode, and agents that wait for
       it do not run.
    5. A prompt is `first` while a message it has a slot for was not sent yet, if `first` is
       declared; else it is `then`.
    6. A Send flows into the target's Prefill of the same round, over a feedback link into that of
       the next round, and only where the prompt in use has the slot.
    7. The turn of an agent on a remote model is one Ask in place of Prefill, Write and Decode.
    """

    requires = Level.TOPOLOGY
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program of the topology."""
        system = graph.system
        within_round = graph.without_feedback()
        waiting = within_round.descendants(system.answer_agent)
        nodes: dict[str, NodeOp] = {}
        edges: list[Edge] = []
        for round_ in range(1, system.rounds + 1):
            last = round_ == system.rounds
            for name in within_round.order():  # 1
                if last and name in waiting:  # 4
                    continue
                answers = last and name == system.answer_agent
                if system.is_remote(name):  # 7
                    _add_ask(system, name, round_, nodes, edges, answers=answers)
                    continue
                prefill = _add_prefill(system, system.agents[name], round_, nodes, edges)
                if answers:  # 4
                    decode = decode_id(round_, name)
                    nodes[decode] = Decode(agent=name, round=round_)
                    edges.append(Edge(prefill, decode, Flow(carries="hidden")))
                else:
                    _add_sends(system, name, round_, nodes, edges)
        return Graph(level=self.ensures, system=system, nodes=nodes, edges=tuple(edges))


def _add_prefill(
    system: System, agent: Agent, round_: int, nodes: dict[str, NodeOp], edges: list[Edge]
) -> str:
    variant = _variant(system, agent, round_)
    prefill = prefill_id(round_, (agent.name,))
    nodes[prefill] = Prefill(agents=(agent.name,), round=round_, variants=(variant,))
    _add_received(system, agent, round_, variant, prefill, nodes, edges)
    return prefill


def _add_received(
    system: System,
    agent: Agent,
    round_: int,
    variant: Variant,
    step: str,
    nodes: dict[str, NodeOp],
    edges: list[Edge],
) -> None:
    for slot in dict.fromkeys(agent.slots(variant)):  # 6
        sent_in = system.links[outer_link_id(slot, agent.name)].sent_in(round_)
        send = send_id(sent_in, slot, (agent.name,))
        if send in nodes:
            edges.append(Edge(send, step, Flow(carries="message")))


def _add_ask(
    system: System,
    name: str,
    round_: int,
    nodes: dict[str, NodeOp],
    edges: list[Edge],
    *,
    answers: bool,
) -> None:
    agent, links = system.agents[name], system.sent_by(name)
    variant = _variant(system, agent, round_)
    ask = ask_id(round_, (name,))
    if not (answers or links):
        return  # nobody reads what it would write
    texts = [link.form.max_tokens or 0 for link in links]
    nodes[ask] = Ask(
        agents=(name,),
        round=round_,
        variants=(variant,),
        max_tokens=None if answers else max(texts),
    )
    _add_received(system, agent, round_, variant, ask, nodes, edges)
    for link in () if answers else links:
        send = send_id(round_, name, (link.target,))
        nodes[send] = Send(source=name, targets=(link.target,), round=round_, apply_inner=False)
        edges.append(Edge(ask, send, Flow(carries="written")))


def _add_sends(
    system: System, name: str, round_: int, nodes: dict[str, NodeOp], edges: list[Edge]
) -> None:
    links = system.sent_by(name)  # 3
    prefill, think, write = (make(round_, (name,)) for make in (prefill_id, think_id, write_id))
    if any(link.form.needs_thoughts for link in links):  # 2
        nodes[think] = Think(agents=(name,), round=round_)
        edges.append(Edge(prefill, think, Flow(carries="hidden")))
    if any(link.form.needs_text for link in links):
        nodes[write] = Write(
            agents=(name,),
            round=round_,
            max_tokens=max(link.form.max_tokens or 0 for link in links),
            keeps_states=any(link.form.needs_written_states for link in links),
        )
        edges.append(Edge(prefill, write, Flow(carries="hidden")))
    for link in links:
        send = send_id(round_, name, (link.target,))
        nodes[send] = Send(
            source=name,
            targets=(link.target,),
            round=round_,
            apply_inner=link.form.has_vectors,
        )
        if link.form.needs_context:
            edges.append(Edge(prefill, send, Flow(carries="context")))
        if link.form.needs_thoughts:
            edges.append(Edge(think, send, Flow(carries="thoughts")))
        if link.form.needs_text:
            edges.append(Edge(write, send, Flow(carries="written")))


def _variant(system: System, agent: Agent, round_: int) -> Variant:
    # 5: every agent that can send took its turn in the round asked for, so "sent yet" is only
    # a matter of that round having been.
    links = (system.links[outer_link_id(slot, agent.name)] for slot in agent.slots("then"))
    missing = any(link.sent_in(round_) < 1 for link in links)
    return "first" if missing and agent.first is not None else "then"
