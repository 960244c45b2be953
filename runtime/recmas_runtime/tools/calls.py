"""How tool calls stand in an answer's text, and how their results are put back.

A call is `<NAME>argument</NAME>` for a known name, or JSON:
`<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["ok", "error", "timeout", "refused", "limit"]

# The tag of the JSON form; also the name of a call whose JSON names no tool.
JSON_FORM: Final = "tool_call"

# An opening tag whose closing tag does not come within so many characters is plain text. It bounds
# what a scanner keeps of a text that never closes its tag.
MAX_ARGUMENT_CHARS: Final = 16_384


@dataclass(frozen=True)
class ToolCall:
    """One call, as the model wrote it; its name is `tool_call` where JSON did not say which."""

    name: str
    argument: str


@dataclass(frozen=True)
class ToolResult:
    """What came of a call.

    Attributes:
        status: `refused` if the tool may not or cannot run here, `limit` if the answer has used up
            its calls.
    """

    call: ToolCall
    status: Status
    text: str
    ms: float

    def to_json(self) -> dict[str, str | float]:
        """Return the form that answers and traces hold."""
        return {
            "name": self.call.name,
            "argument": self.call.argument,
            "status": self.status,
            "result": self.text,
            "ms": round(self.ms, 3),
        }


class CallScanner:
    """Finds the calls of named tools, and those in JSON, in a text that comes in pieces.

    The calls are those of the whole text, however it is cut into pieces. Between an opening tag and
    its closing tag nothing else counts as a tag, so code may print what looks like a call.
    """

    def __init__(self, names: Sequence[str]) -> None:
        tags = "|".join(re.escape(name) for name in dict.fromkeys((*names, JSON_FORM)))
        self._opening = re.compile(f"<({tags})>")
        self._longest_tag = max(map(len, (*names, JSON_FORM))) + len("<>")
        self._text = ""

    def push(self, text: str) -> ToolCall | None:
        """Take in the next piece; return a call once its closing tag is there.

        Text after the call is kept for the next push; pushing an empty text looks at it.
        """
        self._text += text
        while (tag := self._opening.search(self._text)) is not None:
            self._text = self._text[tag.start() :]
            start, closing = len(tag[0]), f"</{tag[1]}>"
            end = self._text.find(closing, start, start + MAX_ARGUMENT_CHARS + len(closing))
            if end >= 0:
                argument, self._text = self._text[start:end], self._text[end + len(closing) :]
                # Dedented first: of an indented program, strip alone would spoil the first line.
                return _call(tag[1], textwrap.dedent(argument).strip())
            if len(self._text) < start + MAX_ARGUMENT_CHARS + len(closing):
                return None
            self._text = self._text[start:]
        # Only what may yet grow into an opening tag matters.
        self._text = self._text[max(0, len(self._text) - self._longest_tag + 1) :]
        return None


def result_block(result: ToolResult) -> str:
    """Return the text that goes into the answer after the call.

    A result cannot close its own block: whoever wrote a web page or a program's output could
    otherwise write what looks like the model's own text.
    """
    text = re.sub(r"<(?=/?result>)", "&lt;", result.text)
    return f"\n<result>\n{text}\n</result>\n"


def valid_text(text: str) -> str:
    """Return the text with `?` for lone surrogates, which no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def json_problem(body: str) -> str:
    """Return what is wrong with a JSON call, for the model to read."""
    found = _read_json(body)
    return found if isinstance(found, str) else f"the call of `{found.name}` is well formed"


def _call(name: str, argument: str) -> ToolCall:
    found = _read_json(argument) if name == JSON_FORM else ToolCall(name, argument)
    return found if isinstance(found, ToolCall) else ToolCall(JSON_FORM, argument)


def _read_json(body: str) -> ToolCall | str:
    """Return the call, or what is wrong with it."""
    try:
        # Models write line breaks into strings as they are; strict JSON would refuse them.
        call = json.loads(body, strict=False)
    except (ValueError, RecursionError) as error:
        return f"this is not valid JSON ({error}); {_EXPECTED}"
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return f"this names no tool; {_EXPECTED}"
    argument = call.get("arguments")
    if isinstance(argument, dict) and len(argument) == 1:
        (value,) = argument.values()
        argument = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not isinstance(argument, str):
        return f"`arguments` of `{call['name']}` is not one value; {_EXPECTED}"
    return ToolCall(valid_text(call["name"]), valid_text(argument.strip()))


_EXPECTED: Final = 'write {"name": "TOOL", "arguments": {"KEY": "TEXT"}}'
