"""What a service writes down as it runs: a line an event, for people or for machines.

Values come from anywhere, so a line is one line and steers no terminal, whatever is in them.
"""

from __future__ import annotations

import datetime
import json
import re
from contextlib import suppress
from typing import Any, Final, Literal, TextIO, get_args

from recmas_runtime.core.terminal import harmless

LogFormat = Literal["text", "json"]
LOG_FORMATS: Final[tuple[str, ...]] = get_args(LogFormat)
_PLAIN: Final = re.compile(r"[\w./:@%+-]+", re.ASCII)
# Of a text, unless it is logged in full on purpose.
_MOST_CHARS: Final = 500


class ServiceLog:
    """Writes events with their fields to a stream; a stream that takes nothing is no error."""

    def __init__(self, stream: TextIO, form: LogFormat = "text") -> None:
        self._stream = stream
        self._form = form

    def info(self, event: str, **fields: object) -> None:
        """Write down what is as it should be."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write down what somebody should know of."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Write down what went wrong."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        now = now.replace("+00:00", "Z")
        known = {
            name: round(value, 3) if isinstance(value, float) else value  # ms, most of them
            for name, value in fields.items()
            if value is not None
        }
        if self._form == "json":
            line = json.dumps({"time": now, "level": level, "event": event, **known}, default=str)
        else:
            shown = "".join(f" {name}={_shown(value)}" for name, value in known.items())
            line = harmless(f"{now} {level:7} {event}{shown}".replace("\n", "\\n"))
        with suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()


def cut(text: str) -> str:
    """Return a text that came from outside at the length that logs show."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}..."


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if _PLAIN.fullmatch(text) or not isinstance(value, str):
        return text
    return json.dumps(text, ensure_ascii=False)
