"""What a system means, as symbols: once by design, once by running the program's steps.

Every value is the interned number of what it was made from, so two values are equal exactly if
they were computed alike, and deep rounds stay small.
"""

from __future__ import annotations

from recmas_compiler.ir.graph import Graph, route_messages
from recmas_compiler.ir.ops import Agent, Decode, Level, Prefill, Send, System, Think


class Symbols:
    """Numbers for terms; equal terms, equal numbers."""

    EMPTY = 0  # the message of an agent without latent steps

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, ...], int] = {}

    def of(self, *term: object) -> int:
        return self._numbers.setdefault(term, len(self._numbers) + 1)


def naive_answer(topology: Graph, symbols: Symbols) -> int:
    """Follow the reference semantics directly: every agent, every round, no steps, no caches."""
    system = topology.system
    messages: dict[tuple[str, int], int] = {}  # (link, round in which it was sent)
    order = topology.without_feedback().order()
    for round_ in range(1, system.rounds + 1):
        for name in order:
            agent = system.agents[name]
            seen = {}
            for link in system.links.values():
                if link.target == name:
                    sent = round_ - 1 if link.feedback else round_
                    if (link.id, sent) in messages:
                        seen[link.source] = messages[link.id, sent]
            complete = set(agent.slots("then")) <= seen.keys()
            variant = "then" if complete or agent.first is None else "first"
            filled = tuple((slot, seen.get(slot, symbols.EMPTY)) for slot in agent.slots(variant))
            prompt = symbols.of("prompt", name, variant, filled)
            if round_ == system.rounds and name == system.answer_agent:
                return symbols.of("answer", name, prompt)
            thoughts = symbols.of("thoughts", name, agent.latent_steps, prompt)
            for link in system.links.values():
                if link.source == name:
                    message = symbols.of("message", link.id, thoughts)
                    empty = agent.latent_steps == 0
                    messages[link.id, round_] = symbols.EMPTY if empty else message
    raise AssertionError("the answer agent did not run in the last round")


def program_answer(program: Graph, symbols: Symbols) -> int:
    """Run the steps in order as an executor would, with one cache per batch of agents."""
    caches: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}  # latest Prefill, its prompts
    thoughts: dict[tuple[str, int], int] = {}
    messages: dict[tuple[str, str], int] = {}  # (Send, link)
    snapshots: dict[str, str] = {}  # by id, the Prefill that saved it last
    answers = []
    for step, op in program.in_order():
        match op:
            case Prefill():
                if op.reuse is not None:
                    assert caches[_rows(program, op.agents, op.cache)][0] == op.reuse
                if op.prefix_of is not None:
                    assert op.prefix_of in {latest for latest, _ in caches.values()}
                if op.restore is not None:
                    assert snapshots[op.restore] == op.rows_of, "states of other rows"
                snapshots |= dict.fromkeys(op.snapshots, step)
                prompts = _prompts(program, step, op, messages, symbols)
                caches[_rows(program, op.agents, op.cache)] = (step, prompts)
            case Think():
                _, prompts = caches[_rows(program, op.agents, op.cache)]
                for agent, prompt in zip(op.agents, prompts, strict=True):
                    steps = program.system.agents[agent].latent_steps
                    symbol = symbols.of("thoughts", agent, steps, prompt)
                    thoughts[agent, op.round] = symbol
            case Send():
                for link in op.links:
                    symbol = symbols.of("message", link, thoughts[op.source, op.round])
                    messages[step, link] = symbol
            case Decode():
                _, (prompt,) = caches[_rows(program, (op.agent,), op.cache)]
                answers.append(symbols.of("answer", op.agent, prompt))
            case Agent():
                raise AssertionError("an agent in a program")
    (answer,) = answers
    return answer


def _rows(program: Graph, agents: tuple[str, ...], cache: str | None) -> tuple[str, ...]:
    """Return whose rows a step works on: by its cache once caches are planned."""
    if program.level is Level.PLANNED:
        assert cache is not None
        return program.system.caches[cache].agents
    return agents


def _prompts(
    program: Graph,
    step: str,
    op: Prefill,
    messages: dict[tuple[str, str], int],
    symbols: Symbols,
) -> tuple[int, ...]:
    system: System = program.system
    found = {(m.agent, m.slot): send for m, send in route_messages(program, step).items()}
    prompts = []
    for agent, variant in zip(op.agents, op.variants, strict=True):
        filled = tuple(
            (
                slot,
                messages[found[agent, slot], f"{slot}->{agent}"]
                if (agent, slot) in found
                else symbols.EMPTY,
            )
            for slot in system.agents[agent].slots(variant)
        )
        prompts.append(symbols.of("prompt", agent, variant, filled))
    return tuple(prompts)
