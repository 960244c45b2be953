"""A run written down: every message that agents exchanged, and every step with its time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.tools.calls import ToolResult

MESSAGES_NAME = "messages.npz"
EVENTS_NAME = "trace.jsonl"
RECORDS_ARRAY = "records"


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """What one step did, for traces and timing.

    Attributes:
        op: prefill, think, send, write, tools or decode.
        agents: Agents that ran; for send the source, then the targets.
        ms: Wall time; that of tools is not part of the text they were called from.
        prefilled_tokens: Text tokens run through the backbone, like all counts per record.
        reused_tokens: Text tokens whose cache rows were kept.
        cut_texts: Hand-over texts that ended at their most tokens.
        tool_calls: The record's place in the batch, and what came of the call.
    """

    op: str
    round: int
    agents: tuple[str, ...]
    ms: float
    prefilled_tokens: tuple[int, ...] = ()
    reused_tokens: tuple[int, ...] = ()
    written_tokens: tuple[int, ...] = ()
    cut_texts: tuple[int, ...] = ()
    tool_calls: tuple[tuple[int, ToolResult], ...] = ()


class Trace(Protocol):
    """Records everything that batches do."""

    def add_event(self, event: StepEvent, *, batch: int) -> None:
        """See a step of a batch of so many records."""

    def add_messages(self, messages: Mapping[str, NDArray[Any]], *, records: Sequence[str]) -> None:
        """See a batch's messages, named `SOURCE->TARGET@ROUND`, each [B, m, d].

        Rows of records whose recursion had ended before that round are NaN; rounds that none of
        them ran are not there.
        """


class TraceWriter:
    """Collects what batches report and writes it into a folder, over an earlier trace in it.

    `trace.jsonl` grows with the run; `messages.npz` is written by `close`. Its arrays
    `SOURCE->TARGET@ROUND` are of shape [B, m, d] over all answered records in their order, whose
    ids are the array `records`; rows of records that did not run the round are NaN.

    Raises:
        RecmasError: RM503 if it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: list[str] = []
        self._messages: dict[str, list[tuple[int, NDArray[Any]]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._events = (folder / EVENTS_NAME).open("w", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def add_event(self, event: StepEvent, *, batch: int) -> None:
        """Write down a step; see `Trace`."""
        calls = [{"record": row, **result.to_json()} for row, result in event.tool_calls]
        line = {
            **asdict(event),
            "tool_calls": calls,
            "batch": batch,
            "rows": batch * (1 if event.op == "send" else len(event.agents)),
        }
        try:
            self._events.write(json.dumps(line) + "\n")
            self._events.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def add_messages(self, messages: Mapping[str, NDArray[Any]], *, records: Sequence[str]) -> None:
        """Keep a batch's messages; see `Trace`."""
        first_row = len(self._records)
        self._records += records
        for name, message in messages.items():
            self._messages.setdefault(name, []).append((first_row, message))

    def close(self) -> None:
        """Write the messages and close the files."""
        arrays: dict[str, Any] = {
            name: self._over_all_records(batches) for name, batches in self._messages.items()
        }
        arrays[RECORDS_ARRAY] = np.array(self._records, np.str_)
        try:
            self._events.close()
            with (self._folder / MESSAGES_NAME).open("wb") as stream:
                np.savez(stream, **arrays)
        except OSError as error:
            raise self._unwritable(error) from error

    def _over_all_records(self, batches: Sequence[tuple[int, NDArray[Any]]]) -> NDArray[Any]:
        """Return a message of all records from those of batches, given with their first rows."""
        _, some = batches[0]
        whole = np.full((len(self._records), *some.shape[1:]), np.nan, some.dtype)
        for first_row, message in batches:
            whole[first_row : first_row + len(message)] = message
        return whole

    def _unwritable(self, error: OSError) -> RecmasError:
        return fail(
            "RM503",
            f"the trace cannot be written: {error.strerror}",
            file=str(self._folder),
            hint="Give --trace a folder with room that you may write to.",
        )
