"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from recmas_runtime.serve.http.answers import Answers, until_left
from recmas_runtime.serve.http.bodies import WHOLE, JsonRoute, Strict
from recmas_runtime.serve.http.errors import ApiError, documented
from recmas_runtime.serve.http.forms import (
    MAX_CHOICES,
    Content,
    Extension,
    Label,
    ModelName,
    NoList,
    NoNumber,
    NoTable,
    Seed,
    Stops,
    StreamOptions,
    Temperature,
    TextFormat,
    Tokens,
    TopP,
    asks,
    joined,
    sampling,
    wrong,
)
from recmas_runtime.serve.http.results import (
    ToldOfAnswer,
    Usage,
    fingerprint,
    told,
    told_of_all,
    usage_of,
)
from recmas_runtime.serve.http.stream import DOCUMENTED, EventStream, line, told_step
from recmas_runtime.serve.protocol import Ask, Done, EarlierTurn, ModelInfo, Step

_PARAM = "messages"


class SystemMessage(Strict):
    """What a system is told beside what it is asked."""

    role: Literal["system", "developer"]
    content: Content
    name: None = None


class UserMessage(Strict):
    """A question."""

    role: Literal["user"]
    content: Content
    name: None = None


class AssistantMessage(Strict):
    """An earlier answer; its keys are those that responses have."""

    role: Literal["assistant"]
    content: Content | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: NoList | None = None
    annotations: NoList | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class ChatRequest(Strict):
    """OpenAI's form; keys that are not honoured may have those values alone that ask nothing."""

    model: ModelName
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    recmas: Extension | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: NoTable | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoList | None = None
    function_call: Literal["none", "auto"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), WHOLE] | None = None
    logit_bias: NoTable | None = None
    presence_penalty: NoNumber | None = None
    frequency_penalty: NoNumber | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    unsupported: ClassVar[Mapping[str, str]] = {
        "response_format": "Answers are text; ask for a form in words.",
        "modalities": "Answers are text.",
        "service_tier": "There is one tier: leave it out.",
        "store": "Nothing is stored: leave it out.",
        "metadata": "Nothing is stored: leave it out.",
        "tools": "Tools of a system are declared in its spec: leave it out.",
        "tool_choice": 'Only "none" and "auto" are taken, as there are no tools.',
        "functions": "Tools of a system are declared in its spec: leave it out.",
        "function_call": 'Only "none" and "auto" are taken, as there are no tools.',
        "logprobs": "Likelihoods of a text are told by /v1/completions with `echo`.",
        "top_logprobs": "Likelihoods of a text are told by /v1/completions with `echo`.",
        "logit_bias": "Leave it out.",
        "presence_penalty": "Only 0 is taken.",
        "frequency_penalty": "Only 0 is taken.",
        "audio": "Answers are text.",
        "prediction": "Leave it out.",
        "reasoning_effort": "Set how far a system thinks with `recmas.rounds`.",
        "verbosity": "Set how long answers are with `max_tokens`.",
        "web_search_options": "Leave it out.",
    }


class AnswerMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A whole response; `recmas` is there if the request has the key."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    recmas: ToldOfAnswer | dict[str, list[ToldOfAnswer]] | None = None


def chat_routes(answers: Answers) -> APIRouter:
    """Return the form over a service."""
    router = APIRouter(route_class=JsonRoute)
    whole = {"model": ChatCompletion, "description": "The answer.", "content": DOCUMENTED}

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        summary="Answer a conversation",
        responses={200: whole, **documented(400, 404, 408, 413, 415, 429, 502, 504)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        model = answers.model(body.model)
        asked = _asks(body, model, answers)
        num_messages = len(body.messages)
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": fingerprint(model),
        }
        if body.stream:
            chunks = _ChatChunks(body, asked[0], head)
            events = answers.events(asked[0], param=_PARAM, num_messages=num_messages)
            return await EventStream.open(events, chunks, answers.settings)
        work = answers.all(asked, param=_PARAM, num_messages=num_messages)
        found = await until_left(request.receive, work)
        return JSONResponse(_whole(body, asked, found, head))

    return router


def _asks(body: ChatRequest, model: ModelInfo, answers: Answers) -> list[Ask]:
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        message = "`max_tokens` and `max_completion_tokens` name different numbers"
        raise wrong("max_tokens", message, hint="Leave one of them out.")
    check_stream(body.stream, body.n, body.stream_options)
    turns = tuple(
        EarlierTurn(
            role="system" if message.role == "developer" else message.role,
            content=joined(message.content),
        )
        for message in body.messages
    )
    record, earlier = answers.record(turns, model, body.recmas, param=_PARAM)
    settings = sampling(
        model,
        max_tokens=next(iter(limits), None),
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=body.stop,
    )
    return asks(model, record, earlier, settings, body.recmas, num=body.n or 1)


def check_stream(stream: bool | None, n: int | None, options: StreamOptions | None) -> None:
    """Refuse streams of several answers, which clients weave into one, and options of none.

    Raises:
        ApiError: 400.
    """
    if stream and (n or 1) > 1:
        raise wrong("n", f"`n` is {n}, and a stream has one answer", hint="Ask without `stream`.")
    if options is not None and not stream:
        raise wrong(
            "stream_options", "`stream_options` are those of a stream", hint='Add "stream": true.'
        )


def _whole(
    body: ChatRequest, asked: list[Ask], found: list[Done], head: dict[str, Any]
) -> dict[str, Any]:
    return {
        **head,
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": done.answer["answer"],
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": done.answer["finish_reason"],
            }
            for index, done in enumerate(found)
        ],
        "usage": usage_of(found),
        **({} if body.recmas is None else {"recmas": told_of_all(asked, found)}),
    }


class _ChatChunks:
    """The chunks of a stream."""

    def __init__(self, body: ChatRequest, ask: Ask, head: dict[str, Any]) -> None:
        self._ask = ask
        self._head = {**head, "object": "chat.completion.chunk"}
        options = body.stream_options or StreamOptions()
        self._has_usage = options.include_usage
        self._tells = body.recmas is not None

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._has_usage else {}
        return line({**self._head, "choices": [choice], **usage, **more})

    def begin(self) -> Iterator[bytes]:
        yield self._chunk({"role": "assistant", "content": ""})

    def step(self, step: Step) -> Iterator[bytes]:
        if self._tells:
            yield self._chunk({}, recmas={"step": told_step(step)})

    def piece(self, text: str) -> Iterator[bytes]:
        yield self._chunk({"content": text})

    def idle(self) -> bytes:
        return self._chunk({})

    def end(self, done: Done) -> Iterator[bytes]:
        own = {"recmas": told(self._ask, done)} if self._tells else {}
        yield self._chunk({}, done.answer["finish_reason"], **own)
        if self._has_usage:
            yield line({**self._head, "choices": [], "usage": usage_of([done])})
        yield b"data: [DONE]\n\n"

    def fail(self, error: ApiError) -> bytes:
        return line(error.to_json())
