"""Lines of the log on requests: one for each response over HTTP, one for each answer.

Texts of questions and answers are in neither unless somebody wants them there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from recmas_runtime.serve.log import ServiceLog, cut
from recmas_runtime.serve.operation.asgi import App, Message, Receive, Scope, Send
from recmas_runtime.serve.protocol import Ask, Done, Piece, Read, Step, WasRead
from recmas_runtime.serve.service import ServiceError

# Asked every few seconds by whoever watches the service; only what is not as it should be is told.
_POLLED: Final = frozenset({"/health", "/ready", "/metrics"})


class AccessLog:
    """An ASGI application whose responses are logged."""

    def __init__(self, app: App, log: ServiceLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status: int | None = None
        num_bytes = 0

        async def seen(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            client = scope.get("client")
            if status != 200 or scope["path"] not in _POLLED:
                self._log.info(
                    "http",
                    client=client[0] if client else None,
                    method=cut(scope["method"]),
                    path=cut(scope["path"]),
                    status=status,  # None: the client left first
                    bytes=num_bytes,
                    ms=round((time.perf_counter() - began) * 1e3, 1),
                )


class AnswerLog:
    """Observes a service."""

    def __init__(self, log: ServiceLog, *, with_texts: bool) -> None:
        self._log = log
        self._with_texts = with_texts

    def begin(self, request: Ask | Read) -> _Watch:
        """Note when a request came; see `Observer`."""
        return _Watch(self._log, request, with_texts=self._with_texts)


class _Watch:
    """The line of one request."""

    def __init__(self, log: ServiceLog, request: Ask | Read, *, with_texts: bool) -> None:
        self._log = log
        self._request = request
        self._with_texts = with_texts
        self._began = time.perf_counter()
        self._done: Done | WasRead | None = None

    def event(self, event: Step | Piece | Done | WasRead) -> None:
        if isinstance(event, Done | WasRead):
            self._done = event

    def end(self, error: ServiceError | None) -> None:
        ms = round((time.perf_counter() - self._began) * 1e3, 1)
        model = cut(self._request.model)
        texts = self._texts() if self._with_texts else {}
        if self._done is None:
            # Why is told without texts: messages may quote values of a record.
            code = error.problems[0].code if error is not None else None
            reason = cut(str(error)) if error is not None and self._shows(error) else None
            how = error.reason if error is not None else "left"
            self._log.info(
                "no answer", model=model, how=how, code=code, reason=reason, ms=ms, **texts
            )
            return
        if isinstance(self._done, WasRead):
            self._log.info("read", model=model, tokens=len(self._done.tokens), ms=ms, **texts)
            return
        answer = self._done.answer
        if self._with_texts:
            texts["answer"] = answer["answer"]
        self._log.info(
            "answer",
            model=model,
            finish=answer["finish_reason"],
            rounds=answer["rounds"],
            **{name: value for name, value in answer["usage"].items() if name != "remote"},
            **_remote(answer["usage"]),
            cached_tokens=self._done.cached_tokens,
            queued_ms=round(self._done.queued_ms, 1),
            ms=ms,
            **texts,
        )

    def _texts(self) -> dict[str, Any]:
        request = self._request
        return {"record": request.record} if isinstance(request, Ask) else {"text": request.text}

    def _shows(self, error: ServiceError) -> bool:
        return self._with_texts or error.reason != "input"


def _remote(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Return what remote models took, all of them together; nothing where none was asked."""
    models = list(usage.get("remote", {}).values())
    names = ("calls", "prompt_tokens", "completion_tokens", "cost")
    return {f"remote_{n}": sum(m[n] or 0 for m in models) for n in names if models}
