"""Agents of Google's ADK: `root_agent.yaml` and the files that it names by `config_path`.

LlmAgent, SequentialAgent, ParallelAgent, LoopAgent, and the Workflow of version 2 with its edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from recmas_compiler.importers.arrange import has_loop, order_from, without
from recmas_compiler.importers.source_files import (
    ONLY_ANSWERS,
    Node,
    TeamFiles,
    check_number,
    take_sampling,
    unknown,
)
from recmas_compiler.importers.team import (
    Blank,
    Message,
    Part,
    Sampling,
    Team,
    TeamAgent,
    Tools,
    free_slug,
    slug,
    tools_named,
)
from recmas_compiler.importers.texts import SCOPED_BRACES, parse_text
from recmas_compiler.importers.texts import field as field_named
from recmas_runtime.formats.ids import path_text

ROOT_FILE: Final = "root_agent.yaml"
_START: Final = "START"
_SAMPLING: Final = {
    "temperature": "temperature",
    "max_output_tokens": "max_new_tokens",
    "maxOutputTokens": "max_new_tokens",
    "top_p": "top_p",
    "topP": "top_p",
    "top_k": "top_k",
    "topK": "top_k",
    "seed": "seed",
    "stop_sequences": "stop",
    "stopSequences": "stop",
}
_CODE: Final = "code has no meaning here"
_REASONS: Final[Mapping[str, str]] = {
    "description": "only agents that choose another one read it",
    "model": "the model is that of --backbone",
    "model_code": "the model is that of --backbone",
    "generate_content_config": "what the answer agent samples stands in `answer`",
    "disallow_transfer_to_parent": "the order of agents is fixed when a system is built",
    "disallow_transfer_to_peers": "the order of agents is fixed when a system is built",
    "include_contents": "every agent reads the question",
    "input_schema": "records and answers are text",
    "output_schema": "records and answers are text",
    "planner": "see `latent_steps`",
    "code_executor": "see `answer.tools.python`",
    "before_agent_callbacks": _CODE,
    "after_agent_callbacks": _CODE,
    "before_model_callbacks": _CODE,
    "after_model_callbacks": _CODE,
    "before_tool_callbacks": _CODE,
    "after_tool_callbacks": _CODE,
    "max_concurrency": "agents side by side run as one batch",
    "args": "functions of the caller know their settings",
    "route": "no route is chosen: both ends run",
}
_NO_MODEL: Final = "it is no language model; who comes after it goes on"


def read(path: Path) -> Team:
    """Read an agent and all below it.

    Args:
        path: The file, or a folder with a `root_agent.yaml`.

    Raises:
        RecmasError: RM100 to RM102, RM160 to RM164 with the place.
    """
    main = path / ROOT_FILE if path.is_dir() else path
    files = TeamFiles(root=main.parent)
    return _Reader(files).team(files.open(main))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A part of the team: its agents in order, who begins, who ends it."""

    order: list[str]
    entries: list[str]
    exits: list[str]


@dataclass
class _Reader:
    files: TeamFiles
    agents: dict[str, Node] = field(default_factory=dict)  # name there -> its node
    names: dict[str, str] = field(default_factory=dict)  # name there -> name here
    edges: list[tuple[str, str]] = field(default_factory=list)
    writers: dict[str, list[str]] = field(default_factory=dict)  # output_key -> who writes it
    rounds: list[int] = field(default_factory=list)

    def team(self, root: Node) -> Team:
        piece = self._piece(root, [], root)
        check_number(root.place, len(piece.order))
        for name in piece.order:
            self.names[name] = free_slug(name, list(self.names.values()))
        answer = piece.exits[-1]
        edges = self.files.join_ends(piece.order, self.edges, answer, root.place)
        tools, sampling = self._settle(answer)
        agents = tuple(self._agent(name) for name in piece.order)
        if has_loop(piece.order, edges) and not self.rounds:
            message = "nothing bounds the loop; `rounds` is 2, or what --rounds says"
            self.files.remark(root.place, message)
        num_carried, left_out = self.files.account(_REASONS)
        return Team(
            name=slug(str(root.need("name").value)),
            form="an agent of Google's ADK",
            files=tuple(self.files.names),
            agents=agents,
            edges=tuple((self.names[s], self.names[t]) for s, t in edges),
            answer=self.names[answer],
            rounds=max(self.rounds, default=None),
            tools=tools,
            sampling=sampling,
            num_carried=num_carried,
            left_out=left_out,
            remarks=tuple(self.files.remarks),
        )

    def _piece(self, node: Node, above: list[Node], at: Node) -> _Piece:
        """Read an agent and all below it; `at` is where it is named."""
        if any(node is other for other in above):
            way = path_text(*(other.file for other in (*above, node)))
            message = f"the agent is inside of itself: {way}."
            raise at.refuse("RM163", message, "Remove the `config_path` that leads back.")
        above = [*above, node]
        found = node.get("agent_class")
        kind = "LlmAgent" if found is None else found.text().rpartition(".")[2] or "LlmAgent"
        name = node.need("name")
        if name.text() == _START:
            raise name.refuse("RM162", "`START` is no name of an agent.", "Give it another name.")
        match kind:
            case "LlmAgent" | "Agent":
                return self._llm(node, above)
            case "SequentialAgent":
                return self._in_order(self._below(node, above), loops=False)
            case "LoopAgent":
                self._bound(node)
                return self._in_order(self._below(node, above), loops=True)
            case "ParallelAgent":
                below = self._below(node, above)
                return _Piece(
                    order=[name for piece in below for name in piece.order],
                    entries=[name for piece in below for name in piece.entries],
                    exits=[name for piece in below for name in piece.exits],
                )
            case "Workflow":
                return self._workflow(node, above)
        known = "LlmAgent, SequentialAgent, ParallelAgent, LoopAgent and Workflow"
        message = f"`{kind}` is no class of agents that can be imported."
        raise (found or node).refuse("RM161", message, f"Known here: {known}.")

    def _below(self, node: Node, above: list[Node]) -> list[_Piece]:
        pieces = []
        for item in node.need("sub_agents").items():
            if "code" in item.mapping():
                message = "an agent that is made by code."
                hint = "Write it as a YAML file, and name that by `config_path`."
                raise item.need("code").refuse("RM161", message, hint)
            at = item
            if "config_path" in item.mapping():
                at = item.need("config_path")
                item = self.files.open(self.files.beside(at, at.text()))
            pieces.append(self._piece(item, above, at))
        if not pieces:
            raise node.need("sub_agents").refuse("RM161", "the list is empty.", "Name agents.")
        return pieces

    def _bound(self, node: Node) -> None:
        if (found := node.get("max_iterations")) is not None:
            self.rounds.append(found.whole_number())

    def _in_order(self, pieces: list[_Piece], *, loops: bool) -> _Piece:
        for before, behind in pairwise(pieces):
            self.edges += [(s, t) for s in before.exits for t in behind.entries]
        if loops:
            self.edges += [(s, t) for s in pieces[-1].exits for t in pieces[0].entries]
        return _Piece(
            order=[name for piece in pieces for name in piece.order],
            entries=pieces[0].entries,
            exits=pieces[-1].exits,
        )

    def _llm(self, node: Node, above: list[Node]) -> _Piece:
        key = node.need("name")
        name = key.text()
        if name in self.agents:
            message = f"two agents are called `{name}`."
            raise key.refuse("RM162", message, "Give every agent a name of its own.")
        self.agents[name] = node
        check_number(key.place, len(self.agents))
        if output := node.text_at("output_key"):
            self.writers.setdefault(output, []).append(name)
        if node.get("sub_agents") is None:
            return _Piece(order=[name], entries=[name], exits=[name])
        place = node.need("sub_agents").place
        message = f"`{name}` does not choose one of its sub-agents: all think, and it reads them"
        self.files.remark(place, message)
        pieces = self._below(node, above)
        self.edges += [(end, name) for piece in pieces for end in piece.exits]
        return _Piece(
            order=[*(agent for piece in pieces for agent in piece.order), name],
            entries=[agent for piece in pieces for agent in piece.entries],
            exits=[name],
        )

    def _workflow(self, node: Node, above: list[Node]) -> _Piece:
        graph = _Graph(self, above)
        for item in node.need("edges").items():
            graph.add(item)
        pieces, edges = graph.pieces, without(graph.passive, graph.edges)
        starts = [t for s, t in edges if s == _START]
        if not starts:
            message = "no edge begins at START."
            raise node.need("edges").refuse("RM163", message, "Begin a chain with START.")
        edges = [(s, t) for s, t in edges if s != _START]
        order = order_from(starts, list(pieces), edges)
        edges = [(s, t) for s, t in edges if s in order and t in order]
        for s, t in edges:
            self.edges += [(end, begin) for end in pieces[s].exits for begin in pieces[t].entries]
        ends = [unit for unit in order if all(s != unit for s, _ in edges)] or order[-1:]
        return _Piece(
            order=[name for unit in order for name in pieces[unit].order],
            entries=[name for unit in dict.fromkeys(starts) for name in pieces[unit].entries],
            exits=[name for unit in ends for name in pieces[unit].exits],
        )

    def _settle(self, answer: str) -> tuple[Tools, Sampling]:
        tools = Tools()
        sampling: Sampling = {}
        for name, node in self.agents.items():
            answers = name == answer
            taken = take_sampling(node.get("generate_content_config"), _SAMPLING, answers=answers)
            sampling = taken or sampling
            named = []
            found = node.get("tools")
            for item in [] if found is None else found.items():
                tool = item.need("name") if isinstance(item.value, dict) else item
                if str(tool.value) == "exit_loop":
                    item.leave("a system runs all its rounds; see `answer.stop_when`")
                elif answers:
                    named.append(tool.text())
                else:
                    item.leave(ONLY_ANSWERS)
            tools = tools_named(named) if named else tools
        return tools, sampling

    def _agent(self, name: str) -> TeamAgent:
        node = self.agents[name]
        instruction = parse_text(node.text_at("instruction"), SCOPED_BRACES, self._resolve)
        found = node.get("static_instruction")
        static = found.text() if found is not None and isinstance(found.value, str) else ""
        if not instruction and not static:
            instruction = (Blank(self.names[name]),)
        return TeamAgent(
            name=self.names[name],
            places=(node.need("name").place,),
            system=(static,) if static else instruction,
            task=instruction if static else (),
        )

    def _resolve(self, name: str) -> Part | None:
        key = name.rstrip("?")
        if key in self.writers:
            return Message(tuple(self.names[writer] for writer in self.writers[key]))
        return field_named(key)


@dataclass
class _Graph:
    """The edges of a workflow, between units: agents, parts of the team, and code."""

    reader: _Reader
    above: list[Node]
    pieces: dict[str, _Piece] = field(default_factory=dict)
    passive: list[str] = field(default_factory=list)
    edges: list[tuple[str, str]] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)  # a reference there -> its unit

    def add(self, item: Node) -> None:
        """Add a chain, or an edge with its two ends."""
        if isinstance(item.value, list):
            self._chain(item.items())
        elif {"from_node", "to_node"} <= item.mapping().keys():
            sources = self._element(item.need("from_node"))
            self._join(sources, self._element(item.need("to_node")))
            if (route := item.get("route")) is not None:
                route.leave("no route is chosen: both ends run")
        else:
            message = "an edge is a chain of nodes, or has `from_node` and `to_node`."
            raise item.refuse("RM161", message, "Write `- [START, first, second]`.")

    def _chain(self, elements: list[Node]) -> None:
        before: list[str] = []
        for element in elements:
            units = self._element(element)
            self._join(before, units)
            before = units

    def _join(self, sources: list[str], targets: list[str]) -> None:
        self.edges += [(s, t) for s in sources for t in targets]

    def _element(self, element: Node) -> list[str]:
        """Return the units of an element of a chain: one, several side by side, or routes."""
        if isinstance(element.value, list):
            return [unit for item in element.items() for unit in self._element(item)]
        if isinstance(element.value, dict) and not _NODE_KEYS & element.mapping().keys():
            units = []
            for route, target in element.mapping().items():
                target.carry()
                message = f"the route `{route}` is not chosen: all behind it run"
                self.reader.files.remark(target.place, message)
                units += self._element(target)
            return units
        return [self._unit(element)]

    def _unit(self, node: Node) -> str:
        if isinstance(node.value, dict):
            return self._inline(node)
        name = node.text()
        if name == _START:
            return name
        if name in self.units:
            return self.units[name]
        if name.endswith((".yaml", ".yml")):
            return self._file(node, name)
        if "." in name:
            return self._code(node, name)
        raise unknown(node, "node of an edge before it", name, self.units)

    def _file(self, node: Node, name: str) -> str:
        if name in self.units:
            return self.units[name]
        unit = self._piece(self.reader.files.open(self.reader.files.beside(node, name)), node)
        self.units[name] = unit
        return unit

    def _piece(self, node: Node, at: Node) -> str:
        name = str(node.need("name").value)
        if name in self.units:
            message = f"two nodes are called `{name}`."
            raise node.need("name").refuse("RM162", message, "Give every node its own name.")
        self.units[name] = name
        self.pieces[name] = self.reader._piece(node, self.above, at)
        return name

    def _inline(self, node: Node) -> str:
        keys = node.mapping()
        if "config_path" in keys:
            reference = node.need("config_path")
            return self._file(reference, reference.text())
        if "code" in keys or "func_code" in keys:
            key = node.need("code" if "code" in keys else "func_code")
            return self._code(key, str(key.value))
        found = node.get("agent_class")
        if found is not None and found.text().rpartition(".")[2] in ("JoinNode", "FunctionNode"):
            return self._code(node, str(node.need("name").value))
        return self._piece(node, node)

    def _code(self, node: Node, name: str) -> str:
        if name not in self.units:
            self.units[name] = name
            self.passive.append(name)
            self.units.setdefault(name.rpartition(".")[2], name)
            self.reader.files.remark(node.place, f"`{name}` is left out: {_NO_MODEL}")
        if node.loc and isinstance(node.loc[-1], str):
            node.leave(_NO_MODEL)
        return name


_NODE_KEYS: Final = {"agent_class", "config_path", "func_code", "code", "name"}
