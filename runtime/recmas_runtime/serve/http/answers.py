"""Asking a service on behalf of HTTP clients, who may leave, wait too long, or be many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final, TypeVar

from msgspec import structs
from starlette.types import Receive

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.serve.conversation import to_record
from recmas_runtime.serve.http.errors import CLIENT_LEFT, ApiError, of_problems, sentence
from recmas_runtime.serve.http.forms import MAX_NAME_CHARS, Extension
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.protocol import (
    Ask,
    Done,
    EarlierTurn,
    ModelInfo,
    Piece,
    ProblemInfo,
    Read,
    Step,
    TokenRead,
)
from recmas_runtime.serve.service import Service, ServiceError

T = TypeVar("T")
Input = TypeVar("Input")
Events = AsyncGenerator[Step | Piece | Done, None]

# Weight of the newest answer in the mean time of one.
_NEWEST: Final = 0.2
# Until somebody has repaired a bundle.
_LOST_S: Final = 10.0


class Answers:
    """A service as the forms use it: its refusals are errors of HTTP."""

    def __init__(self, service: Service, settings: HttpSettings) -> None:
        self.service = service
        self.settings = settings
        self._mean_s = 1.0

    def model(self, name: str) -> ModelInfo:
        """Return a loaded system.

        Raises:
            ApiError: 404 if there is none of that name, 503 if there will be one again.
        """
        if (model := self.service.models.get(name)) is not None:
            return model
        if name in self.service.lost:
            message = sentence(
                f"the bundle of the model {name[:256]!r} cannot be loaded now",
                "Ask again in a few seconds.",
            )
            raise ApiError(503, "RM542", message, param="model", retry_after_s=_LOST_S)
        known = ", ".join(sorted(self.service.models)) or "none"
        shown = repr(name) if len(name) <= MAX_NAME_CHARS else f"{name[:MAX_NAME_CHARS]!r}..."
        message = sentence(f"there is no model {shown}", f"Loaded are: {known}.")
        raise ApiError(404, "RM540", message, param="model")

    def record(
        self,
        turns: Sequence[EarlierTurn],
        model: ModelInfo,
        extension: Extension | None,
        *,
        param: str,
    ) -> tuple[dict[str, Any], tuple[EarlierTurn, ...]]:
        """Return the record of a conversation, and the turns that are shown beside it.

        Args:
            param: The key that held the conversation.

        Raises:
            ApiError: 400 for one that the model does not take.
        """
        given = {} if extension is None else extension.record
        try:
            return to_record(turns, model.serve, model.fields, given)
        except RecmasError as error:
            is_given = any(
                "`recmas.record`" in f"{each.message} {each.hint}" for each in error.problems
            )
            key = "recmas.record" if is_given else param
            params = {each.code: key for each in error.problems}
            named = [  # as this form calls it
                replace(each, message=each.message.replace("messages[", f"{param}["))
                for each in error.problems
            ]
            raise of_problems(named, params=params) from None

    async def events(self, ask: Ask, *, param: str, num_messages: int = 1) -> Events:
        """Answer, as `Service.ask`.

        Args:
            param: The key that held what is asked.
            num_messages: Of the conversation that the record was made of.

        Raises:
            ApiError: There is no answer, or not in time.
        """
        start = time.perf_counter()
        limit_s = self.settings.request_timeout_s
        try:
            async with aclosing(self.service.ask(ask, limit_s=limit_s)) as told:
                async for event in told:
                    if isinstance(event, Done):
                        self._mean_s += _NEWEST * (time.perf_counter() - start - self._mean_s)
                    yield event
        except ServiceError as error:
            raise self._refused(error, param, num_messages) from None

    async def all(self, asks: Sequence[Ask], *, param: str, num_messages: int = 1) -> list[Done]:
        """Answer several at a time, as `events`; none if one has no answer."""
        width = max(1, min(self.service.limits.max_batch or 64, len(asks)))

        async def last(ask: Ask) -> Done:
            events = self.events(ask, param=param, num_messages=num_messages)
            return await self._last(events)

        return await _together(asks, last, width)

    async def _last(self, told: Events) -> Done:
        async with aclosing(told) as events:
            async for event in events:
                last = event
        assert isinstance(last, Done), "an answer ends with it"
        return last

    async def read(self, reads: Sequence[Read], *, param: str) -> list[tuple[TokenRead, ...]]:
        """Have texts read, some at a time.

        Raises:
            ApiError: One cannot be.
        """

        async def one(read: Read) -> tuple[TokenRead, ...]:
            try:
                limit_s = self.settings.request_timeout_s
                return (await self.service.read(read, limit_s=limit_s)).tokens
            except ServiceError as error:
                raise self._refused(error, param) from None

        width = self.service.limits.max_batch or 8
        return await _together(reads, one, width)

    def _refused(
        self, error: ServiceError, param: str, num_messages: int | None = None
    ) -> ApiError:
        codes = {"RM508": "recmas.baseline", "RM506": "recmas.rounds"}
        params = {**dict.fromkeys(("RM206", "RM500", "RM501", "RM543"), param), **codes}
        refused = of_problems(
            error.problems
            if num_messages is None
            else [_too_long(each, num_messages) for each in error.problems],
            reason=error.reason,
            params=params,
            retry_after_s=self._wait_s(error.reason),
        )
        refused.is_counted = True
        return refused

    def _wait_s(self, reason: str) -> float:
        """Return when there may be room: once those before have had their turns."""
        models = self.service.models.values()
        if reason == "stopped":
            return sum(model.loads_ms for model in models) / 1e3
        rows = self.service.limits.max_batch or max((m.max_batch for m in models), default=1)
        return self._mean_s * self.service.num_open / rows / 2


def _too_long(problem: ProblemInfo, num_messages: int) -> ProblemInfo:
    """Say of a prompt that is too long what somebody who did not build the bundle can do."""
    if problem.code != "RM501":
        return problem
    more = "more needs a bundle that is built with a larger build.max_prompt_tokens."
    if num_messages == 1:
        return structs.replace(problem, hint=f"Shorten the text; {more}")
    message = f"{problem.message}; the conversation has {num_messages} messages"
    return structs.replace(problem, message=message, hint=f"Leave out earlier messages; {more}")


async def _together(
    inputs: Sequence[Input], work: Callable[[Input], Coroutine[Any, Any, T]], width: int
) -> list[T]:
    """Work on inputs, so many at a time; the first that fails ends all, and its error is raised."""
    room = asyncio.Semaphore(width)

    async def one(given: Input) -> T:
        async with room:
            return await work(given)

    tasks = [asyncio.create_task(one(given)) for given in inputs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a work, which is cancelled if the client leaves first.

    Raises:
        ApiError: The client left.
    """
    task = asyncio.create_task(work)
    left = asyncio.create_task(client_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_LEFT, "RM542", "the client left.")
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def client_left(receive: Receive) -> None:
    """Return once the client of a request that was read whole has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
