"""Systems with an agent behind an API, without torch; an endpoint that misbehaves on order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from msgspec import structs

from kit.hand_bundle import edit_json, rehash, write_hand_bundle
from recmas_runtime.formats.codec import from_json, to_json
from recmas_runtime.formats.manifest import RemoteEntry
from recmas_runtime.formats.plan import (
    AgentPlan,
    AskStep,
    LinkPlan,
    Message,
    Plan,
    PrefillStep,
    PromptPart,
    SendStep,
    Step,
    WriteStep,
)

KEY_ENV = "RECMAS_TEST_KEY"
# What the endpoint counts for each call.
USED = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}


def completion(text: str | None, reason: str = "stop", **more: Any) -> dict[str, Any]:
    """Return a chat completion as services send it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "far",
        "choices": [choice],
        "usage": USED,
        **more,
    }


@dataclass
class Reply:
    """What the endpoint sends: a body as JSON, or text as it is, after a while or an event."""

    body: object = field(default_factory=lambda: completion("4"))
    status: int = 200
    after_s: float = 0.0
    after: threading.Event | None = None
    headers: dict[str, str] = field(default_factory=dict)


Answering = Callable[[dict[str, Any]], Reply]


@dataclass
class Endpoint:
    """A running endpoint.

    Attributes:
        asked: The bodies of requests, in the order they came.
        keys: Their Authorization headers.
        left: How many clients went before their reply.
    """

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    left: int = 0


@contextmanager
def endpoint(answering: Answering | Sequence[Reply] | Reply) -> Iterator[Endpoint]:
    """Run an endpoint of OpenAI's form; of several replies the last one stays.

    A request for a stream gets a good reply's text in pieces of one character.
    """
    lock = threading.Lock()
    now = 0

    def reply_to(body: dict[str, Any]) -> Reply:
        if callable(answering):
            return answering(body)
        replies = [answering] if isinstance(answering, Reply) else list(answering)
        return replies[min(len(found.asked), len(replies)) - 1]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                found.asked.append(body)
                found.keys.append(self.headers.get("Authorization"))
                now += 1
                found.most_at_once = max(found.most_at_once, now)
                reply = reply_to(body)
            time.sleep(reply.after_s)
            if reply.after is not None:
                reply.after.wait(30)
            with lock:
                now -= 1
            raw, kind = _encoded(reply, streams=bool(body.get("stream")))
            try:
                self.send_response(reply.status)
                headers = {"Content-Type": kind, "Content-Length": str(len(raw)), **reply.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                found.left += 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = Endpoint(url=f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _encoded(reply: Reply, *, streams: bool) -> tuple[bytes, str]:
    if isinstance(reply.body, str):
        return reply.body.encode(), "application/json"
    is_good = reply.status == 200 and isinstance(reply.body, dict) and reply.body.get("choices")
    if not (streams and is_good):
        return json.dumps(reply.body).encode(), "application/json"
    body: Any = reply.body
    choice = body["choices"][0]
    head = {**body, "object": "chat.completion.chunk"}
    del head["usage"]
    deltas = [{"content": each} for each in choice["message"]["content"] or ""]
    chunks = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    end = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    chunks += [{**head, "choices": [end]}, {**head, "choices": [], "usage": body["usage"]}]
    lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return f"{lines}data: [DONE]\n\n".encode(), "text/event-stream"


def write_mixed_bundle(root: Path, entry: RemoteEntry, *, answers: str = "solver") -> Path:
    """Write the bundle of `kit.hand_bundle` with one of its agents on a remote model.

    Args:
        answers: `solver`, on the backbone, after what a remote planner wrote; or `planner`, on the
            remote model, after what the solver wrote.
    """
    write_hand_bundle(root)
    plan = _mixed(from_json(Plan, json.loads((root / "plan.json").read_text()), file=""), answers)
    (root / "plan.json").write_text(json.dumps(to_json(plan)))
    edit_json(root / "manifest.json", "remotes", {"far": to_json(entry)})
    rehash(root)
    return root


def _mixed(plan: Plan, answers: str) -> Plan:
    source = "planner" if answers == "solver" else "solver"
    question, slot = (
        PromptPart(kind="field", value="question"),
        PromptPart(kind="slot", value=source),
    )
    system = (PromptPart(kind="text", value="Be brief."),)
    parts = {source: (question,), answers: (question, PromptPart(kind="text", value=" "), slot)}
    agents = {
        "planner": AgentPlan(
            backbone="far",
            system=system,
            first=None,
            then=parts["planner"],
            inner="",
            latent_steps=0,
        ),
        "solver": structs.replace(
            plan.agents["solver"], system=(), then=parts["solver"], latent_steps=0
        ),
    }
    link = f"{source}->{answers}"
    message = Message(agent=answers, slot=source, link=link, round=1)
    send = SendStep(round=1, source=source, targets=(answers,), links=(link,), apply_inner=False)

    def prefill(*messages: Message) -> PrefillStep:
        return PrefillStep(
            round=1,
            agents=("solver",),
            variants=("then",),
            messages=messages,
            reuse_prefix=False,
            cache="solver",
        )

    def ask(*messages: Message, limit: int | None = None) -> AskStep:
        return AskStep(
            round=1,
            agents=("planner",),
            variants=("then",),
            messages=messages,
            max_new_tokens=limit,
            greedy=limit is not None,
        )

    steps: tuple[Step, ...] = (ask(limit=6), send, prefill(message), plan.steps[-1])
    if answers == "planner":
        write = WriteStep(
            round=1, agents=("solver",), cache="solver", max_new_tokens=6, greedy=True
        )
        steps = (prefill(), write, send, ask(message))
    return structs.replace(
        plan,
        rounds=1,
        answer_agent=answers,
        agents=agents,
        links={link: LinkPlan(source=source, target=answers, carries="text", max_tokens=6)},
        caches={"solver": plan.caches["solver"]},
        steps=tuple(structs.replace(step, round=1) for step in steps),
    )
