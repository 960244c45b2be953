"""Graphs of LangGraph: the JSON of `get_graph().to_json()`, and a file with the prompts.

The dump has nodes and edges and nothing else: what a node asks stands in its code. So the prompts
come from a file of one's own, or stand to be filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recmas_compiler.importers.arrange import has_loop, order_from, without
from recmas_compiler.importers.readers.prompts_file import Prompts
from recmas_compiler.importers.source_files import Node, TeamFiles, check_number, unknown
from recmas_compiler.importers.team import Blank, Message, Part, Team, TeamAgent, free_slug
from recmas_compiler.importers.texts import field as field_named

_START: Final = "__start__"
_END: Final = "__end__"
# Of the classes in `data.id`: nodes that run tools and no model.
_TOOL_NODES: Final = ("ToolNode", "ValidationNode")
_HIDDEN: Final = "routes show only with a path map, or a Literal as what they return"
_MOST_NODES: Final = 1000
_REASONS: Final[Mapping[str, str]] = {
    "metadata": "labels have no meaning here",
    "data": "every node becomes an agent",
}


def read(path: Path, *, prompts: Path | None = None) -> Team:
    """Read the dump of a graph.

    Args:
        prompts: YAML, a text or `{system, prompt, expected}` by the name of the node.

    Raises:
        RecmasError: RM100 to RM102, RM160 to RM164 with the place.
    """
    files = TeamFiles(root=path.parent)
    texts = Prompts.of(prompts)
    return _Reader(files, files.open(path), texts, path.stem).team()


@dataclass
class _Reader:
    files: TeamFiles
    root: Node
    prompts: Prompts
    stem: str
    nodes: dict[str, Node] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def team(self) -> Team:
        passive = self._nodes()
        edges = self._edges()
        begins = [name for name in self.nodes if _last(name) == _START and name == _START]
        agents = [name for name in self.nodes if name not in passive]
        check_number(self.root.need("nodes").place, len(agents))
        inner = [name for name in passive if name not in (_START, _END)]
        edges = without(inner, edges)
        starts = [t for s, t in edges if s == _START and t != _END]
        ends = [s for s, t in edges if t == _END and s != _START]
        edges = [(s, t) for s, t in edges if _START not in (s, t) and _END not in (s, t)]
        if not begins or not starts:
            message = f"no edge leads from `{_START}` to an agent."
            hint = "Dump a compiled graph: `graph.get_graph().to_json()`."
            raise self.root.need("edges").refuse("RM163", message, hint)
        order = order_from(starts, agents, edges)
        for name in agents:
            if name not in order:
                key = self.nodes[name].need("id")
                key.leave(f"no edge of the dump leads to `{name}`")
                message = f"`{name}` is left out: no edge of the dump leads to it"
                self.files.remark(key.place, f"{message}; {_HIDDEN}")
        edges = [(s, t) for s, t in edges if s in order and t in order]
        for name in order:
            self.names[name] = free_slug(name, list(self.names.values()))
        last = [name for name in order if name in ends]
        answer = (last or order)[-1]
        edges = self.files.join_ends(order, edges, answer, self.nodes[answer].need("id").place)
        if has_loop(order, edges):
            message = "nothing bounds the loop; `rounds` is 2, or what --rounds says"
            self.files.remark(self.root.need("edges").place, message)
        members = tuple(self._agent(name) for name in order)
        self.prompts.check_used(self.names)
        num_carried, left_out = self.files.account(_REASONS)
        return Team(
            name=free_slug(self.stem, ()),
            form="a graph of LangGraph",
            files=(*self.files.names, *self.prompts.file),
            agents=members,
            edges=tuple((self.names[s], self.names[t]) for s, t in edges),
            answer=self.names[answer],
            asks_question=self.prompts.root is None,
            num_carried=num_carried + self.prompts.num_carried,
            left_out=left_out,
            remarks=tuple(self.files.remarks),
        )

    def _nodes(self) -> list[str]:
        """Read the nodes; returns those that are no agents."""
        passive = []
        given = self.root.need("nodes")
        items = given.items()
        if len(items) > _MOST_NODES:
            raise given.refuse("RM161", f"{len(items)} nodes.", "Import a part of the graph.")
        for node in items:
            key = node.need("id")
            name = key.text()
            if name in self.nodes:
                message = f"two nodes are called `{name}`."
                raise key.refuse("RM162", message, "Give every node a name of its own.")
            self.nodes[name] = node
            node.text_at("type")
            data = node.get("data")
            if data is not None and isinstance(data.value, dict):
                data.text_at("name")
                if (path := data.get("id")) is not None:
                    path.carry_all()
            if _last(name) in (_START, _END):
                passive.append(name)
            elif self._runs_tools(data):
                passive.append(name)
                self.files.remark(key.place, f"`{name}` runs tools and no model: it is left out")
        return passive

    def _runs_tools(self, data: Node | None) -> bool:
        path = data.value.get("id") if data is not None and isinstance(data.value, dict) else None
        return isinstance(path, list) and bool(path) and path[-1] in _TOOL_NODES

    def _edges(self) -> list[tuple[str, str]]:
        edges = []
        for item in self.root.need("edges").items():
            ends = []
            for key in ("source", "target"):
                end = item.need(key)
                if end.text() not in self.nodes:
                    raise unknown(end, "node", end.text(), self.nodes)
                ends.append(end.text())
            edges.append((ends[0], ends[1]))
            if (condition := item.get("conditional")) is not None:
                condition.leave("links have no conditions: the agent behind it runs in every round")
        return edges

    def _agent(self, name: str) -> TeamAgent:
        place = self.nodes[name].need("id").place
        own = self.names[name]
        found = self.prompts.agent(name, own, resolve=self._resolve, place=place)
        return found or TeamAgent(name=own, places=(place,), task=(Blank(own),))

    def _resolve(self, name: str) -> Part | None:
        return Message((self.names[name],)) if name in self.names else field_named(name)


def _last(name: str) -> str:
    """Return a node's own name, without those of the graphs around it."""
    return name.rpartition(":")[2]
