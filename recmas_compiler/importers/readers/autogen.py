"""Teams of AutoGen (0.4 and later): the JSON that `dump_component` writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recmas_compiler.importers.arrange import has_loop, order_from, without
from recmas_compiler.importers.source_files import (
    ONLY_ANSWERS,
    OPENAI_SAMPLING,
    Node,
    TeamFiles,
    check_number,
    take_sampling,
    unknown,
)
from recmas_compiler.importers.team import Sampling, Team, TeamAgent, Tools, free_slug, tools_named
from recmas_compiler.importers.texts import SINGLE_BRACES, parse_text

# The envelope of a component; its docstring is none of the team's words.
_ENVELOPE: Final = ("provider", "component_type", "version", "component_version", "label")
_SPEAKERS: Final = ("SelectorGroupChat", "Swarm", "MagenticOneGroupChat")
_NEEDS_ALL: Final = "an agent runs once all its senders have"
_REASONS: Final[Mapping[str, str]] = {
    "description": "only who chooses speakers, or people, read it",
    "model_client": "the model is that of --backbone",
    "model_context": "an agent reads its prompt and the messages of its links",
    "memory": "there is no memory between records",
    "handoffs": "the order of agents is fixed when a system is built",
    "reflect_on_tool_use": "the answer agent goes on writing behind a result",
    "tool_call_summary_format": "results stand between <result> and </result>",
    "max_tool_iterations": "see `answer.tools.max_calls`",
    "model_client_stream": "how a text arrives is the caller's choice",
    "structured_message_factory": "answers are text",
    "output_content_type": "answers are text",
    "tool_overrides": "tools are functions of the caller",
    "emit_team_events": "see `recmas run --trace`",
    "metadata": "labels have no meaning here",
    "termination_condition": "a system ends after its rounds",
    "activation_group": _NEEDS_ALL,
    "activation_condition": _NEEDS_ALL,
}
_CONDITION: Final = "links have no conditions: the agent behind it runs in every round"


def read(path: Path) -> Team:
    """Read a team that `dump_component` wrote.

    Raises:
        RecmasError: RM160 to RM164 with the place.
    """
    files = TeamFiles(root=path.parent)
    root = files.open(path)
    component = _Component.of(root)
    if component.kind in _SPEAKERS:
        message = f"in a {component.kind} a model chooses at run time who speaks next."
        hint = "Build the team as a RoundRobinGroupChat or a GraphFlow, and dump that."
        raise root.need("provider").refuse("RM163", message, hint)
    if component.kind not in ("RoundRobinGroupChat", "GraphFlow"):
        message = f"`{component.kind}` is no team that can be imported."
        hint = "Give the dump of a RoundRobinGroupChat or of a GraphFlow."
        raise root.need("provider").refuse("RM161", message, hint)
    return _Reader(files, component, path).team()


@dataclass(frozen=True)
class _Component:
    """A component: its class, and its configuration."""

    node: Node
    kind: str
    config: Node

    @classmethod
    def of(cls, node: Node) -> _Component:
        provider = node.need("provider").text()
        for key in _ENVELOPE:
            if (found := node.get(key)) is not None:
                found.carry()
        config = node.mapping().get("config")
        if config is None:
            config = node.need("config")
        return cls(node, provider.rpartition(".")[2], config)


@dataclass
class _Reader:
    files: TeamFiles
    chat: _Component
    path: Path
    agents: dict[str, Node] = field(default_factory=dict)  # name there -> configuration
    names: dict[str, str] = field(default_factory=dict)  # name there -> name here
    others: list[str] = field(default_factory=list)  # participants that are no agents
    speakers: list[str] = field(default_factory=list)  # all, in turn

    def team(self) -> Team:
        self._participants()
        is_ring = self.chat.kind == "RoundRobinGroupChat"
        order, edges, answer, rounds = self._ring() if is_ring else self._graph()
        check_number(self.chat.config.need("participants").place, len(order))
        for name in order:
            self.names[name] = free_slug(name, list(self.names.values()))
        tools, sampling = self._settle(answer)
        agents = tuple(self._agent(name) for name in order)
        own = self.chat.config.text_at("name")
        num_carried, left_out = self.files.account(_REASONS)
        return Team(
            name=free_slug(self.path.stem if own in ("", self.chat.kind) else own, ()),
            form=f"a {self.chat.kind} of AutoGen",
            files=tuple(self.files.names),
            agents=agents,
            edges=tuple((self.names[s], self.names[t]) for s, t in edges),
            answer=self.names[answer],
            rounds=rounds,
            tools=tools,
            sampling=sampling,
            num_carried=num_carried,
            left_out=left_out,
            remarks=tuple(self.files.remarks),
        )

    def _participants(self) -> None:
        for node in self.chat.config.need("participants").items():
            component = _Component.of(node)
            while component.kind == "MessageFilterAgent":
                component.config.need("filter").leave("messages come from the links of an agent")
                component = _Component.of(component.config.need("wrapped_agent"))
            key = component.config.need("name")
            name = key.text()
            if name in self.agents or name in self.others:
                message = f"two participants are called `{name}`."
                raise key.refuse("RM162", message, "Give every participant a name of its own.")
            self.speakers.append(name)
            if component.kind == "AssistantAgent":
                self.agents[name] = component.config
                continue
            if component.kind in ("SocietyOfMindAgent", "MagenticOneGroupChat"):
                message = f"`{name}` is a team inside of the team."
                raise key.refuse("RM163", message, "Import the inner team, and link its agents.")
            self.others.append(name)
            what = "a human" if component.kind == "UserProxyAgent" else f"a {component.kind}"
            component.node.leave(f"{what} is no language model; who comes after it goes on")
            self.files.remark(key.place, f"`{name}`, {what}, is left out of the order")

    def _ring(self) -> tuple[list[str], list[tuple[str, str]], str, int | None]:
        """All read what was said before them in a round; the last one speaks to the first again."""
        order = list(self.agents)
        check_number(self.chat.config.need("participants").place, len(order))
        edges = [(s, t) for i, t in enumerate(order) for s in order[:i]]
        edges.append((order[-1], order[0]))
        turns = self._turns()
        if turns is None:
            place = self.chat.config.place
            message = "nothing bounds the number of turns; `rounds` is 2, or what --rounds says"
            self.files.remark(place, message)
            return order, edges, order[-1], None
        everyone = len(self.speakers)
        last = self.speakers[(turns - 1) % everyone]
        answer = last if last in self.agents else order[-1]
        return order, edges, answer, math.ceil(turns / everyone)

    def _turns(self) -> int | None:
        """Return the most turns that the chat can have; None if nothing bounds them."""
        bounds = []
        if (found := self.chat.config.get("max_turns")) is not None:
            bounds.append(found.whole_number())
        end = self.chat.config.get("termination_condition")
        waiting = [] if end is None else [end]
        while waiting:
            component = _Component.of(waiting.pop())
            if component.kind in ("OrTerminationCondition", "AndTerminationCondition"):
                is_either = component.kind.startswith("Or")
                inner = component.config.need("conditions")
                if is_either:
                    waiting += inner.items()
                else:
                    component.node.leave("a system ends after its rounds")
            elif component.kind == "MaxMessageTermination":
                # The question is a message, too.
                bounds.append(max(1, component.config.need("max_messages").whole_number() - 1))
            else:
                reason = "a system ends after its rounds; `answer.stop_when` may end it earlier"
                component.node.leave(reason)
        return min(bounds, default=None)

    def _graph(self) -> tuple[list[str], list[tuple[str, str]], str, int | None]:
        graph = self.chat.config.need("graph")
        known = {**self.agents, **dict.fromkeys(self.others)}
        edges: list[tuple[str, str]] = []
        nodes = graph.need("nodes").mapping()
        for name, node in nodes.items():
            if name not in known:
                raise unknown(node, "participant", name, known)
            node.text_at("name")
            if (found := node.get("activation")) is not None:
                if found.value == "all":
                    found.carry()
                else:
                    found.leave(_NEEDS_ALL)
            for edge in [] if (found := node.get("edges")) is None else found.items():
                target = edge.need("target")
                if target.text() not in nodes:
                    raise unknown(target, "node", target.text(), nodes)
                edges.append((name, target.text()))
                if (found := edge.get("condition")) is not None:
                    found.leave(_CONDITION)
        start = graph.get("default_start_node")
        if start is not None and start.text() not in nodes:
            raise unknown(start, "node", start.text(), nodes)
        fed = {target for _, target in edges}
        starts = [name for name in nodes if name not in fed]
        if start is not None:
            starts = [start.text()]
        if not starts:
            message = "every node of the graph has one before it, so none can begin."
            raise graph.refuse("RM163", message, "Name the first one: `default_start_node`.")
        ends = [name for name in nodes if all(source != name for source, _ in edges)]
        edges = without(self.others, edges)
        starts = [name for name in starts if name in self.agents] or [next(iter(self.agents))]
        order = order_from(starts, [n for n in nodes if n in self.agents], edges)
        for name in self.agents:
            if name not in order:
                self.agents[name].leave(f"no edge leads to `{name}`")
        edges = [(s, t) for s, t in edges if s in order and t in order]
        last = [name for name in order if name in ends]
        answer = (last or order)[-1]
        edges = self.files.join_ends(order, edges, answer, graph.place)
        turns = self._turns()
        if not has_loop(order, edges):
            return order, edges, answer, None
        if turns is None:
            message = "nothing bounds the loop; `rounds` is 2, or what --rounds says"
            self.files.remark(graph.place, message)
        return order, edges, answer, None if turns is None else math.ceil(turns / len(order))

    def _settle(self, answer: str) -> tuple[Tools, Sampling]:
        """Return tools and sampling of the agent that answers; those of others are listed."""
        tools = Tools()
        sampling: Sampling = {}
        for name, config in self.agents.items():
            client = config.get("model_client")
            settings = None if client is None else client.get("config")
            taken = take_sampling(settings, OPENAI_SAMPLING, answers=name == answer)
            sampling = taken or sampling
            named = []
            for node in _tools_of(config):
                if name != answer:
                    node.leave(ONLY_ANSWERS)
                    continue
                component = _Component.of(node)
                key = component.config.get("name")
                named.append(component.kind if key is None else key.text())
            tools = tools_named(named) if named else tools
        return tools, sampling

    def _agent(self, name: str) -> TeamAgent:
        config = self.agents[name]
        found = config.get("system_message")
        system = "" if found is None else found.text()
        return TeamAgent(
            name=self.names[name],
            places=(config.need("name").place,),
            system=parse_text(system, SINGLE_BRACES, lambda _: None),
        )


def _tools_of(config: Node) -> list[Node]:
    """Return the tools of an agent, of both forms: in workbenches, and in a list of their own."""
    found = config.get("tools")
    tools = [] if found is None else found.items()
    bench = config.get("workbench")
    benches = [] if bench is None else bench.items() if isinstance(bench.value, list) else [bench]
    for node in benches:
        inner = node.need("config").get("tools")
        _Component.of(node)
        tools += [] if inner is None else inner.items()
    return tools
