"""Turns of a conversation before its last question, as turns of their own in a prompt."""

from __future__ import annotations

from typing import Literal

from recmas_runtime.formats.codec import StrictStruct


class EarlierTurn(StrictStruct, frozen=True, kw_only=True):
    """A turn of a conversation before its last question."""

    role: Literal["system", "user", "assistant"]
    content: str
