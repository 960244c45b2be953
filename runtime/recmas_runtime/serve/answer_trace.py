"""The trace of one answer, kept in memory until the answer is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from recmas_runtime.formats.codec import to_json
from recmas_runtime.running.records import Record
from recmas_runtime.running.run_trace import StepEvent, check_num_nearest
from recmas_runtime.sequences.thoughts import RecordReadings


class AnswerTrace:
    """Receives what was done for one record, as `ThoughtTrace`.

    Attributes:
        num_nearest: Tokens of each thought; with 0 steps and hand-over texts are all there is.
        told: What `Done.trace` holds: `steps`, `thoughts` and `messages`, as a line of a written
            trace has them. Empty until the answer is whole.

    Raises:
        RecmasError: RM506 for a number of tokens that is none.
    """

    def __init__(self, num_nearest: int) -> None:
        check_num_nearest(num_nearest)
        self.num_nearest = num_nearest
        self.told: dict[str, Any] = {}

    def add_batch(
        self,
        records: Sequence[Record],
        events: Sequence[StepEvent],
        messages: Sequence[Mapping[str, NDArray[Any]]],
        readings: Sequence[RecordReadings] | None = None,
    ) -> None:
        """Receive the one record that this is about."""
        assert len(records) == 1, "a trace is one record's"
        (read,) = readings or [RecordReadings(thoughts=(), messages=())]
        self.told = {"steps": [event.of_record(0) for event in events], **to_json(read)}
