"""POST /v1/completions: a prompt is the question, or a text whose likelihood is told."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from recmas_runtime.serve.http.answers import Answers, until_left
from recmas_runtime.serve.http.bodies import WHOLE, JsonRoute, Strict
from recmas_runtime.serve.http.chat import check_stream
from recmas_runtime.serve.http.errors import ApiError, documented
from recmas_runtime.serve.http.forms import (
    MAX_CHOICES,
    Extension,
    Label,
    ModelName,
    NoNumber,
    NoTable,
    Seed,
    Stops,
    StreamOptions,
    Temperature,
    TopP,
    asks,
    demand_text,
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
from recmas_runtime.serve.protocol import (
    Ask,
    Done,
    EarlierTurn,
    ModelInfo,
    Read,
    Step,
    TokenRead,
)

_PARAM: Final = "prompt"
_MAX_PROMPTS: Final = 1024
# Any token will do in the place whose likeliest one is wanted.
_ANY_TOKEN: Final = 0

TokenId = Annotated[int, Field(ge=0, le=2**31), WHOLE]
Ids = Annotated[list[TokenId], Field(min_length=1, max_length=2**20)]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=_MAX_PROMPTS)]
)


class CompletionRequest(Strict):
    """OpenAI's older form; with `echo` and `logprobs` it tells how likely a text is."""

    model: ModelName
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    user: Label | None = None
    recmas: Extension | None = None
    suffix: Literal[""] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    logit_bias: NoTable | None = None
    presence_penalty: NoNumber | None = None
    frequency_penalty: NoNumber | None = None

    unsupported: ClassVar[Mapping[str, str]] = {
        "suffix": "Leave it out.",
        "best_of": "Only 1 is taken; several answers come with `n`.",
        "logit_bias": "Leave it out.",
        "presence_penalty": "Only 0 is taken.",
        "frequency_penalty": "Only 0 is taken.",
    }

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, as texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt]


class Logprobs(BaseModel):
    """How likely tokens are behind all before them, which says nothing of the first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the answers."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """A whole response; `recmas` is there if the request has the key."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    recmas: ToldOfAnswer | dict[str, list[ToldOfAnswer]] | None = None


def completion_routes(answers: Answers) -> APIRouter:
    """Return the form over a service."""
    router = APIRouter(route_class=JsonRoute)
    whole = {"model": Completion, "description": "The answer.", "content": DOCUMENTED}

    @router.post(
        "/v1/completions",
        response_model=None,
        summary="Answer a prompt, or tell how likely a text is",
        responses={200: whole, **documented(400, 404, 408, 413, 415, 429, 502, 504)},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model = answers.model(body.model)
        _check(body, answers.settings.max_choices)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": fingerprint(model),
        }
        if body.logprobs is not None:
            return JSONResponse(await until_left(request.receive, _read(body, answers, head)))
        if body.stream:
            (prompt,) = await until_left(request.receive, _texts(body, answers))
            (ask,) = _asks(body, prompt, model, answers)
            chunks = _TextChunks(body, ask, head, echo=prompt if body.echo else "")
            events = answers.events(ask, param=_PARAM)
            return await EventStream.open(events, chunks, answers.settings)
        work = _answered(body, model, answers, head)
        return JSONResponse(await until_left(request.receive, work))

    return router


def _check(body: CompletionRequest, max_choices: int) -> None:
    """Refuse what does not go together."""
    check_stream(body.stream, body.n, body.stream_options)
    num = len(body.prompts) * (body.n or 1)
    if num > max_choices:
        message = f"{num} answers are asked for, and {max_choices} is the most of one request"
        raise wrong(_PARAM, message, hint="Send several requests.")
    if body.stream and len(body.prompts) > 1:
        message = f"`prompt` holds {len(body.prompts)} prompts, and a stream has one answer"
        raise wrong(_PARAM, message, hint="Ask without `stream`.")
    if body.logprobs is None:
        if body.max_tokens == 0:
            raise wrong("max_tokens", "`max_tokens` is 0", hint="Only `logprobs` can go without.")
        return
    if not body.echo:
        message = "`logprobs` are those of the prompt"
        raise wrong("logprobs", message, hint='Add "echo": true, or leave it out.')
    for name, is_wrong, why in (
        ("max_tokens", (body.max_tokens or 0) > 1, "at most one token follows the prompt"),
        ("temperature", bool(body.temperature), "what follows the prompt is its likeliest token"),
        ("stream", bool(body.stream), "a text that is read is not streamed"),
        ("n", (body.n or 1) > 1, "a text is read once"),
        ("recmas", body.recmas is not None, "a backbone reads the text, and no system runs"),
    ):
        if is_wrong:
            message = f"`{name}` does not go with `logprobs`: {why}"
            raise wrong(name, message, hint="Leave one of them out.")


async def _texts(body: CompletionRequest, answers: Answers) -> list[str]:
    """Return the prompts as text; the backbone's own tokenizer spells out token ids."""
    found = [each if isinstance(each, str) else "" for each in body.prompts]
    places = [i for i, each in enumerate(body.prompts) if not isinstance(each, str)]
    reads = [Read(id=0, model=body.model, text=body.prompts[place]) for place in places]
    for place, tokens in zip(places, await answers.read(reads, param=_PARAM), strict=True):
        found[place] = "".join(token.text for token in tokens)
    return found


def _asks(body: CompletionRequest, prompt: str, model: ModelInfo, answers: Answers) -> list[Ask]:
    demand_text(prompt, _PARAM)
    turn = EarlierTurn(role="user", content=prompt)
    record, turns = answers.record([turn], model, body.recmas, param=_PARAM)
    settings = sampling(
        model,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=body.stop,
    )
    return asks(model, record, turns, settings, body.recmas, num=body.n or 1)


async def _answered(
    body: CompletionRequest, model: ModelInfo, answers: Answers, head: dict[str, Any]
) -> dict[str, Any]:
    texts = await _texts(body, answers)
    asked = [ask for text in texts for ask in _asks(body, text, model, answers)]
    found = await answers.all(asked, param=_PARAM)
    shown = [text if body.echo else "" for text in texts for _ in range(body.n or 1)]
    return {
        **head,
        "choices": [
            {
                "index": index,
                "text": before + done.answer["answer"],
                "logprobs": None,
                "finish_reason": done.answer["finish_reason"],
            }
            for index, (before, done) in enumerate(zip(shown, found, strict=True))
        ],
        "usage": usage_of(found),
        **({} if body.recmas is None else {"recmas": told_of_all(asked, found)}),
    }


async def _read(body: CompletionRequest, answers: Answers, head: dict[str, Any]) -> dict[str, Any]:
    """Have the answer agent's backbone read the prompts; no agent runs."""
    top = body.logprobs or 0
    wants_next = body.max_tokens == 1
    texts: Sequence[str | tuple[int, ...]] = body.prompts
    if wants_next and any(isinstance(text, str) for text in texts):
        reads = [Read(id=0, model=body.model, text=text) for text in texts]
        read = await answers.read(reads, param=_PARAM)
        texts = [tuple(token.id for token in tokens) for tokens in read]
    reads = [
        Read(
            id=0,
            model=body.model,
            text=(*text, _ANY_TOKEN) if wants_next and not isinstance(text, str) else text,
            top=max(top, 1) if wants_next else top,
        )
        for text in texts
    ]
    found = await answers.read(reads, param=_PARAM)
    if wants_next:
        found = [(*tokens[:-1], _likeliest(tokens[-1])) for tokens in found]
    num_prompt = sum(len(tokens) - wants_next for tokens in found)
    num_next = len(found) if wants_next else 0
    return {
        **head,
        "choices": [
            {
                "index": index,
                "text": "".join(token.text for token in tokens),
                "logprobs": _logprobs(tokens, top),
                "finish_reason": "length",
            }
            for index, tokens in enumerate(found)
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_next,
            "total_tokens": num_prompt + num_next,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "latent_steps": 0},
        },
    }


def _likeliest(token: TokenRead) -> TokenRead:
    """Return the likeliest token in the place of another."""
    text, logprob = max(token.top, key=lambda pair: pair[1])
    return TokenRead(id=token.id, text=text, offset=token.offset, logprob=logprob, top=token.top)


def _logprobs(tokens: Sequence[TokenRead], top: int) -> dict[str, Any]:
    def likeliest(token: TokenRead) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for text, logprob in token.top[:top]:  # the likeliest first
            found.setdefault(text, logprob)
        return found

    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [likeliest(token) for token in tokens] if top else None,
        "text_offset": [token.offset for token in tokens],
    }


class _TextChunks:
    """The chunks of a stream."""

    def __init__(
        self, body: CompletionRequest, ask: Ask, head: dict[str, Any], *, echo: str
    ) -> None:
        self._ask = ask
        self._head = head
        self._echo = echo
        self._has_usage = (body.stream_options or StreamOptions()).include_usage
        self._tells = body.recmas is not None

    def _chunk(self, text: str, finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._has_usage else {}
        return line({**self._head, "choices": [choice], **usage, **more})

    def begin(self) -> Iterator[bytes]:
        yield self._chunk(self._echo)

    def step(self, step: Step) -> Iterator[bytes]:
        if self._tells:
            yield self._chunk("", recmas={"step": told_step(step)})

    def piece(self, text: str) -> Iterator[bytes]:
        yield self._chunk(text)

    def idle(self) -> bytes:
        return self._chunk("")

    def end(self, done: Done) -> Iterator[bytes]:
        own = {"recmas": told(self._ask, done)} if self._tells else {}
        yield self._chunk("", done.answer["finish_reason"], **own)
        if self._has_usage:
            yield line({**self._head, "choices": [], "usage": usage_of([done])})
        yield b"data: [DONE]\n\n"

    def fail(self, error: ApiError) -> bytes:
        return line(error.to_json())
