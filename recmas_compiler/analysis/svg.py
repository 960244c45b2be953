"""A picture of the topology, written as SVG without any drawing library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from recmas_compiler.analysis.svg_layout import MARGIN, Box, Layout, Point, lay_out
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, System
from recmas_runtime.core.text import counted

TITLE_SIZE = 15
NAME_SIZE = 14
NOTE_SIZE = 11
CHARACTER_WIDTH = 0.62  # of the font size; a little over the mean of common sans-serif fonts
CORNER = 8.0
LOOP_HEIGHT = 26.0
LEGEND_HEIGHT = 28.0
LEGEND_WIDTH = 190.0  # of one entry

STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; fill: #1e293b; }
  .title { font-size: 15px; font-weight: bold; }
  .name { font-size: 14px; font-weight: bold; text-anchor: middle; }
  .note { font-size: 11px; fill: #475569; text-anchor: middle; }
  .answers { font-size: 11px; font-weight: bold; fill: #0f766e; text-anchor: middle; }
  .legend { font-size: 11px; fill: #475569; }
  .agent { fill: #f8fafc; stroke: #64748b; stroke-width: 1.2; }
  .answer { fill: #ecfdf5; stroke: #0f766e; stroke-width: 2.4; }
  .forward { fill: none; stroke: #334155; stroke-width: 1.5; marker-end: url(#forward); }
  .feedback { fill: none; stroke: #c2410c; stroke-width: 1.5; stroke-dasharray: 5 3;
    marker-end: url(#feedback); }
"""


def topology_svg(topology: Graph) -> str:
    """Return the declared graph as an SVG image: agents, links, and which agent answers."""
    system = topology.system
    title = f"{system.name}: {counted(system.rounds, 'round')}"
    layout = lay_out(topology, box_width=_box_width(system))
    legend = list(_legend(layout))
    title_width = len(title) * TITLE_SIZE * CHARACTER_WIDTH
    width = max(layout.width, 2 * MARGIN + title_width, MARGIN + LEGEND_WIDTH * len(legend))
    height = layout.height + LEGEND_HEIGHT
    return "".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(width)}" height="{_n(height)}" '
            f'viewBox="0 0 {_n(width)} {_n(height)}" role="img">\n',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<defs>\n",
            _arrowhead("forward", "#334155"),
            _arrowhead("feedback", "#c2410c"),
            '</defs>\n<rect width="100%" height="100%" fill="#ffffff"/>\n',
            f'<text class="title" x="{_n(MARGIN)}" y="30">{escape(title)}</text>\n',
            *(_path("feedback", _rounded(lane)) for lane in layout.lanes.values()),
            *(_path("forward", _curved(curve)) for curve in layout.curves.values()),
            *(_path("feedback", _loop(layout.boxes[name])) for name in layout.loops),
            *(_agent(system.agents[n], box, system) for n, box in layout.boxes.items()),
            *legend,
            "</svg>\n",
        )
    )


def _box_width(system: System) -> float:
    widths = [
        width
        for agent in system.agents.values()
        for width in (len(agent.name) * NAME_SIZE, len(_note(agent)) * NOTE_SIZE)
    ]
    return math.ceil(max(widths) * CHARACTER_WIDTH + 28)


def _note(agent: Agent) -> str:
    return f"{agent.backbone}, {counted(agent.latent_steps, 'latent step')}"


def _agent(agent: Agent, box: Box, system: System) -> str:
    answers = agent.name == system.answer_agent
    centre = _n(box.x + box.width / 2)
    first_line = box.y + (22 if answers else 29)
    lines = [
        f'<rect class="{"answer" if answers else "agent"}" x="{_n(box.x)}" y="{_n(box.y)}" '
        f'width="{_n(box.width)}" height="{_n(box.height)}" rx="8"/>',
        f'<text class="name" x="{centre}" y="{_n(first_line)}">{escape(agent.name)}</text>',
        f'<text class="note" x="{centre}" y="{_n(first_line + 17)}">{escape(_note(agent))}</text>',
    ]
    if answers:
        lines.append(
            f'<text class="answers" x="{centre}" y="{_n(first_line + 33)}">writes the answer</text>'
        )
    return "".join(f"{line}\n" for line in lines)


def _legend(layout: Layout) -> Iterator[str]:
    kinds = {
        "forward": ("read in the same round", bool(layout.curves)),
        "feedback": ("read in the next round", bool(layout.lanes or layout.loops)),
    }
    x, y = MARGIN, layout.height + 6
    for kind, (meaning, used) in kinds.items():
        if used:
            sample = _path(kind, f"M {_n(x)} {_n(y)} H {_n(x + 34)}")
            text = f'<text class="legend" x="{_n(x + 42)}" y="{_n(y + 4)}">{meaning}</text>\n'
            yield sample + text
            x += LEGEND_WIDTH


def _arrowhead(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
        f'markerHeight="8" orient="auto" markerUnits="userSpaceOnUse">'
        f'<path d="M 0 1 L 10 5 L 0 9 z" fill="{colour}"/></marker>\n'
    )


def _path(kind: str, data: str) -> str:
    return f'<path class="{kind}" d="{data}"/>\n'


def _curved(points: list[Point]) -> str:
    """Join points by curves with level ends; two points at one height give a straight line."""
    (x, y), *rest = points
    data = [f"M {_n(x)} {_n(y)}"]
    for to_x, to_y in rest:
        bend = _n((x + to_x) / 2)
        data.append(f"C {bend} {_n(y)} {bend} {_n(to_y)} {_n(to_x)} {_n(to_y)}")
        x, y = to_x, to_y
    return " ".join(data)


def _rounded(corners: list[Point]) -> str:
    """Join corners by straight lines, rounding every bend."""
    data = [f"M {_n(corners[0][0])} {_n(corners[0][1])}"]
    for before, at, after in zip(corners, corners[1:], corners[2:], strict=False):
        into, out_of = _toward(at, before), _toward(at, after)
        data.append(f"L {_n(into[0])} {_n(into[1])}")
        data.append(f"Q {_n(at[0])} {_n(at[1])} {_n(out_of[0])} {_n(out_of[1])}")
    data.append(f"L {_n(corners[-1][0])} {_n(corners[-1][1])}")
    return " ".join(data)


def _toward(start: Point, end: Point) -> Point:
    """Return the point a rounding's radius from `start` toward `end`, at most half the way."""
    length = math.dist(start, end)
    share = min(CORNER, length / 2) / length if length else 0.0
    return (start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share)


def _loop(box: Box) -> str:
    """Leave the top of a box and come back to it further left."""
    right, left = box.x + box.width * 0.68, box.x + box.width * 0.32
    top = box.y - LOOP_HEIGHT
    return (
        f"M {_n(right)} {_n(box.y)} C {_n(right + 6)} {_n(top - 6)} "
        f"{_n(left - 6)} {_n(top - 6)} {_n(left)} {_n(box.y)}"
    )


def _n(value: float) -> str:
    """Write a coordinate: at most one decimal, no trailing zero, so that the text is stable."""
    return f"{value:.1f}".removesuffix(".0")
