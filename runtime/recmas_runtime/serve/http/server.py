"""How uvicorn runs the application."""

from __future__ import annotations

from typing import Final

import uvicorn
from starlette.types import ASGIApp

from recmas_runtime.serve.http.guard import MAX_HEADER_BYTES, MAX_PATH_BYTES
from recmas_runtime.serve.http.settings import HttpSettings

# Longer than clients keep connections that they may use again; at five seconds some calls fail.
KEEP_ALIVE_S: Final = 75


def uvicorn_config(
    app: ASGIApp, settings: HttpSettings, *, grace_s: float = 30.0
) -> uvicorn.Config:
    """Return settings of a server for one process; the caller logs.

    Args:
        grace_s: For connections to end once the server stops; open streams would hold it for ever.
    """
    return uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        http="h11",  # the one that bounds headers
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES + MAX_PATH_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
