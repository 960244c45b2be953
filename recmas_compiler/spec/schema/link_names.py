"""Link names: `source -> target`, with any white space."""

from __future__ import annotations

import re

from recmas_compiler.spec.document.places import Places
from recmas_compiler.spec.document.problems import problem_at, show
from recmas_compiler.spec.document.yaml_source import Value
from recmas_compiler.spec.schema.sections import LINK_PATTERN
from recmas_runtime.core.errors import Problem

_LINK = re.compile(LINK_PATTERN)


def link_ends(name: str) -> tuple[str, str]:
    """Return source and target of a canonical link name."""
    source, _, target = name.partition(" -> ")
    return source, target


def outer_link_id(name: str) -> str:
    """Return the id of the link of a canonical name: `source->target`."""
    return "->".join(link_ends(name))


def canonical_link_name(name: str) -> str | None:
    """Return `source -> target` with single spaces, or None if it is no link name."""
    match = _LINK.match(name)
    return f"{match.group(1)} -> {match.group(2)}" if match else None


def normalize_link_names(root: dict[str, Value], places: Places) -> list[Problem]:
    """Rewrite the keys of `links` to their canonical form, in place."""
    links = root.get("links")
    if not isinstance(links, dict):
        return []
    problems: list[Problem] = []
    normalized: dict[str, Value] = {}
    written: dict[str, str] = {}  # canonical name -> the name as written
    for name, link in links.items():
        place = places.key(("links", name))
        canonical = canonical_link_name(name)
        if canonical is None:
            message = f"{show(name)} is not a link name."
            hint = "Write `source -> target` with the names of two agents."
            problems.append(problem_at(place, "RM119", message, hint=hint))
        elif canonical in normalized:
            first = places.key(("links", written[canonical]))
            message = f"the link `{canonical}` is given a second time, first in line {first.line}."
            problems.append(problem_at(place, "RM102", message, hint="Remove one of the two."))
        else:
            normalized[canonical], written[canonical] = link, name
    renamed = {name: canonical for canonical, name in written.items() if name != canonical}
    places.rename(("links",), renamed)
    root["links"] = normalized
    return problems
