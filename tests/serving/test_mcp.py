"""A bundle as a tool of the Model Context Protocol, asked by the protocol's own client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from mcp import Client, StdioServerParameters
from mcp.shared.exceptions import MCPError

from recmas_runtime.cli.main import main
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.mcp import input_schema, make_server
from recmas_runtime.serve.protocol import Ask
from recmas_runtime.serve.service import ServiceLimits

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
COMMAND = [sys.executable, "-m", "recmas_runtime.cli.main", "mcp"]
# As a client sends them that speaks the protocol by hand.
HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "by hand", "version": "1"},
    },
}
CALL = {
    "jsonrpc": "2.0",
    "id": 2,
    "method": "tools/call",
    "params": {"name": "by-hand", "arguments": {"question": "What is 7"}},
}


def over_stdio(bundle: Path, *options: str) -> StdioServerParameters:
    command, *arguments = [*COMMAND, str(bundle), *options]
    return StdioServerParameters(command=command, args=arguments, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def address(hand_bundle: Path) -> Iterator[str]:
    """Where a server over HTTP is."""
    command = [*COMMAND, str(hand_bundle), "--http", "0", "--threads", "1"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        found = re.fullmatch(r"serving recmas-by-hand at (http\S+)\n", server.stderr.readline())
        assert found is not None
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 130


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_tool_answers(transport: str, mode: str, hand_bundle: Path, address: str) -> None:
    told: list[tuple[float, str | None]] = []

    async def listen(progress: float, _: float | None, message: str | None) -> None:
        told.append((progress, message))

    async def ask() -> None:
        server = address if transport == "http" else over_stdio(hand_bundle, "--threads", "1")
        async with Client(server, mode=mode) as client:
            (tool,) = (await client.list_tools()).tools
            question = {"question": "What is 7"}
            jsonschema.validate(question, tool.input_schema)
            result = await client.call_tool(tool.name, question, progress_callback=listen)
            assert (tool.name, tool.input_schema["required"]) == ("by-hand", ["question"])
            assert "2 agents (planner and solver) run 2 rounds" in str(tool.description)
            assert not result.is_error
            assert [part.model_dump()["text"] for part in result.content] == ["h"]
            assert result.structured_content == {
                "answer": "h",
                "finish_reason": "stop",
                "rounds": 2,
                "usage": {
                    "prompt_tokens": 58,
                    "latent_steps": 6,
                    "handover_tokens": 0,
                    "completion_tokens": 2,
                },
                "tool_calls": [],
            }

    asyncio.run(ask())
    assert [progress for progress, _ in told] == [float(n + 1) for n in range(len(told))]
    assert [message for _, message in told][:3] == [
        "round 1/2: prefill planner",
        "round 1/2: think planner",
        "round 1/2: send planner -> solver",
    ]
    assert told[-1][1] == "round 2/2: decode solver"


@asynccontextmanager
async def connected(service: LocalService, **options: Any) -> AsyncIterator[Client]:
    """A client of a server in this process, which speaks the protocol's messages all the same."""
    async with Client(make_server(service, "hand", **options), mode="legacy") as client:
        yield client


def test_what_is_wrong_is_told_to_the_model_that_calls(hand_bundle: Path) -> None:
    async def ask() -> None:
        service = await LocalService.start({"hand": str(hand_bundle)}, threads=1)
        async with connected(service, description="Names a letter.") as client:
            (tool,) = (await client.list_tools()).tools
            assert tool.description == "Names a letter."
            for arguments, code, words in (
                ({}, "RM500", "the argument 'question' is missing. Give question and nothing else"),
                ({"question": None}, "RM500", "the argument 'question' is missing"),
                ({"question": "7", "tone": "kind"}, "RM500", "the argument 'tone' is not known"),
                ({"question": ["7", {}]}, "RM500", "neither text, number nor a list of them"),
                ({"question": " "}, "RM500", "has an empty question"),
                ({"question": "7" * 500}, "RM501", "the bundle allows 128"),
            ):
                result = await client.call_tool("by-hand", arguments)
                assert result.is_error
                assert words in result.content[0].model_dump()["text"]
                assert [each["code"] for each in result.structured_content["errors"]] == [code]
            with pytest.raises(MCPError, match="there is no tool 'other', only 'by-hand'"):
                await client.call_tool("other", {})
            await service.close(0.0)
            ended = await client.call_tool("by-hand", {"question": "7"})
            assert ended.structured_content["errors"][0]["code"] == "RM542"

    asyncio.run(ask())


def test_a_call_that_is_cancelled_frees_its_place(hand_bundle: Path) -> None:
    async def ask_and_leave() -> None:
        limits = ServiceLimits(max_queue=1000)
        service = await LocalService.start({"hand": str(hand_bundle)}, limits, threads=1)

        async def one() -> str:
            async for event in service.ask(Ask(id=0, model="hand", record={"question": "7"})):
                last = event
            return str(last.answer["answer"])  # type: ignore[union-attr]

        async with connected(service) as client:
            others = [asyncio.create_task(one()) for _ in range(200)]
            call = asyncio.create_task(client.call_tool("by-hand", {"question": "7"}))
            while service.num_open < 201:
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            while service.num_open == 201:
                await asyncio.sleep(0.001)
            assert not all(other.done() for other in others), "the call did not wait for its turn"
            assert set(await asyncio.gather(*others)) == {"h"}
            assert service.num_open == 0
            assert not (await client.call_tool("by-hand", {"question": "7"})).is_error
        await service.close(0.0)

    asyncio.run(ask_and_leave())


def test_only_this_machine_is_answered(address: str) -> None:
    sent = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    port = httpx.URL(address).port
    for headers, status in (
        ({}, 200),
        ({"host": f"localhost:{port}"}, 200),
        ({"origin": f"http://127.0.0.1:{port}"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": f"evil.example:{port}"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ):
        with httpx.stream("POST", address, json=HELLO, headers={**sent, **headers}) as response:
            assert response.status_code == status, headers
            allowed = response.headers.get("access-control-allow-origin")
            assert allowed is None
    with httpx.stream("POST", address, content=b"7" * 5_000_000, headers=sent) as response:
        assert response.status_code == 413


LOUD = """
import os, sys, threading, time
from recmas_runtime.cli.main import main
from recmas_runtime.serve import engine_host

def loud():
    while True:
        os.write(1, b"a library prints\\n")
        print("and so does Python", flush=True)
        time.sleep(0.001)

def load(*arguments, quiet=engine_host.load, **options):
    threading.Thread(target=loud, daemon=True).start()
    return quiet(*arguments, **options)

engine_host.load = load
sys.exit(main(sys.argv[1:]))
"""


def test_nothing_but_messages_is_on_standard_output(hand_bundle: Path) -> None:
    """Whatever prints there, from the first moment on."""
    initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    lines = "".join(json.dumps(each) + "\n" for each in (HELLO, initialized, CALL))
    with subprocess.Popen(
        [sys.executable, "-c", LOUD, "mcp", str(hand_bundle), "--threads", "1"],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(lines)
        server.stdin.flush()
        hello, answer = (json.loads(server.stdout.readline()) for _ in range(2))
        server.stdin.close()
        assert (hello["id"], answer["id"]) == (1, 2)
        assert answer["result"]["structuredContent"]["answer"] == "h"
        assert server.wait(timeout=30) == 0


def test_lines_that_are_no_messages_are_told(hand_bundle: Path) -> None:
    """And answered, whatever came first; blank ones are no messages that anybody meant."""
    initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    with subprocess.Popen(
        [*COMMAND, str(hand_bundle), "--threads", "1"],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def told(*sent: str) -> Any:
            server.stdin.write("".join(f"{line}\n" for line in sent))  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            return json.loads(server.stdout.readline())  # type: ignore[union-attr]

        for line, code in (
            ("hello\x1b[31m", -32700),
            ('{"jsonrpc": "2.0", ', -32700),
            ("[]", -32600),
            ('{"jsonrpc": "1.0", "id": 7, "method": "ping"}', -32600),
        ):
            error = told("", line)
            assert (error["id"], error["error"]["code"]) == (None, code)
        assert told(json.dumps(HELLO))["id"] == 1
        answer = told(json.dumps(initialized), json.dumps(CALL))
        assert answer["result"]["structuredContent"]["answer"] == "h"
        assert told("no")["error"]["code"] == -32700
        _, error_text = server.communicate(timeout=30)
        assert server.returncode == 0
    lines = error_text.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("<stdin>: a line that is no JSON: Invalid JSON: expected")
    assert lines[2] == "<stdin>: a line that is no message of JSON-RPC 2.0"


def test_a_signal_ends_it_while_its_client_is_silent(hand_bundle: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, str(hand_bundle), "--threads", "1"],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(HELLO) + "\n")
        server.stdin.flush()
        assert json.loads(server.stdout.readline())["id"] == 1
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 130


def test_schemas_have_what_prompts_use() -> None:
    schema = input_schema(("question", "facts[0]", "facts[2]", "facts[1]"))
    for record, is_valid in (
        ({"question": "q", "facts": ["a", "b", "c"]}, True),
        ({"question": "q", "facts": ["a", "b"]}, False),
        ({"question": "q"}, False),
        ({"question": "q", "facts": ["a", "b", "c"], "more": "x"}, False),
    ):
        assert jsonschema.Draft202012Validator(schema).is_valid(record) == is_valid


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--http", "0.0.0.0:8000"], "RM545", "other machines are not answered"),
        (["--http", "example.org:8000"], "RM545", "is no address that this serves at"),
        (["--http", "70000"], "RM545", "Give a port, or 127.0.0.1:PORT"),
        (["--json"], "RM506", "the protocol speaks on standard output"),
    ],
)
def test_options_that_are_refused(
    options: list[str],
    code: str,
    words: str,
    hand_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["mcp", str(hand_bundle), *options]) == 2
    printed = capsys.readouterr()
    assert code in printed.out + printed.err
    assert words in printed.out + printed.err


def test_a_port_that_is_taken(
    address: str, hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(httpx.URL(address).port)
    assert main(["mcp", str(hand_bundle), "--http", port]) == 2
    assert f"--http '{port}': Address already in use" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["mcp", str(tmp_path)]) == 5
    assert "error[RM400]: not a bundle" in capfd.readouterr().err
    print("standard output is there again")
    assert capfd.readouterr().out == "standard output is there again\n"
