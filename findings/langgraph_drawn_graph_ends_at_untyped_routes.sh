#!/usr/bin/env bash
# langgraph 1.2.24: a route that is neither annotated with a Literal nor given a path map is not in
# `get_graph()`: instead of unknown or all targets, the node gets a plain edge to the end, and edges
# behind it are gone. The compiled graph runs on, past the end that its drawing and
# `get_graph().to_json()` show. A node that returns Command(goto=...) without `destinations` does the
# same.
#
# A tool that reads the JSON sees a shorter graph without a condition, and no sign of that.
#
# Seen: drawn [('__start__', 'first'), ('first', '__end__')]; ran ['first', 'second', 'third']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet langgraph==1.2.24
"$work/venv/bin/python" - <<'PY'
import operator
import sys
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph


class State(TypedDict):
    ran: Annotated[list, operator.add]


def node(name):
    return lambda state: {"ran": [name]}


graph = StateGraph(State)
for name in ("first", "second", "third"):
    graph.add_node(name, node(name))
graph.add_edge(START, "first")
graph.add_conditional_edges("first", lambda state: "second")
graph.add_edge("second", "third")
graph.add_edge("third", END)
compiled = graph.compile()
edges = compiled.get_graph().to_json()["edges"]
drawn = [(edge["source"], edge["target"]) for edge in edges]
ran = compiled.invoke({"ran": []})["ran"]
print(f"drawn {drawn}; ran {ran}")
if any(edge.get("conditional") for edge in edges) or ("first", "__end__") not in drawn:
    sys.exit("changed: the drawn graph says that something may come after `first`")
if ran != ["first", "second", "third"]:
    sys.exit("changed: the graph does not run on")
PY
