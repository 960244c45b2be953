"""A Hugging Face hub on this machine: the few requests that fetching a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name, and what was asked of them.

    Attributes:
        folders: Folder of each repository; all have one commit, and the branch `main`.
        gated: Repositories whose files are refused.
        breaks_at: Files whose first answer ends after so many bytes.
        fetched: Paths of files that were sent, with the byte that each answer began at.
    """

    folders: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    breaks_at: dict[str, int] = field(default_factory=dict)
    fetched: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on 127.0.0.1; `hub.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    parts = unquote(urlsplit(request.path).path).strip("/").split("/")
    is_api = parts[:2] == ["api", "models"]
    parts = parts[2:] if is_api else parts
    repository, rest = "/".join(parts[:2]), parts[2:]
    folder = hub.folders.get(repository)
    if folder is None:
        return _refuse(request, 401, "RepoNotFound", "Repository not found")
    if rest[1:2] and rest[1] not in ("main", COMMIT):
        return _refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
    if is_api and rest[:1] == ["revision"]:
        told = {"id": repository, "sha": COMMIT, "gated": repository in hub.gated}
        siblings = [
            {"rfilename": name, "size": size, "blobId": COMMIT} for name, size in _sizes(folder)
        ]
        return _send(request, json.dumps(told | {"siblings": siblings}).encode())
    if is_api and rest[:1] == ["tree"]:
        tree = [
            {"type": "file", "path": name, "size": size, "oid": COMMIT}
            for name, size in _sizes(folder)
        ]
        return _send(request, json.dumps(tree).encode())
    if repository in hub.gated:
        return _refuse(request, 403, "GatedRepo", "Access to this model is restricted")
    name = "/".join(rest[2:])
    if rest[:1] != ["resolve"] or not (folder / name).is_file():
        return _refuse(request, 404, "EntryNotFound", "Entry not found")
    return _send_file(request, hub, name, (folder / name).read_bytes())


def _send_file(request: BaseHTTPRequestHandler, hub: Hub, name: str, data: bytes) -> None:
    begin = 0
    asked = request.headers.get("Range")
    if asked:
        begin = int(asked.removeprefix("bytes=").partition("-")[0])
    headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        "X-Repo-Commit": COMMIT,
        "Accept-Ranges": "bytes",
    }
    if request.command == "GET":
        hub.fetched.append((name, begin))
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        stop = hub.breaks_at.pop(name, None)
        if stop is not None:
            _send(request, data[begin:stop], headers=headers, size=len(data) - begin)
            request.close_connection = True
            return
    _send(request, data[begin:], status=206 if begin else 200, headers=headers)


def _sizes(folder: Path) -> list[tuple[str, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    _send(request, b"{}", status=status, headers=headers)


def _send(
    request: BaseHTTPRequestHandler,
    data: bytes,
    *,
    status: int = 200,
    headers: dict[str, Any] | None = None,
    size: int | None = None,
) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(data) if size is None else size))
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(data)
