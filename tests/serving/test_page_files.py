"""The files of the page: they ask nobody else, run nothing else, and make no markup of texts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import recmas_runtime.serve.page
from recmas_runtime.serve.page.assets import ASSETS, PAGE_SCRIPTS, REPORT_SCRIPTS, asset
from recmas_runtime.serve.page.routes import page_routes

STATIC = Path(recmas_runtime.serve.page.__file__).with_name("static")
FILES = sorted(path.name for path in STATIC.iterdir())
SVG = "http://www.w3.org/2000/svg"  # the name of a vocabulary, which nobody fetches


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=page_routes()))


def test_every_file_is_used() -> None:
    used = {*ASSETS, *PAGE_SCRIPTS, *REPORT_SCRIPTS, "index.html", "report.html"}
    assert set(FILES) == used


@pytest.mark.parametrize("name", FILES)
def test_no_outside_address(name: str) -> None:
    assert not re.findall(
        r"\b(?:https?|wss?):|//\w+\.\w|@import|url\(", asset(name).replace(SVG, "")
    )


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_texts_become_no_markup(name: str) -> None:
    ways = r"\w+HTML|document\.write|\beval\b|Function\(|DOMParser|srcdoc"
    assert not re.findall(ways, asset(name))


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_page_has_nothing_inline_and_loads_what_is_served() -> None:
    elements = _Elements(asset("index.html")).elements
    for _, attributes in elements:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
    scripts = [own["src"] for name, own in elements if name == "script"]
    assert scripts == [f"assets/{name}" for name in PAGE_SCRIPTS]
    links = {own["href"] for name, own in elements if name == "link"}
    assert {*scripts, *links} == {f"assets/{name}" for name in ASSETS}


def test_every_input_has_a_label() -> None:
    page = asset("index.html")
    for name, own in _Elements(page).elements:
        if name in ("input", "select", "textarea"):
            is_within = re.search(rf"<label[^>]*>[^<]+<{name} id=\"{own['id']}\"", page)
            assert is_within or f'<label for="{own["id"]}">' in page


def test_the_routes(client: TestClient) -> None:
    paths = {route.path for route in page_routes()}
    assert paths == {"/", *(f"/assets/{name}" for name in ASSETS)}
    page = client.get("/")
    assert (page.status_code, page.text) == (200, asset("index.html"))
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/assets/style.css").headers["content-type"].startswith("text/css")
    assert client.get("/assets/report.html").status_code == 404
    assert client.get("/assets/..%2fassets.py").status_code == 404
