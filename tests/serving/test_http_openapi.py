"""The OpenAPI page says what is true, and nothing on it, or beside it, is loaded from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from kit.http_server import MODEL, Served, done, scripted, serving
from recmas_runtime.serve.http.settings import HttpSettings
from test_http_refused import NEUTRAL, REFUSED

KEY = "key-of-the-page"
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Why?"}]},
    "/v1/completions": {"prompt": "Why?"},
    "/v1/responses": {"input": "Why?"},
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(scripted([done("So.")]), HttpSettings(api_keys=(KEY,))) as server:
        yield server


@pytest.fixture(scope="module")
def page(served: Served) -> dict[str, Any]:
    response = served.get("/openapi.json", authorization=f"Bearer {KEY}")
    return dict(response.json())


def checker(page: dict[str, Any], schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": page["components"]})


def form(page: dict[str, Any], path: str) -> jsonschema.Draft202012Validator:
    body = page["paths"][path]["post"]["requestBody"]
    assert body["required"]
    return checker(page, body["content"]["application/json"]["schema"])


def test_all_addresses_are_declared_with_their_errors(page: dict[str, Any]) -> None:
    assert set(page["paths"]) == {
        *LEAST,
        "/v1/models",
        "/v1/models/{id}",
        "/recmas/systems/{id}",
        "/health",
        "/ready",
    }
    for path in LEAST:
        declared = set(page["paths"][path]["post"]["responses"])
        assert declared == {
            *("200", "400", "401", "404", "408", "413", "414", "415", "421", "429", "431"),
            *("500", "502", "503", "504"),
        }
    assert page["security"] == [{"key": []}]
    assert page["paths"]["/health"]["get"]["security"] == []
    assert "422" not in json.dumps(page)
    assert "ValidationError" not in json.dumps(page)


def test_nothing_is_loaded_from_elsewhere(served: Served, page: dict[str, Any]) -> None:
    assert not re.search(r"https?://", json.dumps(page))
    for path in ("/docs", "/redoc"):  # FastAPI's, whose scripts come from elsewhere
        assert served.get(path, authorization=f"Bearer {KEY}").status_code == 404


@pytest.mark.parametrize("path", list(LEAST))
def test_answers_are_as_declared(served: Served, page: dict[str, Any], path: str) -> None:
    body = {"model": MODEL.name, **LEAST[path], "recmas": {}}
    assert form(page, path).is_valid(body)
    response = served.post(path, body, authorization=f"Bearer {KEY}")
    assert response.status_code == 200
    declared = page["paths"][path]["post"]["responses"]
    checker(page, declared["200"]["content"]["application/json"]["schema"]).validate(
        response.json()
    )
    locked = served.post(path, body)
    checker(page, declared["401"]["content"]["application/json"]["schema"]).validate(locked.json())


def test_a_system_is_as_declared(served: Served, page: dict[str, Any]) -> None:
    path = f"/recmas/systems/{MODEL.name}"
    declared = page["paths"]["/recmas/systems/{id}"]["get"]["responses"]["200"]
    found = served.get(path, authorization=f"Bearer {KEY}").json()
    checker(page, declared["content"]["application/json"]["schema"]).validate(found)


def test_the_schemas_refuse_what_the_service_refuses(page: dict[str, Any]) -> None:
    """But for what concerns several keys at a time, or the model, which no schema can say."""
    beyond = {("RM500",), ("RM501",), ("RM506",), ("RM508",)}
    several = {"n", "stream_options", "max_tokens", "messages", "prompt", "recmas.trace"}
    several |= {"seed", "recmas.thoughts", "logprobs", "temperature", "stream", "recmas"}
    for path, keys, param, code in REFUSED:
        body = {"model": MODEL.name, **LEAST[path], **keys}
        is_beyond = (code,) in beyond or (code == "RM543" and param in several)
        assert is_beyond or not form(page, path).is_valid(body), (path, keys)
    for path, keys in NEUTRAL:
        form(page, path).validate({"model": MODEL.name, **LEAST[path], **keys})
