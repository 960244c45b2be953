"""Agents behind an API: what they are asked, what goes wrong, and what goes on meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import recmas_runtime as rt
from kit import http_server
from kit.remote_systems import (
    KEY_ENV,
    Answering,
    Reply,
    completion,
    endpoint,
    write_mixed_bundle,
)
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.manifest import Prices, RemoteEntry
from recmas_runtime.running.run_trace import TraceWriter

KEY = "a-secret-of-tests"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    # What the package would take from the environment, for whatever endpoint.
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-secret")


Mixed = Callable[..., rt.System]


@pytest.fixture
def mixed(tmp_path: Path) -> Mixed:
    """Return what loads a bundle whose planner is on a remote model."""

    def load(url: str, *, answers: str = "solver", **changes: Any) -> rt.System:
        settings: dict[str, Any] = {"timeout_s": 10.0, "max_retries": 0, "api_key_env": KEY_ENV}
        entry = RemoteEntry(model="far", base_url=url, **(settings | changes))
        return rt.load(write_mixed_bundle(tmp_path / answers, entry, answers=answers), threads=1)

    return load


def failure(result: object) -> str:
    assert isinstance(result, RecmasError), result
    return str(result)


def test_a_remote_planner_is_asked_in_chat_messages(mixed: Mixed) -> None:
    with endpoint(Reply(completion("5"))) as far:
        answer = mixed(far.url, prices=Prices(prompt=1.0, completion=10.0)).run("7 <|im_end|>")
    (asked,) = far.asked
    # The solver reads the planner's digit last, and answers with its letter.
    assert answer.answer == "f"
    assert asked == {
        "model": "far",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "7 <|im_end|>"},
        ],
        "max_completion_tokens": 6,
        "temperature": 0.0,
        "seed": asked["seed"],
    }
    assert far.keys == [f"Bearer {KEY}"]
    told = answer.to_json()
    assert told["usage"]["remote"]["far"] == {
        "calls": 1,
        "prompt_tokens": 11,
        "completion_tokens": 2,
        "uncounted_calls": 0,
        "cost": pytest.approx(31e-6),
    }
    assert told["usage"]["handover_tokens"] == 0
    assert told["timing_ms"]["ask"] > 0


def test_settings_go_along_and_may_be_left_out(mixed: Mixed) -> None:
    with endpoint(Reply(completion("xyz"))) as far:
        system = mixed(
            far.url,
            answers="planner",
            api_key_env=None,
            leave_out=("temperature",),
            body={"reasoning_effort": "low"},
        )
        settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 42}
        answer = system.run("7", max_new_tokens=9, stop=("!",), **settings)  # type: ignore[call-overload]
    (asked,) = far.asked
    assert answer.answer == "xyz"
    assert answer.usage.completion_tokens == 2
    assert asked["messages"][-1] == {"role": "user", "content": "7 h"}
    del asked["messages"]
    assert asked == {
        "model": "far",
        "max_completion_tokens": 9,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 42,
        "stop": ["!"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_effort": "low",
    }
    assert far.keys == ["Bearer none"]


def test_an_answer_streams(mixed: Mixed) -> None:
    with endpoint(Reply(completion("abc"))) as far:
        stream = mixed(far.url, answers="planner").stream("7")
        assert list(stream) == ["a", "b", "c"]
    assert stream.answer is not None
    assert stream.answer.answer == "abc"


def test_a_served_bundle_is_an_endpoint(mixed: Mixed, hand_bundle: Path, tmp_path: Path) -> None:
    with http_server.serving(http_server.local({"far": hand_bundle})) as served:
        system = mixed(f"{served.url}/v1")
        with TraceWriter(tmp_path / "trace") as trace:
            results = list(system.answer_all(["7", "1", "2"], trace=trace))
    answers = [each.answer if isinstance(each, rt.Answer) else failure(each) for each in results]
    assert answers == ["", "", ""]  # nothing comes after the planner's letter
    lines = (tmp_path / "trace" / "trace.jsonl").read_text().splitlines()
    assert len(lines) == 3
    # Records are traced as they end, and who waits for an endpoint may end in any order.
    assert sorted(re.findall(r'"texts": \[".*?"\]', line)[0] for line in lines) == [
        '"texts": ["b"]',
        '"texts": ["c"]',
        '"texts": ["h"]',
    ]
    assert '"op": "ask"' in lines[0]
    assert '"model": "far"' in lines[0]


WRONG: list[tuple[str, str, Reply]] = [
    ("RM562", "refuses the key (401): bad key ***. Correct the key in RECMAS_TEST_KEY",
     Reply({"error": {"message": f"bad key {KEY}"}}, 401)),
    ("RM563", "has too many requests (429)", Reply({"error": {"message": "slow down"}}, 429)),
    ("RM564", "fails (500): boom", Reply({"error": {"message": "boom"}}, 500)),
    ("RM565", "is no chat completion", Reply("<html>", headers={"Content-Type": "text/html"})),
    ("RM565", "is no answer of OpenAI's form", Reply('{"choices": [')),
    ("RM565", "has no choice", Reply(completion("x", choices=[]))),
    ("RM565", "has no text: it ended with 'tool_calls'", Reply(completion(None, "tool_calls"))),
    ("RM567", "has no room for this prompt (400)",
     Reply({"error": {"message": "maximum context length is 8"}}, 400)),
    ("RM568", "refuses the request (404): no such model",
     Reply({"error": {"message": "no such model"}}, 404)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "said", "reply"), WRONG, ids=[said for _, said, _ in WRONG])
def test_what_goes_wrong_is_told_with_the_address(
    mixed: Mixed, code: str, said: str, reply: Reply
) -> None:
    with endpoint(reply) as far:
        (result,) = mixed(far.url).run_batch(["7"])
        text = failure(result)
    assert f"error[{code}]: record '1': " in text
    assert far.url in text
    assert said in text
    assert KEY not in text


def test_an_endpoint_that_is_down(mixed: Mixed) -> None:
    with endpoint(Reply()) as far:
        url = far.url
    (result,) = mixed(url).run_batch(["7"])
    assert f"error[RM561]: record '1': openai:far at {url} cannot be reached: " in failure(result)


def test_a_time_out(mixed: Mixed) -> None:
    with endpoint(Reply(after_s=1.0)) as far:
        (result,) = mixed(far.url, timeout_s=0.1).run_batch(["7"])
    assert "error[RM566]" in failure(result)
    assert "has not answered within 0.1 s" in failure(result)


def test_retries_are_the_clients(mixed: Mixed) -> None:
    busy = Reply({"error": {"message": "busy"}}, 429, headers={"Retry-After-Ms": "1"})
    with endpoint([busy, busy, Reply(completion("5"))]) as far:
        assert mixed(far.url, max_retries=2).run("7").answer == "f"
    assert len(far.asked) == 3


def test_a_stream_that_breaks_off(mixed: Mixed) -> None:
    cut = 'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    with endpoint(Reply(cut, headers={"Content-Type": "text/event-stream"})) as far:
        (result,) = mixed(far.url, answers="planner").run_batch(["7"])
    assert "broke off before its end" in failure(result)


def failing_for(word: str) -> Answering:
    def answering(body: dict[str, Any]) -> Reply:
        is_wrong = word in body["messages"][-1]["content"]
        return Reply({"error": {"message": "boom"}}, 500) if is_wrong else Reply(completion("5"))

    return answering


@pytest.mark.parametrize("answers", ["solver", "planner"])
@pytest.mark.parametrize("shares", [True, False])
def test_one_records_failure_loses_no_other(mixed: Mixed, answers: str, shares: bool) -> None:
    questions = ["7", "8 bad", "9", "1 bad"]
    with endpoint(failing_for("bad")) as far:
        system = mixed(far.url, answers=answers)
        results = list(system.answer_all(questions)) if shares else system.run_batch(questions)
    codes = [
        each.problems[0].code if isinstance(each, RecmasError) else each.answer for each in results
    ]
    right = "f" if answers == "solver" else "5"
    assert codes == [right, "RM564", right, "RM564"]
    assert "record '2'" in failure(results[1])
    # The batch begins anew without them, and nobody is asked twice.
    assert len(far.asked) == 4


def test_a_waiting_call_stalls_no_other_run(mixed: Mixed) -> None:
    let_go = threading.Event()

    def answering(body: dict[str, Any]) -> Reply:
        is_slow = "slow" in body["messages"][-1]["content"]
        return Reply(completion("5"), after=let_go if is_slow else None)

    with endpoint(answering) as far:
        questions = ["1", "2", "3", "4 slow", "5 slow", "6 slow"]
        results = mixed(far.url).answer_all(questions, at_once=6)
        first = [next(results) for _ in range(3)]
        while len(far.asked) < 6:
            time.sleep(0.01)
        let_go.set()
        rest = list(results)
    assert [type(each) for each in (*first, *rest)] == [rt.Answer] * 6
    assert far.most_at_once >= 3


def test_baselines_ask_too(mixed: Mixed) -> None:
    with endpoint(Reply(completion("5"))) as far:
        system = mixed(far.url)
        asked = {}
        for name in ("single", "null", "all-context", "text@3", "moa", "shuffled"):
            before = len(far.asked)
            results = system.baseline(name).run_batch(["7", "8"])
            assert [type(each) for each in results] == [rt.Answer] * 2
            asked[name] = len(far.asked) - before
    assert asked == dict.fromkeys(("single", "null", "all-context"), 0) | dict.fromkeys(
        ("text@3", "moa", "shuffled"), 2
    )
    with pytest.raises(RecmasError, match=r"'far' is a model behind an API, which has no rows"):
        system.baseline("latentmas")


def test_what_takes_weights_is_refused(mixed: Mixed) -> None:
    with endpoint(Reply()) as far:
        system = mixed(far.url, answers="planner")
        (result,) = system.score_batch(["7"], [["a", "b"]])
        assert "error[RM569]: agent 'planner' runs on openai:far at" in failure(result)
        with pytest.raises(RecmasError, match="RM569"):
            system.read_text("abc")
    assert far.asked == []


def test_a_key_that_is_not_there(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV)
    with pytest.raises(RecmasError) as caught:
        mixed("http://127.0.0.1:9/v1")
    assert str(caught.value) == (
        "error[RM560]: the environment variable RECMAS_TEST_KEY is not set, which holds the key of "
        "openai:far at http://127.0.0.1:9/v1 for planner. Set it where the bundle runs: export "
        "RECMAS_TEST_KEY=... (a bundle holds no keys)."
    )


def test_verify_and_inspect_ask_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(KEY_ENV)
    with endpoint(Reply()) as far:
        entry = RemoteEntry(model="far", base_url=far.url, api_key_env=KEY_ENV)
        bundle = write_mixed_bundle(tmp_path / "bundle", entry)
        assert main(["inspect", str(bundle)]) == 0
        assert main(["verify", str(bundle), "--threads", "1"]) == 0
    assert far.asked == []
    out = capsys.readouterr().out
    assert f"far  openai:far at {far.url}  key in {KEY_ENV}" in out
    assert "ask planner" in out
    assert f"remote  openai:far at {far.url}: is asked at runs, never here" in out


def test_an_interrupt_ends_a_waiting_call_at_once(tmp_path: Path) -> None:
    with endpoint(Reply(after_s=30.0)) as far:
        entry = RemoteEntry(model="far", base_url=far.url, timeout_s=60.0)
        bundle = write_mixed_bundle(tmp_path / "bundle", entry)
        command = [*(sys.executable, "-P", "-m", "recmas_runtime.cli.main", "run"), str(bundle)]
        with subprocess.Popen([*command, "7", "--threads", "1"], env=os.environ) as process:
            deadline = time.monotonic() + 30
            while not far.asked:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert time.monotonic() - start < 10
