"""Routes of the page, for a Starlette or FastAPI application."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recmas_runtime.serve.page.assets import ASSETS, PAGE_POLICY, asset

_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> list[Route]:
    """Return the routes of the page at `/` and of the files that it loads.

    They hold no answers and may be open where answers need a key: the page asks for it.
    """
    page = _route("/", asset("index.html"), "text/html", {"Content-Security-Policy": PAGE_POLICY})
    return [page, *(_route(f"/assets/{name}", asset(name), ASSETS[name]) for name in ASSETS)]


def _route(path: str, text: str, media_type: str, headers: dict[str, str] | None = None) -> Route:
    return Route(path, _endpoint(text, media_type, headers or {}), include_in_schema=False)


def _endpoint(
    text: str, media_type: str, headers: dict[str, str]
) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
    sent = {**_HEADERS, **headers, "ETag": tag}

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=sent)
        return Response(text, headers=sent, media_type=media_type)

    return endpoint
