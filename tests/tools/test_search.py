"""Search over a small corpus, and of the web against a server of our own."""

from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from recmas_runtime.core.errors import RecmasError, how_to_install
from recmas_runtime.formats.plan import SearchPlan, ToolsPlan
from recmas_runtime.tools import Toolbox, ToolCall, ToolResult
from recmas_runtime.tools.search import LocalSearch, Passage, passages_text

KEY = "tvly-secret-0123456789"
PASSAGES = [
    {"id": "lima", "title": "Lima", "text": "Lima is the capital of Peru."},
    {"id": "oslo", "title": "Oslo", "text": "Oslo is the capital of Norway."},
    {"id": "llama", "title": "Llama", "text": "The llama is a pack animal of Peru."},
    {"id": "twin-1", "title": "", "text": "zebra crossing"},
    {"id": "twin-2", "title": "", "text": "zebra crossing"},
    {"id": "uni", "title": "Z\u00fcrich", "text": "Z\u00fcrich liegt am See."},
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "search.jsonl"
    path.write_text("\n".join(map(json.dumps, PASSAGES)) + "\n\n", encoding="utf-8")
    return path


def found(corpus: Path, query: str, top_k: int = 3) -> list[str]:
    search = LocalSearch(corpus, top_k=top_k)
    return [passage.source for passage in search.find(query, timeout_s=1)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("capital of Norway", ["oslo", "lima"]),
        ("What is the CAPITAL of Peru?", ["lima", "oslo", "llama"]),
        ("zebra", ["twin-1", "twin-2"]),
        ("z\u00fcrich", ["uni"]),
        ("of the", []),
        ("quokka", []),
        ("", []),
    ],
)
def test_ranking(corpus: Path, query: str, expected: list[str]) -> None:
    pytest.importorskip("bm25s", reason="the extra `search` is not installed")
    assert found(corpus, query) == expected
    assert found(corpus, query, top_k=1) == expected[:1]


def u(text: str) -> str:
    """Return a text from its escapes; the project's sources are ASCII."""
    return text.encode("ascii").decode("unicode_escape")


# Capitals in languages that put no spaces between words, or whose words carry particles.
SCRIPTS = {
    "peru-zh": r"\u79d8\u9c81\u7684\u9996\u90fd\u662f\u5229\u9a6c\u3002",
    "france-zh": r"\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece\u3002",
    "japan-ja": r"\u65e5\u672c\u306e\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059\u3002",
    "phone-ja": (
        r"iPhone 15\u306e\u5024\u6bb5\u306f\u30a2\u30c3\u30d7\u30eb\u306e\u30b5\u30a4"
        r"\u30c8\u3067"
    ),
    "tea-ja": r"\u7dd1\u8336\u3092\u98f2\u3080",
    "korea-ko": r"\ub300\ud55c\ubbfc\uad6d\uc758 \uc218\ub3c4\ub294 \uc11c\uc6b8\uc774\ub2e4.",
    "thai": (
        r"\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e40\u0e1b\u0e47\u0e19\u0e40\u0e21"
        r"\u0e37\u0e2d\u0e07\u0e2b\u0e25\u0e27\u0e07"
    ),
    "hindi": (
        r"\u0926\u093f\u0932\u094d\u0932\u0940 \u0930\u093e\u091c\u0927\u093e\u0928"
        r"\u0940 \u0939\u0948"
    ),
    "cafe": r"Un cafe\u0301 est ferme\u0301.",
    "strasse": r"Die STRASSE ist lang",
    "khmer": r"\u1797\u17d2\u1793\u17c6\u1796\u17c1\u1789",
}


@pytest.mark.parametrize(
    ("query", "best"),
    [
        (r"\u79d8\u9c81\u7684\u9996\u90fd", "peru-zh"),
        (r"\u5229\u9a6c", "peru-zh"),
        (r"\u6cd5\u56fd\u9996\u90fd\u5728\u54ea\u91cc", "france-zh"),
        (r"\u65e5\u672c\u306e\u9996\u90fd\u306f\u3069\u3053\u3067\u3059\u304b", "japan-ja"),
        (r"\u6771\u4eac", "japan-ja"),
        (r"iphone\u306e\u5024\u6bb5", "phone-ja"),
        (r"\uff49\uff30\uff48\uff4f\uff4e\uff45", "phone-ja"),
        (r"\uff71\uff6f\uff8c\uff9f\uff99", "phone-ja"),
        (r"\u8336", "tea-ja"),
        (r"\uc11c\uc6b8", "korea-ko"),
        (r"\u1109\u1165\u110b\u116e\u11af", "korea-ko"),
        (r"\ub300\ud55c\ubbfc\uad6d \uc218\ub3c4", "korea-ko"),
        (r"\u0e40\u0e21\u0e37\u0e2d\u0e07\u0e2b\u0e25\u0e27\u0e07", "thai"),
        (r"\u0930\u093e\u091c\u0927\u093e\u0928\u0940", "hindi"),
        (r"caf\u00e9", "cafe"),
        (r"FERME\u0301", "cafe"),
        (r"stra\u00dfe", "strasse"),
        (r"\u1796\u17c1\u1789", "khmer"),
    ],
)
def test_words_of_every_script(tmp_path: Path, query: str, best: str) -> None:
    pytest.importorskip("bm25s", reason="the extra `search` is not installed")
    corpus = tmp_path / "search.jsonl"
    passages = [{"id": name, "text": u(text)} for name, text in SCRIPTS.items()]
    corpus.write_text("\n".join(map(json.dumps, passages)), encoding="utf-8")
    assert found(corpus, u(query), top_k=1) == [best]


def test_passages_that_share_nothing_are_not_found(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="the extra `search` is not installed")
    corpus = tmp_path / "search.jsonl"
    corpus.write_text(json.dumps({"id": "peru", "text": u(SCRIPTS["peru-zh"])}), encoding="utf-8")
    # One character in common is no word in common.
    assert found(corpus, u(r"\u56fd\u7684")) == []
    assert found(corpus, u(r"\u90fd\u9996")) == []


def local_box(corpus: Path, **bounds: Any) -> Toolbox:
    plan = SearchPlan(backend="local", corpus="tools/search.jsonl", top_k=2)
    return Toolbox(ToolsPlan(search=plan, **bounds), corpus=corpus)


def search(box: Toolbox, query: str) -> ToolResult:
    return box.run(ToolCall("search", query), num_earlier=0)


def test_search_as_a_tool(corpus: Path) -> None:
    pytest.importorskip("bm25s", reason="the extra `search` is not installed")
    box = local_box(corpus)
    result = search(box, "capital of Norway")
    assert result.status == "ok"
    assert result.text == (
        "[1] Oslo (oslo)\nOslo is the capital of Norway.\n\n"
        "[2] Lima (lima)\nLima is the capital of Peru."
    )
    assert search(box, "quokka").text == "nothing found"
    assert search(box, "").status == "error"


def test_an_empty_corpus_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="the extra `search` is not installed")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    assert search(local_box(empty), "anything").text == "nothing found"


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', '{"text": 3}', "[" * 100_000])
def test_a_broken_corpus_is_refused(corpus: Path, line: str) -> None:
    pytest.importorskip("bm25s", reason="the extra `search` is not installed")
    corpus.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(RecmasError, match=r"search\.jsonl:2: error\[RM404\]"):
        LocalSearch(corpus, top_k=1)
    assert search(local_box(corpus), "fine").status == "refused"


def test_without_bm25s_the_model_is_told(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "bm25s":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    result = search(local_box(corpus), "anything")
    assert result.status == "refused"
    assert result.text == (
        f"bm25s is not installed, which `search` over a corpus needs. {how_to_install('search')}"
    )


def test_passages_share_the_room() -> None:
    passages = [Passage(f"id{i}", "", "x" * 1000) for i in range(3)]
    text = passages_text(passages, max_chars=300)
    assert 250 < len(text) <= 300
    assert [line for line in text.splitlines() if line.startswith("[")] == [
        "[1] (id0)",
        "[2] (id1)",
        "[3] (id2)",
    ]
    assert text.count("characters left out]") == 3


# The web service: a server that answers as the test says and keeps what it was asked.


class Service(BaseHTTPRequestHandler):
    status = 200
    reply: bytes = b""
    location: str | None = None
    hang: threading.Event | None = None
    asked: list[tuple[str, dict[str, str], bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, dict(self.headers), body))
        if self.hang is not None:
            self.hang.wait(5)
        self.send_response(self.status)
        if self.location:
            self.send_header("Location", self.location)
        self.end_headers()
        self.wfile.write(self.reply)

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers), b""))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Service], str]]:
    handler = type("Handler", (Service,), {"asked": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("TAVILY_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield handler, f"http://127.0.0.1:{server.server_port}/search"
    server.shutdown()
    server.server_close()


def web_box(endpoint: str, timeout_s: float = 5) -> Toolbox:
    plan = SearchPlan(backend="tavily", corpus=None, top_k=2)
    return Toolbox(
        ToolsPlan(search=plan, timeout_s=timeout_s), corpus=None, tavily_endpoint=endpoint
    )


def test_web_search(service: tuple[type[Service], str]) -> None:
    handler, endpoint = service
    results = [
        {"title": f"T{i}", "url": f"https://x/{i}", "content": f"c{i}", "score": 0.5}
        for i in range(3)
    ]
    handler.reply = json.dumps({"query": "q", "results": results}).encode()
    result = search(web_box(endpoint), "who?")
    assert (result.status, result.text) == (
        "ok",
        "[1] T0 (https://x/0)\nc0\n\n[2] T1 (https://x/1)\nc1",
    )
    ((path, headers, body),) = handler.asked
    assert path == "/search"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert json.loads(body) == {"query": "who?", "max_results": 2}


@pytest.mark.parametrize(
    ("status", "reply", "text"),
    [
        (401, b"", "the service does not know the key in TAVILY_API_KEY (HTTP 401)"),
        (429, b"", "too many searches in a short time (HTTP 429)"),
        (500, KEY.encode(), "the service refused the search (HTTP 500)"),
        (200, b"<html>", "the service's reply has an unknown form"),
        (200, b"[1]", "the service's reply has an unknown form"),
        (200, b'{"results": [{"title": "a"}]}', "the service's reply has an unknown form"),
        (200, b" " * (5 << 20), "the service's reply is too long"),
    ],
)
def test_web_errors(
    service: tuple[type[Service], str], status: int, reply: bytes, text: str
) -> None:
    handler, endpoint = service
    handler.status, handler.reply = status, reply
    result = search(web_box(endpoint), "q")
    assert (result.status, result.text) == ("error", text)


def test_a_service_that_hangs(service: tuple[type[Service], str]) -> None:
    handler, endpoint = service
    handler.hang = threading.Event()
    result = search(web_box(endpoint, timeout_s=0.1), "q")
    handler.hang.set()
    assert (result.status, result.text) == ("timeout", "stopped: it took longer than 0.1 s")


def test_nobody_there(service: tuple[type[Service], str]) -> None:
    result = search(web_box("http://127.0.0.1:1/search"), "q")
    assert result.status == "error"
    assert result.text.startswith("the service cannot be reached: ")


def test_redirects_do_not_carry_the_key_away(service: tuple[type[Service], str]) -> None:
    handler, endpoint = service
    handler.status, handler.location = 302, endpoint.replace("/search", "/elsewhere")
    assert search(web_box(endpoint), "q").status == "error"
    assert [path for path, _, _ in handler.asked] == ["/search"]


def test_a_key_that_comes_back_is_not_shown(service: tuple[type[Service], str]) -> None:
    handler, endpoint = service
    echo = {"title": KEY, "url": f"https://x/?key={KEY}", "content": f"key {KEY}."}
    escaped = json.dumps({"results": [echo]}).replace("secret", "\\u0073ecret")
    handler.reply = escaped.encode()
    result = search(web_box(endpoint), "q")
    assert result.status == "ok"
    assert KEY not in repr(result)


@pytest.mark.parametrize("key", [None, "", "  ", "tvly\nInjected: 1", "schl\u00fcssel"])
def test_without_a_key_the_model_is_told(
    service: tuple[type[Service], str], monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    handler, endpoint = service
    monkeypatch.delenv("TAVILY_API_KEY")
    if key is not None:
        monkeypatch.setenv("TAVILY_API_KEY", key)
    result = search(web_box(endpoint), "q")
    assert result.status == "refused"
    assert "web search is not set up" in result.text
    assert not handler.asked
    assert "Injected" not in result.text
