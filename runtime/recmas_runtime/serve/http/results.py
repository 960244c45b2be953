"""What every form says about answers: usage, why they ended, and recmas's own key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from recmas_runtime.scheduling.remote_calls import sum_by_model
from recmas_runtime.serve.protocol import Ask, Done, ModelInfo


class PromptDetails(BaseModel):
    """Prompt tokens that were taken from earlier requests."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Tokens that agents wrote for each other, and latent steps, which are no tokens."""

    reasoning_tokens: int
    latent_steps: int


class RemoteTokens(BaseModel):
    """What calls of one remote model took; the cost is in the currency of the spec's prices."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    uncounted_calls: int
    cost: float | None


class Usage(BaseModel):
    """What answers took, over all agents and rounds; the total is the sum of both.

    What remote models took stands apart, by the names that the spec has for them; of it only the
    tokens of an answer that such a model wrote are among the others.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    remote: dict[str, RemoteTokens] | None = None


class ToldOfAnswer(BaseModel):
    """What recmas tells of an answer to requests that have its key."""

    model_config = ConfigDict(extra="allow")

    rounds: int
    seed: int
    queued_ms: float
    timing_ms: dict[str, float]
    tool_calls: list[dict[str, Any]]
    trace: dict[str, Any] | None = None


def usage_of(answers: Sequence[Done]) -> dict[str, Any]:
    """Return the usage of answers to one request.

    Text that agents write for each other is of their tokens, as reasoning is in OpenAI's count.
    Latent steps are told beside it: they are no tokens, and clients add up what is.
    """
    used: list[Mapping[str, Any]] = [done.answer["usage"] for done in answers]
    remote = sum_by_model(each["remote"] for each in used if "remote" in each)
    prompt = sum(each["prompt_tokens"] for each in used)
    handover = sum(each["handover_tokens"] for each in used)
    completion = handover + sum(each["completion_tokens"] for each in used)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(d.cached_tokens for d in answers)},
        "completion_tokens_details": {
            "reasoning_tokens": handover,
            "latent_steps": sum(each["latent_steps"] for each in used),
        },
        **({"remote": remote} if remote else {}),
    }


def told(ask: Ask, done: Done) -> dict[str, Any]:
    """Return what stands under recmas's key."""
    answer = done.answer
    return {
        "rounds": answer["rounds"],
        "seed": ask.sampling["seed"],
        "queued_ms": done.queued_ms,
        "timing_ms": answer["timing_ms"],
        "tool_calls": answer["tool_calls"],
        **({} if done.trace is None else {"trace": done.trace}),
    }


def told_of_all(asks: Sequence[Ask], answers: Sequence[Done]) -> dict[str, Any]:
    """Return what stands under recmas's key of a whole response: of several answers, a list."""
    each = [told(ask, done) for ask, done in zip(asks, answers, strict=True)]
    return each[0] if len(each) == 1 else {"choices": each}


def fingerprint(model: ModelInfo) -> str:
    """Return what stays the same as long as equal seeds give equal answers."""
    return f"recmas-{model.digest[:12]}"
