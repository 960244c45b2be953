"""Records and answers: the input and output of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from recmas_runtime.tools.calls import ToolResult

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing to answer.

    Attributes:
        id: Unique within a run.
        fields: What prompts may refer to; `id`, `question` and whatever else the input gave.
        index: Place in the input, from 0. Sampling adds it to the seed, so that an answer does not
            depend on which records share its batch.
    """

    id: str
    fields: Mapping[str, object]
    index: int = 0

    def __post_init__(self) -> None:
        # Prompts may show the id, whether it was given or counted.
        object.__setattr__(self, "fields", {**self.fields, "id": self.id})


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: Text tokens that were prefilled, over all agents and rounds, and those of
            tool results.
        latent_steps: Over all agents and rounds.
        handover_tokens: Tokens of text that agents wrote for each other; latent systems write none.
        completion_tokens: Tokens of the answer, including one that ended it.
    """

    prompt_tokens: int
    latent_steps: int
    handover_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall time by phase, in milliseconds; for a batch, of the whole batch.

    Attributes:
        write: Of hand-over text.
        decode: Of the answer's text.
        tools: Inside tools, which neither `write` nor `decode` count.
    """

    prefill: float
    think: float
    send: float
    write: float
    decode: float
    tools: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer and how it came about.

    Attributes:
        answer: The text, including tool calls and their results.
        finish_reason: `stop` for a stop token or string, `length` at `max_new_tokens` or where the
            backbone's positions end.
        rounds: Rounds that ran, the answering one included.
        tool_calls: In order.
    """

    id: str
    question: str
    answer: str
    finish_reason: FinishReason
    rounds: int
    usage: Usage
    timing_ms: Timing
    tool_calls: tuple[ToolResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` and answer files have."""
        timing = {phase: round(ms, 3) for phase, ms in asdict(self.timing_ms).items()}
        calls = [result.to_json() for result in self.tool_calls]
        return {**asdict(self), "timing_ms": timing, "tool_calls": calls}
