"""A run written down: every message that agents exchanged, and every step with its time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import exclusive, reason_of
from recmas_runtime.core.jsonl import JsonLines
from recmas_runtime.formats.codec import to_json
from recmas_runtime.running.records import Record
from recmas_runtime.scheduling.remote_calls import RemoteUse
from recmas_runtime.sequences.thoughts import RecordReadings
from recmas_runtime.tools.calls import ToolResult

RECORDS_NAME: Final = "trace.jsonl"
# Nearest tokens of a thought; the command line has the same bound.
MAX_NEAREST: Final = 4096
_MESSAGES: Final = re.compile(r"[0-9]{6,}\.npz")
_FILE: Final = re.compile(rf'"file": "({_MESSAGES.pattern})"')


def messages_name(record: Record) -> str:
    """Return the file of a record's messages: its place in the input, from `000001.npz`."""
    return f"{record.index + 1:06d}.npz"


def is_trace_file(name: str) -> bool:
    """Tell whether a trace's folder has such a file of its own: its lines, or messages."""
    return name == RECORDS_NAME or _MESSAGES.fullmatch(name) is not None


# Of `StepEvent`, per record.
_COUNTS: Final = ("prefilled_tokens", "reused_tokens", "written_tokens", "cut_texts")
# The same, of steps that hand over rows.
_ROW_COUNTS: Final = ("handed_rows", "handed_bytes")
# The same, of steps whose text may be drafted.
_DRAFT_COUNTS: Final = ("drafted_tokens", "accepted_tokens")


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """What one step did, for traces and timing.

    Attributes:
        op: prefill, think, send, write, ask, tools or decode.
        agents: Agents that ran; for send the source, then the targets.
        ms: Wall time; that of tools is not part of the text they were called from.
        prefilled_tokens: Text tokens run through the backbone, like all counts per record.
        reused_tokens: Text tokens whose cache rows were kept.
        cut_texts: Hand-over texts that ended at their most tokens.
        handed_rows: Rows of a cache that were handed over, for all targets together.
        handed_bytes: Their size.
        drafted_tokens: Tokens of drafts that ran.
        accepted_tokens: Those of them that became text.
        texts: Per record, the hand-over text of each agent; none where the record's recursion had
            ended before.
        tool_calls: The record's place in the batch, and what came of the call.
        first_ms: Of a decode: the time to its first tokens.
        remote: Per record, what calls of remote models took.
    """

    op: str
    round: int
    agents: tuple[str, ...]
    ms: float
    prefilled_tokens: tuple[int, ...] = ()
    reused_tokens: tuple[int, ...] = ()
    written_tokens: tuple[int, ...] = ()
    cut_texts: tuple[int, ...] = ()
    handed_rows: tuple[int, ...] = ()
    handed_bytes: tuple[int, ...] = ()
    drafted_tokens: tuple[int, ...] = ()
    accepted_tokens: tuple[int, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()
    tool_calls: tuple[tuple[int, ToolResult], ...] = ()
    first_ms: float = 0.0
    remote: tuple[tuple[RemoteUse, ...], ...] = ()

    def of_record(self, row: int) -> dict[str, Any]:
        """Return the step with the counts of one record of the batch; the time is the batch's."""
        rows = {name: getattr(self, name)[row] for name in _ROW_COUNTS if self.handed_rows}
        drafts = {name: getattr(self, name)[row] for name in _DRAFT_COUNTS if self.drafted_tokens}
        texts = {"texts": list(self.texts[row])} if self.texts and self.texts[row] else {}
        return {
            "op": self.op,
            "round": self.round,
            "agents": list(self.agents),
            "ms": round(self.ms, 3),
            **{name: counts[row] if (counts := getattr(self, name)) else 0 for name in _COUNTS},
            **rows,
            **drafts,
            **texts,
            **({"remote": [asdict(use) for use in self.remote[row]]} if self.remote else {}),
            "tool_calls": [call.to_json() for place, call in self.tool_calls if place == row],
        }


class Trace(Protocol):
    """Receives everything that batches do, once they have answers."""

    def add_batch(
        self,
        records: Sequence[Record],
        events: Sequence[StepEvent],
        messages: Sequence[Mapping[str, NDArray[Any]]],
    ) -> None:
        """Receive a batch: its steps, and for each record the messages of the rounds that it ran.

        Messages are named `SOURCE->TARGET@ROUND`, each [m, d].
        """


@runtime_checkable
class ThoughtTrace(Protocol):
    """A trace that also receives what thoughts say, as `num_nearest` tokens each; 0 for none."""

    @property
    def num_nearest(self) -> int:
        """Nearest tokens of each thought."""

    def add_batch(
        self,
        records: Sequence[Record],
        events: Sequence[StepEvent],
        messages: Sequence[Mapping[str, NDArray[Any]]],
        readings: Sequence[RecordReadings] | None = None,
    ) -> None:
        """Receive a batch as `Trace` does, and for each record what was thought and sent."""


def reads_thoughts(trace: object) -> TypeGuard[ThoughtTrace]:
    """Tell whether a trace receives what thoughts say, which takes time and memory."""
    return isinstance(trace, ThoughtTrace) and trace.num_nearest > 0


def check_num_nearest(thoughts: int) -> None:
    """Raise RM506 for a number of nearest tokens that no trace has."""
    is_whole = isinstance(thoughts, int) and not isinstance(thoughts, bool)
    if not (is_whole and 0 <= thoughts <= MAX_NEAREST):
        hint = f"Give a whole number from 0 to {MAX_NEAREST}."
        raise fail("RM506", f"thoughts is {thoughts!r}", hint=hint)


class TraceWriter:
    """Writes what batches did into a folder, record by record, as it comes.

    `000001.npz`, named after the record's place in the input, holds its messages as arrays
    `SOURCE->TARGET@ROUND` of shape [m, d]; `trace.jsonl` gets a line for it: its id, the file, the
    number of records it ran with, and the batch's steps. A line is written once its file is whole.

    With `thoughts` the line also has the so many nearest tokens of every thought and of every
    vector of a message: the keys of `RecordReadings`.

    A folder that holds a trace is kept unless `resume`, which adds to it, or `force`, which starts
    afresh, says otherwise.

    Raises:
        RecmasError: RM503 if it cannot be written or another run writes there, RM506 for a number
            of tokens that is none, RM520 if a trace is there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        force: bool = False,
        thoughts: int = 0,
    ) -> None:
        check_num_nearest(thoughts)
        self.num_nearest = thoughts
        self._folder = folder = Path(folder)
        lines = folder / RECORDS_NAME
        try:
            if not (resume or force) and (found := _traces_in(folder)):
                raise fail(
                    "RM520",
                    f"the folder holds a trace already: {found}",
                    file=str(folder),
                    hint="Name another folder, or write over it with --force.",
                )
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._lines = stack.enter_context(JsonLines(lines))
                stack.enter_context(exclusive(lines, code="RM503", what="run"))
                if not resume:
                    self._remove_messages(lines)
                self._lines.keep(None if resume else 0)
                self._open = stack.pop_all()
        except OSError as error:
            raise self._unwritable(error) from error

    def _remove_messages(self, lines: Path) -> None:
        """Remove the files of an earlier trace, as its lines name them."""
        if not lines.is_file():
            return
        for line in lines.read_text(encoding="utf-8", errors="replace").splitlines():
            if name := _FILE.search(line):
                (self._folder / name[1]).unlink(missing_ok=True)

    def add_batch(
        self,
        records: Sequence[Record],
        events: Sequence[StepEvent],
        messages: Sequence[Mapping[str, NDArray[Any]]],
        readings: Sequence[RecordReadings] | None = None,
    ) -> None:
        """Write a batch down; see `Trace` and `ThoughtTrace`."""
        try:
            for row, (record, own) in enumerate(zip(records, messages, strict=True)):
                name = messages_name(record)
                # Not by pathlib, which keeps every name that it has seen.
                with open(os.path.join(self._folder, name), "wb") as stream:  # noqa: PTH118, PTH123
                    np.savez(stream, **_keywords(own))
                self._lines.append(
                    {
                        "id": record.id,
                        "file": name,
                        "batch_size": len(records),
                        "steps": [event.of_record(row) for event in events],
                        **({} if readings is None else to_json(readings[row])),
                    }
                )
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Bring the trace to the disk and close its files."""
        with self._open:
            try:
                self._lines.sync()
            except OSError as error:
                raise self._unwritable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> RecmasError:
        return fail(
            "RM503",
            f"the trace cannot be written: {reason_of(error)}",
            file=str(self._folder),
            hint="Give --trace a folder with room that you may write to.",
        )


def _traces_in(folder: Path) -> str:
    """Return a file of the folder that a trace would write over; empty where there is none."""
    if not folder.is_dir():
        return ""
    lines = folder / RECORDS_NAME
    if os.path.lexists(lines) and lines.stat().st_size:
        return RECORDS_NAME
    return min(filter(_MESSAGES.fullmatch, (path.name for path in folder.iterdir())), default="")


def _keywords(messages: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    # Any, because numpy declares a keyword of its own among those of arrays.
    return dict(messages)
