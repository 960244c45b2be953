"""Engines in a worker process: what a front end sees of it when it works and when it dies."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kit.serving import ENDLESS
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.serve import process
from recmas_runtime.serve.log import ServiceLog
from recmas_runtime.serve.operation.catalog import Catalog, WatchedFolder
from recmas_runtime.serve.process import WorkerService
from recmas_runtime.serve.protocol import Ask, Done
from recmas_runtime.serve.service import Service, ServiceError, ServiceLimits


@asynccontextmanager
async def a_service(
    bundle: Path, log: io.StringIO | None = None, **limits: int
) -> AsyncIterator[WorkerService]:
    service = await WorkerService.start(
        {"m": str(bundle)},
        ServiceLimits(**limits),
        log=ServiceLog(log or io.StringIO()),
        threads=1,
    )
    try:
        yield service
    finally:
        await service.close(5.0)


async def answer(service: Service, question: object, *, model: str = "m", tokens: int = 8) -> str:
    ask = Ask(
        id=0,
        model=model,
        record={"question": question},
        sampling={"max_new_tokens": tokens},
    )
    async for event in service.ask(ask):
        if isinstance(event, Done):
            return str(event.answer["answer"])
    raise AssertionError("it ends with an answer or an error")


async def refusal(asking: Awaitable[object]) -> ServiceError:
    with pytest.raises(ServiceError) as failed:
        await asking
    return failed.value


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


def test_answers_are_those_of_a_lone_system(hand_bundle: Path) -> None:
    async def run() -> None:
        async with a_service(hand_bundle) as service:
            questions = [str(number) for number in range(10)] * 3
            answers = await asyncio.gather(*(answer(service, q) for q in questions))
            assert answers == [*"abcdefghij"] * 3
            assert service.num_open == 0

    asyncio.run(run())


def test_whoever_waits_for_a_dead_worker_is_told(hand_bundle: Path) -> None:
    async def run() -> None:
        async with a_service(hand_bundle) as service:
            asked = [
                asyncio.create_task(refusal(answer(service, ENDLESS, tokens=3900)))
                for _ in range(5)
            ]
            await until(lambda: service.num_open == 5)
            assert service.worker_pid is not None
            os.kill(service.worker_pid, signal.SIGKILL)
            errors = await asyncio.gather(*asked)
            assert {error.reason for error in errors} == {"stopped"}
            assert {str(error) for error in errors} == {"RM542: the worker process ended (SIGKILL)"}
            assert (await refusal(answer(service, "1"))).problems[0].code == "RM542"
            assert (await refusal(service.load(str(hand_bundle), "n"))).reason == "stopped"
            await until(lambda: service.is_ready)
            assert await answer(service, "1") == "b"
            assert service.num_restarts == 1

    asyncio.run(run())


def test_a_bundle_that_went_meanwhile_is_left_out(hand_bundle: Path, tmp_path: Path) -> None:
    async def run() -> None:
        copy = shutil.copytree(hand_bundle, tmp_path / "copy")
        log = io.StringIO()
        async with a_service(hand_bundle, log) as service:
            await service.load(str(copy), "gone")
            shutil.rmtree(copy)
            assert await answer(service, "1", model="gone") == "b"  # engines hold it
            assert service.worker_pid is not None
            os.kill(service.worker_pid, signal.SIGKILL)
            await until(lambda: service.num_restarts == 1 and service.is_ready)
            assert [*service.models] == ["m"]
            assert await answer(service, "1") == "b"
            assert "not loaded model=gone" in log.getvalue()
            # It was there, so that asking again may help; and it is loaded once it is there again.
            error = await refusal(answer(service, "1", model="gone"))
            assert (error.reason, error.problems[0].code) == ("stopped", "RM542")
            assert (await refusal(answer(service, "1", model="never"))).reason == "input"
            shutil.copytree(hand_bundle, tmp_path / "new").rename(copy)
            await until(lambda: "gone" in service.models)
            assert await answer(service, "2", model="gone") == "c"
            assert service.num_restarts == 1
            assert log.getvalue().count("not loaded") == 1
            await service.unload("gone")
            assert (await refusal(answer(service, "1", model="gone"))).reason == "input"

    asyncio.run(run())


def test_a_service_whose_only_bundle_is_broken_keeps_its_worker(
    hand_bundle: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        copy = shutil.copytree(hand_bundle, tmp_path / "copy")
        log = io.StringIO()
        async with a_service(copy, log) as service:
            plan = (copy / "plan.json").read_bytes()
            (copy / "plan.json").write_text("{}")
            assert service.worker_pid is not None
            os.kill(service.worker_pid, signal.SIGKILL)
            await until(lambda: service.lost == {"m"})
            assert not service.is_ready
            assert (await refusal(answer(service, "1"))).problems[0].code == "RM542"
            await service.load(str(hand_bundle), "other")
            assert service.is_ready
            (copy / "plan.json").write_bytes(plan)
            await until(lambda: not service.lost)
            assert await answer(service, "1") == "b"
            assert service.num_restarts == 1
            assert log.getvalue().count("worker ended") == 1

    asyncio.run(run())


def test_a_worker_that_hangs_is_ended_and_started_again(
    hand_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_SILENT_S", 30.0)

    async def run() -> None:
        log = io.StringIO()
        async with a_service(hand_bundle, log) as service:
            monkeypatch.setattr(process, "_SILENT_S", 1.0)
            await asyncio.sleep(2.5)  # one that has nothing to do may be silent
            assert (service.num_restarts, service.is_ready) == (0, True)
            assert service.worker_pid is not None
            os.kill(service.worker_pid, signal.SIGSTOP)
            error = await refusal(answer(service, "1"))
            monkeypatch.setattr(process, "_SILENT_S", 30.0)
            assert error.problems[0].code == "RM542"
            await until(lambda: service.is_ready)
            assert await answer(service, "1") == "b"
            assert service.num_restarts == 1
            assert 'worker ended how="by the service: it said nothing for 1 s"' in log.getvalue()

    asyncio.run(run())


def test_workers_that_die_at_once_are_started_later_and_later(
    hand_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_FIRST_DELAY_S", 0.05)

    async def run() -> None:
        log = io.StringIO()
        async with a_service(hand_bundle, log) as service:
            # A worker that begins with another program than ours.
            monkeypatch.setattr(process, "_WORKER", "this")
            assert service.worker_pid is not None
            os.kill(service.worker_pid, signal.SIGKILL)
            await until(lambda: service.num_restarts >= 3)
            assert not service.is_ready
            assert "Beautiful is better than ugly." in log.getvalue()
            assert 'worker ended how="status 0"' in log.getvalue()
            monkeypatch.undo()
            await until(lambda: service.is_ready)
            assert await answer(service, "2") == "c"

    asyncio.run(run())


def test_a_worker_that_never_starts_is_an_error(
    hand_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_WORKER", "no_such_module")
    log = io.StringIO()

    async def run() -> ServiceError:
        starting = WorkerService.start({"m": str(hand_bundle)}, log=ServiceLog(log))
        return await refusal(starting)

    error = asyncio.run(run())
    assert error.problems[0].code == "RM542"
    assert error.problems[0].message == "the worker process ended (status 1)"
    assert "No module named no_such_module" in log.getvalue()


def test_a_broken_bundle_is_the_error_of_the_start(hand_bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(hand_bundle, tmp_path / "broken")
    (broken / "plan.json").write_text("{}")

    async def run() -> ServiceError:
        return await refusal(WorkerService.start({"m": str(broken)}, log=ServiceLog(io.StringIO())))

    assert asyncio.run(run()).problems[0].code == "RM401"


def test_a_model_is_replaced_between_two_answers(hand_bundle: Path) -> None:
    async def run() -> None:
        async with a_service(hand_bundle) as service:
            long = asyncio.create_task(answer(service, ENDLESS, tokens=400))
            await until(lambda: service.num_open == 1)
            info = await service.load(str(hand_bundle), "m")
            assert info.name == "m"
            assert await answer(service, "4") == "e"
            assert len(await long) == 400
            await service.unload("m")
            assert (await refusal(answer(service, "4"))).problems[0].code == "RM540"
            await service.load(str(hand_bundle), "m")
            assert await answer(service, "4") == "e"

    asyncio.run(run())


@pytest.mark.parametrize("value", ["\ud800", {"deep": ["\udfff"]}], ids=repr)
def test_what_no_line_can_hold_is_refused_alone(hand_bundle: Path, value: object) -> None:
    async def run() -> None:
        async with a_service(hand_bundle) as service:
            error = await refusal(answer(service, value))
            assert (error.reason, error.problems[0].code) == ("input", "RM500")
            assert await answer(service, "1") == "b"
            assert service.num_restarts == 0

    asyncio.run(run())


def test_a_closed_service_takes_nothing(hand_bundle: Path) -> None:
    async def run() -> None:
        async with a_service(hand_bundle) as service:
            asked = asyncio.create_task(refusal(answer(service, ENDLESS, tokens=3900)))
            await until(lambda: service.num_open == 1)
            first = asyncio.create_task(service.close(600.0))
            await asyncio.sleep(0.05)
            assert (await refusal(answer(service, "1"))).reason == "stopped"
            await service.close(0.0)  # and the first one waits no longer either
            await first
            assert (await asked).problems[0].message == "the service ends"
            assert service.worker_pid is None

    asyncio.run(run())


def test_nothing_is_left_of_many_workers(hand_bundle: Path) -> None:
    async def run() -> None:
        async with a_service(hand_bundle) as service:
            for number in range(3):
                assert service.worker_pid is not None
                os.kill(service.worker_pid, signal.SIGKILL)
                await until(
                    lambda number=number: (
                        service.num_restarts > number  # type: ignore[misc]
                        and service.is_ready
                    )
                )
                if number == 0:
                    before = [*Path("/proc/self/fd").iterdir()]
            await asyncio.sleep(0.05)
            assert len([*Path("/proc/self/fd").iterdir()]) <= len(before)

    asyncio.run(run())


def test_a_catalog_checks_what_it_adds(hand_bundle: Path) -> None:
    async def run() -> None:
        async with a_service(hand_bundle) as service:
            full = Catalog(service, lambda: 100)
            with pytest.raises(RecmasError, match=r"RM545.*take \d+ kB, and 100 B are free"):
                await full.add(str(hand_bundle), "n")
            await Catalog(service, lambda: None).add(str(hand_bundle), "n")
            assert [*service.models] == ["m", "n"]

    asyncio.run(run())


def test_a_watched_folder_that_is_being_filled(hand_bundle: Path, tmp_path: Path) -> None:
    """Nothing is loaded before it is whole, and nothing is reported that only was not."""

    async def run() -> None:
        log = io.StringIO()
        async with a_service(hand_bundle, log) as service:
            catalog = Catalog(service, lambda: None)
            watched = WatchedFolder(tmp_path, catalog, service, ServiceLog(log))
            place = tmp_path / "new"
            place.mkdir()
            for path in sorted(
                hand_bundle.rglob("*"), key=lambda path: path.name != "manifest.json"
            ):
                to = place / path.relative_to(hand_bundle)
                if path.is_file():
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, to)
                    await watched.look()
            assert "new" not in service.models
            await watched.look()
            assert await answer(service, "3", model="new") == "d"
            (tmp_path / "m").symlink_to(hand_bundle)
            await watched.look()
            await watched.look()
            shutil.rmtree(place)
            (tmp_path / "m").unlink()
            await watched.look()
            assert [*service.models] == ["m"]
            text = log.getvalue()
            assert text.count("not loaded") == 1
            assert "a model 'm' was loaded from elsewhere" in text

    asyncio.run(run())


def test_a_bundle_that_kills_workers_is_given_up(
    hand_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(hand_bundle, tmp_path / "deadly")

    async def run() -> None:
        log = io.StringIO()
        async with a_service(hand_bundle, log) as service:
            load = WorkerService._load

            async def deadly(self: WorkerService, path: str, model: str) -> object:
                if model.startswith("deadly"):
                    assert self.worker_pid is not None
                    os.kill(self.worker_pid, signal.SIGKILL)
                return await load(self, path, model)

            monkeypatch.setattr(WorkerService, "_load", deadly)
            watched = WatchedFolder(
                tmp_path, Catalog(service, lambda: None), service, ServiceLog(log)
            )
            for _ in range(6):
                await watched.look()
                await until(lambda: service.is_ready and service.worker_pid is not None)
                await asyncio.sleep(0.05)
                await until(lambda: service.is_ready)
            assert service.num_restarts == 2
            assert log.getvalue().count("not loaded model=deadly") == 1
            assert await answer(service, "1") == "b"

    asyncio.run(run())


def test_the_front_end_has_no_engines() -> None:
    """What answers HTTP stays small, and is not what is ended where memory runs out."""
    code = "import sys, recmas_runtime.serve.process; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"onnxruntime", "tokenizers"} & set(ran.stdout.split())
