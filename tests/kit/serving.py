"""`recmas serve` as a process, and what its clients do, with nothing but the standard library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEY = "a-key-for-tests"
PATIENCE_S = 30.0
# A question that the bundle written by hand answers without an end.
ENDLESS = "Z"
LONG = {"max_tokens": 3900}


@dataclass
class Served:
    """A running `recmas serve`."""

    process: subprocess.Popen[str]
    log_path: Path
    ready: dict[str, Any]

    @property
    def port(self) -> int:
        port = urlsplit(self.ready["url"]).port
        assert port is not None
        return port

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        text = self.log_path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of one event so far."""
        return [line for line in self.log if line["event"] == name]

    def request(
        self, method: str, path: str, body: object = None, *, key: str | None = KEY
    ) -> tuple[int, Any]:
        """Return the status and the body, parsed if it is JSON."""
        with self.open(method, path, body, key=key) as response:
            raw = response.read()
            is_json = response.getheader("content-type", "").startswith("application/json")
            return response.status, json.loads(raw) if is_json else raw.decode()

    @contextmanager
    def open(
        self, method: str, path: str, body: object = None, *, key: str | None = KEY
    ) -> Iterator[HTTPResponse]:
        """Give the response to a request as soon as its head is there."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, question: str, model: str = "by-hand", **options: object) -> tuple[int, Any]:
        """Ask for a whole answer; return the status, and its text or the error."""
        status, body = self.request("POST", "/v1/chat/completions", chat(question, model, options))
        return status, body["choices"][0]["message"]["content"] if status == 200 else body["error"]

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end; return the exit status."""
        return self.process.wait(PATIENCE_S)

    def worker_pid(self) -> int:
        """The process that has the engines."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = map(int, children.read_text(encoding="ascii").split())
        return pid

    def metric(self, line: str) -> float:
        """The value of one line of `/metrics`."""
        _, text = self.request("GET", "/metrics")
        values = dict(each.rsplit(" ", 1) for each in text.splitlines() if each[0] != "#")
        return float(values[line])


def chat(question: str, model: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the body of a request."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, **(options or {})}


@contextmanager
def serving(*arguments: object, folder: Path, key: str | None = KEY) -> Iterator[Served]:
    """Give a `recmas serve` that is ready, on a free port, with its log in `folder` as JSON."""
    log_path = folder / "log.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "RECMAS_API_KEY"}
    if key is not None:
        environment["RECMAS_API_KEY"] = key
    command = [
        *(sys.executable, "-P", "-m", "recmas_runtime.cli.main", "serve"),
        *map(str, arguments),
    ]
    command += ["--json", "--log-format", "json", "--threads", "1"]
    if "--port" not in command:
        command += ["--port", "0"]
    with (
        log_path.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith('{"ready": true'), line + log_path.read_text(encoding="utf-8")
            yield Served(process=process, log_path=log_path, ready=json.loads(line))
        finally:
            if process.poll() is None:
                process.kill()


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.02)


def sse_events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield what a stream says until it ends or is done."""
    for line in response:
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            yield json.loads(line[6:])
