"""Runs of a text system as graphs of textgrad's variables, through which gradients go back.

Imports `textgrad`; see `package.import_textgrad`. The texts of a run are there already: the system
wrote them, batch by batch. Here each turn of an agent becomes textgrad's own `LLMCall`, with the
prompt's parameter and the texts that it read as predecessors, so its chain rule applies as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableSet, Sequence
from typing import Any

from textgrad import EngineLM, Variable
from textgrad.autograd import LLMCall
from textgrad.autograd.function import BackwardContext

from recmas_compiler.text_gradients.forward import Written
from recmas_compiler.text_gradients.prompts import Parameter
from recmas_runtime.formats.plan import Plan, PrefillStep
from recmas_runtime.prompts.render import joined
from recmas_runtime.running.record_prompts import field_of_slot, with_texts


class InOrder(MutableSet[Any]):
    """A set that keeps the order of insertion.

    Textgrad's own sets are ordered by addresses in memory, so that the same run would give other
    gradients in another process, and one that is resumed another end.
    """

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self._items = dict.fromkeys(items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, value: Any) -> None:
        """Add an item behind all others."""
        self._items[value] = None

    def discard(self, value: Any) -> None:
        """Remove an item if it is there."""
        self._items.pop(value, None)


class OrderedVariable(Variable):
    """A variable whose predecessors and gradients stand in the order in which they came."""

    def __init__(self, value: str, *, role: str, predecessors: Iterable[Variable] = ()) -> None:
        before = list(predecessors)
        super().__init__(value, predecessors=before, role_description=role)
        self.predecessors = InOrder(before)
        self.gradients = InOrder()


class Turn(LLMCall):
    """The turn of one agent, whose text is written already."""

    def forward(
        self, text: str, *, role: str, read: Iterable[Variable], prompt: str, system: str
    ) -> Variable:
        """Return the text of a turn as a variable.

        Args:
            role: What the text is used for.
            read: The parameters and texts that its prompt is made of.
        """
        response = OrderedVariable(text, role=role, predecessors=read)
        response.set_grad_fn(
            BackwardContext(self.backward, response=response, prompt=prompt, system_prompt=system)
        )
        return response


def parameter_variables(parameters: Iterable[Parameter], plan: Plan) -> dict[str, Variable]:
    """Return a variable for each parameter, by its name."""
    return {
        one.name: OrderedVariable(one.text, role=parameter_role(one, plan)) for one in parameters
    }


def parameter_role(parameter: Parameter, plan: Plan) -> str:
    """Return what textgrad is told that a parameter is."""
    agent = parameter.agent
    what = "system prompt" if parameter.is_system else "instructions in the prompt"
    return f"{what} of the agent '{agent}', {_work(agent, plan)}; used again for every question"


def record_graph(
    plan: Plan,
    written: Written,
    *,
    engine: EngineLM,
    parameters: Sequence[Parameter],
    variables: Mapping[str, Variable],
) -> Variable:
    """Return the answer to one record; a loss over it reaches the parameters.

    Args:
        plan: The text system's.
        variables: By name of the parameter, as its prompts had them in this run.
    """
    turns: dict[tuple[str, int], Variable] = {}
    last: Variable | None = None
    turn = Turn(engine)
    for step in plan.steps:
        if not isinstance(step, PrefillStep):
            continue
        for agent, variant in zip(step.agents, step.variants, strict=True):
            sources = {
                m.slot: (plan.links[m.link].source, m.round)
                for m in step.messages
                if m.agent == agent
            }
            read = [turns[source] for source in sources.values() if source in turns]
            texts = {slot: turns[s].value for slot, s in sources.items() if s in turns}
            is_answer = agent == plan.answer_agent and step.round == plan.rounds
            text = written.answer if is_answer else written.texts.get((agent, step.round))
            if text is None:
                continue  # nobody reads what it would write
            spec = plan.agents[agent]
            place = "first" if variant == "first" and spec.first is not None else "then"
            own = [
                variables[one.name]
                for one in parameters
                if one.agent == agent and {"system", place} & set(one.places)
            ]
            fields = {**written.fields, **{field_of_slot(s): t for s, t in texts.items()}}
            last = turn(
                text,
                role=(
                    "the answer to the question"
                    if is_answer
                    else f"text of the agent '{agent}', {_work(agent, plan)}"
                ),
                read=[*own, *read],
                prompt=joined(with_texts(spec.parts(variant), texts), fields),
                system=joined(spec.system, fields),
            )
            turns[agent, step.round] = last
    assert last is not None, "a plan ends with an answer"
    return last


def _work(agent: str, plan: Plan) -> str:
    """Return whom an agent works for."""
    if agent == plan.answer_agent:
        return "which answers the question"
    readers = dict.fromkeys(link.target for link in plan.links.values() if link.source == agent)
    return f"which hands its text to {' and '.join(readers)}" if readers else "in a team"
