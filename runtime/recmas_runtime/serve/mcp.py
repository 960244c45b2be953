"""A loaded system as one tool of the Model Context Protocol, over stdio or streamable HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from typing import Any, Final, Protocol, TextIO

import anyio
import mcp_types as types
import uvicorn
from anyio.streams.memory import MemoryObjectSendStream
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from recmas_runtime.core.printing import note
from recmas_runtime.core.text import counted, listed
from recmas_runtime.formats.plan import field_place
from recmas_runtime.serve.protocol import Ask, Done, ModelInfo, Piece, Step
from recmas_runtime.serve.service import Service, ServiceError

PATH: Final = "/mcp"
# Clients give a call up after a minute without a message.
_BEAT_S: Final = 5.0
_MAX_SESSIONS: Final = 100
# How long a server over HTTP waits for calls that run when it is to end.
_GRACE_S: Final = 5


def make_server(service: Service, model: str, *, description: str | None = None) -> Server[Any]:
    """Return a server whose one tool asks a loaded system.

    Args:
        description: What the system is good for, by which agents choose among tools; None for what
            the bundle says of it.
    """
    info = service.models[model]
    tool = _tool(info, description)

    async def list_tools(
        _: ServerRequestContext[Any], __: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool])

    async def call_tool(
        context: ServerRequestContext[Any], call: types.CallToolRequestParams
    ) -> types.CallToolResult:
        if call.name != tool.name:
            message = f"there is no tool {call.name!r}, only {tool.name!r}"
            raise MCPError(code=types.INVALID_PARAMS, message=message)
        try:
            record = _record(info, call.arguments or {})
            done = await _answer(service, Ask(id=0, model=model, record=record), context)
        except ServiceError as error:
            return _failure(error)
        return _success(done.answer)

    return Server(
        f"recmas-{tool.name}",
        version=info.digest[:12],
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _tool(info: ModelInfo, description: str | None) -> types.Tool:
    agents = listed([agent.name for agent in info.agents])
    about = (
        f"Ask the multi-agent system {info.system}. Its {counted(len(info.agents), 'agent')} "
        f"({agents}) run {counted(info.rounds, 'round')} and hand each other states of language "
        f"models; {info.answer_agent} writes the answer."
    )
    return types.Tool(
        name=re.sub(r"[^A-Za-z0-9_-]", "_", info.system)[:64],
        description=description or about,
        input_schema=input_schema(info.fields),
        output_schema=_OUTPUT,
        annotations=types.ToolAnnotations(
            read_only_hint=not info.has_tools, open_world_hint=info.has_tools
        ),
    )


def input_schema(fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON schema of a record that has what prompts use, and nothing else."""
    properties: dict[str, Any] = {}
    for shown in fields:
        name, entry = field_place(shown)
        text = {"type": "string"}
        if entry is None:
            properties.setdefault(name, {"description": f"The {name}.", **text})
            continue
        known = properties.get(name, {}).get("minItems", 0)
        properties[name] = {
            "description": f"The {name}, one by one.",
            "type": "array",
            "items": text,
            "minItems": max(known, entry + 1),
        }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_COUNT: Final = {"type": "integer", "minimum": 0}
_OUTPUT: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "answer": {"type": "string"},
        "finish_reason": {"enum": ["stop", "length"]},
        "rounds": _COUNT,
        "usage": {
            "type": "object",
            "properties": {"remote": {"type": "object"}},
            "additionalProperties": _COUNT,
        },
        "tool_calls": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["answer", "finish_reason", "rounds", "usage", "tool_calls"],
}


def _record(info: ModelInfo, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as a record; what else is wrong with them the engines say."""
    schema = input_schema(info.fields)
    names = schema["required"]
    missing = [name for name in names if arguments.get(name) is None]
    others = [name for name in arguments if name not in names]
    if missing or others:
        wrong = f"{missing[0]!r} is missing" if missing else f"{others[0]!r} is not known"
        hint = f"Give {listed(names)} and nothing else."
        raise ServiceError.of("input", "RM500", f"the argument {wrong}", hint)
    return dict(arguments)


class _Progress:
    """Tells the client what runs: each step, and between them that the call is still alive."""

    def __init__(self, context: ServerRequestContext[Any]) -> None:
        self._session = context.session
        self._count = 0
        self.message = "waiting"

    async def tell(self, message: str) -> None:
        """Send a message; progress is the number of messages, for it must grow."""
        self.message = message
        self._count += 1
        await self._session.report_progress(self._count, message=message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            await self.tell(self.message)

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Within it a message is sent at least every few seconds."""
        beat = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beat.cancel()
            await asyncio.wait([beat])


async def _answer(service: Service, ask: Ask, context: ServerRequestContext[Any]) -> Done:
    """Return the answer; a call that is cancelled takes its request along."""
    progress, num_chars = _Progress(context), 0
    async with aclosing(service.ask(ask)) as events, progress.beating():
        async for event in events:
            match event:
                case Step():
                    await progress.tell(_step_text(event))
                case Piece():
                    num_chars += len(event.text)
                    progress.message = f"answer, {num_chars} characters so far"
                case Done():
                    return event
    raise AssertionError("a request ends with its answer or an error")


def _step_text(step: Step) -> str:
    agents = ", ".join(step.agents)
    if step.op == "send":
        agents = f"{step.agents[0]} -> {', '.join(step.agents[1:])}"
    return f"round {step.round}/{step.rounds}: {step.op} {agents}"


def _success(answer: Mapping[str, Any]) -> types.CallToolResult:
    return types.CallToolResult(
        content=[types.TextContent(text=answer["answer"])],
        structured_content={name: answer[name] for name in _OUTPUT["required"]},
    )


def _failure(error: ServiceError) -> types.CallToolResult:
    """Return what the model that called reads, and may correct."""
    texts = [f"{each.code}: {each.message}. {each.hint}".rstrip() for each in error.problems]
    return types.CallToolResult(
        content=[types.TextContent(text="\n".join(texts))],
        structured_content={
            "reason": error.reason,
            "errors": [
                {"code": each.code, "message": each.message, "hint": each.hint}
                for each in error.problems
            ],
        },
        is_error=True,
    )


@contextmanager
def protocol_output() -> Iterator[TextIO]:
    """Return standard output for the protocol alone: what libraries print goes to standard error.

    That is also what libraries not written in Python print, so it is done to the descriptor.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding="utf-8", newline="\n", closefd=False) as output:
            yield output
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


async def serve_stdio(server: Server[Any], output: TextIO) -> None:
    """Serve one client over standard input and an output, until it closes them."""
    async with (
        stdio_server(stdout=anyio.wrap_file(output)) as (incoming, outgoing),
        anyio.create_task_group() as tasks,
    ):
        to_server, messages = anyio.create_memory_object_stream[SessionMessage | Exception]()
        tasks.start_soon(_pass_on, incoming, to_server, outgoing)
        await server.run(messages, outgoing, server.create_initialization_options())
        tasks.cancel_scope.cancel()


async def _pass_on(
    incoming: AsyncIterable[SessionMessage | Exception],
    to_server: MemoryObjectSendStream[SessionMessage | Exception],
    outgoing: _Outgoing,
) -> None:
    """Pass a client's messages on; say of lines that are none what is wrong with them.

    The package leaves them without a word.
    """
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):  # the other side ended
        async with to_server:
            async for item in incoming:
                if isinstance(item, SessionMessage):
                    await to_server.send(item)
                elif (error := _unreadable(item)) is not None:
                    note(f"<stdin>: {error.message}")
                    told = types.JSONRPCError(jsonrpc="2.0", id=None, error=error)
                    await outgoing.send(SessionMessage(told))


class _Outgoing(Protocol):
    """Takes messages to a client."""

    async def send(self, item: SessionMessage, /) -> None:
        """Send one."""


def _unreadable(error: Exception) -> types.ErrorData | None:
    """Return the error for a line that is no message; None for a blank one."""
    first = error.errors()[0] if isinstance(error, ValidationError) else None
    if first is None or first["type"] != "json_invalid":
        message = "a line that is no message of JSON-RPC 2.0"
        return types.ErrorData(code=types.INVALID_REQUEST, message=message)
    if not str(first["input"]).strip():
        return None
    return types.ErrorData(
        code=types.PARSE_ERROR, message=f"a line that is no JSON: {first['msg']}"
    )


async def serve_http(server: Server[Any], listener: socket.socket) -> None:
    """Serve clients over streamable HTTP, until a signal ends it.

    Only requests that name this machine are answered, from its own pages or from programs: another
    site's page cannot reach it through a name of its own.
    """
    host, port = listener.getsockname()[:2]
    names = {f"{name}:{port}" for name in (f"[{host}]" if ":" in host else host, "localhost")}
    application = server.streamable_http_app(
        streamable_http_path=PATH,
        max_sessions=_MAX_SESSIONS,
        transport_security=TransportSecuritySettings(
            allowed_hosts=sorted(names),
            allowed_origins=sorted(f"http://{name}" for name in names),
        ),
    )
    config = uvicorn.Config(
        application, log_level="warning", timeout_graceful_shutdown=_GRACE_S, access_log=False
    )
    await uvicorn.Server(config).serve(sockets=[listener])
