"""What a tool call and its result are, and the text by which a result joins an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal

Status = Literal["ok", "error", "timeout", "refused", "limit"]

# The name of a call that names no tool.
NAMELESS: Final = "tool_call"

# What might be taken for a mark of the block, in any case and with white space.
_RESULT_MARK: Final = re.compile(r"<(?=\s*/?\s*result\b)", re.IGNORECASE)


@dataclass(frozen=True)
class ToolCall:
    """One call, as the model wrote it; its name is `tool_call` where the model did not say which.

    Attributes:
        problem: What is wrong with a call that cannot be run, for the model to read.
    """

    name: str
    argument: str
    problem: str = field(default="", repr=False)


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


def result_block(text: str) -> str:
    """Return what goes into the answer after a call for the text of its result.

    A result cannot close its own block: whoever wrote a web page or a program's output could
    otherwise write what looks like the model's own text.
    """
    return f"\n<result>\n{_RESULT_MARK.sub('&lt;', text)}\n</result>\n"


def valid_text(text: str) -> str:
    """Return the text with `?` for lone surrogates, which no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
