"""Who may ask, under which name, and how much at a time."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from kit.http_server import Served, done, local, piece, scripted, serving, step
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.serve.http.settings import HttpSettings

KEY = "correct-horse-battery"
OTHER_KEY = "second-key-for-a-change"
CHAT = "/v1/chat/completions"
BODY = {"model": "scripted", "messages": [{"role": "user", "content": "Why?"}]}
SCRIPT = [step(), piece("So."), done("So.")]
BEHIND_THE_KEY = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/scripted"),
    ("GET", "/recmas/systems/scripted"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nope"),
    ("GET", "/admin"),
    ("POST", CHAT),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("OPTIONS", CHAT),
    ("GET", "/health/"),
    ("GET", "/page"),
    ("GET", "/page.css/../v1/models"),
]


class Figures:
    content_type = "text/plain; version=0.0.4"

    def __init__(self) -> None:
        self.responses: list[tuple[str, int]] = []
        self.refusals: list[tuple[str, str]] = []

    def render(self) -> bytes:
        return b"recmas_requests 1\n"

    def on_refusal(self, reason: str, code: str) -> None:
        self.refusals.append((reason, code))

    def on_response(self, route: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.responses.append((route, status))


async def said(request: object) -> PlainTextResponse:
    return PlainTextResponse("said")


ADMIN = [Route("/admin", said)]
PAGE = [Route("/", said), Mount("/page", routes=[Route("/style.css", said)])]


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    settings = HttpSettings(api_keys=(KEY, OTHER_KEY), max_body_bytes=10_000)
    options = {"metrics": Figures(), "routes": ADMIN, "page": PAGE}
    with serving(scripted(SCRIPT), settings, **options) as served:
        yield served


@pytest.fixture(scope="module")
def open_() -> Iterator[Served]:
    with serving(scripted(SCRIPT), HttpSettings(max_body_bytes=10_000)) as served:
        yield served


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY} {KEY}",
        f"Basic {KEY}",
        KEY,
        "Bearer \xff\xfe",
    ],
)
def test_no_key_no_answer(locked: Served, authorization: str | None) -> None:
    named = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    with locked.client() as client:
        for method, path in BEHIND_THE_KEY:
            response = client.request(method, path, headers=named, json=BODY)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "RM544")
            assert KEY not in response.text


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_each_key_opens(locked: Served, key: str) -> None:
    named = {"authorization": f"Bearer {key}"}
    assert locked.post(CHAT, BODY, **named).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/admin"):
        assert locked.get(path, **named).status_code == 200
    assert locked.get("/nope", **named).status_code == 404
    assert locked.get("/v1/models", authorization=f"bearer  {key}").status_code == 200


def test_probes_and_the_page_need_no_key_and_say_nothing_else(locked: Served) -> None:
    assert locked.get("/health").content == b'{"status":"ok"}'
    assert locked.get("/ready").content == b'{"status":"ready"}'
    for path in ("/", "/page/style.css"):
        assert locked.get(path).text == "said"


def test_metrics_may_be_opened() -> None:
    figures = Figures()
    settings = HttpSettings(api_keys=(KEY,), open_metrics=True)
    with serving(scripted(SCRIPT), settings, metrics=figures) as served:
        response = served.get("/metrics")
        assert (response.status_code, response.content) == (200, b"recmas_requests 1\n")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert served.get("/v1/models").status_code == 401
        served.post(CHAT, BODY, authorization=f"Bearer {KEY}")
        served.get("/v1/models/a/b", authorization=f"Bearer {KEY}")
    assert figures.responses == [
        ("/metrics", 200),
        ("other", 401),
        (CHAT, 200),
        ("/v1/models/{id:path}", 404),
    ]


@pytest.mark.parametrize(
    "key", ["short", "with space inside", "new\nline-is-not", "schl\u00fcssel"]
)
def test_keys_that_no_header_can_hold_are_refused(key: str) -> None:
    with pytest.raises(RecmasError, match="RM545"):
        HttpSettings(api_keys=(key,))


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "localhost."],
)
def test_hosts_of_this_machine(open_: Served, host: str) -> None:
    assert open_.get("/health", host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "localhost@evil.example",
        "localhost/evil",
        "localhost:80:80",
        "[::1",
        "127.0.0.2",
        "",
        "0.0.0.0",
    ],
)
def test_hosts_that_are_not_ours(open_: Served, host: str) -> None:
    """A page elsewhere reaches this machine under a name of its own (DNS rebinding)."""
    for path in ("/health", "/v1/models"):
        response = open_.get(path, host=host)
        assert response.status_code == 421
        assert response.json()["error"]["code"] == "RM544"


def test_two_hosts_are_none(open_: Served) -> None:
    got = open_.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    assert got.startswith((b"HTTP/1.1 421", b"HTTP/1.1 400"))
    got = open_.raw(b"GET /health HTTP/1.0\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 421")


def test_hosts_may_be_named() -> None:
    settings = HttpSettings(host="127.0.0.1", allowed_hosts=("api.example", "::2"))
    with serving(scripted(SCRIPT), settings) as served:
        assert served.get("/health", host="API.example:443").status_code == 200
        assert served.get("/health", host="[::2]").status_code == 200
        assert served.get("/health", host="other.example").status_code == 421
    with serving(scripted(SCRIPT), HttpSettings(allowed_hosts=("*",))) as served:
        assert served.get("/health", host="any.example").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_an_address_for_everywhere_names_nothing(host: str) -> None:
    assert HttpSettings(host=host).hosts == HttpSettings().hosts
    assert "10.1.2.3" in HttpSettings(host="10.1.2.3").hosts
    assert "[fd00::1]" in HttpSettings(host="fd00::1").hosts


def test_pages_of_other_origins_read_nothing(open_: Served) -> None:
    """No answer has a header that allows it, and what asks first is refused."""
    origin = {"origin": "https://evil.example"}
    for response in (
        open_.get("/v1/models", **origin),
        open_.post(CHAT, BODY, **origin),
        open_.get("/nope", **origin),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    with open_.client() as client:
        response = client.options(CHAT, headers={**origin, **asks})
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_origins_may_be_named() -> None:
    settings = HttpSettings(cors_origins=("https://app.example",), api_keys=(KEY,))
    with serving(scripted(SCRIPT), settings) as served:
        named = {"origin": "https://app.example", "authorization": f"Bearer {KEY}"}
        response = served.get("/v1/models", **named)
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        asks = {"access-control-request-method": "POST", "origin": "https://app.example"}
        with served.client() as client:
            assert client.options(CHAT, headers=asks).status_code == 200
            other = client.options(CHAT, headers={**asks, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        other = served.get("/v1/models", **{**named, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_every_response_has_the_headers_that_browsers_heed(open_: Served) -> None:
    for response in (open_.get("/health"), open_.get("/nope"), open_.post(CHAT, BODY)):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "server" not in response.headers


@pytest.mark.parametrize(
    "media",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        "text/plain; application/json",
        "application/jsonp",
        "",
    ],
)
def test_only_json_is_read(open_: Served, media: str | None) -> None:
    """Forms of other sites send these without asking first."""
    named = {} if media is None else {"content-type": media}
    with open_.client() as client:
        response = client.post(CHAT, content=b'{"model": "scripted"}', headers=named)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "RM546"


@pytest.mark.parametrize("media", ["application/json", "Application/JSON; charset=UTF-8"])
def test_json_is_read(open_: Served, media: str) -> None:
    with open_.client() as client:
        response = client.post(CHAT, content=b"{}", headers={"content-type": media})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


def test_compressed_bodies_are_not_read(open_: Served) -> None:
    named = {"content-type": "application/json", "content-encoding": "gzip"}
    with open_.client() as client:
        assert client.post(CHAT, content=b"\x1f\x8b", headers=named).status_code == 415


JSON_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


def test_a_body_that_is_too_large_is_refused_unread(open_: Served) -> None:
    got = open_.raw(JSON_HEAD + b"Content-Length: 10001\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 413")
    assert b'"code":"RM546"' in got
    got = open_.raw(JSON_HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n")
    assert got.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_a_chunked_body_is_read_no_further_than_the_bound(open_: Served) -> None:
    part = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    head = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", open_.port), timeout=10) as link:
        link.sendall(head + part * 11)  # and never the end
        assert link.recv(2**16).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    settings = HttpSettings(body_timeout_s=0.3)
    with (
        serving(scripted(SCRIPT), settings) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=10) as link,
    ):
        link.sendall(JSON_HEAD + b"Content-Length: 100\r\n\r\n{")
        got = b""
        while part := link.recv(2**16):
            got += part
    assert got.startswith(b"HTTP/1.1 408")
    assert b"RM546" in got


def test_a_key_is_asked_for_before_a_body_is_read(locked: Served) -> None:
    got = locked.raw(JSON_HEAD + b"Content-Length: 5000\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 401")


def test_headers_are_bounded(open_: Served) -> None:
    def status(more: bytes, path: bytes = b"/health") -> int:
        got = open_.raw(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + more + b"\r\n")
        return int(got.split(b" ", 2)[1]) if got else 400  # cut off while we sent

    assert status(b"A: " + b"a" * 30_000 + b"\r\n") == 200
    assert status(b"A: " + b"a" * 33_000 + b"\r\n") in (400, 431)
    assert status(b"A: " + b"a" * 500_000 + b"\r\n") == 400
    assert status(b"A: b\r\n" * 90) == 200
    assert status(b"A: b\r\n" * 110) == 431
    assert status(b"", b"/" + b"a" * 9_000) == 414
    assert open_.get("/health").status_code == 200


def test_only_so_many_requests_are_open_at_a_time() -> None:
    settings = HttpSettings(max_requests=1, first_event_s=0.01)
    body = {**BODY, "stream": True}
    with (
        serving(scripted([step(), 3600.0]), settings) as served,
        served.client() as client,
        client.stream("POST", CHAT, json=body) as stream,
    ):
        assert stream.status_code == 200
        response = served.get("/v1/models")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "RM541"
        assert served.get("/health").status_code == 200, "a busy service is not a dead one"


def test_there_are_no_websockets(open_: Served) -> None:
    got = open_.raw(
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    )
    assert got.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))  # as any other request
    assert b"101" not in got.split(b"\r\n")[0]


def test_a_bug_of_ours_is_told_without_a_trace(
    hand_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(request: object) -> PlainTextResponse:
        raise RuntimeError("secret detail")

    with serving(local({"tiny": hand_bundle}), routes=[Route("/broken", broken)]) as served:
        response = served.get("/broken")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "RM507"
        assert "secret" not in response.text
        assert served.get("/health").status_code == 200
    assert "secret detail" in caplog.text
