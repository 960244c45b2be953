"""How long a bundle takes to load, and what it then holds: without the cache, and with it.

    python benchmarks/loading.py BUNDLE... [--repeats 7] [--before CHECKOUT] [--cold] [--json FILE]

Every load is in a process of its own. Ways take turns: `before` (another checkout of recmas, of
which only the runtime is used), `off` (no cache), `cold` (an empty cache, which this load fills),
`warm` (the cache that the one before filled). Given are medians, least and most in brackets:

    whole       from the start of Python to a system that can answer, by the clock
    load        of that `recmas_runtime.load`
    processor   of that load, processor time of all its threads
    peak        most memory of the process up to there
    own         of its memory, what is no file and so nobody else's, after it has answered

All ways must give the same answer. With `--cold` what the system keeps of the bundle's files and
the cache's is dropped before each load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import recmas_runtime
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.formats.bundle import open_bundle

FIGURES = ("whole_ms", "load_ms", "processor_ms", "peak_mb", "own_mb")

# Runs with whatever runtime is first on its path.
LOAD = """
import json, sys, time
before = time.perf_counter(), time.process_time()
import recmas_runtime
from recmas_runtime.running import system as _
started = time.perf_counter(), time.process_time()
system = recmas_runtime.load(sys.argv[1], device="cpu", threads=int(sys.argv[2]) or None)
loaded = time.perf_counter(), time.process_time()

def memory(file, name):
    with open(file) as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3

told = {"at": time.time(), "load_ms": (loaded[0] - started[0]) * 1e3,
        "import_ms": (started[0] - before[0]) * 1e3,
        "processor_ms": (loaded[1] - started[1]) * 1e3,
        "peak_mb": memory("/proc/self/status", "VmHWM"),
        "problems": [str(problem) for problem in system.problems]}
fields = {name: "7" for name in system.fields}
told["answer"] = system.run(fields, max_new_tokens=8, temperature=0.0).answer
told["own_mb"] = memory("/proc/self/smaps_rollup", "Anonymous:")
print(json.dumps(told))
"""


def main() -> None:
    """Measure what the command line names and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="default: physical cores")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--cold", action="store_true", help="drop the files from memory first")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    own = Path(recmas_runtime.__file__).parents[1]
    found = {str(path): measure(path, options, own) for path in options.bundles}
    for path, ways in found.items():
        print(table(path, ways, options.cold))
    if options.json is not None:
        report = {"machine": describe_machine(), "cold": options.cold, "bundles": found}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(path: Path, options: argparse.Namespace, own: Path) -> dict[str, list[dict[str, Any]]]:
    """Load a bundle in every way, in turn; return what each load told."""
    open_bundle(path)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="recmas-loading-") as folder:
        for turn in range(options.repeats):
            cache = Path(folder) / str(turn)
            ways = {"off": (own, "off"), "cold": (own, str(cache)), "warm": (own, str(cache))}
            if options.before is not None:
                ways = {"before": (options.before / "runtime", "off"), **ways}
            for way, (runtime, kept) in ways.items():
                if options.cold:
                    drop(path, Path(folder))
                found.setdefault(way, []).append(load(path, runtime, kept, options.threads))
            shutil.rmtree(cache)
    answers = {told["answer"] for each in found.values() for told in each}
    assert len(answers) == 1, f"ways differ: {answers}"
    assert not any(told["problems"] for told in found["warm"]), found["warm"][0]["problems"]
    return found


def load(path: Path, runtime: Path, cache: str, threads: int) -> dict[str, Any]:
    """Load a bundle in a new process and return what it tells."""
    environment = {**os.environ, "RECMAS_CACHE": cache, "PYTHONPATH": str(runtime)}
    command = [sys.executable, "-P", "-c", LOAD, str(path), str(threads)]
    start = time.time()
    ran = subprocess.run(command, env=environment, capture_output=True, check=True)
    told: dict[str, Any] = json.loads(ran.stdout)
    told["whole_ms"] = (told.pop("at") - start) * 1e3
    return told


def drop(*folders: Path) -> None:
    """Have the system forget what it holds in memory of files; what is not written yet stays."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(path: str, ways: dict[str, list[dict[str, Any]]], cold: bool) -> str:
    """Return the figures as a Markdown table, shares of the first way behind its times."""
    lines = [
        f"{path}, files {'not ' if cold else ''}in memory",
        "| way | whole ms | load ms | processor ms | peak MB | own MB |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(ways.values()))
    for way, told in ways.items():
        cells = []
        for name in FIGURES:
            values = sorted(each[name] for each in told)
            middle = statistics.median(values)
            share = middle / statistics.median(each[name] for each in first)
            cells.append(f"{middle:.0f} ({values[0]:.0f} to {values[-1]:.0f}), {share:.2f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
