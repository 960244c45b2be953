"""A service whose systems ask models behind an API: usage, streams, and the status of failures."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kit.http_server import Served, chunks, local, serving
from kit.remote_systems import KEY_ENV, USED, Reply, completion, endpoint, write_mixed_bundle
from recmas_runtime.formats.manifest import RemoteEntry
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.service import ServiceError, ServiceLimits


def bundle(folder: Path, url: str, answers: str = "solver", **changes: Any) -> Path:
    settings: dict[str, Any] = {"timeout_s": 5.0, "max_retries": 0} | changes
    entry = RemoteEntry(model="far", base_url=url, **settings)
    return write_mixed_bundle(folder / answers, entry, answers=answers)


def body(model: str, content: str = "7", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def asked(served: Served, model: str, content: str = "7", **more: object) -> Any:
    return served.post("/v1/chat/completions", body(model, content, **more))


def test_usage_counts_remote_tokens_apart(tmp_path: Path) -> None:
    with endpoint(Reply(completion("5"))) as far:
        bundles = {name: bundle(tmp_path, far.url, name) for name in ("solver", "planner")}
        with serving(local(bundles)) as served:
            usage = asked(served, "solver").json()["usage"]
            took = {"calls": 1, "uncounted_calls": 0, "cost": None}
            took |= {name: USED[name] for name in ("prompt_tokens", "completion_tokens")}
            assert usage["remote"] == {"far": took}
            assert usage["completion_tokens"] == 2  # the letter and its end, written here
            told = chunks(
                asked(served, "planner", stream=True, stream_options={"include_usage": True}).text
            )
            assert "".join(c["choices"][0]["delta"].get("content") or "" for c in told[:-1]) == "5"
            assert told[-1]["usage"]["remote"] == {"far": took}


WRONG = [
    (401, "nope", 502, "RM562"),
    (429, "nope", 503, "RM563"),
    (500, "nope", 502, "RM564"),
    (404, "nope", 502, "RM568"),
    (400, "maximum context length", 400, "RM567"),
]


def test_failures_have_the_status_of_a_gateway(tmp_path: Path) -> None:
    replies = [Reply({"error": {"message": said}}, status) for status, said, _, _ in WRONG]
    replies += [Reply("{"), Reply(after_s=1.0)]
    with endpoint(replies) as far:
        with serving(local({"far": bundle(tmp_path, far.url, timeout_s=0.3)})) as served:
            found = [asked(served, "far") for _ in replies]
        assert [(each.status_code, each.json()["error"]["code"]) for each in found] == [
            *((status, code) for _, _, status, code in WRONG),
            (502, "RM565"),
            (504, "RM566"),
        ]
        assert found[1].headers["Retry-After"]
        assert far.url in found[0].json()["error"]["message"]


def test_a_waiting_request_stalls_no_other(tmp_path: Path) -> None:
    let_go = threading.Event()

    def answering(body: dict[str, Any]) -> Reply:
        is_slow = "slow" in body["messages"][-1]["content"]
        return Reply(completion("5"), after=let_go if is_slow else None)

    with (
        endpoint(answering) as far,
        serving(local({"far": bundle(tmp_path, far.url, timeout_s=60.0)})) as served,
        ThreadPoolExecutor(1) as pool,
    ):
        slow = pool.submit(asked, served, "far", "slow")
        while not far.asked:
            time.sleep(0.01)
        for _ in range(3):
            assert asked(served, "far").status_code == 200
        assert not slow.done()
        let_go.set()
        assert slow.result().status_code == 200


def test_a_bundle_without_its_key_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    far = bundle(tmp_path, "http://127.0.0.1:9/v1", api_key_env=KEY_ENV)
    start = LocalService.start({"far": str(far)}, ServiceLimits(), threads=1)
    with pytest.raises(ServiceError, match=f"environment variable {KEY_ENV} is not set"):
        asyncio.run(start)
