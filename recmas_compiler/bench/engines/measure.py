"""`recmasc bench engines`: every engine of a backbone beside the floor, in one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Final

from recmas_compiler.bench.engines.engine_adapters import ENGINES, WITHOUT_CAPACITY, FormKey
from recmas_compiler.bench.engines.step_weights import HostReader, Reader
from recmas_compiler.bench.engines.workers import Worker, running
from recmas_runtime.core.errors import fail
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.onnx.session import physical_cores, resolve_device
from recmas_runtime.formats.bundle import open_bundle

# Reads of the weights before and behind each visit; the fastest of them is its floor.
_READS: Final = 3

# A step of the naive form takes as long as a prompt, and one is as good as the next.
_NAIVE_STEPS: Final = 1


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the command line asks for.

    Attributes:
        bundles: Folders; engines that are not a bundle's own measure the first.
        engines: Names; empty for all of them.
        genai: Folders that onnxruntime-genai's builder wrote; what is named is measured.
        batches: Rows that run together.
        capacities: Cache rows of each sequence.
        used: Positions in the cache when a step begins.
        steps: Latent steps, and tokens, of one turn.
        warmup: Turns that do not count.
        repeats: Turns that count.
        device: `auto`, `cpu` or `cuda`.
        threads: Threads within an operator; None takes the physical cores.
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
    """One setting that an engine is timed in; they run in this order, the small ones first.

    Attributes:
        capacity: None for engines without a fixed one.
    """

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

    Attributes:
        workers: The engines.
        timings: By the place of the engine, and cell.
        reads: Seconds of reading so many bytes, before and behind each visit, by bytes.
        device: Where it ran.
        threads: Threads within an operator.
        interrupted: Whether the user ended it.
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

    Args:
        options: What to measure, and how.
        progress: Is told of every visit.

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
        num_bytes: _reader(num_bytes, found)
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
                reads.append(_fastest_read(reader))
                for cell in cells[place]:
                    reply = worker.ask(_request(options, worker.key.engine, cell))
                    reads.append(_fastest_read(reader))
                    _keep(
                        found, place, cell, reply | {"floor_s": min(reads[-2:])}, counts=turn >= 0
                    )
                    advance()


def _fastest_read(reader: Reader) -> float:
    return min(reader.seconds() for _ in range(_READS))


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


def _keys(options: EngineOptions, *, device: str, threads: int) -> Iterator[FormKey]:
    """Yield the engines to open: each bundle's own, then the others over the first bundle."""
    others = [name for name in options.engines or ENGINES if name != "genai"]
    wanted = (*others, "genai") if options.genai else others
    bundles = [open_bundle(path) for path in options.bundles]
    for engine in wanted:
        for number, bundle in enumerate(bundles if engine == "onnx" else bundles[:1]):
            for backbone in bundle.manifest.backbones:
                for model in options.genai if engine == "genai" else (None,):
                    yield FormKey(
                        engine=engine,
                        bundle=str(options.bundles[number]),
                        backbone=backbone,
                        genai=None if model is None else str(model),
                        device=device,
                        threads=threads,
                    )


def _reader(num_bytes: int, found: Measured) -> Reader:
    if found.device == "cpu":
        return HostReader(num_bytes, threads=found.threads)
    from recmas_compiler.bench.engines.device_reader import DeviceReader

    return DeviceReader(num_bytes)


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
