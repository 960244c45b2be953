"""Two questions about links: which cycles lie within one round, and who reaches the answer when."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import pairwise

from recmas_compiler.spec.schema.sections import LinkSection

Ends = tuple[str, str]


def closing_links(links: Mapping[Ends, LinkSection]) -> list[list[Ends]]:
    """Return cycles of links without feedback, each ending with the link declared last in it.

    Marking every cycle's last link as feedback leaves no cycle, so the list is one set of fixes
    rather than the (possibly huge) set of all cycles.
    """
    remaining = [ends for ends, link in links.items() if not link.feedback]
    rank = {ends: i for i, ends in enumerate(remaining)}
    cycles = []
    while cycle := _find_cycle(remaining):
        last = cycle.index(max(cycle, key=rank.__getitem__))
        cycle = cycle[last + 1 :] + cycle[: last + 1]
        remaining.remove(cycle[-1])
        cycles.append(cycle)
    return cycles


def _find_cycle(links: list[Ends]) -> list[Ends]:
    """Return one cycle, or an empty list."""
    following: dict[str, list[str]] = {}
    for source, target in links:
        following.setdefault(source, []).append(target)
    finished: set[str] = set()
    for start in following:
        path: list[str] = []
        waiting = [(start, 0)]
        while waiting:
            agent, depth = waiting.pop()
            finished.update(path[depth:])
            del path[depth:]
            if agent in path:
                loop = [*path[path.index(agent) :], agent]
                return list(pairwise(loop))
            if agent in finished:
                continue
            path.append(agent)
            waiting += [(target, depth + 1) for target in reversed(following.get(agent, []))]
        finished.update(path)
    return []


def feedbacks_to(answer: str, links: Mapping[Ends, LinkSection]) -> dict[str, int]:
    """Return, for every agent whose thoughts reach `answer`, the fewest feedback links on the way.

    A message takes one more round for each of them.
    """
    fewest = {answer: 0}
    waiting = deque([answer])
    while waiting:
        target = waiting.popleft()
        for (source, end), link in links.items():
            through = fewest[target] + link.feedback
            if end == target and through < fewest.get(source, through + 1):
                fewest[source] = through
                waiting.append(source)
    return fewest
