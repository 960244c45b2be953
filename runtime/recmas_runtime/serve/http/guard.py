"""What stands before the application: who may ask, under which name, and how much at a time.

It is plain ASGI, because middleware that wraps responses takes streams and clients that leave away
from those who must see them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recmas_runtime.serve.http.errors import (
    CLIENT_LEFT,
    ERROR_KEY,
    ApiError,
    internal_error,
    sentence,
)
from recmas_runtime.serve.http.settings import HttpSettings, MetricsSource

LOG: Final = logging.getLogger("recmas.serve.http")

MAX_HEADER_BYTES: Final = 32 * 2**10
_MAX_HEADERS: Final = 100
MAX_PATH_BYTES: Final = 8 * 2**10

# No script, style or connection but our own, and nobody's frame.
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = tuple(
    (name.encode(), value.encode())
    for name, value in {
        "content-security-policy": _CSP,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }.items()
)
_NO_STORE: Final = (b"cache-control", b"no-store")

_HOST: Final = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_LOOSE_MEDIA: Final = re.compile(
    r"application/json\s*(?:;\s*charset\s*=\s*\"?utf-?8\"?\s*)?;?\s*", re.IGNORECASE
)


class _LeftError(Exception):
    """The client left before its request was whole."""


class Guard:
    """Passes a request on once it has the key, the right host and a whole body within bounds.

    Args:
        open_paths: Paths that need no key; one that ends in `/` stands for all below it.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: HttpSettings,
        *,
        open_paths: Collection[str],
        metrics: MetricsSource | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._hosts = settings.hosts
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in settings.api_keys)
        self._open = frozenset(open_paths)
        self._open_below = tuple(p for p in open_paths if p.endswith("/") and p != "/")
        self._metrics = metrics
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a request, or answer it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._guarded(scope, receive, send)
        else:  # there is nothing here for WebSockets
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        response = _Response(send)
        self._num_running += 1
        try:
            await self._run(scope, receive, response)
        except ApiError as error:
            scope[ERROR_KEY] = error
            await error.response()(scope, receive, response)
        except _LeftError:
            response.status = CLIENT_LEFT
        except Exception:
            LOG.exception("a request failed")
            if response.status:  # a part of the answer is out: only cutting it off says so
                raise
            scope[ERROR_KEY] = failed = internal_error()
            await failed.response()(scope, receive, response)
        finally:
            self._num_running -= 1
            if self._metrics is not None:
                seconds = time.perf_counter() - start
                path = getattr(scope.get("route"), "path", "other")
                status = response.status or CLIENT_LEFT
                self._metrics.on_response(path, status, seconds)
                told: ApiError | None = scope.get(ERROR_KEY)
                if told is not None and not told.is_counted and status != CLIENT_LEFT:
                    self._metrics.on_refusal(told.reason, told.code)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        _check_size(scope)
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_key(scope["path"], headers)
        is_probe = scope["path"] in self._open  # a busy service is not a dead one
        if self._num_running > self._settings.max_requests and not is_probe:
            message = f"{self._settings.max_requests} requests are open already"
            hint = "Try again in a few seconds."
            raise ApiError(503, "RM541", sentence(message, hint), retry_after_s=1)
        _check_media(headers)
        body = await self._body(headers, receive)
        await self._app(scope, _Replay(body, receive), send)

    def _check_host(self, headers: Headers) -> None:
        """Refuse names that are not ours: pages elsewhere reach us by names of their own."""
        if "*" in self._hosts:
            return
        named = headers.getlist("host")
        found = _HOST.fullmatch(named[0]) if len(named) == 1 else None
        if found is None or found["name"].lower().rstrip(".") not in self._hosts:
            shown = ", ".join(map(repr, named)) or "no host"
            hint = "Ask under a name of this machine, or start the service with --allowed-hosts."
            raise ApiError(421, "RM544", sentence(f"{shown} is not served here", hint))

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or path in self._open or path.startswith(self._open_below):
            return
        given = headers.getlist("authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # All of them, so that the time does not say which one it was.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            what = "this API key is not known" if given else "there is no API key"
            raise ApiError(
                401,
                "RM544",
                sentence(
                    what, "Send a key of this service in the header: Authorization: Bearer KEY."
                ),
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the whole body, at most as much of it as may be."""
        limit = self._settings.max_body_bytes
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared[:20]) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _LeftError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            message_ = f"the body did not arrive within {self._settings.body_timeout_s:g} s"
            close = {"Connection": "close"}
            raise ApiError(
                408, "RM546", sentence(message_, "Send it at once."), headers=close
            ) from None


def _too_large(limit: int) -> ApiError:
    hint = "Shorten the request."
    message = f"the body is larger than {limit} bytes"
    return ApiError(413, "RM546", sentence(message, hint), headers={"Connection": "close"})


def _check_size(scope: Scope) -> None:
    """Bound what the server does not: what comes in one piece may be longer than it allows."""
    headers = scope["headers"]
    path = scope.get("raw_path") or scope["path"].encode()  # not every server has both
    if len(path) + len(scope["query_string"]) > MAX_PATH_BYTES:
        raise ApiError(
            414, "RM546", f"the address is longer than {MAX_PATH_BYTES} bytes. Shorten it."
        )
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEADER_BYTES or len(headers) > _MAX_HEADERS:
        message = f"there are more than {_MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"
        raise ApiError(431, "RM546", sentence(message, "Send fewer or shorter ones."))


def _check_media(headers: Headers) -> None:
    """Demand JSON: browsers send no such thing to another origin without asking it first."""
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    media = headers.getlist("content-type")
    coding = headers.get("content-encoding", "identity").strip().lower()
    if len(media) != 1 or _LOOSE_MEDIA.fullmatch(media[0]) is None or coding != "identity":
        what = f"a body of the type {media[0]!r}" if media else "a body without a type"
        what = what if coding == "identity" else f"a body that is encoded as {coding!r}"
        hint = "Send JSON as UTF-8 with the header: Content-Type: application/json."
        raise ApiError(415, "RM546", sentence(f"{what} is not read", hint))


class _Replay:
    """Receives a body that was read before, then what else comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Response:
    """Sends with the headers that every response has; `status` is 0 before it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = list(message.get("headers", ()))
            names = {name.lower() for name, _ in own}
            added = [pair for pair in (*_HEADERS, _NO_STORE) if pair[0] not in names]
            message = {**message, "headers": own + added}
        await self._send(message)
