"""A proxy in front of an endpoint that remembers each request and its answer.

It stands between every framework and every endpoint, so that calls, messages and tokens are counted
in one place and alike. It runs in the driver, whose time is nobody's.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# What decides an answer; frameworks send other keys, too.
SAMPLING = ("temperature", "max_tokens", "max_completion_tokens", "stop", "top_p", "seed", "stream")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request to the model and what came back."""

    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    text: str
    prompt_tokens: int
    cached_tokens: int
    written_tokens: int

    @classmethod
    def of(cls, request: dict[str, Any], answer: dict[str, Any]) -> Call:
        """Read a request of the chat form and its answer."""
        usage = answer["usage"]
        return cls(
            messages=request["messages"],
            sampling={key: request[key] for key in SAMPLING if request.get(key) is not None},
            text=answer["choices"][0]["message"]["content"],
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            written_tokens=usage["completion_tokens"],
        )


@dataclass
class Recorder:
    """Where the proxy listens, and the calls since they were last taken."""

    url: str
    calls: list[Call] = field(default_factory=list)

    def take(self) -> list[Call]:
        """Return the calls so far and forget them."""
        taken, self.calls = self.calls, []
        return taken


@contextmanager
def recording(upstream: str) -> Iterator[Recorder]:
    """Listen on this machine and hand requests on to `upstream` until the block ends."""
    target = urlsplit(upstream)
    recorder = Recorder("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=600)
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", self.path, body, headers)
                response = connection.getresponse()
                answer = response.read()
            finally:
                connection.close()
            if response.status == 200:
                recorder.calls.append(Call.of(json.loads(body), json.loads(answer)))
            self.send_response(response.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            # A system that was ended reads no answer.
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorder.url = f"http://127.0.0.1:{server.server_address[1]}{target.path}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
