"""Records that are answered by workers in a Ray cluster, and come back in their order."""

from __future__ import annotations

import os
import signal
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.text import human_bytes
from recmas_runtime.engines.devices import needs_gpu
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.running.records import Answer, Record
from recmas_runtime.running.system import System, load

Result = Answer | RecmasError

# Records of a batch, by how many of them run at a time: in its beginning and end fewer do.
_CALLS: Final = 8
# Batches for each worker that are out before the first record of all is back: none of them waits
# for a slow neighbour, and what was read fits into memory.
_AHEAD: Final = 4
# A record whose worker dies is tried again elsewhere; not for ever, for it may be the reason.
_DEATHS: Final = 3
# Deaths of workers that are nobody's fault, beyond one for each.
_MOST_DEATHS: Final = 20
_THREADS: Final = 4
# Ray tries for minutes, by itself.
_CONNECT_S: Final = 5.0
_TRIES: Final = 3


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What each worker loads.

    Attributes:
        bundle: Its path, the same on every machine.
        fingerprint: Of the bundle; a machine that has another one there is refused.
        memory_bytes: Of each worker.
        threads: Of each worker; None for a few, or as many as the smallest machine has.
        date: For chat templates that write the date; None for the bundle's, or else today.
        cache: Whether packed weights are kept in the cache of each machine.
    """

    bundle: Path
    fingerprint: str
    baseline: str
    device: str
    memory_bytes: int
    threads: int | None = None
    date: str | None = None
    cache: bool = True


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What a worker has loaded: its system's date, and the one that prompts show."""

    date: str
    prompt_day: str | None


class _Worker:
    """A system in a process of the cluster.

    What it returns are answers and problems: the errors that hold these do not travel.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._system: System | None = None

    def load(self) -> _Loaded | tuple[Problem, ...]:
        """Load the system, or say why not."""
        settings = self._settings
        try:
            system = load(
                settings.bundle,
                device=settings.device,
                threads=settings.threads,
                date=settings.date,
                cache=settings.cache,
            )
            if system.manifest.fingerprint != settings.fingerprint:
                raise fail(
                    "RM401",
                    f"the machine {ray.util.get_node_ip_address()} has another bundle there",
                    file=str(settings.bundle),
                    hint="Give all machines of the cluster the same bundle under the same path.",
                )
            self._system = system.baseline(settings.baseline)
            return _Loaded(date=system.date, prompt_day=system.prompt_day)
        except RecmasError as error:
            return error.problems

    def answer(
        self, records: Sequence[Record], sampling: SamplingPlan, at_once: int
    ) -> list[Answer | Problem]:
        """Answer records, or say why not."""
        assert self._system is not None, "only workers that have loaded are asked"
        results = self._system.answer_all(records, at_once=at_once, sampling=sampling)
        return [each.problems[0] if isinstance(each, RecmasError) else each for each in results]


@dataclass
class _Asked:
    """A record that was read, and what came of it."""

    record: Record
    result: Result | None = None
    num_deaths: int = 0  # of workers that had this record alone


@dataclass
class BatchWorkers:
    """Workers that share records, once `connected` has started them.

    Attributes:
        num_workers: Most workers at a time; fewer run while machines have no room for all.
    """

    settings: WorkerSettings
    num_workers: int
    resources: Mapping[str, float]
    _loaded: _Loaded | None = None  # by the first worker
    _idle: list[Any] = field(default_factory=list)
    # By the reference of what Ray gives back once a worker has loaded, or answered.
    _starting: dict[Any, Any] = field(default_factory=dict)
    _running: dict[Any, tuple[Any, list[_Asked]]] = field(default_factory=dict)
    _num_starts: int = 0
    _problems: tuple[Problem, ...] = ()

    @property
    def prompt_day(self) -> str | None:
        """The date that prompts show; None if no chat template writes one."""
        assert self._loaded is not None, "the first worker has loaded"
        return self._loaded.prompt_day

    def start(self) -> None:
        """Start one worker, which decides what day it is, and then the others.

        Raises:
            RecmasError: If it cannot load the bundle.
        """
        self._start_worker()
        while not self._idle:
            self._demand_workers()
            self._wait()
        for _ in range(self.num_workers - 1):
            self._start_worker()

    def answer_all(
        self, records: Iterable[Record], *, total: int | None, sampling: SamplingPlan, at_once: int
    ) -> Iterator[Result]:
        """Yield for each record, in order, what came of it.

        Args:
            total: How many there are, if that is known: the last of them are shared by all workers.
            at_once: How many may run in a worker at a time.

        Raises:
            RecmasError: Once no worker is left.
        """
        size = _CALLS * at_once
        if total is not None:
            size = min(size, max(at_once, -(-total // (_AHEAD * self.num_workers))))
        coming = iter(records)
        ordered, again = deque[_Asked](), deque[list[_Asked]]()
        while True:
            while self._idle and (again or len(ordered) < _AHEAD * self.num_workers * size):
                if again:
                    batch = again.popleft()
                elif batch := [*map(_Asked, islice(coming, size))]:
                    ordered.extend(batch)
                else:
                    break
                self._hand_out(batch, sampling, at_once)
            if ordered and (result := ordered[0].result) is not None:
                ordered.popleft()
                yield result
            elif not ordered and self._idle:  # which have found nothing to do
                return
            else:
                self._demand_workers()
                again.extend(self._wait())

    def _hand_out(self, batch: list[_Asked], sampling: SamplingPlan, at_once: int) -> None:
        worker = self._idle.pop()
        records = [asked.record for asked in batch]
        self._running[worker.answer.remote(records, sampling, at_once)] = worker, batch

    def _start_worker(self) -> None:
        self._num_starts += 1
        worker = ray.remote(_Worker).options(**self.resources).remote(self.settings)
        self._starting[worker.load.remote()] = worker

    def _demand_workers(self) -> None:
        if not (self._idle or self._starting or self._running):
            raise RecmasError(self._problems)

    def _wait(self) -> list[list[_Asked]]:
        """Wait until a worker is idle or dead; returns what a dead one leaves to be done."""
        (reference,), _ = ray.wait([*self._starting, *self._running], num_returns=1)
        if reference in self._starting:
            self._has_loaded(self._starting.pop(reference), reference)
            return []
        worker, batch = self._running.pop(reference)
        try:
            found = ray.get(reference)
        except RayTaskError:
            raise  # a bug: its worker lives
        except RayError as error:
            self._replace(error)
            return _to_do_again(batch)
        self._idle.append(worker)
        for asked, result in zip(batch, found, strict=True):
            asked.result = RecmasError(result) if isinstance(result, Problem) else result
        return []

    def _has_loaded(self, worker: Any, reference: Any) -> None:
        try:
            loaded = ray.get(reference)
        except RayTaskError:
            raise
        except RayError as error:
            self._replace(error)
            return
        if not isinstance(loaded, _Loaded):  # another try would say the same
            self._problems = loaded
            return
        if self._loaded is None:
            self._loaded = loaded
            self.settings = replace(self.settings, date=loaded.date)
        self._idle.append(worker)

    def _replace(self, error: RayError) -> None:
        """Start a worker in place of one that died, unless they only ever die."""
        reason = str(error).strip().splitlines()[0]
        hint = "See the logs of the cluster; memory may have run out on a machine."
        problem = Problem(code="RM507", message=f"workers of the cluster died: {reason}", hint=hint)
        self._problems = (problem,)
        if self._num_starts < 2 * self.num_workers + _MOST_DEATHS:
            self._start_worker()


def _to_do_again(batch: list[_Asked]) -> list[list[_Asked]]:
    """Return the halves of a batch whose worker died: any of its records may be the reason."""
    if len(batch) > 1:
        middle = len(batch) // 2
        return [batch[:middle], batch[middle:]]
    (asked,) = batch
    asked.num_deaths += 1
    if asked.num_deaths < _DEATHS:
        return [batch]
    message = f"{asked.num_deaths} workers died over record {asked.record.id!r}"
    asked.result = fail("RM507", message, hint="--resume tries it again.")
    return []


@contextmanager
def connected(address: str | None, settings: WorkerSettings) -> Iterator[BatchWorkers]:
    """Connect to a cluster and start workers in it, as many as its machines have room for.

    Args:
        address: `HOST:PORT` of the cluster; None for the one that runs here or that RAY_ADDRESS
            names.

    Raises:
        RecmasError: RM504 if there is no cluster or it has no room, and what keeps a worker from
            loading the bundle.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address)
        signal.signal(signal.SIGTERM, before)  # Ray has set one of its own
        workers = _planned(settings)
        workers.start()
        yield workers
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _connect(address: str | None) -> None:
    # None is started where there is none: it would listen on all addresses of this machine, and
    # run the code of whoever finds it.
    where = f"at {address!r}" if address else "here or at the address in RAY_ADDRESS"
    try:
        if address is not None:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(_TRIES))
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise fail(
            "RM504",
            f"no Ray cluster answers {where}",
            hint="Start one with `ray start --head` and give the address that it prints, as "
            "HOST:PORT.",
        ) from error


def _planned(settings: WorkerSettings) -> BatchWorkers:
    """Return workers that fit into the cluster as it is now."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(machine.get("CPU", 0)) for machine in machines if machine.get("CPU", 0) >= 1]
    threads = settings.threads or min([_THREADS, *cpus])
    needs = {"CPU": float(threads), "memory": float(settings.memory_bytes)}
    if needs_gpu(settings.device):
        needs["GPU"] = 1.0
    num_workers = sum(
        min(int(machine.get(name, 0) // need) for name, need in needs.items())
        for machine in machines
    )
    if num_workers < 1:
        a_gpu = ", a GPU" if "GPU" in needs else ""
        what = f"{threads} CPUs{a_gpu} and {human_bytes(settings.memory_bytes)}"
        message = f"no machine of the Ray cluster has {what} for a worker"
        hint = "Give fewer --threads, a smaller --batch, or add machines."
        raise fail("RM504", message, hint=hint)
    return BatchWorkers(
        settings=replace(settings, threads=threads),
        num_workers=num_workers,
        resources={
            "num_cpus": needs["CPU"],
            "num_gpus": needs.get("GPU", 0.0),
            "memory": needs["memory"],
        },
    )
