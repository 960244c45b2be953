"""POST /v1/responses, in the part that clients need for text; nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from recmas_runtime.serve.http.answers import Answers, until_left
from recmas_runtime.serve.http.bodies import WHOLE, JsonRoute, Strict
from recmas_runtime.serve.http.errors import ApiError, documented
from recmas_runtime.serve.http.forms import (
    Extension,
    Label,
    ModelName,
    NoList,
    Seed,
    StreamOptions,
    Temperature,
    TextFormat,
    Tokens,
    TopP,
    asks,
    demand_text,
    joined,
    sampling,
)
from recmas_runtime.serve.http.results import ToldOfAnswer, told, usage_of
from recmas_runtime.serve.http.stream import DOCUMENTED, EventStream, line, told_step
from recmas_runtime.serve.protocol import Ask, Done, EarlierTurn, ModelInfo, Step

_PARAM: Final = "input"


class InputText(Strict):
    """A part of a message; images, files and audio are not read."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: NoList | None = None
    logprobs: NoList | None = None


class InputMessage(Strict):
    """A message; of earlier answers as responses have them, too."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Field(max_length=128)]
    id: str | None = None
    status: Literal["completed", "incomplete"] | None = None
    phase: Annotated[str, Field(max_length=64)] | None = None


class TextConfig(Strict):
    """The form of the answer."""

    format: TextFormat | None = None
    verbosity: None = None


class ResponsesRequest(Strict):
    """OpenAI's form; keys that are not honoured may have those values alone that ask nothing."""

    model: ModelName
    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=2048)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    recmas: Extension | None = None
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: None = None
    include: NoList | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), WHOLE] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    reasoning: None = None

    unsupported: ClassVar[Mapping[str, str]] = {
        "text": "Answers are text; ask for a form in words.",
        "truncation": "Nothing is cut: shorten the conversation.",
        "service_tier": "There is one tier: leave it out.",
        "store": "Nothing is stored: leave it out.",
        "background": "Ask with `stream`.",
        "tools": "Tools of a system are declared in its spec: leave it out.",
        "tool_choice": 'Only "none" and "auto" are taken, as there are no tools.',
        "max_tool_calls": "Leave it out.",
        "include": "Leave it out.",
        "top_logprobs": "Likelihoods of a text are told by /v1/completions with `echo`.",
        "previous_response_id": "Nothing is stored: send the whole conversation.",
        "conversation": "Nothing is stored: send the whole conversation.",
        "prompt": "Nothing is stored: send the whole prompt.",
        "reasoning": "Set how far a system thinks with `recmas.rounds`.",
    }


class ResponsesUsage(BaseModel):
    """What an answer took, in the names of this form."""

    model_config = ConfigDict(extra="allow")

    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponsesResponse(BaseModel):
    """A whole response; `recmas` is there if the request has the key."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[dict[str, Any]]
    usage: ResponsesUsage
    recmas: ToldOfAnswer | None = None


def responses_routes(answers: Answers) -> APIRouter:
    """Return the form over a service."""
    router = APIRouter(route_class=JsonRoute)
    whole = {"model": ResponsesResponse, "description": "The answer.", "content": DOCUMENTED}

    @router.post(
        "/v1/responses",
        response_model=None,
        summary="Answer a conversation",
        responses={200: whole, **documented(400, 404, 408, 413, 415, 429, 502, 504)},
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        model = answers.model(body.model)
        ask = _ask(body, model, answers)
        told_ = _Told(body, ask)
        num_messages = len(body.input) if isinstance(body.input, list) else 1
        if body.stream:
            events = answers.events(ask, param=_PARAM, num_messages=num_messages)
            return await EventStream.open(events, _ResponsesChunks(told_), answers.settings)
        work = answers.all([ask], param=_PARAM, num_messages=num_messages)
        (done,) = await until_left(request.receive, work)
        return JSONResponse(told_.whole(done))

    return router


def _ask(body: ResponsesRequest, model: ModelInfo, answers: Answers) -> Ask:
    turns = [EarlierTurn(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        demand_text(body.input, _PARAM)
        turns.append(EarlierTurn(role="user", content=body.input))
    else:
        turns += (
            EarlierTurn(
                role="system" if message.role == "developer" else message.role,
                content=joined(message.content),
            )
            for message in body.input
        )
    record, earlier = answers.record(turns, model, body.recmas, param=_PARAM)
    settings = sampling(
        model,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
    )
    (ask,) = asks(model, record, earlier, settings, body.recmas)
    return ask


class _Told:
    """The parts of a response, whole or as they come."""

    def __init__(self, body: ResponsesRequest, ask: Ask) -> None:
        self.body = body
        self.ask = ask
        self.item_id = f"msg_{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": ask.sampling.get("temperature"),
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": ask.sampling.get("top_p"),
            "truncation": "disabled",
            "user": body.user,
        }

    def begun(self) -> dict[str, Any]:
        """Return the response before its answer."""
        nothing: dict[str, Any] = {"incomplete_details": None, "output": [], "usage": None}
        return {**self._head, "status": "in_progress", **nothing}

    def part(self, text: str) -> dict[str, Any]:
        """Return the answer as the one part of its message."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def item(self, status: str, *parts: dict[str, Any]) -> dict[str, Any]:
        """Return the answer's message."""
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": list(parts),
        }

    def whole(self, done: Done) -> dict[str, Any]:
        """Return the whole response."""
        is_cut = done.answer["finish_reason"] == "length"
        status = "incomplete" if is_cut else "completed"
        used = usage_of([done])
        return {
            **self._head,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self.item(status, self.part(done.answer["answer"]))],
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": used["completion_tokens_details"],
                "total_tokens": used["total_tokens"],
            },
            **({} if self.body.recmas is None else {"recmas": told(self.ask, done)}),
        }


class _ResponsesChunks:
    """The events of a stream, numbered, each with its name."""

    def __init__(self, told_: _Told) -> None:
        self._told = told_
        self._num = 0

    def _event(self, name: str, **keys: Any) -> bytes:
        data = {"type": name, "sequence_number": self._num, **keys}
        self._num += 1
        return line(data, event=name)

    def _of_text(self, name: str, **keys: Any) -> bytes:
        place = {"item_id": self._told.item_id, "output_index": 0, "content_index": 0}
        return self._event(name, **place, **keys)

    def begin(self) -> Iterator[bytes]:
        told_ = self._told
        yield self._event("response.created", response=told_.begun())
        yield self._event("response.in_progress", response=told_.begun())
        item = told_.item("in_progress")
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._of_text("response.content_part.added", part=told_.part(""))

    def step(self, step: Step) -> Iterator[bytes]:
        if self._told.body.recmas is not None:
            begun = self._told.begun()
            step_ = {"step": told_step(step)}
            yield self._event("response.in_progress", response=begun, recmas=step_)

    def piece(self, text: str) -> Iterator[bytes]:
        yield self._of_text("response.output_text.delta", delta=text, logprobs=[])

    def idle(self) -> bytes:
        return self._of_text("response.output_text.delta", delta="", logprobs=[])

    def end(self, done: Done) -> Iterator[bytes]:
        whole = self._told.whole(done)
        (item,) = whole["output"]
        (part,) = item["content"]
        yield self._of_text("response.output_text.done", text=part["text"], logprobs=[])
        yield self._of_text("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def fail(self, error: ApiError) -> bytes:
        info = error.to_json()["error"]
        keys = {key: info[key] for key in ("code", "message", "param")}
        return self._event("error", **keys)
