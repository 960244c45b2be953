"""Text of models and of the world on its way to a terminal, which obeys some characters."""

from __future__ import annotations

import unicodedata
from typing import Final, TextIO

# Line breaks and tabs, and the joiners that scripts and emoji are spelled with.
_HARMLESS: Final = "\n\t\u200c\u200d"


def harmless(text: str) -> str:
    """Return text that cannot steer a terminal: control characters are shown, not sent."""
    return "".join(c if _is_harmless(c) else repr(c)[1:-1] for c in text)


def shown_on(stream: TextIO, text: str) -> str:
    """Return what to write of a foreign text: all of it as it is, unless to a terminal."""
    return harmless(text) if stream.isatty() else text


def _is_harmless(character: str) -> bool:
    # Every space counts as not printable but the ASCII one.
    return (
        character.isprintable() or character in _HARMLESS or unicodedata.category(character) == "Zs"
    )
