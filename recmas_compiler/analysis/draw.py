"""Drawings: the topology as SVG, and both IR levels as Mermaid, which GitHub and editors draw.

In the SVG agents stand in columns, one per layer of the graph without its feedback links, so
forward links run from left to right; one that skips a column has a row of its own in it. Feedback
links leave on the right, run in lanes below all boxes and come back on the left; one to the agent
itself turns just below its box. So no line crosses a box.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.sax.saxutils import escape

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import (
    Agent,
    Ask,
    Decode,
    Flow,
    Link,
    NodeOp,
    Prefill,
    Send,
    System,
    Think,
    Write,
)
from recmas_runtime.core.text import counted

Point = tuple[float, float]

MARGIN = 24.0
TITLE_HEIGHT = 60.0
BOX_HEIGHT = 64.0
ROW_GAP = 40.0
COLUMN_GAP = 72.0
TRACK_GAP = 12.0  # between feedback links beside a column
LANE_GAP = 14.0  # between feedback links below the boxes
OWN_LANE = 14.0  # below the box, of an agent's feedback to itself
FIRST_LANE = 26.0  # below all boxes
PORT_GAP = 12.0  # between lines that touch the same side of a box
CORNER = 8.0
CHARACTER_WIDTH = 0.62  # of the font size; a little over the mean of common sans-serif fonts
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
LABEL_STYLE = """  .carried { font-size: 10px; fill: #475569; text-anchor: middle;
    paint-order: stroke; stroke: #ffffff; stroke-width: 3px; }
"""
LABEL_RISE = 3.0  # over its line
ARROWHEAD = (
    '<marker id="{0}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
    'orient="auto" markerUnits="userSpaceOnUse"><path d="M 0 1 L 10 5 L 0 9 z" fill="{1}"/>'
    "</marker>\n"
)


class Box(NamedTuple):
    """An agent's rectangle: top left corner and size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything goes.

    Attributes:
        curves: Per forward link, points to join by curves that leave and arrive level.
        lanes: Per feedback link, corners to join by straight lines.
    """

    width: float
    height: float
    boxes: dict[str, Box]
    curves: dict[str, list[Point]]
    lanes: dict[str, list[Point]]


def lay_out(topology: Graph, *, box_width: float) -> Layout:
    """Return the layout of a topology whose boxes are all `box_width` wide."""
    forward = topology.without_feedback()
    layers, passed = forward.layers()
    ways = {e.op.id: passed[e.source, e.target] for e in forward.edges() if isinstance(e.op, Link)}
    column = {item: i for i, layer in enumerate(layers) for item in layer}
    pitch, most = BOX_HEIGHT + ROW_GAP, max(map(len, layers))
    middle = {
        item: TITLE_HEIGHT + BOX_HEIGHT / 2 + pitch * (row + (most - len(layer)) / 2)
        for layer in layers
        for row, item in enumerate(layer)
    }
    # From the inside to the outside, so that feedback links nest instead of crossing.
    feedback = sorted(
        (edge.op for edge in topology.edges() if isinstance(edge.op, Link) and edge.op.feedback),
        key=lambda link: (
            abs(column[link.source] - column[link.target]),
            -middle[link.source] - middle[link.target],
            link.id,
        ),
    )
    # The gap before each column has a track for whatever leaves the column before it or enters it.
    leaving = [
        [k.id for k in feedback if column[k.source] == i - 1] for i in range(len(layers) + 1)
    ]
    entering = [[k.id for k in feedback if column[k.target] == i] for i in range(len(layers))]
    x = MARGIN - COLUMN_GAP + TRACK_GAP * bool(entering[0])
    left: dict[str, float] = {}
    for i, layer in enumerate(layers):
        x += COLUMN_GAP + TRACK_GAP * (len(leaving[i]) + len(entering[i]))
        left |= dict.fromkeys(layer, x)
        x += box_width
    starts, ends = _ports(ways, feedback, left=left, middle=middle, box_width=box_width)

    curves = {}
    for link_id, way in ways.items():
        level = [(left[item] + far, middle[item]) for item in way[1:-1] for far in (0, box_width)]
        curves[link_id] = [starts[link_id], *level, ends[link_id]]
    floor = TITLE_HEIGHT + pitch * most - ROW_GAP
    lanes, depths = {}, itertools.count(floor + FIRST_LANE, LANE_GAP)
    for link in feedback:
        is_own = link.source == link.target
        y = middle[link.source] + BOX_HEIGHT / 2 + OWN_LANE if is_own else next(depths)
        start, end = starts[link.id], ends[link.id]
        down = start[0] + TRACK_GAP * (1 + leaving[column[link.source] + 1].index(link.id))
        up = end[0] - TRACK_GAP * (2 + entering[column[link.target]].index(link.id))
        lanes[link.id] = [start, (down, start[1]), (down, y), (up, y), (up, end[1]), end]
    return Layout(
        width=x + TRACK_GAP * len(leaving[-1]) + MARGIN,
        height=max([floor, *(y for lane in lanes.values() for _, y in lane)]) + MARGIN,
        boxes={
            name: Box(left[name], middle[name] - BOX_HEIGHT / 2, box_width, BOX_HEIGHT)
            for name in topology.nodes()
        },
        curves=curves,
        lanes=lanes,
    )


def _ports(
    ways: Mapping[str, Sequence[str]],
    feedback: Sequence[Link],
    *,
    left: Mapping[str, float],
    middle: Mapping[str, float],
    box_width: float,
) -> tuple[dict[str, Point], dict[str, Point]]:
    """Spread the lines over the sides of their boxes: where each link starts, and where it ends."""
    exits: dict[str, list[tuple[bool, float, str]]] = defaultdict(list)
    entries: dict[str, list[tuple[bool, float, str]]] = defaultdict(list)
    for link_id, way in ways.items():
        exits[way[0]].append((False, middle[way[1]], link_id))
        entries[way[-1]].append((False, middle[way[-2]], link_id))
    for depth, link in enumerate(feedback):  # below the forward links, as they go down
        exits[link.source].append((True, -depth, link.id))
        entries[link.target].append((True, -depth, link.id))
    starts: dict[str, Point] = {}
    ends: dict[str, Point] = {}
    for sides, ports, far in ((exits, starts, box_width), (entries, ends, 0.0)):
        for agent, touching in sides.items():
            gap = min(PORT_GAP, (BOX_HEIGHT - 2 * PORT_GAP) / max(len(touching) - 1, 1))
            for k, (*_, link_id) in enumerate(sorted(touching)):
                offset = gap * (k - (len(touching) - 1) / 2)
                ports[link_id] = (left[agent] + far, middle[agent] + offset)
    return starts, ends


def topology_svg(topology: Graph) -> str:
    """Return the declared graph as an SVG image: agents, links, and which agent answers."""
    system = topology.system
    title = f"{system.name}: {counted(system.rounds, 'round')}"
    # of names in bold 14 px and notes in 11 px
    widest = max(max(14 * len(a.name), 11 * len(_note(a, system))) for a in system.agents.values())
    layout = lay_out(topology, box_width=math.ceil(widest * CHARACTER_WIDTH + 28))
    lines = [
        *(_path("feedback", _rounded(lane)) for lane in layout.lanes.values()),
        *(_path("forward", _curved(curve)) for curve in layout.curves.values()),
        *_labels(system, layout),
        *(_agent(system.agents[name], box, system) for name, box in layout.boxes.items()),
    ]
    style = LABEL_STYLE if any(map(_carried, system.links.values())) else ""
    x, y = MARGIN, layout.height + 6
    for kind, meaning, used in (
        ("forward", "read in the same round", layout.curves),
        ("feedback", "read in the next round", layout.lanes),
    ):
        if used:
            lines.append(_path(kind, f"M {_n(x)} {_n(y)} H {_n(x + 34)}"))
            lines.append(_text("legend", x + 42, y + 4, meaning))
            x += LEGEND_WIDTH
    width = _n(max(layout.width, x, 2 * MARGIN + len(title) * 15 * CHARACTER_WIDTH))
    height = _n(layout.height + 28)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n<defs>\n"
        f"{ARROWHEAD.format('forward', '#334155')}{ARROWHEAD.format('feedback', '#c2410c')}"
        '</defs>\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f"{_text('title', MARGIN, 30, title)}{''.join(lines)}</svg>\n"
    )


def _agent(agent: Agent, box: Box, system: System) -> str:
    answers = agent.name == system.answer_agent
    centre, first_line = box.x + box.width / 2, box.y + (22 if answers else 29)
    return "".join(
        (
            f'<rect class="{"answer" if answers else "agent"}" x="{_n(box.x)}" y="{_n(box.y)}" '
            f'width="{_n(box.width)}" height="{_n(box.height)}" rx="8"/>\n',
            _text("name", centre, first_line, agent.name),
            _text("note", centre, first_line + 17, _note(agent, system)),
            _text("answers", centre, first_line + 33, "writes the answer") if answers else "",
        )
    )


def _note(agent: Agent, system: System) -> str:
    if system.is_remote(agent.name):
        return f"{agent.backbone}, behind an API"
    return f"{agent.backbone}, {counted(agent.latent_steps, 'latent step')}"


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}">{escape(text)}</text>\n'


def _path(kind: str, data: str) -> str:
    return f'<path class="{kind}" d="{data}"/>\n'


def _curved(points: list[Point]) -> str:
    """Join points by curves with level ends; two points at one height give a straight line."""
    data = [f"M {_n(points[0][0])} {_n(points[0][1])}"]
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        bend = _n((x + to_x) / 2)
        data.append(f"C {bend} {_n(y)} {bend} {_n(to_y)} {_n(to_x)} {_n(to_y)}")
    return " ".join(data)


def _rounded(corners: list[Point]) -> str:
    """Join corners by straight lines, rounding every bend."""
    data = [f"M {_n(corners[0][0])} {_n(corners[0][1])}"]
    for before, (x, y), after in zip(corners, corners[1:], corners[2:], strict=False):
        for command, (to_x, to_y) in (("L", before), (f"Q {_n(x)} {_n(y)}", after)):
            length = math.dist((x, y), (to_x, to_y))
            share = min(CORNER, length / 2) / length
            data.append(f"{command} {_n(x + (to_x - x) * share)} {_n(y + (to_y - y) * share)}")
    data.append(f"L {_n(corners[-1][0])} {_n(corners[-1][1])}")
    return " ".join(data)


def _n(value: float) -> str:
    """Write a coordinate: at most one decimal, no trailing zero, so that the text is stable."""
    return f"{value:.1f}".removesuffix(".0")


def _carried(link: Link) -> str:
    """Return what a link carries; nothing for thoughts, which every arrow is for otherwise."""
    return "" if link.form.carries == "thoughts" else link.form.carries


def _when(link: Link) -> str:
    return "next round: " if link.feedback else ""


def _labels(system: System, layout: Layout) -> Iterator[str]:
    """Yield what links carry: above the first stretch of an arrow, or its lane below the boxes."""
    for link_id, points in (*layout.curves.items(), *layout.lanes.items()):
        if carried := _carried(system.links[link_id]):
            start, end = points[2:4] if link_id in layout.lanes else points[:2]
            x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - LABEL_RISE
            yield _text("carried", x, y, carried)


def topology_mermaid(topology: Graph) -> str:
    """Return the declared graph as a flow chart; dotted arrows are feedback links."""
    system = topology.system
    # Own ids, as an agent may be called `end`, which is a word of Mermaid.
    ids = {name: f"a{i}" for i, name in enumerate(topology.nodes())}
    lines = ["flowchart LR"]
    for name, agent in system.agents.items():
        answers = name == system.answer_agent
        label = f"<b>{name}</b><br/>{_note(agent, system)}"
        lines.append(f'  {ids[name]}(["{label}"])' if answers else f'  {ids[name]}["{label}"]')
    for link in (edge.op for edge in topology.edges() if isinstance(edge.op, Link)):
        arrow = "-. next round .->" if link.feedback else "-->"
        if carried := _carried(link):
            arrow = f"{'-.->' if link.feedback else '-->'}|{_when(link)}{carried}|"
        lines.append(f"  {ids[link.source]} {arrow} {ids[link.target]}")
    lines.append(f"  answer((answer))\n  {ids[system.answer_agent]} ==> answer")
    return "\n".join(lines) + "\n"


def program_mermaid(program: Graph) -> str:
    """Return the steps as a flow chart, a box per round; dotted arrows are reused cache rows.

    The first of them says so, as the legend.
    """
    ids = {step: f"s{i}" for i, step in enumerate(program.order())}
    lines = ["flowchart TD"]
    for round_ in range(1, program.system.rounds + 1):
        lines.append(f'  subgraph r{round_}["round {round_}"]')
        for step, op in program.in_order():
            if not isinstance(op, Agent) and op.round == round_:
                lines.append(f"    {ids[step]}{_shape(op, program.system)}")
        lines.append("  end")
    dotted = "-. reuses cache .->"
    for edge in program.edges():
        arrow = "-->"
        if edge.op == Flow(carries="cache"):
            arrow, dotted = dotted, "-.->"
        lines.append(f"  {ids[edge.source]} {arrow} {ids[edge.target]}")
    return "\n".join(lines) + "\n"


def _at_most(tokens: int | None) -> str:
    return "" if tokens is None else f"<br/>{counted(tokens, 'token')} at most"


def _shape(op: NodeOp, system: System) -> str:
    match op:
        case Prefill(agents=agents):
            return f'["prefill {", ".join(agents)}"]'
        case Think(agents=agents):
            steps = system.agents[agents[0]].latent_steps
            return f'["think {", ".join(agents)}<br/>{counted(steps, "step")}"]'
        case Write(agents=agents, max_tokens=max_tokens):
            return f'["write {", ".join(agents)}<br/>{counted(max_tokens, "token")} at most"]'
        case Send(source=source, targets=targets):
            return f'(["{source} to {", ".join(targets)}"])'
        case Ask(agents=agents, max_tokens=most):
            return f'[["ask {", ".join(agents)}{_at_most(most)}"]]'
        case Decode(agent=agent):
            return f'[["decode {agent}"]]'
        case Agent():
            raise AssertionError(f"an agent in a program: {op.name}")
