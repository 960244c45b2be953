"""A model behind an endpoint of OpenAI's form: chat messages go there, and text comes back.

Retries, time-outs and connections are those of the `openai` package, which is imported with the
first model that is opened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from recmas_runtime.core.errors import RecmasError, missing_package
from recmas_runtime.formats.manifest import OPENAI_URL, RemoteEntry
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.prompts.render import ChatMessage
from recmas_runtime.remote.failures import failure_of, no_key, unusable

if TYPE_CHECKING:  # most bundles have no such models, and all this takes a while to import
    import asyncio

    from openai import AsyncOpenAI

    from recmas_runtime.remote.event_loop import BackgroundLoop

# Sent where there is no key: the package does not do without, and endpoints without one ignore it.
_NO_KEY: Final = "none"
_END: Final = None
# Some services take 32 bits, with a sign.
_SEEDS: Final = 2**31
_STREAM: Final = 1_000_003
# What OpenAI's form does not have: sent only where it says something, as vLLM and others name it.
_BEYOND: Final[Mapping[str, float]] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True, kw_only=True)
class RemoteRequest:
    """What a model is asked; equal ones are the same question."""

    messages: tuple[ChatMessage, ...]
    sampling: SamplingPlan


@dataclass(frozen=True, kw_only=True)
class RemoteReply:
    """What a model has written.

    Attributes:
        prompt_tokens: As the endpoint counts them; None where it does not say.
        completion_tokens: Likewise, reasoning included.
        ms: From the question to its end, retries included.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int | None
    completion_tokens: int | None
    ms: float


class RemoteStream:
    """A reply that comes piece by piece; `next` is asked until it gives None."""

    def __init__(self, model: RemoteModel, request: RemoteRequest) -> None:
        import asyncio

        self._model = model
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.reply: Future[RemoteReply] = model.loop.submit(model.write(request, self._pieces))

    def next(self) -> Future[str | None]:
        """Return the next piece to come; None is the end, of whatever kind."""
        return self._model.loop.submit(self._pieces.get())

    def cancel(self) -> None:
        """Give up what is yet to come, at the endpoint too."""
        self.reply.cancel()


class RemoteModel:
    """One model at one endpoint.

    Args:
        key: None for an endpoint that needs none.
    """

    def __init__(self, entry: RemoteEntry, loop: BackgroundLoop, key: str | None) -> None:
        self.entry = entry
        self.loop = loop
        self._key = key
        self._client = _client(entry, key)
        loop.at_end(self._client.close)

    def ask(self, request: RemoteRequest) -> Future[RemoteReply]:
        """Send a question; the future has the whole reply, or raises RM56x."""
        return self.loop.submit(self.write(request, None))

    def stream(self, request: RemoteRequest) -> RemoteStream:
        """Send a question whose reply comes in pieces."""
        return RemoteStream(self, request)

    async def write(
        self, request: RemoteRequest, pieces: asyncio.Queue[str | None] | None
    ) -> RemoteReply:
        """Ask; whoever wants pieces gets them, and None at the end.

        Raises:
            RecmasError: RM56x.
        """
        start = time.perf_counter()
        try:
            if pieces is None:
                return await self._whole(request, start)
            return await self._streamed(request, start, pieces)
        except RecmasError:
            raise
        except Exception as error:
            raise failure_of(error, self.entry, self._key) from error
        finally:
            if pieces is not None:
                pieces.put_nowait(_END)

    async def _whole(self, request: RemoteRequest, start: float) -> RemoteReply:
        found: Any = await self._client.chat.completions.create(**self._body(request))
        choices = getattr(found, "choices", None)
        if not choices:
            raise unusable(
                self.entry, "has no choice" if choices == [] else "is no chat completion"
            )
        message = getattr(choices[0], "message", None)
        text = getattr(message, "content", None)
        return self._reply(text, choices[0], found, start)

    async def _streamed(
        self, request: RemoteRequest, start: float, pieces: asyncio.Queue[str | None]
    ) -> RemoteReply:
        body = self._body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        texts: list[str] = []
        last: Any = None
        counted: Any = None
        stream: Any = await self._client.chat.completions.create(**body)
        if not hasattr(stream, "__aiter__"):
            raise unusable(self.entry, "is no stream of chat completions")
        async with stream:
            async for chunk in stream:
                counted = chunk if getattr(chunk, "usage", None) else counted
                for choice in getattr(chunk, "choices", None) or ():
                    last = choice if getattr(choice, "finish_reason", None) else last or choice
                    piece = getattr(getattr(choice, "delta", None), "content", None)
                    if piece:
                        texts.append(piece)
                        pieces.put_nowait(piece)
        if last is None:
            raise unusable(self.entry, "has no choice")
        if not getattr(last, "finish_reason", None):
            raise unusable(self.entry, "broke off before its end")
        return self._reply("".join(texts), last, counted, start)

    def _reply(self, text: object, choice: Any, found: Any, start: float) -> RemoteReply:
        reason = getattr(choice, "finish_reason", None)
        if not isinstance(text, str) or reason not in ("stop", "length", None):
            raise unusable(self.entry, f"has no text: it ended with {reason!r}")
        usage = getattr(found, "usage", None)
        return RemoteReply(
            text=text,
            finish_reason="length" if reason == "length" else "stop",
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            ms=(time.perf_counter() - start) * 1e3,
        )

    def _body(self, request: RemoteRequest) -> dict[str, Any]:
        """Return the request in OpenAI's keys."""
        sampling = request.sampling
        said: dict[str, Any] = {
            "max_completion_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            **({"top_p": sampling.top_p} if sampling.top_p != 1.0 else {}),
            "seed": sampling.seed,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }
        kept = {name: value for name, value in said.items() if name not in self.entry.leave_out}
        beyond = {
            name: getattr(sampling, name)
            for name, default in _BEYOND.items()
            if getattr(sampling, name) != default
        }
        return {
            "model": self.entry.model,
            "messages": [
                {"role": message.role, "content": message.content} for message in request.messages
            ],
            **kept,
            "extra_body": {**beyond, **self.entry.body} or None,
        }


def open_models(
    entries: Mapping[str, RemoteEntry], users: Mapping[str, str]
) -> dict[str, RemoteModel]:
    """Open models, which asks nobody for anything; all that is missing is told at once.

    Args:
        users: By model, the agents on it in words.

    Raises:
        RecmasError: RM560 for keys that are not there, RM201 without the package.
    """
    keys = {
        name: None if entry.api_key_env is None else os.environ.get(entry.api_key_env, "").strip()
        for name, entry in entries.items()
    }
    missing = [no_key(entries[name], users[name]) for name, key in keys.items() if key == ""]
    if missing:
        raise RecmasError(problem for error in missing for problem in error.problems)
    if not entries:
        return {}
    from recmas_runtime.remote.event_loop import BackgroundLoop

    loop = BackgroundLoop()
    return {name: RemoteModel(entry, loop, keys[name]) for name, entry in entries.items()}


def remote_seed(seed: int, stream: int) -> int:
    """Return the seed of a text as services take it: streams of one record are apart.

    Args:
        stream: 0 for the answer, whose seed is then the record's own.
    """
    return (seed + stream * _STREAM) % _SEEDS


def _client(entry: RemoteEntry, key: str | None) -> AsyncOpenAI:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="remote") from error

    # The package takes them from the environment, for whatever endpoint it is told.
    foreign: Any = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    return openai.AsyncOpenAI(
        base_url=entry.base_url,
        api_key=key or _NO_KEY,
        timeout=entry.timeout_s,
        max_retries=entry.max_retries,
        default_headers=None if entry.base_url == OPENAI_URL else foreign,
    )


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
