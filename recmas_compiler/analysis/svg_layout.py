"""Where things go in the drawing of a topology: boxes, curves, lanes. Numbers only, no SVG.

Agents stand in columns, one per generation of the graph without its feedback links, so forward
links run from left to right. A forward link that skips a column has a row of its own in it, its
thread. Feedback links run in lanes below all agents: they leave and enter the lowest agent of a
column from below, any other one through the gap beside its column. So no line crosses a box.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Link

Point = tuple[float, float]

MARGIN = 24.0
TITLE_HEIGHT = 36.0
BOX_HEIGHT = 64.0
THREAD_HEIGHT = 12.0
ROW_GAP = 40.0  # room for a self-loop above a box
COLUMN_GAP = 72.0
TRACK_GAP = 12.0  # between feedback links that share a gap
LANE_GAP = 14.0
FIRST_LANE = 22.0  # below the boxes
PORT_GAP = 12.0
SWEEPS = 8  # of ordering columns by their neighbours; drawings settle in two or three


@dataclass(frozen=True, kw_only=True)
class Box:
    """An agent's rectangle: top left corner and size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The whole drawing.

    Attributes:
        boxes: By agent.
        curves: Per forward link, points to join by curves that leave and arrive level.
        lanes: Per feedback link, corners to join by straight lines.
        loops: Agents that feed back to themselves.
    """

    width: float
    height: float
    boxes: dict[str, Box]
    curves: dict[str, list[Point]]
    lanes: dict[str, list[Point]]
    loops: list[str]


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Columns of items (agents and threads) with their coordinates."""

    columns: list[list[str]]
    column: dict[str, int]
    left: list[float]  # of each column
    middle: dict[str, float]  # y of each item's centre
    box_width: float
    floor: float  # y below all boxes

    def is_lowest(self, agent: str) -> bool:
        return self.columns[self.column[agent]][-1] == agent

    def left_of(self, item: str) -> float:
        return self.left[self.column[item]]

    def right_of(self, item: str) -> float:
        return self.left_of(item) + self.box_width


def lay_out(topology: Graph, *, box_width: float) -> Layout:
    """Return the layout of a topology whose boxes are all `box_width` wide."""
    links = [edge.op for edge in topology.edges() if isinstance(edge.op, Link)]
    forward = [link for link in links if not link.feedback]
    feedback = [link for link in links if link.feedback and link.source != link.target]
    columns, threads = _columns(topology, forward)
    loops = [link.source for link in links if link.feedback and link.source == link.target]
    top = TITLE_HEIGHT + (ROW_GAP if loops else MARGIN)
    grid = _place(columns, feedback, top=top, box_width=box_width)
    ports = _side_ports(grid, forward, threads, feedback) | _bottom_ports(grid, feedback)
    lanes = _lanes(grid, feedback, ports)
    deepest = max((y for points in lanes.values() for _, y in points), default=grid.floor)
    tracks_right = max((x for points in lanes.values() for x, _ in points), default=0.0)
    return Layout(
        width=max(grid.left[-1] + box_width, tracks_right) + MARGIN,
        height=max(deepest, grid.floor) + MARGIN,
        boxes={
            name: Box(
                x=grid.left_of(name),
                y=grid.middle[name] - BOX_HEIGHT / 2,
                width=box_width,
                height=BOX_HEIGHT,
            )
            for name in topology.nodes()
        },
        curves={link.id: _curve(grid, threads[link.id], link, ports) for link in forward},
        lanes=lanes,
        loops=loops,
    )


def _columns(
    topology: Graph, forward: Sequence[Link]
) -> tuple[list[list[str]], dict[str, list[str]]]:
    """Return the items of each column from top to bottom, and each forward link's threads."""
    columns = topology.without_feedback().generations()
    column = {name: i for i, names in enumerate(columns) for name in names}
    threads: dict[str, list[str]] = {}
    neighbours: dict[str, list[str]] = {name: [] for name in column}
    for link in forward:
        skipped = range(column[link.source] + 1, column[link.target])
        threads[link.id] = [f"{link.id}@{i}" for i in skipped]  # agents' names have no `@`
        for i, thread in zip(skipped, threads[link.id], strict=True):
            columns[i].append(thread)
            neighbours[thread] = []
        way = [link.source, *threads[link.id], link.target]
        for here, there in itertools.pairwise(way):
            neighbours[here].append(there)
            neighbours[there].append(here)
    for sweep in range(SWEEPS):
        for i in range(len(columns))[:: 1 if sweep % 2 == 0 else -1]:
            columns[i].sort(key=_by_neighbours(columns, neighbours))
    return columns, threads


def _by_neighbours(
    columns: list[list[str]], neighbours: dict[str, list[str]]
) -> Callable[[str], float]:
    height = {item: (k + 0.5) / len(c) for c in columns for k, item in enumerate(c)}

    def mean_height(item: str) -> float:
        around = [height[other] for other in neighbours[item]] or [height[item]]
        return sum(around) / len(around)

    return mean_height


def _place(
    columns: list[list[str]], feedback: Sequence[Link], *, top: float, box_width: float
) -> _Grid:
    column = {item: i for i, items in enumerate(columns) for item in items}
    lowest = {items[-1] for items in columns}
    tracks = [0] * (len(columns) + 1)  # of the gap to the left of each column, and of the last
    for link in feedback:
        tracks[column[link.source] + 1] += link.source not in lowest
        tracks[column[link.target]] += link.target not in lowest
    left = [MARGIN + (tracks[0] + 1) * TRACK_GAP * (tracks[0] > 0)]
    for num_tracks in tracks[1:-1]:
        left.append(left[-1] + box_width + COLUMN_GAP + num_tracks * TRACK_GAP)

    heights = [sum(_height(item) + ROW_GAP for item in items) - ROW_GAP for items in columns]
    middle = {}
    for items, height in zip(columns, heights, strict=True):
        y = top + (max(heights) - height) / 2
        for item in items:
            middle[item] = y + _height(item) / 2
            y += _height(item) + ROW_GAP
    return _Grid(
        columns=columns,
        column=column,
        left=left,
        middle=middle,
        box_width=box_width,
        floor=top + max(heights),
    )


def _height(item: str) -> float:
    return THREAD_HEIGHT if "@" in item else BOX_HEIGHT


# (link, end) -> where it touches the box
Ports = dict[tuple[str, str], Point]


def _side_ports(
    grid: _Grid,
    forward: Iterable[Link],
    threads: Mapping[str, Sequence[str]],
    feedback: Iterable[Link],
) -> Ports:
    """Spread what touches a box's left or right side over that side."""
    sides: dict[tuple[str, str], list[tuple[float, int, str]]] = {}
    for link in forward:
        way = [link.source, *threads[link.id], link.target]
        sides.setdefault((link.source, "out"), []).append((grid.middle[way[1]], 0, link.id))
        sides.setdefault((link.target, "in"), []).append((grid.middle[way[-2]], 0, link.id))
    for link in feedback:  # below the forward links, as they go down; the longest outermost
        nearness = -abs(grid.column[link.source] - grid.column[link.target])
        if not grid.is_lowest(link.source):
            sides.setdefault((link.source, "out"), []).append((grid.floor, nearness, link.id))
        if not grid.is_lowest(link.target):
            sides.setdefault((link.target, "in"), []).append((grid.floor, nearness, link.id))
    ports = {}
    for (agent, end), touching in sides.items():
        x = grid.right_of(agent) if end == "out" else grid.left_of(agent)
        offsets = _spread(len(touching), BOX_HEIGHT)
        for offset, (*_, link_id) in zip(offsets, sorted(touching), strict=True):
            ports[link_id, end] = (x, grid.middle[agent] + offset)
    return ports


def _bottom_ports(grid: _Grid, feedback: Iterable[Link]) -> Ports:
    """Spread what touches the bottom of a lowest box, so that lanes nest instead of crossing."""
    bottoms: dict[str, list[tuple[tuple[int, int, float], str, str]]] = {}
    for link in feedback:
        for end, agent, other in (
            ("out", link.source, link.target),
            ("in", link.target, link.source),
        ):
            if grid.is_lowest(agent):
                away = grid.column[other] - grid.column[agent]
                above = -grid.middle[other]
                nested = (0, -away, above) if away <= 0 else (1, -away, -above)
                bottoms.setdefault(agent, []).append((nested, link.id, end))
    ports = {}
    for agent, touching in bottoms.items():
        centre = grid.left_of(agent) + grid.box_width / 2
        offsets = _spread(len(touching), grid.box_width)
        for offset, (_, link_id, end) in zip(offsets, sorted(touching), strict=True):
            ports[link_id, end] = (centre + offset, grid.middle[agent] + BOX_HEIGHT / 2)
    return ports


def _spread(count: int, room: float) -> list[float]:
    gap = min(PORT_GAP, (room - 2 * PORT_GAP) / max(count - 1, 1))
    return [(k - (count - 1) / 2) * gap for k in range(count)]


def _curve(grid: _Grid, threads: Iterable[str], link: Link, ports: Ports) -> list[Point]:
    points = [ports[link.id, "out"]]
    for thread in threads:
        y = grid.middle[thread]
        points += [(grid.left_of(thread), y), (grid.right_of(thread), y)]
    return [*points, ports[link.id, "in"]]


def _lanes(grid: _Grid, feedback: Sequence[Link], ports: Ports) -> dict[str, list[Point]]:
    """Return each feedback link's corners; short links run in higher lanes than long ones."""
    exits, entries = _tracks(grid, feedback, ports, "out"), _tracks(grid, feedback, ports, "in")
    legs: dict[str, tuple[float, float]] = {}
    for link in feedback:
        down, up = ports[link.id, "out"][0], ports[link.id, "in"][0]
        if link.id in exits:
            down += TRACK_GAP * (1 + exits[link.id])
        if link.id in entries:
            up -= TRACK_GAP * (2 + entries[link.id])  # room for the arrowhead
        legs[link.id] = (down, up)

    occupied: list[list[tuple[float, float]]] = []
    lanes = {}
    for link in sorted(feedback, key=lambda k: (abs(legs[k.id][1] - legs[k.id][0]), k.id)):
        down, up = legs[link.id]
        low, high = min(down, up), max(down, up)
        free = (all(high < a or b < low for a, b in lane) for lane in occupied)
        depth = next((i for i, is_free in enumerate(free) if is_free), len(occupied))
        if depth == len(occupied):
            occupied.append([])
        occupied[depth].append((low, high))
        y = grid.floor + FIRST_LANE + LANE_GAP * depth
        start, end = ports[link.id, "out"], ports[link.id, "in"]
        corners = [start, (down, start[1]), (down, y), (up, y), (up, end[1]), end]
        lanes[link.id] = list(dict.fromkeys(corners))
    return lanes


def _tracks(
    grid: _Grid, feedback: Iterable[Link], ports: Ports, end: Literal["in", "out"]
) -> dict[str, int]:
    """Number the links that leave or enter by the side within their gap, inner tracks first."""
    tracks: dict[str, int] = {}
    used = [0] * len(grid.columns)
    for link in sorted(feedback, key=lambda link: -ports[link.id, end][1]):
        agent = link.source if end == "out" else link.target
        if not grid.is_lowest(agent):
            tracks[link.id] = used[grid.column[agent]]
            used[grid.column[agent]] += 1
    return tracks
