"""Several machines: a Ray cluster of two nodes, both on this one, and what dies in it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from recmas_runtime.core.errors import RecmasError

pytestmark = pytest.mark.ray

RECMAS = [sys.executable, "-m", "recmas_runtime.cli.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
KEY = "a-key-for-tests-only"
LETTERS = "abcdefghij"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes."""
    before = dict(os.environ)
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": ENVIRONMENT["PYTHONPATH"],
        "RECMAS_API_KEY": KEY,
    }
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    # Not 127.0.0.1, which Ray takes for the address that other machines see.
    head = {**node, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(**node, node_ip_address="127.0.0.3")
    yield nodes.address
    nodes.shutdown()
    os.environ.clear()
    os.environ |= before


def processes(title: str) -> list[int]:
    """Return the processes of Ray that have a title which begins like this."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def write_questions(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"question": f"It is {n % 10}"}) + "\n" for n in range(count))
    )
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return what a run has written but for its times, which differ from run to run."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "timing_ms"} for line in found]


def run_command(bundle: Path, source: Path, target: Path, *options: str) -> list[str]:
    files = ["--input", str(source), "--output", str(target)]
    return [*RECMAS, "run", str(bundle), *files, "--threads", "1", *options]


def wait_for_lines(path: Path, count: int) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("address", "where"),
    [(["127.0.0.2:1025"], "at '127.0.0.2:1025'"), ([], "here or at the address in RAY_ADDRESS")],
)
def test_where_no_cluster_is(
    address: list[str], where: str, hand_bundle: Path, tmp_path: Path
) -> None:
    """Before there is the one of this file, which would be found."""
    source = write_questions(tmp_path / "q.jsonl", 3)
    command = run_command(hand_bundle, source, tmp_path / "a.jsonl", "--ray", *address)
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 4
    assert f"error[RM504]: no Ray cluster answers {where}" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_cluster_answers_as_one_process_does(
    cluster: str, hand_bundle: Path, tmp_path: Path
) -> None:
    source = write_questions(tmp_path / "q.jsonl", 60)
    text = source.read_text().splitlines(keepends=True)
    text[7:7] = ["{broken\n", '{"question": "%s"}\n' % ("x" * 200)]
    source.write_text("".join(text))
    sampled = ("--temperature", "0.7", "--seed", "5")
    for name, options, sampling in (
        ("greedy", ("--batch", "3"), ()),
        ("sampled", (), sampled),
        ("null", ("--baseline", "null"), ()),
    ):
        here, there = tmp_path / f"{name}-here.jsonl", tmp_path / f"{name}-there.jsonl"
        for target, more in ((here, ()), (there, ("--ray", cluster))):
            command = run_command(hand_bundle, source, target, *options, *sampling, *more)
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ran.returncode == 1, ran.stderr  # two lines cannot be answered
            assert "answered 60 records in" in ran.stderr
        assert lines_of(there) == lines_of(here)
        identities = [Path(f"{path}.run.json").read_text() for path in (here, there)]
        assert identities[0] == identities[1]


def test_workers_that_die_leave_each_record_one_line(
    cluster: str, hand_bundle: Path, tmp_path: Path
) -> None:
    source = write_questions(tmp_path / "q.jsonl", 3000)
    target = tmp_path / "a.jsonl"
    command = run_command(hand_bundle, source, target, "--ray", cluster, "--batch", "1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        for count in (200, 900, 1500):
            wait_for_lines(target, count)
            os.kill(processes("ray::_Worker")[0], signal.SIGKILL)
        _, said = run.communicate(timeout=200)
    assert run.returncode == 0, said
    found = lines_of(target)
    assert [line["id"] for line in found] == [str(n + 1) for n in range(3000)]
    assert [line["answer"] for line in found] == [LETTERS[n % 10] for n in range(3000)]


def test_a_run_that_was_interrupted_goes_on(
    cluster: str, hand_bundle: Path, tmp_path: Path
) -> None:
    source = write_questions(tmp_path / "q.jsonl", 2000)
    target = tmp_path / "a.jsonl"
    command = run_command(hand_bundle, source, target, "--ray", cluster, "--batch", "1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        wait_for_lines(target, 100)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "with --resume goes on" in said
    num_before = len(lines_of(target))
    assert 100 <= num_before < 2000
    ran = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert f"{num_before} there already" in ran.stderr
    assert [line["id"] for line in lines_of(target)] == [str(n + 1) for n in range(2000)]


def test_a_cluster_that_has_another_bundle_is_refused(
    cluster: str, hand_bundle: Path, tmp_path: Path
) -> None:
    source = write_questions(tmp_path / "q.jsonl", 3)
    target = tmp_path / "a.jsonl"
    command = run_command(hand_bundle, source, target, "--ray", cluster)
    ran = subprocess.run([*command, "--threads", "64"], capture_output=True, text=True, check=False)
    assert ran.returncode == 4
    assert "error[RM504]: no machine of the Ray cluster has 64 CPUs and " in ran.stderr
    ran = subprocess.run(
        [*command, "--baseline", "none"], capture_output=True, text=True, check=False
    )
    assert "error[RM508]" in ran.stderr
    assert not target.exists()


@pytest.fixture(scope="module")
def client(cluster: str, hand_bundle: Path) -> Iterator[httpx.Client]:
    """A client of two replicas."""
    import ray
    from ray import serve

    from recmas_runtime.serve.ray import app

    ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": 8641, "location": "HeadOnly"})
    serve.run(app({"bundle": str(hand_bundle), "min_replicas": "2", "max_replicas": "2"}))
    key = {"Authorization": f"Bearer {os.environ['RECMAS_API_KEY']}"}
    limits = httpx.Limits(max_connections=100)
    with httpx.Client(
        base_url="http://127.0.0.1:8641", headers=key, timeout=60, limits=limits
    ) as found:
        yield found
    serve.shutdown()
    ray.shutdown()


def ask(client: httpx.Client, number: int, *, stream: bool = False) -> str:
    """Ask; returns the answer, or how the request was refused."""
    body = {
        "model": "by-hand",
        "messages": [{"role": "user", "content": f"It is {number % 10}"}],
        "stream": stream,
    }
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            text = response.read().decode()
    except httpx.TransportError as error:
        return type(error).__name__
    if response.status_code != 200:
        return str(response.status_code)
    if not stream:
        return str(json.loads(text)["choices"][0]["message"]["content"])
    chunks = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if not chunks or chunks[-1] != "[DONE]":
        return "cut"
    parts = [json.loads(chunk) for chunk in chunks[:-1]]
    return "".join(part["choices"][0]["delta"].get("content", "") for part in parts)


def test_the_application_answers_on_a_cluster(client: httpx.Client) -> None:
    assert ask(client, 7) == "h"
    assert ask(client, 7, stream=True) == "h"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["by-hand"]
    assert client.get("/ready").status_code == 200
    assert client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    wrong = client.post("/v1/chat/completions", json={"model": "by-hand", "messages": 7})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["message"]


def test_a_replica_that_dies_under_load(client: httpx.Client) -> None:
    """Every request gets its answer or an error, and the next ones their answers."""
    dead = threading.Event()

    def kill() -> None:
        time.sleep(1.0)
        os.kill(processes("ray::ServeReplica:default:recmas")[0], signal.SIGKILL)
        dead.set()

    with ThreadPoolExecutor(9) as pool:
        killing = pool.submit(kill)
        numbers = range(800)
        found = list(pool.map(lambda n: ask(client, n, stream=n % 2 == 1), numbers))
        killing.result()
    assert dead.is_set()
    wrong = Counter(answer for n, answer in enumerate(found) if answer != LETTERS[n % 10])
    assert not {answer for answer in wrong if answer in LETTERS}, "the answer of another request"
    assert sum(wrong.values()) <= 16, wrong  # those that the replica had
    assert wrong.keys() <= {"500", "503", "cut", "RemoteProtocolError", "ReadError"}
    assert [ask(client, n) for n in range(20)] == [LETTERS[n % 10] for n in range(20)]


def test_an_update_loses_no_request(client: httpx.Client, hand_bundle: Path) -> None:
    from ray import serve

    from recmas_runtime.serve.ray import app

    over = threading.Event()

    def asking() -> list[str]:
        wrong = []
        number = 0
        while not over.is_set():
            if (answer := ask(client, number)) != LETTERS[number % 10]:
                wrong.append(answer)
            number += 1
        assert number > 20
        return wrong

    before = set(processes("ray::ServeReplica:default:recmas"))
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(asking) for _ in range(4)]
        serve.run(
            app({"bundle": str(hand_bundle), "min_replicas": 2, "max_replicas": 2, "max_queue": 32})
        )
        over.set()
        assert [each.result() for each in clients] == [[]] * 4
    after = set(processes("ray::ServeReplica:default:recmas"))
    assert len(after - before) == 2


def test_a_full_replica_refuses_by_itself(client: httpx.Client, hand_bundle: Path) -> None:
    """Not by Serve's plain text: with an error object, and the time to come back."""
    from ray import serve

    from recmas_runtime.serve.ray import app

    options = {"bundle": str(hand_bundle), "max_batch": 1, "max_queue": 0}
    serve.run(app(options), name="small", route_prefix="/small")
    body = {"model": "by-hand", "messages": [{"role": "user", "content": "It is 7"}]}

    def post(_: int) -> httpx.Response:
        return client.post("/small/v1/chat/completions", json=body)

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(post, range(120)))
    assert {response.status_code for response in found} == {200, 429}
    refused = [response for response in found if response.status_code == 429]
    assert all(response.json()["error"]["message"] for response in refused)
    assert all(1 <= int(response.headers["retry-after"]) <= 60 for response in refused)
    serve.delete("small")


def test_there_are_more_replicas_where_requests_wait(
    client: httpx.Client, hand_bundle: Path
) -> None:
    from ray import serve

    from recmas_runtime.serve.ray import app

    options = {"bundle": str(hand_bundle), "max_batch": 1, "max_replicas": 2, "upscale_s": 0.5}
    serve.run(app(options), name="growing", route_prefix="/growing")
    replicas = "ray::ServeReplica:growing:recmas"
    assert len(processes(replicas)) == 1
    body = {"model": "by-hand", "messages": [{"role": "user", "content": "It is 7"}]}
    deadline = time.monotonic() + 120

    def ask_until_there_are_two(_: int) -> set[int]:
        statuses = set()
        while len(processes(replicas)) < 2 and time.monotonic() < deadline:
            statuses.add(client.post("/growing/v1/chat/completions", json=body).status_code)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        found = set().union(*pool.map(ask_until_there_are_two, range(8)))
    assert len(processes(replicas)) == 2
    assert found == {200}
    serve.delete("growing")


def test_a_record_that_kills_its_workers_is_found() -> None:
    from recmas_runtime.running.records import Record
    from recmas_runtime.serve.ray.batch_workers import _Asked, _to_do_again

    batch = [_Asked(Record(id=n, fields={"question": "7"}, index=n)) for n in range(13)]
    left, num_deaths, done = [batch], 0, []
    while left:
        part = left.pop()
        if batch[5] in part:
            num_deaths += 1
            left += _to_do_again(part)
        else:
            done += [asked.record.id for asked in part]
    assert sorted(done) == [n for n in range(13) if n != 5]
    assert isinstance(batch[5].result, RecmasError)
    assert batch[5].result.problems[0].message == "3 workers died over record 5"
    assert num_deaths <= 4 + 3  # down to one record, and then for three


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, r"RM545.*arguments of app: .*`bundle`"),
        ({"bundle": "/nowhere"}, "RM400.*not a bundle"),
        ({"bundle": "/nowhere", "max_replica": 3}, r"RM545.*`max_replica`"),
        ({"bundle": "/nowhere", "cpus": "many"}, r"RM545.*`\$.cpus`"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    from recmas_runtime.serve.ray import app

    with pytest.raises(RecmasError, match=words):
        app(arguments)


def test_a_replica_without_engines_or_without_a_key(
    hand_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recmas_runtime.serve.ray.application import _Replica

    async def try_both() -> None:
        replica = _Replica.__new__(_Replica)
        with pytest.raises(RecmasError, match=r"RM545.*there is no key"):
            await replica.__init__({"bundle": str(hand_bundle)}, "hand")
        await replica.__init__({"bundle": str(hand_bundle), "insecure": True}, "hand")
        replica.check_health()
        await replica._service.close(0.0)
        with pytest.raises(RuntimeError, match="the thread of the engines has ended"):
            replica.check_health()

    monkeypatch.delenv("RECMAS_API_KEY", raising=False)
    asyncio.run(try_both())


def test_the_address_is_no_bundle() -> None:
    ran = subprocess.run(
        [*RECMAS, "run", "bundle", "7", "--ray"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert re.search(r"error\[RM506\].*--ray needs --input", ran.stderr)
