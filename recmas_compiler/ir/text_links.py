"""The same graph of agents as a text system: what one sends to another is what it writes."""

from __future__ import annotations

from dataclasses import replace

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Link, System
from recmas_runtime.formats.messages import MessageForm


def text_system(system: System) -> System:
    """Return a system each of whose links carries text, at most as much as an answer has.

    This is what the runtime's baseline `text` makes of a plan: links over which nothing is sent
    stay as they are, and all rounds run.
    """
    form = MessageForm(carries="text", max_tokens=system.sampling.max_new_tokens)

    def as_text(link: Link) -> Link:
        is_sent = link.form.is_sent(system.agents[link.source].latent_steps)
        return replace(link, form=form, weights=None, layer_share=None) if is_sent else link

    links = {name: as_text(link) for name, link in system.links.items()}
    return replace(system, links=links, stop_when=None)


def writing_agents(system: System) -> tuple[str, ...]:
    """Return the agents that write in a text system: who answers, and who hands something over."""
    return tuple(a for a in system.agents if a == system.answer_agent or system.sent_by(a))


def with_text_links(topology: Graph) -> Graph:
    """Return a topology as a text system; see `text_system`."""
    system = text_system(topology.system)
    edges = tuple(
        replace(edge, op=system.links[edge.op.id]) if isinstance(edge.op, Link) else edge
        for edge in topology.edges()
    )
    return topology.replaced(system=system, edges=edges)
