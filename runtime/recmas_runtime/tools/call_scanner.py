"""Finding calls in a text that comes in pieces."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from recmas_runtime.tools.call_forms import FORMS, CallForm, Reading, read_form
from recmas_runtime.tools.calls import ToolCall

# Behind these a turn begins anew: the thinking is over, or the channel of an answer opens.
_TURN_MARK: Final = re.compile(
    r"(?:</think>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>|<\|START_RESPONSE\|>|<\|message\|>)"
    r"\s*"
)
_TAIL_CHARS: Final = 100  # kept of what stands before, to know whether a turn begins


@dataclass(frozen=True)
class Passed:
    """Text that is certain, whether it is a call, and the calls that it makes.

    Where there are calls, the text ends with all that has been written; some of it may yet turn
    out to begin another call.
    """

    text: str
    call_text: str = ""
    behind: str = ""
    calls: tuple[ToolCall, ...] = ()


class CallScanner:
    """Finds calls in a text that comes in pieces, and holds back what may become one.

    The calls are those of the whole text, however it is cut into pieces. Between the marks of a
    call nothing else counts as one, so code may print what looks like a call.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        own = tuple(
            CallForm("recmas", f"<{name}>", f"</{name}>", keeps_opening=True) for name in names
        )
        forms = {form.opening: form for form in (*own, *FORMS)}
        self._forms = {opening: f for opening, f in forms.items() if not f.opens_turn}
        self._turn_forms = {opening: f for opening, f in forms.items() if f.opens_turn}
        self._own = frozenset(form.opening for form in own)
        longest_first = sorted(self._forms, key=len, reverse=True)
        self._opening = re.compile("|".join(map(re.escape, longest_first)))
        self._longest = len(longest_first[0])
        self._mark_beginnings = _beginnings(self._forms)
        self._turn_beginnings = _beginnings(self._turn_forms)
        self._text = ""  # what is not decided, from the first character that is not
        self._num_passed = 0  # of it, characters that were passed on with a call before them
        self._tail = ""

    def push(self, text: str = "", *, ended: bool = False) -> Passed:
        """Take in the next piece; return what is certain, and a call once it is complete.

        Text behind the call is looked at by the next push.

        Args:
            ended: The model ends its turn here, which completes the calls of some forms.
        """
        self._text += text
        before = ""
        while self._text:
            start, form = self._next_opening(ended=ended)
            before += self._pass(start)
            if form is None:
                break
            reading = self._read(form, ended=ended)
            if isinstance(reading, tuple):
                end, calls = reading
                call_text = self._text[self._num_passed : end]
                behind = self._text[max(end, self._num_passed) :]
                self._text = self._text[end:]
                self._num_passed = len(self._text)
                self._tail = ""
                return Passed(before, call_text, behind, calls)
            if reading is None and not ended:
                break
            before += self._pass(len(self._text) if reading is None else len(form.opening))
        return Passed(before)

    def skip(self, text: str) -> None:
        """Take in text behind a call that was passed on already; it may begin another call."""
        self._text += text
        self._num_passed += len(text)

    def flush(self) -> str:
        """Return what was held back: the text has ended, it makes no call."""
        return self._pass(len(self._text))

    def _pass(self, num_chars: int) -> str:
        """Let go of the first characters; return those that were not passed on before."""
        passed = self._text[self._num_passed : max(num_chars, self._num_passed)]
        self._tail = (self._tail + self._text[:num_chars])[-_TAIL_CHARS:]
        self._text = self._text[num_chars:]
        self._num_passed = max(0, self._num_passed - num_chars)
        return passed

    def _next_opening(self, *, ended: bool) -> tuple[int, CallForm | None]:
        """Return where the next call may begin, and its form if its mark is complete."""
        found = self._opening.search(self._text)
        form = self._forms[found[0]] if found else None
        limit = found.start() if found else self._partial_mark()
        for start in self._turn_starts():
            rest = self._text[start:]
            for opening, turn_form in self._turn_forms.items():
                if start < limit and rest.startswith(opening):
                    limit, form = start, turn_form
            if start < limit and rest in self._turn_beginnings and not ended:
                limit, form = start, None
        return limit, form

    def _turn_starts(self) -> list[int]:
        """Return where in the text a turn begins; white space before it does not count."""
        known = self._tail + self._text
        ends = [found.end() for found in _TURN_MARK.finditer(known)]
        if not self._tail.strip():
            ends.append(len(known) - len(known.lstrip()))
        return [end - len(self._tail) for end in ends if end >= len(self._tail)]

    def _partial_mark(self) -> int:
        """Return where a mark may begin that is not complete yet; the text's end if nowhere."""
        text = self._text
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start:] in self._mark_beginnings:
                return start
        return len(text)

    def _read(self, form: CallForm, *, ended: bool) -> Reading:
        reading = read_form(form, self._text, self._names, ended=ended)
        if form.opening in self._own and isinstance(reading, tuple):
            inside = self._text[len(form.opening) : reading[0] - len(form.closing)]
            # Dedented first: of an indented program, strip alone would spoil the first line.
            argument = textwrap.dedent(inside).strip()
            return reading[0], (ToolCall(form.opening[1:-1], argument),)
        return reading


def _beginnings(openings: Iterable[str]) -> frozenset[str]:
    """Return every text that is a part of an opening mark, from its start."""
    return frozenset(mark[:length] for mark in openings for length in range(1, len(mark)))
