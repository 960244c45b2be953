"""`recmas serve` from outside: signals, kills, addresses, models that come and go, its log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kit.hand_bundle import write_hand_bundle
from kit.serving import ENDLESS, KEY, LONG, Served, chat, serving, sse_events, until
from recmas_runtime.cli.main import main


@pytest.fixture(scope="module")
def server(hand_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all tests that leave it as it was."""
    with serving(hand_bundle, folder=tmp_path_factory.mktemp("serve")) as served:
        yield served
        served.signal()
        assert served.wait() == 0


def num_there(server: Served) -> float:
    """How many requests for answers run or wait."""
    return sum(server.metric(f"recmas_requests_{how}") for how in ("running", "waiting"))


def test_a_killed_worker_is_started_again_and_answers(server: Served) -> None:
    before = server.worker_pid()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, ENDLESS, **LONG) for _ in range(8)]
        until(lambda: num_there(server) == 8, "all of them are there")
        os.kill(before, signal.SIGKILL)
        answers = [each.result() for each in asked]
    assert [status for status, _ in answers] == [503] * 8
    assert {error["code"] for _, error in answers} == {"RM542"}
    until(lambda: server.request("GET", "/ready")[0] == 200, "the service is ready again")
    assert server.worker_pid() != before
    assert server.ask("7") == (200, "h")
    assert server.events("worker ended")[-1]["how"] == "SIGKILL"
    assert server.metric("recmas_worker_restarts_total") == len(server.events("worker ended"))


def test_a_stream_of_a_killed_worker_ends_with_an_error(server: Served) -> None:
    body = chat(ENDLESS, "by-hand", {**LONG, "stream": True})
    with server.open("POST", "/v1/chat/completions", body) as response:
        events = sse_events(response)
        until(lambda: bool(next(events)["choices"][0]["delta"].get("content")), "text comes")
        os.kill(server.worker_pid(), signal.SIGKILL)
        *_, last = events
    assert last["error"]["code"] == "RM542"
    until(lambda: server.request("GET", "/ready")[0] == 200, "the service is ready again")


def test_the_worker_has_neither_the_key_nor_the_address(server: Served) -> None:
    pid = server.worker_pid()
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert KEY.encode() not in environment
    descriptors = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    assert sum(name.startswith("socket:") for name in descriptors) == 1


def test_what_needs_no_key(server: Served) -> None:
    for path in ("/health", "/ready"):
        assert server.request("GET", path, key=None)[0] == 200
    status, page = server.request("GET", "/", key=None)
    assert status == 200
    assert page.lower().startswith("<!doctype html>")
    for path in ("/v1/models", "/metrics", "/admin/models", "/openapi.json"):
        assert server.request("GET", path, key=None)[0] == 401


def test_models_come_and_go_behind_the_key(server: Served, hand_bundle: Path) -> None:
    asked = {"path": str(hand_bundle), "name": "second/one"}
    assert server.request("POST", "/admin/models", asked, key=None)[0] == 401
    status, model = server.request("POST", "/admin/models", asked)
    assert (status, model["id"]) == (201, "second/one")
    assert server.ask("3", model="second/one") == (200, "d")
    assert server.request("DELETE", "/admin/models/second/one")[0] == 200
    assert server.ask("3", model="second/one")[0] == 404
    assert server.request("DELETE", "/admin/models/second/one")[0] == 404
    assert server.ask("3") == (200, "d")


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"path": "/", "name": "root"}, "RM400"),
        ({"path": "nowhere", "name": "gone"}, "RM400"),
        ({"path": "{bundle}", "name": "two words"}, "RM545"),
        ({"path": "{bundle}", "name": "../up"}, "RM545"),
    ],
)
def test_a_model_that_cannot_be_added_changes_nothing(
    server: Served, hand_bundle: Path, asked: dict[str, str], code: str
) -> None:
    asked = {**asked, "path": asked["path"].replace("{bundle}", str(hand_bundle))}
    status, body = server.request("POST", "/admin/models", asked)
    assert (status, body["error"]["code"]) == (400, code)
    assert [m["id"] for m in server.request("GET", "/admin/models")[1]["data"]] == ["by-hand"]


def test_metrics_of_known_requests(hand_bundle: Path, tmp_path: Path) -> None:
    with serving(f"m={hand_bundle}", folder=tmp_path) as server:
        assert [server.ask(digit, "m")[1] for digit in "123"] == ["b", "c", "d"]
        assert server.ask("1", "other")[0] == 404
        assert server.ask("1", "m", max_tokens=10**6)[0] in (200, 400)
        assert server.request("GET", "/metrics", key=None)[0] == 401
        _, answer = server.request("POST", "/v1/chat/completions", chat("1", "m"))
        counted = server.metric('recmas_requests_total{how="answered",kind="answer",model="m"}')
        assert counted in (4, 5)
        for kind, key in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
            metric = f'recmas_tokens_total{{kind="{kind}",model="m"}}'
            assert server.metric(metric) == counted * answer["usage"][key]
        assert server.metric('recmas_time_to_first_token_seconds_count{model="m"}') == counted
        assert server.metric('recmas_latent_phase_seconds_count{model="m"}') == counted
        for labels in (
            'agent="planner",model="m",op="think",round="1"',
            'agent="solver",model="m",op="decode",round="2"',
        ):
            assert server.metric(f"recmas_agent_seconds_count{{{labels}}}") == counted
        # What the service has not seen is counted as well, and what it has not twice.
        assert server.ask("1", "m", x=1)[0] == 400
        assert server.request("GET", "/nowhere")[0] == 404
        assert server.ask("1" * 200, "m")[0] == 400
        for code, num in (("RM540", 1), ("RM543", 1), ("RM544", 1), ("RM546", 1), ("RM501", 1)):
            line = f'recmas_refusals_total{{code="{code}",reason="input"}}'
            assert server.metric(line) == num
        assert server.metric("recmas_requests_running") == 0
        assert server.metric("recmas_requests_waiting") == 0


def test_sigterm_lets_requests_end(hand_bundle: Path, tmp_path: Path) -> None:
    with serving(hand_bundle, "--grace", "20", folder=tmp_path) as server:
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.ask, ENDLESS, max_tokens=2000) for _ in range(4)]
            until(lambda: num_there(server) == 4, "all of them are there")
            server.signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        assert [status for status, _ in answers] == [200] * 4
        assert len({text for _, text in answers}) == 1
        assert len(answers[0][1]) == 2000
        assert server.wait() == 0
        assert server.events("stopped")
        assert not server.events("requests cut")


def test_whoever_comes_while_others_end_is_told(hand_bundle: Path, tmp_path: Path) -> None:
    with serving(hand_bundle, "--grace", "60", folder=tmp_path) as server:
        body = chat(ENDLESS, "by-hand", {**LONG, "stream": True})
        with server.open("POST", "/v1/chat/completions", body) as response:
            events = sse_events(response)
            until(lambda: bool(next(events)["choices"][0]["delta"].get("content")), "text comes")
            server.signal(signal.SIGTERM)
            until(lambda: server.request("GET", "/ready")[0] == 503, "it takes no more")
            assert server.request("GET", "/health")[0] == 200
            path, body = "/v1/chat/completions", chat("4", "by-hand")
            with server.open("POST", path, body) as refused:
                assert refused.status == 503
                assert int(refused.getheader("retry-after", "0")) >= 1
                assert json.load(refused)["error"]["code"] == "RM542"
        # Its client has left, so nothing runs any more.
        assert server.wait() == 0


def test_the_grace_ends(hand_bundle: Path, tmp_path: Path) -> None:
    with serving(hand_bundle, "--grace", "0.3", folder=tmp_path) as server:
        body = chat(ENDLESS, "by-hand", {**LONG, "stream": True})
        with server.open("POST", "/v1/chat/completions", body) as response:
            events = sse_events(response)
            until(lambda: bool(next(events)["choices"][0]["delta"].get("content")), "text comes")
            server.signal(signal.SIGTERM)
            *_, last = events
        assert last["error"]["code"] == "RM542"
        assert server.wait() == 0
        assert server.events("requests cut")[0]["requests"] == 1


def test_a_second_signal_stops_at_once(hand_bundle: Path, tmp_path: Path) -> None:
    with serving(hand_bundle, "--grace", "600", folder=tmp_path) as server:
        worker = server.worker_pid()
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(server.ask, ENDLESS, **LONG) for _ in range(2)]
            until(lambda: server.metric("recmas_requests_running") >= 1, "a request runs")
            server.signal(signal.SIGINT)
            until(lambda: any("a second signal" in line["event"] for line in server.log), "it says")
            server.signal(signal.SIGINT)
            start = time.monotonic()
            assert {each.result()[0] for each in asked} == {503}
            assert server.wait() == 130
        assert time.monotonic() - start < 10
        assert not Path(f"/proc/{worker}").exists()


def test_an_interrupt_counts_where_a_shell_ignores_it(hand_bundle: Path, tmp_path: Path) -> None:
    """As for what a script starts with `&`; a hang-up stays ignored, as `nohup` wants it."""
    ignored = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        with serving(hand_bundle, folder=tmp_path) as server:
            server.signal(signal.SIGHUP)
            assert server.ask("7") == (200, "h")
            assert not any("no new requests" in line["event"] for line in server.log)
            server.signal(signal.SIGINT)
            assert server.wait() == 0
            assert server.events("stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_worker_dies_with_its_front_end(hand_bundle: Path, tmp_path: Path) -> None:
    with serving(hand_bundle, folder=tmp_path) as server:
        worker = server.worker_pid()
        server.signal(signal.SIGKILL)
        server.wait()
        # Nobody but the system waits for it: it is gone, or a zombie of a container without init.
        until(lambda: not _runs(worker), "the worker is gone")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_port_that_is_taken_is_refused(
    server: Served, hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(hand_bundle), "--port", str(server.port)]) == 2
    error = capsys.readouterr().err
    assert f"error[RM545]: port {server.port} is in use on 127.0.0.1" in error
    assert server.ask("7") == (200, "h")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{bundle}", "--host", "0.0.0.0"], "RM545", "lets other machines ask"),
        (["{bundle}", "--host", "no.such.host.invalid"], "RM545", "and there is no key"),
        (["{bundle}", "{bundle}"], "RM545", "two bundles are named 'by-hand'"),
        (["a b={bundle}"], "RM545", "'a b' is no name of a model"),
        (["{bundle}/links"], "RM400", "has no manifest.json"),
        ([], "RM506", "give a BUNDLE or --watch FOLDER"),
        (["--watch", "/nowhere"], "RM545", "is no folder"),
        (["{bundle}", "--port", "70000"], "RM545", "--port is 70000"),
        (["{bundle}", "--max-batch", "0"], "RM545", "--max-batch is 0"),
        (["{bundle}", "--api-key-file", "/dev/null"], "RM545", "/dev/null holds no key"),
        (["{bundle}", "--keep-memory", "900000000"], "RM545", "0 would fit"),
        (["{bundle}", "--otlp", "here"], "RM545", "is no address of HTTP"),
    ],
)
def test_what_is_refused_before_anything_starts(
    hand_bundle: Path,
    arguments: list[str],
    code: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.replace("{bundle}", str(hand_bundle)) for argument in arguments]
    assert main(["serve", "--port", "0", *given]) != 0
    error = capsys.readouterr().err
    assert f"error[{code}]" in error
    assert message in error


def test_without_the_extra_users_are_told_how_to_get_it(hand_bundle: Path) -> None:
    hidden = "import sys; sys.modules['fastapi'] = None\nfrom recmas_runtime.cli.main import main\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{hidden}sys.exit(main(['serve', {str(hand_bundle)!r}]))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert "error[RM201]" in done.stderr
    assert 'pip install "WHEEL[serve]"' in done.stderr


def test_a_bundle_that_engines_refuse_ends_the_command(
    hand_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(hand_bundle, tmp_path / "broken")
    (broken / "spec.yaml").unlink()
    assert main(["serve", f"good={hand_bundle}", f"bad={broken}", "--port", "0"]) == 5
    assert "error[RM401]" in capfd.readouterr().err


def test_a_watched_folder(hand_bundle: Path, tmp_path: Path) -> None:
    watched = tmp_path / "models"
    shutil.copytree(hand_bundle, watched / "one")
    (watched / "no-bundle").mkdir()
    with serving("--watch", watched, folder=tmp_path) as server:
        assert server.ready["models"] == ["one"]
        shutil.copytree(hand_bundle, watched / "two")
        broken = shutil.copytree(hand_bundle, watched / "broken")
        (broken / "plan.json").write_text("{}")
        until(lambda: server.ask("4", "two") == (200, "e"), "a folder that came is a model")
        until(lambda: bool(server.events("not loaded")), "a broken one is reported")
        shutil.rmtree(watched / "two")
        until(lambda: server.ask("4", "two")[0] == 404, "a folder that went is none")
        # Replaced by another build while it is asked: no request fails.
        before = server.request("GET", "/admin/models")[1]["data"][0]["digest"]
        listed = server.request("GET", "/v1/models/one")[1]
        new = write_hand_bundle(tmp_path / "new", with_state=True)
        (watched / "one").rename(tmp_path / "old")
        new.rename(watched / "one")
        until(
            lambda: (
                server.ask("5", "one") == (200, "f")
                and server.request("GET", "/admin/models")[1]["data"][0]["digest"] != before
            ),
            "another build takes the place",
        )
        relisted = server.request("GET", "/v1/models/one")[1]
        assert relisted["created"] > listed["created"]
        assert relisted["recmas"]["digest"] != listed["recmas"]["digest"] == before
        assert {line["model"] for line in server.events("not loaded")} == {"broken"}
        server.signal()
        assert server.wait() == 0


def test_a_bundle_that_is_overwritten_in_place(hand_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(hand_bundle, tmp_path / "copy")
    with serving(f"m={copy}", f"other={hand_bundle}", folder=tmp_path) as server:
        assert server.ask("4", "m") == (200, "e")
        plan = (copy / "plan.json").read_bytes()
        (copy / "plan.json").write_text("{}")
        os.kill(server.worker_pid(), signal.SIGBUS)
        until(lambda: bool(server.events("not loaded")), "it cannot be loaded now")
        until(lambda: server.ask("4", "other") == (200, "e"), "the others can")
        path, body = "/v1/chat/completions", chat("4", "m")
        with server.open("POST", path, body) as response:
            assert response.status == 503
            assert int(response.getheader("retry-after", "0")) >= 1
            assert json.load(response)["error"]["code"] == "RM542"
        assert server.ask("4", "never")[0] == 404
        (copy / "plan.json").write_bytes(plan)
        until(lambda: server.ask("4", "m") == (200, "e"), "it is whole again")
        assert [line["how"] for line in server.events("worker ended")] == ["SIGBUS"]
        assert server.metric("recmas_worker_restarts_total") == 1


def test_what_is_logged(server: Served) -> None:
    def last(event: str, **fields: object) -> dict[str, Any]:
        """The line is written after the answer is out."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            lines = server.events(event)
            found[:] = [line for line in lines if fields.items() <= line.items()]
            return bool(found)

        until(is_there, f"{event} with {fields}")
        return found[-1]

    server.ask("9")
    line = last("answer", model="by-hand", finish="stop", rounds=2)
    assert "record" not in line
    last("http", method="POST", path="/v1/chat/completions", status=200)
    server.request("GET", "/nowhere%0Aforged%1b[2J?secret=1")
    last("http", path="/nowhere\nforged\x1b[2J", status=404)  # one line of JSON, parsed
    assert "secret" not in server.log_path.read_text()
    assert KEY not in server.log_path.read_text()
