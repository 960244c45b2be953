"""Answer files: lines that a run writes, whose they are, and how a later run goes on with them.

answers.jsonl             a line for each record: its answer, or why it has none
answers.jsonl.run.json    what the answers depend on beside their records: bundle, baseline,
                          sampling, date
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import exclusive, reason_of, sync_folder
from recmas_runtime.core.jsonl import JsonLines
from recmas_runtime.core.text import human_bytes
from recmas_runtime.running.records import Answer, FailedRecord, Record, RecordId

IDENTITY_SUFFIX: Final = ".run.json"
# Of what `FORMAT` says: the keys of a line.
FORMAT: Final = 2
_WHAT: Final = "run"


class AnswerWriter:
    """Writes results as JSON lines, each whole or not at all; to standard output without a path.

    A regular file is locked while it is open, ends with a complete line even after an error, and
    has a file beside it that says what its answers depend on. A file with lines is kept unless
    `resume` or `force` says otherwise: resuming keeps its answers and drops what failed, to be
    tried again; force starts afresh.

    Attributes:
        finished: Of the records whose answers were there, by their ids as text, digests of their
            fields.
        num_dropped: Failed records that were dropped.

    Raises:
        RecmasError: RM503 if it cannot be opened or another run writes there, RM520 if it has lines
            that nobody wanted to keep or replace, RM502 if a file to resume is no answer file,
            RM521 if its answers are those of another run.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        identity: Mapping[str, Any] | None = None,
        resume: bool = False,
        force: bool = False,
    ) -> None:
        self._name = "<stdout>" if path is None else str(path)
        self.finished: Mapping[str, bytes] = {}
        self.num_dropped = 0
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(JsonLines(path))
                if path is not None and self._file.is_regular:
                    self._open(stack, path, dict(identity or {}), resume=resume, force=force)
            except OSError as error:
                raise self._unwritable(error) from error
            self._stack = stack.pop_all()

    def _open(
        self, stack: ExitStack, path: Path, identity: dict[str, Any], *, resume: bool, force: bool
    ) -> None:
        # As it will be read back: JSON knows no tuples.
        whole = json.loads(json.dumps({"format": FORMAT, **identity}))
        beside = path.with_name(path.name + IDENTITY_SUFFIX)
        has_lines = self._file.size > 0
        if has_lines and not resume and not force:
            raise fail(
                "RM520",
                f"the output holds {human_bytes(self._file.size)} already",
                file=self._name,
                hint="--resume goes on with it, --force starts afresh; or name another file.",
            )
        with _made(beside):
            stack.enter_context(exclusive(beside, code="RM503", what=_WHAT))
            if has_lines and resume:
                self._refuse_another(beside, whole)
                self._go_on(stack, path)
            else:
                self._file.keep(0)
                _write_identity(beside, whole)

    def _refuse_another(self, beside: Path, identity: dict[str, Any]) -> None:
        try:
            found = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise fail(
                "RM521",
                f"--resume cannot tell whose answers these are: {beside.name} beside them is not "
                "there or not whole",
                file=self._name,
                hint="Name the output of an interrupted run, or start afresh with --force.",
            )
        before, now = dict(_leaves(found)), dict(_leaves(identity))
        others = [
            f"{key} was {_shown(before.get(key))}, is {_shown(now.get(key))}"
            for key in dict.fromkeys((*before, *now))
            if before.get(key) != now.get(key)
        ]
        if others:
            raise fail(
                "RM521",
                f"the answers there are those of another run: {'; '.join(others)}",
                file=self._name,
                hint="Give the settings of that run, or another --output; --force starts afresh.",
            )

    def _go_on(self, stack: ExitStack, path: Path) -> None:
        """Keep answers; a line cut off at the end and failures go."""
        finished = {}
        for number, line in enumerate(self._file.lines(), start=1):
            answered, record_id, fields = self._read(line, number=number)
            if answered:
                finished[str(record_id)] = _digest(fields)
            else:
                self.num_dropped += 1
        self.finished = finished
        if not self.num_dropped:
            self._file.keep()
            return
        place = Path(os.path.realpath(path))
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".recmas-", delete=False) as kept:
            try:
                shutil.copymode(place, kept.name)
                for line in self._file.lines():
                    if self._read(line, number=0)[0]:
                        kept.write(line)
                kept.flush()
                os.fsync(kept.fileno())
                Path(kept.name).replace(place)
            except BaseException:
                Path(kept.name).unlink()
                raise
        sync_folder(place.parent)
        self._file = stack.enter_context(JsonLines(path))
        self._file.keep()

    def _read(self, line: bytes, *, number: int) -> tuple[bool, RecordId, object]:
        """Return whether a line is an answer and not a failure, its record's id and fields."""
        try:
            found: Any = json.loads(line)
            is_answer = isinstance(found.get("answer"), str)
            if type(found["id"]) in (str, int) and (is_answer or "code" in found["error"]):
                return is_answer, found["id"], found["record"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise fail(
            "RM502",
            "--resume found a line that is not an answer",
            file=self._name,
            line=number,
            hint="Name the output of an earlier run, or start afresh with --force.",
        )

    def is_finished(self, record: Record) -> bool:
        """Return whether the answer to a record was there.

        Raises:
            RecmasError: RM521 if it answers another record with this id. Ids that are counted move
                where a line is added or taken away before them.
        """
        found = self.finished.get(str(record.id))
        if found is None:
            return False
        if found != _digest(dict(record.given)):
            raise fail(
                "RM521",
                f"the answer there to record {record.id!r} is to another record of this id",
                file=self._name,
                hint="Give the input of that run, or another --output; --force starts afresh. "
                "Records without an `id` have the number of their line.",
            )
        return True

    def write(self, result: Answer | FailedRecord) -> None:
        """Append a result.

        Raises:
            RecmasError: RM503 if it could not be written; the lines before it are kept.
            BrokenPipeError: If nobody reads standard output any more.
        """
        try:
            self._file.append(result.to_json())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Make sure that the lines are on the disk; RM503 if they cannot be."""
        with self._stack:
            try:
                self._file.sync()
            except OSError as error:
                raise self._unwritable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> RecmasError:
        return fail(
            "RM503",
            f"the output cannot be written: {reason_of(error)}",
            file=self._name,
            hint="Make room or choose another place; --resume goes on from the finished answers.",
        )


@contextmanager
def _made(path: Path) -> Iterator[None]:
    """Make sure that a file is there; if the block fails, one that was not is gone again."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        yield
        return
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write_identity(path: Path, identity: dict[str, Any]) -> None:
    # In place, for the lock is on this very file. Cut off, it belongs to an output without lines.
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(json.dumps(identity, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _digest(fields: object) -> bytes:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
