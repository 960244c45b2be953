"""Names of links: ids in bundles, logs and traces, names in specs, and names of their files.

The outer link from a to b has the id `a->b` and is written `a -> b` in a spec; the inner link of a
has the id `a.inner`. Names of agents hold neither dots nor arrows, so an id says what it is.
"""

from __future__ import annotations

import re
from typing import Final

# The name of an agent, a backbone or a system.
SLUG_PATTERN: Final = "[a-z0-9][a-z0-9_-]*"
# The name of a link as people may write it, with any white space.
LINK_PATTERN: Final = rf"^\s*({SLUG_PATTERN})\s*->\s*({SLUG_PATTERN})\s*$"

_ARROW: Final = "->"
_SPACED_ARROW: Final = " -> "
_INNER: Final = ".inner"
_LINK: Final = re.compile(LINK_PATTERN)


def outer_link_id(source: str, target: str) -> str:
    """Return the id of the outer link between two agents."""
    return f"{source}{_ARROW}{target}"


def inner_link_id(agent: str) -> str:
    """Return the id of an agent's inner link."""
    return f"{agent}{_INNER}"


def is_inner(link_id: str) -> bool:
    """Tell whether an id is that of an inner link."""
    return link_id.endswith(_INNER)


def link_ends(link: str) -> tuple[str, str]:
    """Return source and target of a link, by its id or name; an inner one has its agent twice."""
    if is_inner(link):
        agent = link.removesuffix(_INNER)
        return agent, agent
    source, _, target = link.partition(_SPACED_ARROW if _SPACED_ARROW in link else _ARROW)
    return source, target


def link_file_name(link_id: str) -> str:
    """Return the name of a link's file: `inner.a.safetensors` or `outer.a.b.safetensors`."""
    source, target = link_ends(link_id)
    stem = f"inner.{source}" if is_inner(link_id) else f"outer.{source}.{target}"
    return f"{stem}.safetensors"


def link_name(source: str, target: str) -> str:
    """Return the canonical name of an outer link, as specs and messages write it: `a -> b`."""
    return path_text(source, target)


def canonical_link_name(name: str) -> str | None:
    """Return `a -> b` with single spaces, or None if `name` is no link name."""
    match = _LINK.match(name)
    return link_name(match.group(1), match.group(2)) if match else None


def path_text(*agents: str) -> str:
    """Return agents one behind the other as messages write them: `a -> b -> c`."""
    return _SPACED_ARROW.join(agents)
