"""Bundles behind HTTP in a thread of this process, for clients that are none of ours."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from recmas_runtime.serve.http.app import make_app
from recmas_runtime.serve.http.server import uvicorn_config
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.page.routes import page_routes


@contextmanager
def served(bundles: Mapping[str, Path], **settings: Any) -> Iterator[str]:
    """Serve bundles by their names, with the page, on a port that is free; gives the address."""
    address: Future[str] = Future()
    stops = threading.Event()

    async def serve() -> None:
        names = {name: str(path) for name, path in bundles.items()}
        service = await LocalService.start(names, threads=1)
        http = HttpSettings(port=0, **settings)
        app = make_app(service, http, page=page_routes())
        server = uvicorn.Server(uvicorn_config(app, http, grace_s=1))
        running = asyncio.create_task(server.serve())
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            address.set_result(f"http://127.0.0.1:{port}/")
            await asyncio.to_thread(stops.wait)
        finally:
            server.should_exit = True
            await running
            await service.close(0.0)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if address.done():
                raise
            address.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield address.result()
    finally:
        stops.set()
        thread.join()
