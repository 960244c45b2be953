"""`recmasc bench engines`: every engine of a backbone beside the floor, in one run.

Every engine has a process of its own, so that its memory is its own and no other engine's threads
wait beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from recmas_compiler.bench.engine_worker import (
    ENGINES,
    ROWS_ONLY,
    WITHOUT_CAPACITY,
    EngineKey,
)
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.onnx.session import physical_cores, resolve_device
from recmas_runtime.formats.bundle import Bundle, open_bundle
from recmas_runtime.formats.layers import has_states

_MODULE: Final = "recmas_compiler.bench.engine_worker"
_SECONDS_TO_END: Final = 5.0


class Worker:
    """One engine in a process of its own; `about` is what it says of itself once it is open.

    Raises:
        RecmasError: What opening the engine raised; RM507 if the process died.
    """

    def __init__(self, key: EngineKey) -> None:
        self.key = key
        # A session of its own: Ctrl-C is for the process that asks, which ends this one.
        self._process = subprocess.Popen(  # noqa: S603  # our own module, our own arguments
            [sys.executable, "-m", _MODULE, json.dumps(asdict(key))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.about: Mapping[str, Any] = {}

    def wait_until_open(self) -> None:
        """Return once the engine is open."""
        self.about = self._reply()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Put a request and return the reply."""
        assert self._process.stdin is not None, "stdin is a pipe"
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "stdin is a pipe"
        assert self._process.stdout is not None, "stdout is a pipe"
        self._process.terminate()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "stdout is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise fail(
                "RM507",
                f"the process of engine {self.key.engine!r} ended with status "
                f"{self._process.wait()}",
                hint="What it printed on stderr says why; leave it out with --engine otherwise.",
            )
        reply: dict[str, Any] = json.loads(line)
        if "problems" in reply:
            raise RecmasError(Problem(**problem) for problem in reply["problems"])
        return reply


@contextmanager
def running(keys: Sequence[EngineKey], progress: Progress) -> Iterator[list[Worker]]:
    """Run a worker for each key until the context is left.

    They open one after the other: opening side by side takes as long, and peaks in memory.
    """
    workers: list[Worker] = []
    try:
        with progress.stage("Opening engines", len(keys)) as advance:
            for key in keys:
                workers.append(Worker(key))
                workers[-1].wait_until_open()
                advance()
        yield workers
    finally:
        for worker in workers:
            worker.close()


# Reads a block of memory as large as the weights of a step; returns the seconds of reading it once.
Reader = Callable[[], float]


def host_reader(num_bytes: int, *, threads: int) -> Reader:
    """Return what reads a block of memory, with as many threads as an engine has."""
    parts = np.array_split(np.ones(num_bytes // 8, np.uint64), threads)

    def read() -> float:
        start = time.perf_counter()
        # The reduction that computes least: those of floats are slower than the memory of one core.
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    return read


def device_reader(num_bytes: int) -> Reader:
    """Return what reads a block of the current CUDA device's memory (untried on hardware)."""
    import torch

    block = torch.ones(num_bytes // 4, device="cuda")

    def read() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        block.sum()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return read


# Reads of the weights before and behind each visit; the fastest of them is its floor.
_READS: Final = 3

# A step of the naive form takes as long as a prompt, and one is as good as the next.
_NAIVE_STEPS: Final = 1


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the command line asks for; no engines stand for all of them.

    Engines that are not a bundle's own measure the first bundle. A step begins behind the `used`
    positions of a cache; `steps` are latent steps, and tokens, of one turn. No threads stand for
    the physical cores.
    """

    bundles: tuple[Path, ...]
    engines: tuple[str, ...]
    genai: tuple[Path, ...]
    batches: tuple[int, ...]
    capacities: tuple[int, ...]
    used: tuple[int, ...]
    steps: int
    warmup: int
    repeats: int
    device: str
    threads: int | None


@dataclass(frozen=True, order=True)
class Cell:
    """One setting that an engine is timed in; engines without a fixed capacity have none."""

    batch: int
    capacity: int | None
    used: int


@dataclass(kw_only=True)
class Timings:
    """What the turns of one engine in one cell took; seconds.

    Attributes:
        floor_s: Of reading the weights of a step once, just before or behind.
        outside_share: Of the time of the steps, spent outside the engine's own calls.
        memory_bytes: Most resident memory of the engine's process in its first turn.
    """

    prefill_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    outside_share: list[float] = field(default_factory=list)
    memory_bytes: int = 0


@dataclass(kw_only=True)
class Measured:
    """What a run found; it grows while it runs, so that an interruption keeps what there is.

    Timings are by the place of the engine, and cell; reads are seconds of reading so many bytes,
    before and behind each visit, by bytes.
    """

    device: str
    threads: int
    workers: list[Worker] = field(default_factory=list)
    timings: dict[tuple[int, Cell], Timings] = field(default_factory=dict)
    reads: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    interrupted: bool = False


def measure_engines(options: EngineOptions, *, progress: Progress) -> Measured:
    """Time every engine in every cell, by turns.

    In each turn every engine visits all its cells, and its weights are read before and behind each
    visit: what makes the machine slower for a while hits all of them alike.

    Raises:
        RecmasError: RM506 for options that make no sense, and what opening an engine raises.
    """
    _check(options)
    threads = physical_cores() if options.threads is None else options.threads
    device = resolve_device(options.device)
    found = Measured(device=device, threads=threads)
    keys = list(_keys(options, device=device, threads=threads))
    try:
        with running(keys, progress) as found.workers:
            _take_turns(options, found, progress)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _take_turns(options: EngineOptions, found: Measured, progress: Progress) -> None:
    cells = [_cells(options, worker.key.engine) for worker in found.workers]
    readers = {
        num_bytes: host_reader(num_bytes, threads=found.threads)
        if found.device == "cpu"
        else device_reader(num_bytes)
        for num_bytes in {int(worker.about["step_bytes"]) for worker in found.workers}
    }
    turns = options.warmup + options.repeats
    with progress.stage("Measuring", turns * sum(map(len, cells))) as advance:
        for turn in range(-options.warmup, options.repeats):
            places = range(len(found.workers))
            first = turn % len(found.workers)
            for place in (*places[first:], *places[:first]):
                worker = found.workers[place]
                num_bytes = int(worker.about["step_bytes"])
                reader, reads = readers[num_bytes], found.reads[num_bytes]
                reads.append(min(reader() for _ in range(_READS)))
                for cell in cells[place]:
                    reply = worker.ask(_request(options, worker.key.engine, cell))
                    reads.append(min(reader() for _ in range(_READS)))
                    _keep(
                        found, place, cell, reply | {"floor_s": min(reads[-2:])}, counts=turn >= 0
                    )
                    advance()


def _request(options: EngineOptions, engine: str, cell: Cell) -> dict[str, int]:
    steps = min(options.steps, _NAIVE_STEPS) if engine == "naive" else options.steps
    return {
        "batch": cell.batch,
        "capacity": cell.capacity or cell.used + steps,
        "used": cell.used,
        "steps": steps,
    }


def _keep(
    found: Measured, place: int, cell: Cell, reply: dict[str, float], *, counts: bool
) -> None:
    timings = found.timings.setdefault((place, cell), Timings())
    # Later turns run in memory that larger cells have left behind.
    timings.memory_bytes = timings.memory_bytes or int(reply["memory_bytes"])
    if counts:
        for name in ("prefill_s", "step_s", "floor_s", "token_s", "outside_share"):
            if name in reply:
                getattr(timings, name).append(reply[name])


def _cells(options: EngineOptions, engine: str) -> list[Cell]:
    """Return what an engine is timed in, from small to large."""
    capacities = (None,) if engine in WITHOUT_CAPACITY else options.capacities
    return sorted(
        (Cell(*cell) for cell in product(options.batches, capacities, options.used)),
        key=lambda cell: (cell.batch * (cell.capacity or cell.used), cell.used),
    )


def _keys(options: EngineOptions, *, device: str, threads: int) -> Iterator[EngineKey]:
    """Yield the engines to open: each bundle's own, then the others over the first bundle."""
    bundles = [open_bundle(path) for path in options.bundles]
    others = [name for name in engines_of(options, bundles[0]) if name != "genai"]
    wanted = (*others, "genai") if options.genai else others
    for engine in wanted:
        for number, bundle in enumerate(bundles if engine == "onnx" else bundles[:1]):
            for backbone in bundle.manifest.backbones:
                for model in options.genai if engine == "genai" else (None,):
                    yield EngineKey(
                        engine=engine,
                        bundle=str(options.bundles[number]),
                        backbone=backbone,
                        genai=None if model is None else str(model),
                        device=device,
                        threads=threads,
                    )


def engines_of(options: EngineOptions, bundle: Bundle) -> list[str]:
    """Return the engines to measure: where none were asked for, those that can run the bundle.

    Raises:
        RecmasError: RM203 for one that was asked for and cannot.
    """
    asked = [*options.engines, *(["genai"] if options.genai else [])]
    for name, entry in bundle.manifest.backbones.items():
        if not has_states(entry.layers):
            continue
        unable = [engine for engine in asked if engine in ROWS_ONLY]
        if unable:
            raise fail(
                "RM203",
                f"engine {unable[0]!r} goes back to no layer states, which backbone {name!r} of "
                f"{options.bundles[0]} keeps",
                hint="Measure those that do: --engine onnx --engine naive.",
            )
        return asked or [engine for engine in ENGINES if engine not in ROWS_ONLY]
    return asked or list(ENGINES)


def _check(options: EngineOptions) -> None:
    """Refuse options that make no sense, before anything takes long."""
    unknown = [name for name in options.engines if name not in ENGINES]
    longest = max(options.used) + options.steps
    wrong = {
        f"--engine {', '.join(unknown)} is none of {', '.join(ENGINES)}": unknown,
        "--engine genai needs --genai DIR": "genai" in options.engines and not options.genai,
        f"--capacity {min(options.capacities)} is less than {max(options.used)} used rows and "
        f"{options.steps} steps": min(options.capacities) < longest,
        f"--steps {options.steps} is not 1 or more": options.steps < 1,
        f"--warmup {options.warmup} is not 0 or more": options.warmup < 0,
        f"--repeats {options.repeats} is not 1 or more": options.repeats < 1,
        "batches, capacities and used rows are 1 or more": min(
            *options.batches, *options.capacities, *options.used
        )
        < 1,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise fail("RM506", message, hint="See `recmasc bench engines --help`.")
