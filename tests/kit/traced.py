"""Runs of a system with their messages, as a trace holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import recmas_runtime as rt
from kit.files import read_messages
from recmas_compiler.lowering.reference import ReferenceResult
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.running.many import run_many
from recmas_runtime.running.run_trace import TraceWriter
from recmas_runtime.scheduling.scheduler import Scheduler


def run_traced(
    system: rt.System, folder: Path, records: Sequence[Mapping[str, object]], *, batch: int
) -> tuple[list[rt.Answer], dict[str, np.ndarray]]:
    """Answer records in batches; returns answers and messages [records, m, d]."""
    given = [rt.Record(id=str(r["id"]), fields=dict(r), index=i) for i, r in enumerate(records)]
    answers = []
    with TraceWriter(folder) as trace:
        for start in range(0, len(given), batch):
            for answer in system.run_batch(given[start : start + batch], trace=trace):
                assert isinstance(answer, rt.Answer), answer
                answers.append(answer)
    return answers, read_messages(folder)


def run_shared(
    system: rt.System, folder: Path, records: Sequence[Mapping[str, object]], *, chunk: int
) -> tuple[list[rt.Answer], dict[str, np.ndarray]]:
    """Answer all records at once, each by itself, on engines that they share; see `run_traced`.

    Args:
        chunk: Positions of a prompt that run in one call, few enough to cut every prompt.
    """
    scheduler = Scheduler()
    shared = system.shared(scheduler, chunk=chunk)
    given = [rt.Record(id=str(r["id"]), fields=dict(r), index=i) for i, r in enumerate(records)]
    with TraceWriter(folder) as trace:
        runs = [shared.run_of(record, 0, system.plan.sampling, trace) for record in given]
        found = run_many(
            runs, scheduler, lock=system.loaded.lock, at_once=len(runs), free_memory=lambda: None
        )
        answers = []
        for answer in found:
            assert isinstance(answer, rt.Answer), answer
            answers.append(answer)
    assert max(scheduler.counts.rows_per_step, default=0) > 1, scheduler.counts
    return answers, read_messages(folder)


def assert_messages_agree(messages: Mapping[str, np.ndarray], expected: ReferenceResult) -> None:
    """Demand the messages of another form of the same system."""
    for name, message in messages.items():
        other = expected.messages[name].numpy()
        assert message.shape == other.shape, name
        np.testing.assert_array_equal(np.isnan(message), np.isnan(other), err_msg=name)
        error = np.nanmax(np.abs(message - other), initial=0)
        assert error <= TOLERANCES["message_absolute"], f"{name} is off by {error}"
