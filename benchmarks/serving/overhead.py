"""What a server adds to the time of one answer, and what serving adds to starting the program.

    python benchmarks/serving/overhead.py BUNDLE [--tokens 32,128] [--pairs 10] [--threads N]
        [--clock processor] [--before DIR] [--starts 20] [--json FILE]

Each question is answered by `System.stream` in this process and by `recmas serve BUNDLE` over HTTP,
streamed, with nothing beside it, first one and then the other in turn; a share is the median over
pairs of the time that the second took more. `--clock processor` takes processor seconds of both
sides instead, the client's apart: with `--threads 1` a busy machine changes them little. `--before
DIR` compares `import recmas_runtime` and `recmas --help` with those of another checkout, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from targets import Clock, Target, started

import recmas_runtime as rt
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores

# Questions are the tests' own.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from kit.word_problems import word_problems

ROOT = Path(__file__).parents[2]
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
STARTS = {
    "import recmas_runtime": ["-c", "import recmas_runtime"],
    "recmas --help": ["-m", "recmas_runtime.cli.main", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=numbers, default=[32, 128])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {arguments.threads} threads",
        "clock": arguments.clock,
        "answers": asyncio.run(answers(arguments)) if arguments.pairs else [],
    }
    if arguments.before is not None:
        figures["starts"] = starts(arguments.before, arguments.starts, OF_CHILDREN[arguments.clock])
    print(text(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


async def answers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time pairs of answers for each number of tokens."""
    # Nothing that is kept of an earlier question's prompt shall make the server faster.
    opened = started(
        arguments.bundle,
        arguments.threads,
        ["--keep-memory", "0"],
        by_processor=arguments.clock == "processor",
    )
    async with opened as target:
        with rt.load(arguments.bundle, threads=arguments.threads) as system:
            return [
                await pairs(target, system, tokens, arguments.pairs, CLOCKS[arguments.clock])
                for tokens in arguments.tokens
            ]


async def pairs(
    target: Target, system: rt.System, tokens: int, count: int, clock: Clock
) -> dict[str, Any]:
    """Answer questions both ways; returns times, and the share that the target adds."""
    alone_s, served_s, lengths = [], [], []
    questions = word_problems(count + 1, least=3, most=6)
    for number, question in enumerate(questions):
        for is_served in (False, True) if number % 2 else (True, False):
            if is_served:
                seen = await target.ask(question, tokens)
                times, taken, answered = served_s, seen.total_s, seen.text
                lengths.append(seen.tokens)
            else:
                start = clock()
                stream = system.stream(question, max_new_tokens=tokens, temperature=0.0)
                alone = "".join(stream)
                times, taken = alone_s, clock() - start
            if number > 0:  # the first one warms up
                times.append(taken)
        if alone != answered:
            print(f"answers differ: {alone!r}, served {answered!r}", file=sys.stderr)
    shares = [served / alone - 1 for served, alone in zip(served_s, alone_s, strict=True)]
    return {
        "answer_tokens": statistics.mean(lengths[1:]),
        "alone_s": statistics.median(alone_s),
        "served_s": statistics.median(served_s),
        "share": statistics.median(shares),
        "shares": shares,
        "more_ms": 1e3
        * statistics.median(
            served - alone for served, alone in zip(served_s, alone_s, strict=True)
        ),
    }


def starts(before: Path, count: int, clock: Clock) -> list[dict[str, Any]]:
    """Time starts of this checkout and of another one, in turn."""
    checkouts = {"before": before, "now": ROOT}
    rows = []
    for name, command in STARTS.items():
        seconds: dict[str, list[float]] = {when: [] for when in checkouts}
        for number in range(count + 1):
            for when, folder in checkouts.items():
                taken = start_s(folder, command, clock)
                if number > 0:  # the first one reads files from the disk
                    seconds[when].append(taken)
        rows.append(
            {
                "command": name,
                **{f"{when}_s": statistics.median(taken) for when, taken in seconds.items()},
                **{f"{when}_least_s": min(taken) for when, taken in seconds.items()},
            }
        )
    return rows


def start_s(folder: Path, command: Sequence[str], clock: Clock) -> float:
    """Time one start of a checkout's runtime."""
    env = {**os.environ, "PYTHONPATH": str(folder / "runtime")}
    start = clock()
    subprocess.run([sys.executable, *command], env=env, check=True, stdout=subprocess.DEVNULL)
    return clock() - start


def children_s() -> float:
    """Return the processor seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def text(figures: dict[str, Any]) -> str:
    lines = [f"**{figures['machine']}; {figures['date']}; {figures['clock']} seconds**", ""]
    if figures["answers"]:
        lines += ["| tokens | alone, s | served, s | more, ms | share |", "|---|---|---|---|---|"]
        for row in figures["answers"]:
            spread = f"{min(row['shares']):+.1%} to {max(row['shares']):+.1%}"
            lines.append(
                f"| {row['answer_tokens']:.0f} | {row['alone_s']:.3f} | {row['served_s']:.3f} "
                f"| {row['more_ms']:.1f} | {row['share']:+.1%} ({spread}) |"
            )
    if "starts" in figures:
        lines += ["", "| start | before, ms | now, ms | fastest, ms |", "|---|---|---|---|"]
        for row in figures["starts"]:
            least = f"{1e3 * row['before_least_s']:.0f}, {1e3 * row['now_least_s']:.0f}"
            lines.append(
                f"| `{row['command']}` | {1e3 * row['before_s']:.0f} | {1e3 * row['now_s']:.0f} "
                f"| {least} |"
            )
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


OF_CHILDREN: dict[str, Clock] = {"wall": time.perf_counter, "processor": children_s}

if __name__ == "__main__":
    main()
