"""Messages between a front end and a worker process: one JSON object a line, never code."""

from __future__ import annotations

from typing import Final

import msgspec

from recmas_runtime.core.errors import fail
from recmas_runtime.formats.codec import Count, StrictStruct
from recmas_runtime.serve.protocol import MAX_LINE_BYTES, AnyEvent, AnyRequest, Gauges
from recmas_runtime.serve.service import ServiceLimits


class WorkerSettings(StrictStruct, frozen=True, kw_only=True):
    """The first line that a worker reads; see `EngineHost`."""

    limits: ServiceLimits
    device: str
    threads: Count | None
    cache: bool


SETTINGS: Final = msgspec.json.Decoder(WorkerSettings)
REQUESTS: Final = msgspec.json.Decoder(AnyRequest)
EVENTS: Final[msgspec.json.Decoder[AnyEvent | Gauges]] = msgspec.json.Decoder(AnyEvent | Gauges)


def to_line(message: AnyRequest | AnyEvent | Gauges | WorkerSettings) -> bytes:
    """Return a message as its line.

    Raises:
        RecmasError: RM500 for what JSON has no form for, or too much of it.
    """
    hint = "Shorten it, or leave such values out."
    try:
        line = msgspec.json.encode(message)
    except (UnicodeEncodeError, OverflowError, TypeError, RecursionError) as error:
        raise fail("RM500", f"a value that JSON cannot hold: {error}", hint=hint) from None
    if len(line) >= MAX_LINE_BYTES:
        message_mb, most_mb = len(line) / 2**20, MAX_LINE_BYTES / 2**20
        raise fail("RM500", f"{message_mb:.0f} MiB, more than {most_mb:.0f} MiB", hint=hint)
    return line + b"\n"
