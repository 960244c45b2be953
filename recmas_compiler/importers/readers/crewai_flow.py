"""Flows of CrewAI (`schema: crewai.flow/v1`): methods that call agents or crews, and listen.

A method that calls an agent or a crew becomes agents; expressions and code are left out, and who
listens to them goes on. Routes are no conditions here: who listens to one follows its router.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recmas_compiler.importers.arrange import ends_of, has_loop, order_from, without
from recmas_compiler.importers.readers.crewai_members import (
    CREW_FILES,
    Members,
    agent_text,
    examples_of,
    read_crew,
)
from recmas_compiler.importers.source_files import Node, TeamFiles, unknown
from recmas_compiler.importers.team import Blank, Message, Part, Team, TeamAgent
from recmas_compiler.importers.texts import DOLLAR_BRACES, Resolve, parse_text
from recmas_compiler.importers.texts import field as field_named

_OUTPUT: Final = re.compile(r"outputs\.([A-Za-z_][A-Za-z0-9_]*)(\.[A-Za-z_.]+)?")
_STATE: Final = re.compile(r"state\.([A-Za-z_][A-Za-z0-9_]*)")
_NO_MODEL: Final = "it calls no language model; who listens to it goes on"
_EXPRESSION: Final = "expressions are not computed"


def read_flow(files: TeamFiles, main: Path) -> Team:
    """Read a flow.

    Raises:
        RecmasError: RM161 to RM164 with the place.
    """
    root = files.open(main)
    schema = root.need("schema")
    if schema.text() != "crewai.flow/v1":
        message = f"`{schema.value}` is no form of flows that this version reads."
        raise schema.refuse("RM161", message, "Write `schema: crewai.flow/v1`.")
    return _Flow(files, main, root).team()


@dataclass
class _Flow:
    files: TeamFiles
    main: Path
    root: Node
    methods: dict[str, Node] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    first: dict[str, list[str]] = field(default_factory=dict)  # method -> agents that begin it
    last: dict[str, str] = field(default_factory=dict)  # method -> the agent that ends it

    def team(self) -> Team:
        members = Members(self.files)
        self.methods = self.root.need("methods").mapping()
        starts = [name for name, method in self.methods.items() if self._starts(method)]
        if not starts:
            message = "no method begins the flow."
            node = self.root.need("methods")
            raise node.refuse("RM163", message, "Write `start: true` at the first one.")
        for name, method in self.methods.items():
            self._listen(name, method)
        acting = [name for name, method in self.methods.items() if _call(method) in _ACTING]
        if not acting:
            message = "no method calls an agent or a crew."
            node = self.root.need("methods")
            raise node.refuse("RM161", message, "A team has agents.")
        for name, method in self.methods.items():
            if name not in acting:
                method.need("do").leave(_NO_MODEL)
        passive = [name for name in self.methods if name not in acting]
        begins = [name for name in acting if name in starts or self._only_behind(name, passive)]
        edges = without(passive, self.edges)
        order = order_from(begins or acting[:1], acting, edges)
        for name in acting:
            if name not in order:
                self.methods[name].leave("nothing leads to this method")
        edges = [(s, t) for s, t in edges if s in order and t in order]
        for name in order:
            self._act(members, name, self.methods[name], edges)
        ends = ends_of(order, edges) or order
        rank = {name: i for i, name in enumerate(order)}
        for source, target in edges:
            reached = self.first[target]
            members.edges += [(self.last[source], agent) for agent in reached]
        if has_loop(order, edges):
            place = self.root.need("methods").place
            message = "nothing bounds the loop; `rounds` is 2, or what --rounds says"
            self.files.remark(place, message)
        state = self.root.get("state")
        answer = self.last[max(ends, key=rank.__getitem__)]
        return members.team(
            name=self.root.text_at("name") or self.main.parent.name,
            form="a flow of CrewAI",
            answer=answer,
            examples=examples_of(None if state is None else state.get("default")),
        )

    def _only_behind(self, name: str, passive: list[str]) -> bool:
        """Tell whether only methods that are left out come before a method."""
        before, waiting = set[str](), [name]
        while waiting:
            target = waiting.pop()
            new = {s for s, t in self.edges if t == target} - before
            before |= new
            waiting += [s for s in new if s in passive]
        return not before - set(passive)

    def _starts(self, method: Node) -> bool:
        found = method.get("start")
        if found is None:
            return False
        if found.value is True:
            found.carry()
            return True
        if found.value is False:
            found.carry()
            return False
        found.leave("a flow begins with all its first methods")
        return True

    def _listen(self, name: str, method: Node) -> None:
        emitted = {
            event.text(): other
            for other, node in self.methods.items()
            if (events := node.get("emit")) is not None
            for event in events.items()
        }
        found = method.get("listen")
        for node in [] if found is None else _names_in(found):
            source = emitted.get(str(node.value), str(node.value))
            if source not in self.methods:
                raise unknown(node, "method or event", str(node.value), {**self.methods, **emitted})
            node.carry()
            if str(node.value) in emitted:
                message = f"`{name}` runs in every round, whichever route `{source}` chooses"
                self.files.remark(node.place, message)
            self.edges.append((source, name))
        if (router := method.get("router")) is not None:
            router.leave("no route is chosen: all who listen run")

    def _act(self, members: Members, name: str, method: Node, edges: list[tuple[str, str]]) -> None:
        """Add the agents of a method."""
        action = method.need("do")
        known = len(members.agents)
        if _call(method) == "agent":
            action.need("call").carry()
            self.first[name] = [self._agent(members, name, action.need("with"), method)]
            self.last[name] = self.first[name][0]
            return
        action.need("call").carry()
        inner, folder = action.get("with"), self.main.parent
        if inner is None:
            reference = action.need("from_declaration")
            path = self.files.beside(reference, reference.text(), inside=CREW_FILES)
            inner, folder = self.files.open(path, comments=True), path.parent
        inputs = self._inputs(action)
        before = len(members.edges)
        self.last[name] = read_crew(members, inner, folder, resolve=self._input(inputs))
        added = [agent.name for agent in members.agents[known:]]
        fed = {target for _, target in members.edges[before:]}
        self.first[name] = [agent for agent in added if agent not in fed]

    def _agent(self, members: Members, name: str, node: Node, method: Node) -> str:
        own = members.name(name)
        given = node.get("input")
        text = given.text() if given is not None and isinstance(given.value, str) else ""
        members.agents.append(
            TeamAgent(
                name=own,
                places=(method.place,),
                system=agent_text(node, field_named),
                task=parse_text(text, DOLLAR_BRACES, self._resolve) or (Blank(own),),
            )
        )
        if (tools := node.get("tools")) is not None:
            members.add_tools(tools, [item.text() for item in tools.items()], {own})
        return own

    def _resolve(self, expression: str) -> Part | None:
        """Return what `${...}` stands for: an output is a message, a part of the state a field."""
        if (output := _OUTPUT.fullmatch(expression)) and output.group(1) in self.last:
            return Message((self.last[output.group(1)],))
        if state := _STATE.fullmatch(expression):
            return field_named(state.group(1))
        return None

    def _inputs(self, action: Node) -> Mapping[str, Part]:
        """Return what the inputs of a crew stand for."""
        found = action.get("inputs")
        parts: dict[str, Part] = {}
        for key, item in ({} if found is None else found.mapping()).items():
            text = parse_text(str(item.value), DOLLAR_BRACES, self._resolve)
            if len(text) == 1:
                parts[key] = text[0]
                item.carry()
            else:
                item.leave(_EXPRESSION)
        return parts

    def _input(self, inputs: Mapping[str, Part]) -> Resolve:
        return lambda name: inputs.get(name, field_named(name))


_ACTING: Final = ("agent", "crew")


def _call(method: Node) -> str:
    action = method.need("do")
    return str(action.need("call").value)


def _names_in(condition: Node) -> Iterator[Node]:
    """Yield the names in a condition: one, or any or all of several."""
    if isinstance(condition.value, str):
        yield condition
    elif isinstance(condition.value, list):
        for item in condition.items():
            yield from _names_in(item)
    else:
        for item in condition.mapping().values():
            yield from _names_in(item)
