"""Streams byte by byte, and clients that wait, leave, or read nothing; the engines are scripted."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from typing import Any

import pytest

from kit.http_server import (
    MODEL,
    ScriptedEngines,
    Served,
    chunks,
    done,
    failed,
    piece,
    scripted,
    serving,
    step,
)
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.service import ServiceLimits

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
BODY: dict[str, Any] = {
    "model": MODEL.name,
    "messages": [{"role": "user", "content": "Why?"}],
    "stream": True,
}
PLAIN = {**BODY, "stream": False}
# Quick signs of life.
QUICK = HttpSettings(comment_s=0.05, chunk_s=0.12, first_event_s=0.05)
HUNG = 3600.0


def head(text: str) -> str:
    """Return what all chunks of a stream begin with."""
    first = chunks(text)[0]
    keys = ("id", "created", "model", "system_fingerprint", "object")
    return json.dumps({key: first[key] for key in keys}, separators=(",", ":"))[:-1]


def cancelled(served: Served, within_s: float = 5.0) -> bool:
    """Whether the one request of a server is cancelled in time."""
    assert isinstance(served.service, ScriptedEngines)
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if served.service.cancelled:
            return served.service.num_open == 0
        time.sleep(0.01)
    return False


def sent(served: Served, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """Return a connection on which a request was sent."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    link = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    link.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return link


def until(link: socket.socket, mark: bytes) -> bytes:
    """Read until something was said."""
    got = b""
    while mark not in got:
        part = link.recv(2**16)
        assert part, got
        got += part
    return got


def test_a_chat_byte_by_byte() -> None:
    script = [step("prefill"), step("send", 2), piece("Be\ncause"), piece(' "\u2028'), done("x")]
    with serving(scripted(script)) as served:
        text = served.post(CHAT, BODY).text
    begin = head(text)

    def chunk(delta: str, reason: str = "null") -> str:
        choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}'
        return f'data: {begin},"choices":[{choice}]}}\n\n'

    assert text == "".join(
        (
            chunk('{"role":"assistant","content":""}'),
            ": round 1/3 critic: prefill\n",
            ": round 2/3 critic: send\n",
            chunk('{"content":"Be\\ncause"}'),
            chunk('{"content":" \\"\\u2028"}'),
            chunk("{}", '"stop"'),
            "data: [DONE]\n\n",
        )
    )


def test_the_usage_chunk_comes_last_and_only_when_asked_for() -> None:
    with serving(scripted([piece("a"), done("a")])) as served:
        body = {**BODY, "stream_options": {"include_usage": True}}
        text = served.post(CHAT, body).text
        quiet = served.post(CHAT, {**BODY, "stream_options": {"include_usage": False}}).text
    usage = (
        '"usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":15,'
        '"prompt_tokens_details":{"cached_tokens":0},'
        '"completion_tokens_details":{"reasoning_tokens":3,"latent_steps":6}}'
    )
    assert text.endswith(f'data: {head(text)},"choices":[],{usage}}}\n\ndata: [DONE]\n\n')
    assert text.count('"usage":null') == 3
    assert "usage" not in quiet


def test_a_completion_byte_by_byte() -> None:
    with serving(scripted([step(), piece("So."), done("So.")])) as served:
        body = {"model": MODEL.name, "prompt": "Why?", "stream": True}
        text = served.post(TEXT, body).text
    begin = json.dumps(
        {key: chunks(text)[0][key] for key in ("id", "object", "created", "model")}
        | {"system_fingerprint": "recmas-000000000000"},
        separators=(",", ":"),
    )[:-1]

    def chunk(said: str, reason: str = "null") -> str:
        choice = f'{{"index":0,"text":"{said}","logprobs":null,"finish_reason":{reason}}}'
        return f'data: {begin},"choices":[{choice}]}}\n\n'

    assert text == "".join(
        (
            chunk(""),
            ": round 1/3 critic: think\n",
            chunk("So."),
            chunk("", '"stop"'),
            "data: [DONE]\n\n",
        )
    )


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_comments_have_one_line_end_and_nothing_is_numbered(path: str) -> None:
    asked = {CHAT: BODY, TEXT: {"prompt": "Why?"}, RESPONSES: {"input": "Why?"}}[path]
    body = {**asked, "model": MODEL.name, "stream": True, "recmas": {}}
    with serving(scripted([step(), 0.2, step(), piece("a"), 0.2, done("a")]), QUICK) as served:
        text = served.post(path, body).text
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = block.split("\n")
        assert not lines[-1].startswith(":"), "an empty line after a comment is an event to some"
        data = [each for each in lines if each.startswith("data: ")]
        assert len(data) == 1
        assert all(each.startswith((":", "data: ", "event: ")) for each in lines), lines
        assert path == RESPONSES or not any(each.startswith("event") for each in lines)
    assert ": waiting\n" in text


def test_a_silent_phase_has_comments_and_empty_chunks() -> None:
    with serving(scripted([step(), 0.6, piece("a"), done("a")]), QUICK) as served:
        text = served.post(CHAT, BODY).text
    deltas = [each["choices"][0]["delta"] for each in chunks(text)]
    silent = deltas[1 : deltas.index({"content": "a"})]
    assert 2 <= len(silent) <= 5
    assert all(each == {} for each in silent)
    assert 4 <= text.count(": waiting\n") <= 12


def test_comments_alone_do_not_count_as_chunks() -> None:
    """Steps come more often than clients time out, and none of them is a chunk."""
    script = [step(), 0.03] * 16
    with serving(scripted([*script, done("a")]), replace(QUICK, comment_s=HUNG)) as served:
        text = served.post(CHAT, BODY).text
    assert text.count(": round") == 16
    assert 1 <= sum(each["choices"][0]["delta"] == {} for each in chunks(text)[:-1]) <= 4


def test_headers_and_the_role_come_before_anything_is_known() -> None:
    with serving(scripted([HUNG]), QUICK) as served, sent(served, BODY) as link:
        got = until(link, b'"role":"assistant"')
        assert got.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding: chunked" in got.lower()
        assert b"x-accel-buffering: no" in got.lower()


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [
        ("input", "RM500", 400),
        ("full", "RM541", 429),
        ("stopped", "RM542", 503),
        ("failed", "RM507", 500),
    ],
)
@pytest.mark.parametrize("body", [BODY, PLAIN], ids=["stream", "plain"])
def test_what_is_refused_at_once_has_a_status(
    body: dict[str, Any], reason: Any, code: str, status: int
) -> None:
    with serving(scripted([failed(reason, code, "no")])) as served:
        response = served.post(CHAT, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["message"]) == (code, "no. Do something else.")
    wait = response.headers.get("retry-after")
    assert (wait is not None) == (status in (429, 503))
    assert wait is None or 1 <= int(wait) <= 60


def test_a_failure_within_a_stream_is_an_object_and_then_the_end() -> None:
    script = [step(), piece("half"), failed("stopped", "RM542", "it was restarted")]
    with serving(scripted(script)) as served:
        text = served.post(CHAT, BODY).text
        responses = served.post(
            RESPONSES, {"model": MODEL.name, "input": "Why?", "stream": True}
        ).text
    assert text.endswith(
        'data: {"error":{"message":"it was restarted. Do something else.",'
        '"type":"service_unavailable_error","param":null,"code":"RM542"}}\n\n'
    )
    assert "[DONE]" not in text
    last = responses.rstrip("\n").split("\n")
    assert last[-2] == "event: error"
    assert json.loads(last[-1][6:])["message"] == "it was restarted. Do something else."


def test_a_service_that_ends_ends_its_streams_with_an_error() -> None:
    with serving(scripted([piece("half"), HUNG]), QUICK) as served:
        link = sent(served, BODY)
        until(link, b"half")
        service = served.service
        served.loop.call_soon_threadsafe(lambda: served.loop.create_task(service.close(0.0)))
        with link:
            assert b'"code":"RM542"' in until(link, b"0\r\n\r\n")
        assert served.get("/ready").status_code == 503
        assert served.post(CHAT, PLAIN).status_code == 503


@pytest.mark.parametrize("body", [BODY, PLAIN], ids=["stream", "plain"])
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_a_client_that_leaves_cancels_its_request(path: str, body: dict[str, Any]) -> None:
    asked = {CHAT: {}, TEXT: {"prompt": "Why?"}, RESPONSES: {"input": "Why?"}}[path]
    sent_body = {**body, **asked}
    if path != CHAT:
        del sent_body["messages"]
    with serving(scripted([step(), HUNG]), QUICK) as served:
        link = sent(served, sent_body, path)
        if body["stream"]:
            until(link, b"round 1/3")
        else:
            while not served.service.num_open:
                time.sleep(0.01)
        link.close()
        assert cancelled(served)


def test_one_failure_of_several_answers_cancels_the_others() -> None:
    class OneFails(ScriptedEngines):
        def _send(self, request: Any) -> None:
            self.script = [HUNG] if self.asked else [0.1, failed("failed", "RM507", "no")]
            super()._send(request)

    async def start() -> ScriptedEngines:
        return OneFails([])

    with serving(start) as served:
        assert served.post(CHAT, {**PLAIN, "n": 3}).status_code == 500
        assert isinstance(served.service, ScriptedEngines)
        assert len(served.service.cancelled) == 2
        assert served.service.num_open == 0


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """Its buffers fill up, and then it holds neither rows nor a place."""
    flood = [piece("x" * 2**16)] * 400
    with serving(scripted([*flood, HUNG]), replace(QUICK, stall_timeout_s=0.3)) as served:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", served.port))
        raw = json.dumps(BODY).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        link.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        assert cancelled(served)
        assert served.get("/health").status_code == 200
        link.close()


@pytest.mark.parametrize("body", [BODY, PLAIN], ids=["stream", "plain"])
def test_an_answer_that_takes_too_long(body: dict[str, Any]) -> None:
    settings = replace(QUICK, request_timeout_s=0.5, first_event_s=5.0)
    with serving(scripted([HUNG]), settings) as served:
        response = served.post(CHAT, body)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "RM547"
        assert cancelled(served)
    with serving(scripted([step(), HUNG]), settings) as served:
        response = served.post(CHAT, body)
        assert response.status_code == (200 if body["stream"] else 504)
        assert '"code":"RM547"' in response.text
        assert cancelled(served)


def test_a_full_service_refuses_cheaply() -> None:
    limits = ServiceLimits(max_batch=1, max_queue=0)
    with serving(scripted([step(), HUNG], limits), QUICK) as served:
        with sent(served, BODY) as link:
            until(link, b"round 1/3")
            for body in (BODY, PLAIN):
                response = served.post(CHAT, body)
                assert response.status_code == 429
                assert response.json()["error"]["code"] == "RM541"
                assert response.headers["content-type"] == "application/json"
                assert 1 <= int(response.headers["retry-after"]) <= 60
        assert cancelled(served)


def test_who_waits_too_long_for_room_is_refused() -> None:
    limits = ServiceLimits(max_wait_s=0.1)
    with serving(scripted([HUNG], limits)) as served:
        response = served.post(CHAT, BODY)
    assert response.status_code == 429


def test_a_starting_service_says_when_to_come_back() -> None:
    with serving(scripted([])) as served:
        served.service.is_ready = False
        response = served.post(CHAT, PLAIN)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"  # its models take 2.5 s to load
        ready = served.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "not ready"})
        assert served.get("/health").status_code == 200
