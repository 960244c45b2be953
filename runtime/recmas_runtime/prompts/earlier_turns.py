"""Turns of a conversation before its last question, as turns of their own in a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from recmas_runtime.core.errors import fail
from recmas_runtime.formats.codec import StrictStruct
from recmas_runtime.formats.plan import PromptPart

_GAP = PromptPart(kind="text", value="\n\n")


class EarlierTurn(StrictStruct, frozen=True, kw_only=True):
    """A turn of a conversation before its last question."""

    role: Literal["system", "user", "assistant"]
    content: str


def as_fields(turns: Sequence[EarlierTurn]) -> dict[str, object]:
    """Return the texts of turns as fields, so that they never become control tokens.

    Raises:
        RecmasError: RM500 for a text that is none.
    """
    for place, turn in enumerate(turns):
        try:
            turn.content.encode()
        except UnicodeEncodeError:
            raise fail(
                "RM500",
                f"turn {place + 1} of the conversation holds half a surrogate pair",
                hint="Correct its text.",
            ) from None
    return {_field_of(place): turn.content for place, turn in enumerate(turns)}


def system_parts(turns: Sequence[EarlierTurn], *, is_first: bool) -> Iterator[PromptPart]:
    """Yield the system messages among turns, as the end of a system text or all of it."""
    for place, turn in enumerate(turns):
        if turn.role == "system":
            if not is_first:
                yield _GAP
            is_first = False
            yield PromptPart(kind="field", value=_field_of(place))


def turn_parts(turns: Sequence[EarlierTurn]) -> Iterator[tuple[str, PromptPart]]:
    """Yield the roles and texts of turns, system messages left out."""
    for place, turn in enumerate(turns):
        if turn.role != "system":
            yield turn.role, PromptPart(kind="field", value=_field_of(place))


def _field_of(place: int) -> str:
    return f"turns.{place}"  # no field of a record can have a dot in its name
