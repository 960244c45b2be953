"""A server under clients that behave badly, for long: no wrong answer, none lost, nothing kept.

    python benchmarks/serving/soak_service.py BUNDLE [--requests 5000] [--clients 16] [--kills 2]

Starts `recmas serve BUNDLE` and asks it over loopback: whole answers and streams, greedy and
sampled, clients that leave in the middle or give up at once, bodies that are wrong. Its worker is
killed meanwhile. Every answer is compared with that of the same question asked alone, where only a
choice between two tokens that are about as likely may differ, and what has no answer must have an
error. Resident memory and open files of both processes are read all along; memory may grow by 2 %
over what it was after the first tenth, files not at all. Ends with status 1 if anything of this
does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import recmas_runtime as rt
from recmas_runtime.checking.machine import describe_machine

# The judge of differences is the tests' own.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from kit.alike import Outcome, Request, find_tie
from kit.alike import alone as asked_alone

ALLOWED: Final = 0.02
KEY: Final = "the-key-of-the-soak"
CHAT: Final = "/v1/chat/completions"
# Longest that anything may take, a worker that is started again included.
PATIENCE_S: Final = 600.0
# Memory and files are read when all clients have their answers, at most so often.
PARTS: Final = 50
QUIET_S: Final = 0.3
WRONG: Final[tuple[tuple[int, Any], ...]] = (
    (400, b"{"),
    (400, b"[]"),
    (400, b'{"messages": []}'),
    (400, b'\xff\xfe{"model": 1}'),
    (400, b"[" * 5000),
    (404, {"model": "nobody"}),
    (400, {"messages": [{"role": "user", "content": 7}]}),
    (400, {"messages": [{"role": "nobody", "content": "?"}]}),
    (400, {"temperature": "hot"}),
    (400, {"temperature": -1}),
    (400, {"max_tokens": 0}),
    (400, {"nonsense": True}),
    (400, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    (400, {"recmas": {"record": 3}}),
    (413, b'{"model": "' + b"x" * (5 * 2**20) + b'"}'),
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and its answer when nobody else asks."""

    request: Request
    outcome: Outcome

    @property
    def text(self) -> str:
        return str(self.request.record["question"])


@dataclass
class Tally:
    """What came of the requests."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    differ: list[tuple[Question, str]] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Memory and files of a process after so many requests."""

    requests: int
    resident: int
    files: int


class Lost(Exception):
    """A connection ended without an answer and without an error."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    # Full within the first tenth, so that what grows later is no kept prompt.
    parser.add_argument("--keep-memory", type=int, default=2, metavar="MIB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return asyncio.run(run(parser.parse_args()))


async def run(arguments: argparse.Namespace) -> int:
    dice = random.Random(arguments.seed)
    questions = alone(arguments, dice)
    began = time.monotonic()
    soak = Soak(arguments, questions, dice)
    with soak.server:
        try:
            await soak.run()
        finally:
            soak.server.terminate()
    seconds = time.monotonic() - began
    status = soak.server.wait()
    soak.explain()
    return soak.report(seconds, status)


def alone(arguments: argparse.Namespace, dice: random.Random) -> list[Question]:
    """Ask every question by itself, on engines of this process."""
    found = []
    with rt.load(arguments.bundle, threads=arguments.threads) as system:
        for number in range(arguments.questions):
            words = " ".join(dice.choices(("why", "how", "when", "who", "where"), k=number % 12))
            last = "Z" if number % 3 == 0 else str(number % 10)
            text = f"{words} {last}".strip()
            sampling: dict[str, Any] = {"max_new_tokens": dice.randint(1, arguments.max_tokens)}
            if number % 4 == 1:
                sampling |= {"temperature": 1.0, "seed": number}
            request = Request(record={"question": text}, sampling=sampling)
            found.append(Question(request=request, outcome=asked_alone(system, request)))
    return found


class Soak:
    """The clients, and the server that they ask."""

    def __init__(
        self, arguments: argparse.Namespace, questions: list[Question], dice: random.Random
    ) -> None:
        self.arguments = arguments
        self.questions = questions
        self.dice = dice
        self.tally = Tally()
        self.readings: dict[int, list[Reading]] = {}
        self.metrics: dict[str, float] = {}
        command = [
            *(
                sys.executable,
                "-P",
                "-m",
                "recmas_runtime.cli.main",
                "serve",
                str(arguments.bundle),
            ),
            *("--port", "0", "--json", "--threads", str(arguments.threads)),
            *("--max-queue", str(2 * arguments.clients)),
            *("--keep-memory", str(arguments.keep_memory)),
        ]
        self.log = (
            Path(f"soak-{os.getpid()}.log")
            if arguments.json is None
            else (arguments.json.with_suffix(".log"))
        )
        with self.log.open("w", encoding="utf-8") as log:
            self.server = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "RECMAS_API_KEY": KEY},
            )
        assert self.server.stdout is not None
        ready = json.loads(self.server.stdout.readline())
        self.port = urlsplit(ready["url"]).port
        (self.model,) = ready["models"]

    async def run(self) -> None:
        """Send all requests, some clients at a time; kill the worker in between."""
        total, kills = self.arguments.requests, self.arguments.kills
        deaths = {total * (kill + 1) // (kills + 1) for kill in range(kills)}
        size = max(2 * self.arguments.clients, total // PARTS)
        for part in range(0, total, size):
            todo = iter(range(part, min(part + size, total)))
            clients = (self.client(todo, deaths) for _ in range(self.arguments.clients))
            await asyncio.gather(*clients)
            await asyncio.sleep(QUIET_S)
            self.read(min(part + size, total))
        _, body = await self.whole("GET", "/metrics", None)
        for line in body.decode().splitlines():
            name, _, value = line.rpartition(" ")
            if not line.startswith("#"):
                self.metrics[name] = float(value)

    async def client(self, todo: Iterator[int], deaths: set[int]) -> None:
        """Send requests, one after the other, while there are any to send."""
        for number in todo:
            if number in deaths:
                os.kill(self.worker(), signal.SIGKILL)
            try:
                await asyncio.wait_for(self.one(), PATIENCE_S)
            except (Lost, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.tally.lost.append(f"request {number}: {error!r}")

    def worker(self) -> int:
        """The process with the engines; waits for one while there is none."""
        children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children")
        while not (pids := children.read_text(encoding="ascii").split()):
            time.sleep(0.01)
        return int(pids[0])

    def read(self, num_done: int) -> None:
        """Note memory and files of both processes; nothing runs meanwhile."""
        for pid in (self.server.pid, self.worker()):
            try:
                pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
                files = len([*Path(f"/proc/{pid}/fd").iterdir()])
            except OSError:  # it was killed just now
                continue
            resident = int(pages) * os.sysconf("SC_PAGE_SIZE")
            reading = Reading(requests=num_done, resident=resident, files=files)
            self.readings.setdefault(pid, []).append(reading)

    async def one(self) -> None:
        """Be one client: its request, and what it does with the answer."""
        question = self.dice.choice(self.questions)
        (kind,) = self.dice.choices(
            ("whole", "stream", "leaves a stream", "gives up", "leaves at once", "wrong"),
            (40, 25, 12, 8, 3, 12),
        )
        if kind == "wrong":
            await self.ask_wrongly(question)
        elif kind in ("whole", "stream"):
            while not await self.ask(question, stream=kind == "stream"):
                await asyncio.sleep(0.2)
        else:
            await self.leave(question, kind)
        self.tally.ended[kind] += 1

    async def ask(self, question: Question, *, stream: bool) -> bool:
        """Ask and compare; False if the service had no time for it."""
        body = self.body(question, stream=stream)
        if not stream:
            status, raw = await self.whole("POST", CHAT, body)
            data = json.loads(raw)
            text = data["choices"][0]["message"]["content"] if status == 200 else ""
        else:
            status, text, data = await self.streamed(body)
        if "error" in data:
            code = data["error"]["code"]
            self.tally.refused[f"{status} {code}"] += 1
            if code not in ("RM541", "RM542"):
                self.tally.wrong.append(f"{question.text!r}: {data['error']}")
                return True
            return False
        if text != question.outcome.text:
            self.tally.differ.append((question, text))
        return True

    async def ask_wrongly(self, question: Question) -> None:
        """Send a body that is refused."""
        expected, body = self.dice.choice(WRONG)
        if isinstance(body, dict):
            body = {**self.body(question, stream=False), **body}
        status, raw = await self.whole("POST", CHAT, body)
        shown = body if isinstance(body, dict) else body[:40]
        if status == 503:  # the worker is started again; that is said first
            self.tally.refused["503 for a wrong body"] += 1
        elif status != expected or set(json.loads(raw)) != {"error"}:
            self.tally.wrong.append(f"{shown}: {status} {raw[:200]!r}, expected {expected}")

    async def leave(self, question: Question, kind: str) -> None:
        """Ask, and go away before the answer is there, or nearly."""
        reader, writer = await self.send("POST", CHAT, self.body(question, stream=True))
        try:
            if kind == "gives up":
                await asyncio.sleep(self.dice.random() * 0.1)
            elif kind == "leaves a stream":
                for _ in range(self.dice.randint(1, 20)):
                    if not await reader.readline():
                        return
        finally:
            writer.transport.abort() if self.dice.random() < 0.5 else writer.close()

    def body(self, question: Question, *, stream: bool) -> dict[str, Any]:
        sampling = {"temperature": 0.0, **question.request.sampling}
        sampling["max_tokens"] = sampling.pop("max_new_tokens")
        messages = [{"role": "user", "content": question.text}]
        return {"model": self.model, "messages": messages, "stream": stream, **sampling}

    async def send(
        self, method: str, path: str, body: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request on a connection of its own."""
        raw = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + raw)
        return reader, writer

    async def head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").strip().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, value in pairs}

    async def whole(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Send a request and return status and body of what comes."""
        reader, writer = await self.send(method, path, body)
        try:
            status, headers = await self.head(reader)
            raw = (
                await reader.read()
                if "content-length" not in headers
                else (await reader.readexactly(int(headers["content-length"])))
            )
            return status, raw
        finally:
            writer.close()

    async def streamed(self, body: Any) -> tuple[int, str, dict[str, Any]]:
        """Send a request and return status, the text of a stream, and its error if it has one."""
        reader, writer = await self.send("POST", CHAT, body)
        try:
            status, headers = await self.head(reader)
            if not headers["content-type"].startswith("text/event-stream"):
                return status, "", json.loads(await reader.read())
            text = ""
            while line := await reader.readline():
                if line.strip() == b"data: [DONE]":
                    return status, text, {}
                if not line.startswith(b"data: "):
                    continue
                data = json.loads(line[6:])
                if "error" in data:
                    return status, "", data
                for choice in data["choices"]:
                    text += choice["delta"].get("content") or ""
            raise Lost(f"a stream without an end after {text!r}")
        finally:
            writer.close()

    def explain(self) -> None:
        """Tell ties of tokens from wrong answers."""
        with rt.load(self.arguments.bundle, threads=self.arguments.threads) as system:
            for question, text in self.tally.differ:
                got, wanted = Outcome(text=text), question.outcome
                tie = find_tie(system, question.request, wanted, got)
                if tie is None:
                    self.tally.wrong.append(f"{question.text!r}: {text!r}, alone {wanted.text!r}")
                else:
                    self.tally.ties.append(f"{question.text!r}: {tie}")

    def report(self, seconds: float, status: int) -> int:
        """Print what came of it; return 1 if something must not be."""
        arguments, tally = self.arguments, self.tally
        facts = describe_machine()
        print(
            f"{arguments.requests} requests of {arguments.clients} clients in {seconds:.0f} s, "
            f"{arguments.kills} kills; {facts['cpu']}, {facts['logical_cpus']} cores, "
            f"{date.today().isoformat()}\n"
        )
        print("| kind | requests |\n|---|--:|")
        for kind, count in sorted(tally.ended.items()):
            print(f"| {kind} | {count} |")
        for kind, count in sorted(tally.refused.items()):
            print(f"| (asked again after {kind}) | {count} |")
        failed = [*tally.wrong, *tally.lost]
        print(
            f"\nwrong: {len(tally.wrong)}, lost: {len(tally.lost)}; "
            f"another token of two that are about as likely: {len(tally.ties)}"
        )
        for line in failed[:20]:
            print(f"  {line}")
        print("\n| process | requests | first tenth MB | largest after MB | growth | files |")
        print("|---|--:|--:|--:|--:|--:|")
        for pid in self.readings:
            if (grown := self.growth(pid)) is not None:
                failed.append(grown)
        for line in ("recmas_requests_running", "recmas_requests_waiting"):
            if self.metrics[line] != 0:
                failed.append(f"{line} {self.metrics[line]:g}")
        if self.metrics["recmas_worker_restarts_total"] != arguments.kills:
            failed.append(f"{self.metrics['recmas_worker_restarts_total']:g} restarts")
        if status != 0:
            failed.append(f"the server ended with status {status}")
        print("\n" + ("holds" if not failed else f"FAILS: {failed[-5:]}"))
        if arguments.json is not None:
            report = {
                "seconds": seconds,
                "ended": tally.ended,
                "refused": tally.refused,
                "wrong": tally.wrong,
                "ties": tally.ties,
                "lost": tally.lost,
                "failed": failed,
                "metrics": self.metrics,
                "readings": {pid: [vars(r) for r in rs] for pid, rs in self.readings.items()},
            }
            arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
        return 1 if failed else 0

    def parts(self, pid: int) -> tuple[list[Reading], list[Reading]]:
        """Return readings in the first tenth of all requests of a process's life, and later."""
        readings = self.readings[pid]
        settled = readings[0].requests + self.arguments.requests // 10
        first = [each for each in readings if each.requests <= settled]
        return first, readings[len(first) :]

    def growth(self, pid: int) -> str | None:
        """Print how a process grew; return that if it is more than it may.

        Workers are one program that was started several times, and how much one of them takes
        depends on how many requests it ever had at once: each is held against what the largest of
        them had settled at.
        """
        is_front_end = pid == self.server.pid
        name = "front end" if is_front_end else f"worker {pid}"
        first, later = self.parts(pid)
        if not later:
            return None
        alike = [other for other in self.readings if (other == self.server.pid) == is_front_end]
        base = max(each.resident for other in alike for each in self.parts(other)[0])
        own, largest = (max(each.resident for each in part) for part in (first, later))
        growth = largest / base - 1
        files = max(each.files for each in later) - max(each.files for each in first)
        count = f"{first[0].requests}-{later[-1].requests}"
        print(
            f"| {name} | {count} | {own / 1e6:.1f} | {largest / 1e6:.1f} | {growth:+.2%} | "
            f"{max(each.files for each in first)} {files:+d} |"
        )
        return f"{name}: {growth:+.2%}, {files:+d} files" if growth > ALLOWED or files > 0 else None


if __name__ == "__main__":
    sys.exit(main())
