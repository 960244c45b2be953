"""JSON text to plain values, with the place of every key and value.

The same bounds hold as for YAML. With comments (JSONC), `//`, `/* */` and a comma before a closing
bracket are allowed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out
from typing import Final

from recmas_compiler.spec.document.places import Loc, Places, position_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.document.yaml_source import MAX_DEPTH, MAX_NODES, Source, Value
from recmas_runtime.core.errors import Problem, RecmasError

_CODE: Final = "RM160"
_BLANK: Final = re.compile(r"[ \t\n\r]*")
_COMMENT: Final = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS: Final[dict[str, Value]] = {"true": True, "false": False, "null": None}
_WORD: Final = re.compile(r"[A-Za-z]+")
# Python refuses to parse integers of thousands of digits.
_LONGEST_NUMBER: Final = 100


def parse_json(text: str, *, file: str, comments: bool) -> Source:
    """Parse one JSON document.

    Raises:
        RecmasError: RM160 with the place: invalid JSON, JSON over the bounds.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    scanner = _Scanner(text, Places(file=file, source=text), [], comments=comments)
    at = scanner.blank(0)
    value, at = scanner.value(at, (), 0)
    at = scanner.blank(at)
    if at < len(text):
        raise scanner.error(at, "something follows the value", "Remove it: a file is one value.")
    return Source(value=value, places=scanner.places, problems=tuple(scanner.problems))


@dataclass
class _Scanner:
    text: str
    places: Places
    problems: list[Problem]
    comments: bool
    num_nodes: int = 0

    def error(self, at: int, message: str, hint: str = "") -> RecmasError:
        place = position_of(self.text, at, self.places.file)
        hint = hint or "Check the quotes, commas and brackets up to this place."
        return RecmasError(problem_at(place, _CODE, f"not valid JSON: {message}.", hint=hint))

    def blank(self, at: int) -> int:
        """Return where the next thing begins behind `at`."""
        while True:
            at = self._end(_BLANK, at)
            if self.text[at : at + 1] != "/":
                return at
            comment = _COMMENT.match(self.text, at)
            if comment is None or not self.comments:
                hint = "" if self.comments else "JSON has no comments: remove it."
                raise self.error(at, "`/` begins nothing", hint)
            at = comment.end()

    def _end(self, pattern: re.Pattern[str], at: int) -> int:
        found = pattern.match(self.text, at)
        return at if found is None else found.end()

    def value(self, at: int, loc: Loc, depth: int) -> tuple[Value, int]:
        """Return the value at `at`, and where it ends."""
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self.error(at, f"more than {MAX_NODES} keys and values", "Is this a team?")
        self.places.values[loc] = position_of(self.text, at, self.places.file)
        begin = self.text[at : at + 1]
        if begin and begin in "{[":
            if depth == MAX_DEPTH:
                raise self.error(at, f"nested more than {MAX_DEPTH} levels deep", "Is this a team?")
            return (self._object if begin == "{" else self._array)(at + 1, loc, depth + 1)
        if begin == '"':
            text, end = self._string(at)
            self.places.spans[loc] = (at, end)
            return text, end
        found = _NUMBER.match(self.text, at) or _WORD.match(self.text, at)
        if found is None:
            raise self.error(at, "a value is missing here")
        self.places.spans[loc] = found.span()
        return self._plain(found.group(), at), found.end()

    def _plain(self, word: str, at: int) -> Value:
        if word in _WORDS:
            return _WORDS[word]
        if word[0].isalpha():
            raise self.error(at, f"`{word[:40]}` is no value", "Put text into double quotes.")
        if len(word) > _LONGEST_NUMBER:
            raise self.error(at, "a number of so many digits is none of a team")
        value: Value = json.loads(word)
        return value

    def _string(self, at: int) -> tuple[str, int]:
        try:
            text, end = scanstring(self.text, at + 1, True)
        except json.JSONDecodeError as error:
            message = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
            raise self.error(min(error.pos, len(self.text)), message) from error
        return str(text), int(end)

    def _closes(self, at: int, bracket: str, *, is_first: bool) -> tuple[bool, int]:
        """Tell whether a collection ends at `at`; otherwise step over the comma before an item."""
        if self.text[at : at + 1] == bracket:
            return True, at + 1
        if is_first:
            return False, at
        if self.text[at : at + 1] != ",":
            raise self.error(at, f"`,` or `{bracket}` is missing here")
        after = self.blank(at + 1)
        if self.text[after : after + 1] == bracket:
            if not self.comments:
                raise self.error(at, f"a comma stands before `{bracket}`", "Remove it.")
            return True, after + 1
        return False, after

    def _array(self, at: int, loc: Loc, depth: int) -> tuple[Value, int]:
        items: list[Value] = []
        while True:
            done, at = self._closes(self.blank(at), "]", is_first=not items)
            if done:
                return items, at
            item, at = self.value(at, (*loc, len(items)), depth)
            items.append(item)

    def _object(self, at: int, loc: Loc, depth: int) -> tuple[Value, int]:
        found: dict[str, Value] = {}
        is_first = True
        while True:
            done, at = self._closes(self.blank(at), "}", is_first=is_first)
            if done:
                return found, at
            is_first = False
            if self.text[at : at + 1] != '"':
                raise self.error(at, "a key in double quotes is missing here")
            key_at = at
            key, at = self._string(at)
            at = self.blank(at)
            if self.text[at : at + 1] != ":":
                raise self.error(at, "`:` is missing behind a key")
            place = position_of(self.text, key_at, self.places.file)
            item_loc = (*loc, key)
            if key in found:
                first = self.places.keys[item_loc].line
                message = f"`{key}` is given a second time, first in line {first}."
                problem = problem_at(place, "RM102", message, hint="Remove one of the two.")
                self.problems.append(problem)
                _, at = self.value(self.blank(at + 1), (*loc, f"{key} (again)"), depth)
                continue
            self.places.keys[item_loc] = place
            found[key], at = self.value(self.blank(at + 1), item_loc, depth)
