"""What who asks gets: requests and tokens in a second, and how long one waits for them.

The figures are those that `vllm bench serve` and `trtllm-bench` report. A request waits for its
whole batch, so the times are the batch's, counted once for each of its requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from recmas_runtime.bench.measure import Run

PERCENTILES: Final = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """A time over requests, in milliseconds: its mean, and the percentiles of `PERCENTILES`."""

    mean: float
    at: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Return those of one or more values."""
        found = np.percentile(np.array(values), PERCENTILES)
        return cls(mean=float(np.mean(values)), at=tuple(map(float, found)))

    def to_json(self) -> dict[str, float]:
        """Return the form that `--json` prints."""
        at = zip(PERCENTILES, self.at, strict=True)
        return {"mean": round(self.mean, 3), **{f"p{p}": round(value, 3) for p, value in at}}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What one system gives in one size of batch.

    Attributes:
        first_token: From the request to the first token of the answer.
        per_token: Of an answer, from each token to the next; None where no answer has two.
        whole: From the request to the end of its batch.
    """

    requests_per_s: float
    output_tokens_per_s: float
    first_token: Percentiles
    per_token: Percentiles | None
    whole: Percentiles

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Latency:
        """Return the figures over every request of some runs, of which none failed."""
        seconds = sum(run.ms for run in runs) / 1e3
        requests = [run for run in runs for _ in run.answer_tokens]
        # The longest answer decides how many steps its batch takes.
        steps = [
            (run.ms - run.first_ms) / (max(run.answer_tokens) - 1)
            for run in requests
            if max(run.answer_tokens) > 1
        ]
        return cls(
            requests_per_s=len(requests) / seconds,
            output_tokens_per_s=sum(sum(run.answer_tokens) for run in runs) / seconds,
            first_token=Percentiles.of([run.first_ms for run in requests]),
            per_token=Percentiles.of(steps) if steps else None,
            whole=Percentiles.of([run.ms for run in requests]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return {
            "requests_per_s": round(self.requests_per_s, 4),
            "output_tokens_per_s": round(self.output_tokens_per_s, 3),
            "time_to_first_token_ms": self.first_token.to_json(),
            "time_per_output_token_ms": (
                None if self.per_token is None else self.per_token.to_json()
            ),
            "latency_ms": self.whole.to_json(),
        }
