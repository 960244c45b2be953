"""Drawings: well-formed, complete, nothing on top of anything else."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings

from kit.graphs import EXAMPLES, sequential, topology, with_forms
from recmas_compiler.analysis.draw import (
    Box,
    Point,
    lay_out,
    program_mermaid,
    topology_mermaid,
    topology_svg,
)
from recmas_compiler.ir.graph import Graph
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_runtime.formats.messages import MessageForm
from test_scheduler import topologies


@pytest.mark.parametrize("name", EXAMPLES)
def test_mermaid(name: str, golden: Callable[..., None]) -> None:
    graph = EXAMPLES[name]()
    golden(topology_mermaid(graph) + "\n" + program_mermaid(run_pipeline(graph)))


def test_svg(golden: Callable[..., None]) -> None:
    golden(topology_svg(sequential()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_svg_names_every_agent_and_draws_every_link(name: str) -> None:
    graph = EXAMPLES[name]()
    root = ElementTree.fromstring(topology_svg(graph))
    kinds = [element.get("class") for element in root.iter()]
    texts = {element.text for element in root.iter() if element.get("class") == "name"}
    links = graph.system.links.values()
    legends = {link.feedback for link in links}
    assert texts == set(graph.system.agents)
    assert kinds.count("answer") == 1
    assert kinds.count("forward") == sum(not k.feedback for k in links) + (False in legends)
    assert kinds.count("feedback") == sum(k.feedback for k in links) + (True in legends)


def test_markup_in_names_is_text() -> None:
    graph = topology("a", "")
    system = graph.system
    object.__setattr__(system, "name", "<b> & co")
    assert ElementTree.fromstring(topology_svg(graph)).findtext("{*}title") == "<b> & co: 3 rounds"


@settings(max_examples=200, deadline=None)
@given(topologies())
def test_no_box_is_under_a_line_or_another_box(graph: Graph) -> None:
    layout = lay_out(graph, box_width=150)
    boxes = layout.boxes
    for one, other in itertools.combinations(boxes.values(), 2):
        apart_x = one.x + one.width < other.x or other.x + other.width < one.x
        apart_y = one.y + one.height < other.y or other.y + other.height < one.y
        assert apart_x or apart_y
    for points in layout.lanes.values():
        for (x, y), (to_x, to_y) in itertools.pairwise(points):
            assert x == to_x or y == to_y
            assert not any(crosses(box, along((x, y), (to_x, to_y))) for box in boxes.values())
    for points in layout.curves.values():
        for i, (start, end) in enumerate(itertools.pairwise(points)):
            inside_gap = i % 2 == 0  # else through a column, in the thread's own row
            assert inside_gap or start[1] == end[1]
            assert not any(crosses(box, along(start, end)) for box in boxes.values())
    for box in boxes.values():
        assert 0 < box.x < box.x + box.width < layout.width
        assert 0 < box.y < box.y + box.height < layout.height


def along(start: Point, end: Point) -> Iterator[Point]:
    for i in range(1, 40):
        share = i / 40
        yield (start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share)


def crosses(box: Box, points: Iterator[Point]) -> bool:
    return any(
        box.x + 0.5 < x < box.x + box.width - 0.5 and box.y + 0.5 < y < box.y + box.height - 0.5
        for x, y in points
    )


def test_what_links_carry_is_drawn_where_it_is_not_thoughts() -> None:
    graph = with_forms(
        sequential(),
        planner_critic=MessageForm(carries="cache", rows=("context",)),
        solver_planner=MessageForm(carries="text", max_tokens=8),
    )
    mermaid = topology_mermaid(graph)
    assert "a0 -->|cache| a1" in mermaid
    assert "a1 --> a2" in mermaid
    assert "a2 -.->|next round: text| a0" in mermaid
    root = ElementTree.fromstring(topology_svg(graph))
    labels = [t.text for t in root.findall(".//{*}text") if t.get("class") == "carried"]
    assert sorted(labels) == ["cache", "text"]
