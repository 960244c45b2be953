"""What textual gradients are asked to do: data, budget, and the engine that criticises."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recmas_compiler.spec.document.yaml_source import resolve
from recmas_runtime.core.errors import Problem, RecmasError, fail

BASELINE: Final = "textgrad"
# Budgets may grow when a run is resumed; everything else decides what a run is.
_BUDGET: Final = ("steps", "max_tokens", "max_seconds")
# An endpoint may move; its model may not.
_PLACE: Final = ("url", "key_env", "timeout_s", "retries")
_MOST: Final = 2**40


class TextGradSettings(BaseModel):
    """Settings of one run. Every key may be given as `--textgrad KEY=VALUE`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    """Records to learn from, of the protocol of the evaluation."""

    steps: int = Field(default=12, ge=1, le=100_000)
    """Optimisation steps, each over `batch` records."""

    batch: int = Field(default=3, ge=1, le=1024)
    """Records per step."""

    records: int | None = Field(default=None, ge=1, le=1_000_000)
    """The training part: so many records of `data`, as the protocol selects them; None for all but
    those of the validation."""

    validation: int = Field(default=16, ge=0, le=1_000_000)
    """The records after these, by which a step is kept or taken back; 0 keeps every step."""

    max_tokens: int = Field(default=_MOST, ge=1, le=_MOST)
    """Stop after the step in which so many tokens have been read and written, all engines."""

    max_seconds: float = Field(default=1e9, gt=0, le=1e9)
    """Stop after the step in which so many seconds have passed."""

    handover_tokens: int | None = Field(default=None, ge=1, le=999_999)
    """Most tokens of a text between agents, as N of `text@N`; None for those of an answer."""

    training: Path | None = None
    """Folder of a `recmasc train` of the same system, whose cost is told beside this one's."""

    rewrites: Literal["instructions", "prompt"] = "instructions"
    """What learns: the longest run of lines without fields and slots, or whole prompts."""

    untagged: Literal["reject", "take"] = "reject"
    """What becomes of a new text that is not between the tags that textgrad asks for: small models
    never write them. `take` takes the whole reply."""

    reply_tokens: int = Field(default=512, ge=1, le=32_768)
    """Most tokens of a text that the backward engine writes."""

    url: str | None = None
    """Base URL of an OpenAI-compatible endpoint, such as `http://127.0.0.1:8000/v1`; None for the
    answer agent's backbone in this process."""

    model: str | None = None
    """The endpoint's name of the model."""

    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key; it may be unset where none is wanted."""

    timeout_s: float = Field(default=300.0, gt=0, le=86_400)
    """Longest wait for the endpoint's reply."""

    retries: int = Field(default=2, ge=0, le=20)
    """Further tries where the endpoint does not answer or is busy."""

    def identity(self) -> dict[str, object]:
        """Return what decides what a run is; its budget may grow on resuming."""
        kept = self.model_dump(mode="json", exclude={"data", "training", *_PLACE, *_BUDGET})
        return {"textgrad": kept}

    @property
    def text_baseline(self) -> str:
        """The baseline whose prompts learn."""
        return "text" if self.handover_tokens is None else f"text@{self.handover_tokens}"

    @property
    def key(self) -> str | None:
        """The endpoint's key, from the environment."""
        return os.environ.get(self.key_env)


def read_settings(given: Iterable[str]) -> TextGradSettings:
    """Return the settings of `KEY=VALUE` texts.

    Raises:
        RecmasError: RM506 for each that is none, unknown or out of bounds.
    """
    values: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise _unusable(f"--textgrad {text}: this is not KEY=VALUE")
        values[key.strip()] = resolve(value.strip())
    if "data" not in values:
        raise fail(
            "RM506",
            f"--baseline {BASELINE} without records to learn from",
            hint="Give --textgrad data=FILE: records of the same protocol, not those of --data.",
        )
    try:
        settings = TextGradSettings.model_validate(values)
    except ValidationError as error:
        raise RecmasError(
            Problem(
                code="RM506",
                message=f"--textgrad {'.'.join(map(str, one['loc']))}="
                f"{one['input']}: {one['msg'].lower()}",
                hint=_HINT,
            )
            for one in error.errors()
        ) from None
    if settings.url is not None and settings.model is None:
        raise _unusable("--textgrad url without model")
    if settings.model is not None and settings.url is None:
        raise _unusable("--textgrad model without url")
    return settings


_HINT: Final = f"Keys are {', '.join(TextGradSettings.model_fields)}."


def _unusable(message: str) -> RecmasError:
    return fail("RM506", message, hint=_HINT)
