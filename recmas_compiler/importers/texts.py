"""Texts with places for values: `{topic}`, `{state.topic}`, `${state.topic}`, `{{ topic }}`.

What a place stands for, a field of the record or a message, its reader decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from recmas_compiler.importers.team import Field, Part, Text

_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]*"
# Form -> its places; group 1 is what stands inside.
SINGLE_BRACES: Final = re.compile(rf"(?<!\{{)\{{({_NAME})\}}(?!\}})")
SCOPED_BRACES: Final = re.compile(rf"\{{+\s*((?:{_NAME}[.:])?{_NAME}\??)\s*\}}+")
DOLLAR_BRACES: Final = re.compile(r"\$\{\s*([^{}]+?)\s*\}")
EITHER_BRACES: Final = re.compile(rf"\{{\{{\s*({_NAME})\s*\}}\}}|(?<!\{{)\{{({_NAME})\}}(?!\}})")
DOTTED_BRACES: Final = re.compile(r"\{([A-Za-z][A-Za-z0-9_.()]*)\}")

# Line breaks of YAML 1.1, which do not come back out of a block.
_ODD_BREAKS: Final = re.compile("[\x85\u2028\u2029]")

Resolve = Callable[[str], Part | None]
"""What a place stands for, by what stands inside; None leaves it as it is."""


def parse_text(text: str, places: re.Pattern[str], resolve: Resolve) -> Text:
    """Split a text at its places."""
    parts: list[Part] = []
    at = 0
    for found in places.finditer(text):
        inside = next(group for group in found.groups() if group is not None)
        part = resolve(inside)
        if part is None:
            continue
        parts += [text[at : found.start()], part]
        at = found.end()
    parts.append(text[at:])
    return tidy(parts)


def field(name: str) -> Field:
    """Return the field for a name: a scope, as in `app:topic` or `state.topic`, is left out."""
    plain = re.sub(r"\W+", "_", re.split(r"[.:]", name.rstrip("?"))[-1])
    return Field("latent_" if plain == "latent" else plain)


def joined(*texts: Text, by: str) -> Text:
    """Join texts that are there."""
    parts: list[Part] = []
    for text in texts:
        if text:
            parts += [by, *text] if parts else text
    return tidy(parts)


def tidy(parts: Iterable[Part]) -> Text:
    """Join neighbouring pieces; white space around the whole and at ends of lines goes."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str):
            part = _ODD_BREAKS.sub("\n", part).replace("\ufeff", "")
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part != "":
            merged.append(part)
    merged = [re.sub(r"[ \t]+\n", "\n", p) if isinstance(p, str) else p for p in merged]
    if merged and isinstance(merged[0], str):
        merged[0] = merged[0].lstrip()
    if merged and isinstance(merged[-1], str):
        merged[-1] = merged[-1].rstrip()
    return tuple(part for part in merged if part != "")


def fields_of(texts: Iterable[Text]) -> list[str]:
    """Return the fields that texts show, each once."""
    return list(dict.fromkeys(p.name for text in texts for p in text if isinstance(p, Field)))
