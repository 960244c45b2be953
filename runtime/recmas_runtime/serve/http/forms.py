"""What OpenAI's forms share: settings of an answer, parts of messages, and recmas's own key."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import Field

from recmas_runtime.formats.plan import MAX_NEW_TOKENS, MAX_SEED, MAX_STOPS, MAX_TEMPERATURE
from recmas_runtime.serve.http.bodies import WHOLE, Strict
from recmas_runtime.serve.http.errors import ApiError, sentence
from recmas_runtime.serve.protocol import Ask, EarlierTurn, ModelInfo

MAX_CHOICES: Final = 16
MAX_NAME_CHARS: Final = 256
_MAX_STOP_CHARS: Final = 1000
_MAX_NEAREST: Final = 16
_NEAREST: Final = 4  # of each thought in a trace that does not say how many

ModelName = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME_CHARS, description="Of a loaded system.")
]
Tokens = Annotated[
    int, Field(ge=1, le=2**31, description="Above what was built it ends there."), WHOLE
]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)]
TopP = Annotated[float, Field(gt=0, le=1)]
Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE]
Label = Annotated[str, Field(max_length=512, description="A mark of yours; it changes nothing.")]

# Values of keys that are not honoured: those that ask for nothing.
NoNumber = Annotated[float, Field(ge=0, le=0)]
NoList = Annotated[list[Any], Field(max_length=0)]
NoTable = Annotated[dict[str, Any], Field(max_length=0)]


class Extension(Strict):
    """What systems take beyond OpenAI's forms.

    Attributes:
        record: Other fields of the record.
        rounds: How many of the built rounds run.
        baseline: A baseline instead of the system itself.
        trace: Whether the answer says what each agent did.
        thoughts: Nearest tokens of each thought in the trace.
    """

    record: dict[str, Any] = Field(default_factory=dict)
    rounds: Annotated[int, Field(ge=1, le=2**16), WHOLE] | None = None
    baseline: Annotated[str, Field(min_length=1, max_length=64)] = "latent"
    trace: bool = False
    thoughts: Annotated[int, Field(ge=0, le=_MAX_NEAREST), WHOLE] | None = None


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextPart(Strict):
    """A part of a message; images and audio are not read."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(max_length=128)]
Content = str | Parts


class TextFormat(Strict):
    """The one form of answers: text."""

    type: Literal["text"]


class Part(Protocol):
    """Of a message."""

    text: str


def joined(content: str | Sequence[Part] | None) -> str:
    """Return the text of a message: its parts one after the other."""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content or ())


def sampling(
    model: ModelInfo,
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: str | list[str] | None = None,
) -> dict[str, Any]:
    """Return settings over the bundle's.

    A request that names no seed gets one of its own, as clients expect who ask twice. It matters
    only where tokens are drawn.
    """
    wanted = min(max_tokens or model.default_max_tokens, model.max_new_tokens, MAX_NEW_TOKENS)
    stops = [stop] if isinstance(stop, str) else stop
    return {
        "max_new_tokens": wanted,
        "seed": secrets.randbits(32) if seed is None else seed,
        **({} if temperature is None else {"temperature": temperature}),
        **({} if top_p is None else {"top_p": top_p}),
        **({"stop": stops} if stops else {}),
    }


def asks(
    model: ModelInfo,
    record: dict[str, Any],
    turns: tuple[EarlierTurn, ...],
    settings: dict[str, Any],
    extension: Extension | None,
    *,
    num: int = 1,
) -> list[Ask]:
    """Return what is asked of the service for so many answers of one record.

    Raises:
        ApiError: 400 for an extension that does not fit the model.
    """
    own = extension or Extension()
    if own.rounds is not None and own.rounds > model.rounds:
        message = f"`recmas.rounds` is {own.rounds}, built were {model.rounds}"
        raise wrong("recmas.rounds", message, "RM506", f"Take at most {model.rounds}.")
    if own.thoughts is not None and not own.trace:
        raise wrong(
            "recmas.thoughts",
            "`recmas.thoughts` are told in a trace",
            "RM543",
            'Add "trace": true.',
        )
    if own.trace and num > 1:
        raise wrong("recmas.trace", "a trace is that of one answer", "RM543", "Leave `n` out.")
    if settings["seed"] + num - 1 > MAX_SEED:
        message = f"`seed` is {settings['seed']}, and answer {num} would draw beyond {MAX_SEED}"
        raise wrong("seed", message, hint=f"Take one of at most {MAX_SEED - num + 1}.")
    return [
        Ask(
            id=0,
            model=model.name,
            record=record,
            # Rather than an index, so that the seed that stands in an answer gives it again.
            sampling={**settings, "seed": settings["seed"] + place},
            rounds=own.rounds,
            baseline=own.baseline,
            thoughts=(_NEAREST if own.thoughts is None else own.thoughts) if own.trace else None,
            turns=turns,
        )
        for place in range(num)
    ]


def wrong(param: str, message: str, code: str = "RM543", hint: str = "") -> ApiError:
    """Return the error of a key whose value asks for what cannot be."""
    return ApiError(400, code, sentence(message, hint), param=param)


def demand_text(text: str, param: str) -> None:
    """Refuse a question that says nothing, by the name that its form has for it.

    Raises:
        ApiError: 400.
    """
    if not text.strip():
        raise wrong(param, f"`{param}` is empty", "RM500", "Write a question.")
