"""Both IR levels as Mermaid text, which GitHub and many editors draw."""

from __future__ import annotations

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, Decode, Flow, Link, NodeOp, Prefill, Send, System, Think
from recmas_compiler.ir.text_table import counted


def topology_mermaid(topology: Graph) -> str:
    """Return the declared graph as a flow chart; dotted arrows are feedback links."""
    system = topology.system
    # Own ids, as an agent may be called `end`, which is a word of Mermaid.
    ids = {name: f"a{i}" for i, name in enumerate(topology.nodes())}
    lines = ["flowchart LR"]
    for name, agent in system.agents.items():
        answers = name == system.answer_agent
        label = f"<b>{name}</b><br/>{agent.backbone}, {counted(agent.latent_steps, 'latent step')}"
        lines.append(f'  {ids[name]}(["{label}"])' if answers else f'  {ids[name]}["{label}"]')
    for edge in topology.edges():
        dotted = isinstance(edge.op, Link) and edge.op.feedback
        arrow = "-. next round .->" if dotted else "-->"
        lines.append(f"  {ids[edge.source]} {arrow} {ids[edge.target]}")
    lines.append(f"  answer((answer))\n  {ids[system.answer_agent]} ==> answer")
    return "\n".join(lines) + "\n"


def program_mermaid(program: Graph) -> str:
    """Return the steps as a flow chart, a box per round; dotted arrows are reused cache rows."""
    ids = {step: f"s{i}" for i, step in enumerate(program.order())}
    lines = ["flowchart TD"]
    for round_ in range(1, program.system.rounds + 1):
        lines.append(f'  subgraph r{round_}["round {round_}"]')
        for step, op in program.in_order():
            if not isinstance(op, Agent) and op.round == round_:
                lines.append(f"    {ids[step]}{_shape(op, program.system)}")
        lines.append("  end")
    for edge in program.edges():
        arrow = "-.->" if edge.op == Flow(carries="cache") else "-->"
        lines.append(f"  {ids[edge.source]} {arrow} {ids[edge.target]}")
    return "\n".join(lines) + "\n"


def _shape(op: NodeOp, system: System) -> str:
    match op:
        case Prefill(agents=agents):
            return f'["prefill {", ".join(agents)}"]'
        case Think(agents=agents):
            steps = system.agents[agents[0]].latent_steps
            return f'["think {", ".join(agents)}<br/>{counted(steps, "step")}"]'
        case Send(source=source, targets=targets):
            return f'(["{source} to {", ".join(targets)}"])'
        case Decode(agent=agent):
            return f'[["decode {agent}"]]'
        case Agent():
            raise AssertionError(f"an agent in a program: {op.name}")
