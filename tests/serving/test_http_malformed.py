"""Two hundred malformed requests: the right status, a body that says why, a server that lives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.http_server import Served, local, serving
from recmas_runtime.serve.http.settings import HttpSettings

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_BODY = 200_000

# What no form can be, as bytes; all are 400.
NO_JSON = {
    "nothing": b"",
    "a space": b" ",
    "a brace": b"{",
    "two braces": b"}{",
    "no value": b'{"model":}',
    "no colon": b'{"model" "tiny"}',
    "no quotes": b"{model: tiny}",
    "single quotes": b"{'model': 'tiny'}",
    "a trailing comma": b'{"model": "tiny",}',
    "two values": b'{"model": "tiny"} {}',
    "a comment": b'{"model": "tiny" /* it */}',
    "a key twice": b'{"model": "tiny", "model": "other"}',
    "not a number": b'{"temperature": NaN}',
    "an infinity": b'{"temperature": -Infinity}',
    "beyond all bounds": b'{"model": "tiny", "temperature": 1e999}',
    "thousands of digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "a leading zero": b'{"seed": 07}',
    "a hexadecimal": b'{"seed": 0x10}',
    "a plus": b'{"seed": +1}',
    "an open text": b'{"model": "tiny',
    "an unknown escape": b'{"model": "\\x41"}',
    "half an escape": b'{"model": "\\u12"}',
    "a control character": b'{"model": "ti\x00ny"}',
    "a line break in a text": b'{"model": "ti\nny"}',
    "half a surrogate pair": b'{"model": "\\ud800"}',
    "half a pair as a key": b'{"model": "tiny", "\\udfff": 1}',
    "Latin-1": '{"model": "t\u00efny"}'.encode("latin-1"),
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "an overlong form": b'{"model": "\xc0\x80"}',
    "a byte order mark": b'\xef\xbb\xbf{"model": "tiny"}',
    "bytes": bytes(range(256)),
    "zeros": b"\x00" * 100,
    "a form": b"model=tiny&prompt=what",
    "XML": b"<model>tiny</model>",
    "YAML": b"model: tiny",
    "a list": b'[{"model": "tiny"}]',
    "a text": b'"tiny"',
    "a number": b"7",
    "null": b"null",
    "true": b"true",
    "an empty object": b"{}",
    "an empty list": b"[]",
    "deep lists": b'{"model": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "open lists": b'{"model": ' + b"[" * 100_000,
    "deep objects": b'{"model": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
    "thirty levels and more": b'{"model": "tiny", "recmas": {"record": {"a": '
    + b"[" * 40
    + b"]" * 40
    + b"}}}",
    "a thousand keys": json.dumps({f"k{i}": i for i in range(1000)}).encode(),
    "a long key": json.dumps({"k" * 100_000: 1}).encode(),
    "steering characters": b'{"\\u001b[31mred\\u001b[0m": 1}',
    "a key of nothing": b'{"": 1}',
    "a prototype": b'{"__proto__": {"a": 1}}',
    "a class": b'{"__class__": "x", "model": {"__init__": 1}}',
    "a template": b'{"model": "{{ 7 * 7 }}", "messages": "{% include x %}"}',
}

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
GOOD = b'{"model": "tiny", "messages": [{"role": "user", "content": "what 7"}]}'

# Whole requests, and the statuses that may follow; 0 is a connection that is closed unanswered.
RAW: dict[str, tuple[bytes, set[int]]] = {
    "nothing": (b"", {0}),
    "line breaks": (b"\r\n\r\n\r\n", {0, 400}),
    "noise": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), {400}),
    "HTTP/0.9": (b"GET /health\r\n\r\n", {400}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 421}),
    "HTTP/9.9": (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", {200, 400, 505}),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", {400, 421}),
    "two hosts": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        {400, 421},
    ),
    "a host with a line": (b"GET /health HTTP/1.1\r\nHost: local\x00host\r\n\r\n", {400}),
    "a header without a colon": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad\r\n\r\n", {400}),
    "a header with a space": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA B: c\r\n\r\n", {400}),
    "a folded header": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n",
        {200, 400},
    ),
    "NUL in a header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: \x00\r\n\r\n", {400}),
    "many headers": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        {0, 400, 431},
    ),
    "a long header": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 500_000 + b"\r\n\r\n",
        {0, 400},
    ),
    "a long path": (b"GET /" + b"a" * 500_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {0, 400}),
    "a few headers too many": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        {431},
    ),
    "a header that is a little long": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 40_000 + b"\r\n\r\n",
        {400, 431},
    ),
    "a path that is a little long": (
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        {414},
    ),
    "a path with NUL": (b"GET /v1/models/a%00b HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
    "a path up": (b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
    "a path up, escaped": (
        b"GET /v1/models/%2e%2e%2f%2e%2e%2fetc HTTP/1.1\r\nHost: localhost\r\n\r\n",
        {404},
    ),
    "a path of no UTF-8": (b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
    "a path that steers": (b"GET /v1/models/%1b%5b31m HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
    "a path with a line": (
        b"GET /v1/models/a%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        {404},
    ),
    "a proxy's path": (
        b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        {200, 400, 404},
    ),
    "a tunnel": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404, 405}),
    "TRACE": (b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
    "an unknown method": (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
    "a method in lower case": (b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n", {200, 400, 405}),
    "PUT": (b"PUT /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
    "DELETE": (b"DELETE /v1/models/tiny HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
    "a negative length": (HEAD + JSON + b"Content-Length: -1\r\n\r\n", {400}),
    "a length that is none": (HEAD + JSON + b"Content-Length: ten\r\n\r\n", {400}),
    "a signed length": (HEAD + JSON + b"Content-Length: +2\r\n\r\n{}", {400}),
    "two lengths": (HEAD + JSON + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", {400}),
    "a huge length": (HEAD + JSON + b"Content-Length: 999999999999\r\n\r\n", {413}),
    "a length beyond numbers": (
        HEAD + JSON + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n",
        {400, 413},
    ),
    "a length and chunks": (
        HEAD + JSON + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        {400},
    ),
    "another transfer": (HEAD + JSON + b"Transfer-Encoding: gzip\r\n\r\n", {400, 501}),
    "two transfers": (
        HEAD + JSON + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        {400, 501},
    ),
    "chunks of no size": (
        HEAD + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        {0, 400},
    ),
    "a chunk that ends early": (
        HEAD + JSON + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}\r\n0\r\n\r\n",
        {0, 400},
    ),
    "a body that ends early": (HEAD + JSON + b"Content-Length: 50\r\n\r\n" + GOOD[:10], {0, 400}),
    "a long body": (
        HEAD + JSON + f"Content-Length: {MAX_BODY + 1}\r\n\r\n".encode() + b" " * (MAX_BODY + 1),
        {413},
    ),
    "no media": (HEAD + f"Content-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD, {415}),
    "two media": (HEAD + JSON + JSON + b"Content-Length: 2\r\n\r\n{}", {415}),
    "a wildcard": (HEAD + b"Content-Type: */*\r\nContent-Length: 2\r\n\r\n{}", {415}),
    "compressed": (
        HEAD + JSON + b"Content-Encoding: deflate\r\nContent-Length: 2\r\n\r\n{}",
        {415},
    ),
    "an expectation": (HEAD + JSON + b"Expect: nothing\r\nContent-Length: 2\r\n\r\n{}", {400, 417}),
    "a query of no keys": (
        b"GET /v1/models?%ff=%00&&&=&a[b]=c HTTP/1.1\r\nHost: localhost\r\n\r\n",
        {200},
    ),
}

TRACE = re.compile(rb"Traceback|File \"|\.py\b|site-packages|line \d+, in ")


@pytest.fixture(scope="module")
def served(hand_bundle: Path) -> Iterator[Served]:
    settings = HttpSettings(max_body_bytes=MAX_BODY, body_timeout_s=2.0)
    with serving(local({"tiny": hand_bundle}), settings) as server:
        yield server


def test_there_are_two_hundred() -> None:
    assert len(NO_JSON) * len(PATHS) + len(RAW) >= 200


def is_alive(served: Served) -> bool:
    """Whether it still answers, and the right thing."""
    response = served.post(PATHS[0], json.loads(GOOD))
    return bool(response.json()["choices"][0]["message"]["content"] == "h")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", list(NO_JSON))
def test_bodies_that_are_no_form(served: Served, path: str, name: str) -> None:
    named = {"content-type": "application/json"}
    response = served.http.post(path, content=NO_JSON[name], headers=named)
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] in ("RM543", "RM546")
    assert len(response.content) < 8_000, "it says what is wrong, and not everything"
    assert not TRACE.search(response.content)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", error["message"]), "nothing steers a terminal"


@pytest.mark.parametrize("name", list(RAW))
def test_requests_that_are_none(served: Served, name: str) -> None:
    data, statuses = RAW[name]
    got = served.raw(data)
    status = int(got.split(b" ", 2)[1]) if got else 0
    assert status in statuses, got[:500]
    assert not TRACE.search(got)
    assert b"X-Evil" not in got.split(b"\r\n\r\n")[0]


def test_it_lives(served: Served) -> None:
    """Runs last: pytest keeps the order of a file."""
    assert is_alive(served)
    assert served.service.num_open == 0
    assert served.get("/ready").status_code == 200
