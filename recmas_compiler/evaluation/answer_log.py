"""The file of all answers of a system: a JSON line each, appended batch by batch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from recmas_compiler.evaluation.jobs import Job
from recmas_runtime.core.errors import RecmasError, fail


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer and what the check said of it; or why there is none.

    Attributes:
        id: The record's.
        seed: As the protocol has it.
        rollout: From 0.
        correct: Whether it counts as right.
        extracted: What was taken for the answer; None for none.
        score: From 0 to 1.
        batch_size: Records that shared its batch, and the batch's time.
        answer: The whole answer as `recmas run --json` has it; None if the record failed.
        failure: Why it has no answer; None if it has one.
    """

    id: str
    seed: int
    rollout: int
    correct: bool
    extracted: str | None
    score: float
    batch_size: int
    answer: dict[str, Any] | None
    failure: str | None


class AnswerLog:
    """Answers on disk. What is in it is whole batches; the rest of a torn one is cut off.

    Args:
        path: The file.
        jobs: All jobs, in order.
        resume: Keep what is there.

    Attributes:
        judged: All answers so far, those read at the start included.
        num_jobs: Jobs that are done.

    Raises:
        RecmasError: RM503 if it cannot be written, RM603 if what is there is of other jobs.
    """

    def __init__(self, path: Path, jobs: Sequence[Job], *, resume: bool) -> None:
        self._path = path
        self.judged: list[Judged] = []
        self.num_jobs = 0
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            kept_bytes = self._keep(jobs) if resume else 0
            os.ftruncate(self._descriptor, kept_bytes)
            os.lseek(self._descriptor, kept_bytes, os.SEEK_SET)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, judged: Sequence[Judged]) -> None:
        """Write the answers of the next job.

        Raises:
            RecmasError: RM503; the jobs before it are kept.
        """
        lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in judged)
        start = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        rest = memoryview(lines.encode("utf-8", "backslashreplace"))
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            os.ftruncate(self._descriptor, start)
            raise self._unwritable(error) from error
        self.judged += judged
        self.num_jobs += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def _keep(self, jobs: Sequence[Job]) -> int:
        """Read whole jobs back; returns the bytes that they take."""
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            lines = [line for line in stream if line.endswith(b"\n")]
        taken = kept_bytes = 0
        for job in jobs:
            part = lines[taken : taken + len(job.questions)]
            if len(part) < len(job.questions):
                break
            found = [self._read(line, taken + i) for i, line in enumerate(part, start=1)]
            wanted = [(q.record.id, job.seed, job.rollout) for q in job.questions]
            if [(one.id, one.seed, one.rollout) for one in found] != wanted:
                raise self._foreign(taken + 1)
            self.judged += found
            self.num_jobs += 1
            taken += len(part)
            kept_bytes += sum(map(len, part))
        return kept_bytes

    def _read(self, line: bytes, number: int) -> Judged:
        try:
            return Judged(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise self._foreign(number) from error

    def _foreign(self, line: int) -> RecmasError:
        return fail(
            "RM603",
            "--resume found a line that is not an answer of this evaluation",
            file=str(self._path),
            line=line,
            hint="Name the folder of the interrupted run, or another --out to start afresh.",
        )

    def _unwritable(self, error: OSError) -> RecmasError:
        return fail(
            "RM503",
            f"the answers cannot be written: {error.strerror}",
            file=str(self._path),
            hint="Make room or choose another --out; --resume goes on from the finished answers.",
        )
