"""A service in this process: which requests run, wait, are refused and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from recmas_runtime.running.open_engines import LoadedBundle
from recmas_runtime.serve import engine_host
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.protocol import AnyEvent, Ask, Done, Gauges, Piece, Step
from recmas_runtime.serve.service import ServiceError, ServiceLimits

Test = Callable[[LocalService], Coroutine[Any, Any, None]]


@asynccontextmanager
async def service_of(bundle: Path, **limits: Any) -> AsyncIterator[LocalService]:
    service = await LocalService.start({"digits": str(bundle)}, ServiceLimits(**limits), threads=1)
    try:
        yield service
    finally:
        await service.close(0.0)


def ask(question: str = "7", **more: Any) -> Ask:
    return Ask(id=0, model="digits", record={"question": question}, **more)


async def text_of(service: LocalService, question: Ask) -> str:
    pieces = [event.text async for event in service.ask(question) if isinstance(event, Piece)]
    return "".join(pieces)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


@pytest.mark.parametrize("shares", [True, False])
def test_events_come_in_order(
    hand_bundle: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    monkeypatch.setattr(LoadedBundle, "can_share", property(lambda _: shares))

    async def test() -> None:
        async with service_of(hand_bundle) as service:
            events = [event async for event in service.ask(ask())]
            assert [event.op for event in events if isinstance(event, Step)][-1] == "decode"
            *_, last = events
            assert isinstance(last, Done)
            assert last.answer["answer"] == "h"
            assert await asyncio.gather(
                *(text_of(service, ask(str(digit))) for digit in range(8))
            ) == list("abcdefgh")

    run(test)


@pytest.mark.parametrize("shares", [True, False])
def test_whoever_leaves_frees_the_room(
    hand_bundle: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    monkeypatch.setattr(LoadedBundle, "can_share", property(lambda _: shares))

    async def test() -> None:
        async with service_of(hand_bundle, max_batch=1, max_queue=1) as service:
            leaving = service.ask(ask())
            assert isinstance(await anext(leaving), Step)
            waiting = asyncio.create_task(text_of(service, ask("3")))
            await asyncio.sleep(0)
            with pytest.raises(ServiceError) as refused:
                await text_of(service, ask("4"))
            assert (refused.value.reason, refused.value.problems[0].code) == ("full", "RM541")
            await leaving.aclose()
            assert await waiting == "d"
            assert service.num_open == 0

    run(test)


def test_a_request_may_wait_only_so_long(hand_bundle: Path) -> None:
    async def test() -> None:
        async with service_of(hand_bundle, max_batch=1, max_wait_s=0.2) as service:
            running = service.ask(ask())
            await anext(running)
            # Nobody reads what the first one says, but its engines run on, so it is held up here.
            service._host._has_room = lambda model: False  # type: ignore[method-assign]
            with pytest.raises(ServiceError) as refused:
                await text_of(service, ask("4"))
            assert refused.value.reason == "full"
            assert "0.2 s" in str(refused.value)
            await running.aclose()

    run(test)


def test_requests_are_refused_with_their_own_reason(hand_bundle: Path) -> None:
    async def test() -> None:
        async with service_of(hand_bundle) as service:
            wrong = {
                "RM500": Ask(id=0, model="digits", record={"other": "7"}),
                "RM505": ask(sampling={"temperature": -1.0}),
                "RM506": ask(rounds=9),
                "RM508": ask(baseline="nothing"),
                "RM540": Ask(id=0, model="letters", record={"question": "7"}),
            }
            for code, question in wrong.items():
                with pytest.raises(ServiceError) as refused:
                    await text_of(service, question)
                assert [problem.code for problem in refused.value.problems] == [code]
                assert refused.value.reason == "input"
            assert await text_of(service, ask()) == "h"

    run(test)


def test_bundles_come_and_go(hand_bundle: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with service_of(hand_bundle) as service:
            with pytest.raises(ServiceError) as refused:
                await service.load(str(tmp_path), "broken")
            assert refused.value.problems[0].code.startswith("RM40")
            await service.load(str(hand_bundle), "again")
            again = Ask(id=0, model="again", record={"question": "2"})
            running = service.ask(again)
            await anext(running)
            leaving = asyncio.create_task(service.unload("again"))
            await asyncio.sleep(0)
            with pytest.raises(ServiceError, match="no model 'again'"):
                await text_of(service, again)
            *_, last = [event async for event in running]
            assert isinstance(last, Done)
            await leaving
            assert list(service.models) == ["digits"]

    run(test)


def test_closing_ends_what_runs(hand_bundle: Path) -> None:
    async def test() -> None:
        async with service_of(hand_bundle) as service:
            running = service.ask(ask())
            await anext(running)
            await service.close(0.0)
            with pytest.raises(ServiceError) as ended:
                async for _ in running:
                    pass
            assert ended.value.reason == "stopped"
            with pytest.raises(ServiceError) as refused:
                await text_of(service, ask())
            assert refused.value.reason == "stopped"

    run(test)


def test_caches_are_told_while_requests_have_them(
    hand_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_host, "_GAUGES_S", 0.0)  # after each engine call

    async def test() -> None:
        async with service_of(hand_bundle) as service:
            seen: list[int] = []
            told = service.dispatch

            def dispatch(event: AnyEvent | Gauges) -> None:
                if isinstance(event, Gauges):
                    seen.append(event.cache_bytes)
                told(event)

            service.dispatch = dispatch  # type: ignore[method-assign]
            answers = (text_of(service, ask("Z", sampling={"max_new_tokens": 60})) for _ in "1234")
            await asyncio.gather(*answers, text_of(service, ask("3")))
            async with asyncio.timeout(30):
                while not (max(seen, default=0) > 0 and seen[-1] == 0):
                    await asyncio.sleep(0.01)

    run(test)
