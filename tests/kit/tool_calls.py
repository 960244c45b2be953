"""What a scanner of tool calls makes of a text that comes in pieces."""

from __future__ import annotations

from recmas_runtime.tools.call_scanner import CallScanner
from recmas_runtime.tools.calls import ToolCall

NAMES = ("search", "python", "lookup")


def read(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    """Return what is passed on and the calls, of a turn that ends behind the last piece."""
    scanner = CallScanner(NAMES)
    text = ""
    found: list[ToolCall] = []
    for piece in [*pieces, None]:
        passed = scanner.push(piece or "", ended=piece is None)
        while True:
            text += passed.text + passed.call_text + passed.behind
            found += passed.calls
            if not passed.calls:
                break
            passed = scanner.push("", ended=piece is None)
    return text + scanner.flush(), found
