"""How much a server answers, and how long its clients wait, by how many ask at once.

    python benchmarks/serving/load.py MEASURE [MEASURE ...] BUNDLE [--tokens 32,128] [--repeats 3]
        [--start | --url http://127.0.0.1:8000/v1 [--model NAME]] [--threads N] [--data FILE.jsonl]
        [--questions FILE] [--per-client 4] [--json FILE]

Measures:

- `ratio`: eight clients against one, and against a static batch of eight equal records
- `curve`: 1, 2, 4, 8, 16 and 32 clients
- `half`: the wait for the first token of an idle server, of one with four clients, and of one that
  is asked half as often as eight clients can, at random times
- `mixed`: a short question beside four long ones, and beside four short ones

Clients ask in a closed loop: each its next question when it has its answer. They talk to a service
in this process; `--start` starts `recmas serve BUNDLE`, `--url` takes a server that runs. What is
compared takes turns, `--repeats` times behind a warm-up; a ratio is the median of those of each
turn. Questions are those of `--data` (a field `question`) or written on the spot, all different,
and only those are asked whose greedy answers do not end before the most of `--tokens`, which is
found out first and kept in `--questions`; how many ended early all the same is told.

`--clock processor` takes all times in processor seconds of the service, or of the server that was
started: with `--threads 1` they are about what it takes on a machine with nothing beside. Times
that nobody asks in are left out, so random arrivals come by that clock, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from targets import Clock, Seen, Target, in_process, over_http, started

import recmas_runtime as rt
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.serve.service import ServiceLimits

# Questions are the tests' own.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from kit.word_problems import word_problem, word_problems

CURVE = (1, 2, 4, 8, 16, 32)
MANY = 8
BESIDE = 4
# Sentences of a short question, and of a long one where the bundle has room for it: about 25 and
# 350 tokens.
SHORT, LONG = 1, 22
PERCENTILES = (50, 95)
CLOCKS: Mapping[str, Clock] = {
    "wall": time.perf_counter,
    "processor": time.process_time,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("measures", nargs="+", choices=sorted(MEASURES), metavar="MEASURE")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=numbers, default=[32, 128], help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--per-client", type=int, default=4, help="requests of each client")
    parser.add_argument("--most-clients", type=int, default=CURVE[-1], help="of the curve")
    parser.add_argument(
        "--chunk", type=int, default=ServiceLimits().chunk, help="of a service in this process"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--start", action="store_true", help="start `recmas serve`")
    where.add_argument("--url", help="of a server that runs")
    parser.add_argument("--model", help="of that server; its first one")
    parser.add_argument("--key-file", type=Path, help="holds the server's key")
    parser.add_argument("--serve-option", action="append", default=[], help="of `recmas serve`")
    parser.add_argument("--kept-mb", type=int, default=256, help="of a service in this process")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--data", type=Path)
    parser.add_argument("--questions", type=Path, help="keeps those that were chosen")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.clock == "processor" and arguments.url:
        parser.error("--clock processor is for what this command starts")
    asyncio.run(measure_all(arguments))


async def measure_all(arguments: argparse.Namespace) -> None:
    """Run what was asked for; prints a table for each measure as it is there."""
    rows: list[dict[str, Any]] = []
    figures = {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {arguments.threads} threads",
        "over": arguments.url or ("recmas serve" if arguments.start else "a service in process"),
        "clock": arguments.clock,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    print(
        f"**{figures['machine']}; {figures['date']}; over {figures['over']}; "
        f"{figures['clock']} seconds; medians of {figures['repeats']}**"
    )
    async with opened(arguments) as target:
        bench = Bench(target=target, arguments=arguments)
        await bench.find_questions(max(arguments.tokens))
        for tokens in arguments.tokens:
            for name in arguments.measures:
                found = await MEASURES[name](bench, tokens)
                found = [{"measure": name, "answer_tokens": tokens, **row} for row in found]
                print(table(found), flush=True)
                rows += found
                figures["ended_early"] = bench.num_early
                if arguments.json:
                    text = json.dumps(figures, indent=1)
                    arguments.json.write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{bench.num_early} answers ended early.")


def opened(arguments: argparse.Namespace) -> AbstractAsyncContextManager[Target]:
    """Return the server or service to ask."""
    if arguments.url:
        key = arguments.key_file.read_text().strip() if arguments.key_file else None
        return over_http(arguments.url, arguments.model, key)
    if arguments.start:
        by_processor = arguments.clock == "processor"
        options = arguments.serve_option
        return started(arguments.bundle, arguments.threads, options, by_processor=by_processor)
    limits = ServiceLimits(
        max_queue=256, kept_bytes=arguments.kept_mb * 2**20, chunk=arguments.chunk
    )
    clock = CLOCKS[arguments.clock]
    return in_process(arguments.bundle, limits, arguments.threads, clock=clock)


@dataclass
class Bench:
    """A target, the questions that it is asked, and what went otherwise than planned."""

    target: Target
    arguments: argparse.Namespace
    num_early: int = 0
    _questions: list[str] = field(default_factory=list)
    _next: int = 0
    _static: rt.System | None = None

    @property
    def static(self) -> rt.System:
        """The system in this process, for batches that nothing joins or leaves."""
        if self._static is None:
            self._static = rt.load(self.arguments.bundle, threads=self.arguments.threads)
        return self._static

    async def find_questions(self, tokens: int) -> None:
        """Ask a pool of questions, which warms up too, and keep those whose answers go on."""
        file = self.arguments.questions
        if file is not None and file.exists():
            self._questions = json.loads(file.read_text(encoding="utf-8"))
            await clients(self.target, self._questions[:2], tokens, 2)
            return
        pool = self.pool()
        # So that none comes again soon: beginnings of prompts are kept.
        wanted = (MANY + 1) * self.arguments.per_client + 1
        for start in range(0, len(pool), MANY):
            part = pool[start : start + MANY]
            seen = await clients(self.target, part, tokens, MANY)
            self._questions += (
                question
                for question, each in zip(part, seen, strict=True)
                if each.finish_reason == "length"
            )
            if len(self._questions) >= wanted:
                break
        if not self._questions:
            sys.exit(f"no question of {len(pool)} has an answer of {tokens} tokens")
        print(f"{len(self._questions)} questions for {tokens} tokens", file=sys.stderr, flush=True)
        if file is not None:
            file.write_text(json.dumps(self._questions, indent=1) + "\n", encoding="utf-8")

    def pool(self) -> list[str]:
        """Return questions of which some will do."""
        if self.arguments.data is None:
            # About as long as problems of grade schools are, and one as the other.
            return word_problems(12 * MANY * self.arguments.per_client, least=5, most=5)
        lines = self.arguments.data.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines]

    def longest_question(self) -> int:
        """Return how many sentences a question may have for which the bundle has room."""
        for sentences in range(LONG, SHORT, -1):
            try:
                for number in range(50):
                    question = word_problem(number, sentences)
                    self.static.prompts(rt.Record(id="1", fields={"question": question}))
            except rt.RecmasError:
                continue
            return sentences
        sys.exit("the bundle has room for short questions only")

    def questions(self, count: int) -> list[str]:
        """Return the next questions; what was asked least recently comes first."""
        known = self._questions
        self._next += count
        return [known[(self._next - count + i) % len(known)] for i in range(count)]

    async def closed_loop(self, num_clients: int, count: int, tokens: int) -> dict[str, Any]:
        """Ask so many questions by so many clients."""
        questions = self.questions(count)
        start = self.target.clock()
        seen = await clients(self.target, questions, tokens, num_clients)
        return self.summary(seen, self.target.clock() - start, tokens)

    def summary(self, seen: Sequence[Seen], seconds: float, tokens: int) -> dict[str, Any]:
        """Return rates and waits of answers that took so long together."""
        self.num_early += sum(each.tokens < tokens for each in seen)
        return {
            "requests": len(seen),
            "requests_per_min": 60 * len(seen) / seconds,
            "tokens_per_s": sum(each.tokens for each in seen) / seconds,
            "first_s": percentiles([each.first_s for each in seen]),
            "token_ms": percentiles([1e3 * each.token_s for each in seen]),
            "total_s": percentiles([each.total_s for each in seen]),
            "prompt_tokens": sum(each.prompt_tokens for each in seen) / len(seen),
            "cached_tokens": sum(each.cached_tokens for each in seen) / len(seen),
        }


async def clients(
    target: Target, questions: Sequence[str], tokens: int, num_clients: int
) -> list[Seen]:
    """Ask all questions by so many clients, each in a closed loop; returns answers in order."""
    waiting = iter(enumerate(questions))
    seen: dict[int, Seen] = {}

    async def client() -> None:
        for place, question in waiting:
            seen[place] = await target.ask(question, tokens)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return [seen[place] for place in range(len(questions))]


async def ratio(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    """Eight clients against one and against a static batch, all in turn."""
    per_client = bench.arguments.per_client

    async def static() -> dict[str, Any]:
        (question,) = bench.questions(1)
        sampling = {"max_new_tokens": tokens, "temperature": 0.0}
        clock = CLOCKS[bench.arguments.clock]  # of this process
        start = clock()
        answers = await asyncio.to_thread(bench.static.run, [question] * MANY, **sampling)
        seconds = clock() - start
        made = sum(answer.usage.completion_tokens for answer in answers)
        return {
            "requests": MANY,
            "requests_per_min": 60 * MANY / seconds,
            "tokens_per_s": made / seconds,
            "prompt_tokens": answers[0].usage.prompt_tokens,
        }

    rows = await in_turn(
        bench,
        {
            "1 client": lambda: bench.closed_loop(1, per_client, tokens),
            f"{MANY} clients": lambda: bench.closed_loop(MANY, MANY * per_client, tokens),
            f"static batch of {MANY}": static,
        },
    )
    return with_ratios(rows, "tokens_per_s")


async def curve(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    """Throughput and waits by the number of clients."""
    per_client, most = bench.arguments.per_client, bench.arguments.most_clients
    rows = await in_turn(
        bench,
        {
            f"{count} client{'s' * (count > 1)}": _partial(
                bench.closed_loop, count, max(per_client, count * per_client // 2), tokens
            )
            for count in CURVE
            if count <= most
        },
    )
    return with_ratios(rows, "tokens_per_s")


async def half(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    """The wait for the first token at half of the load that eight clients make."""
    count = MANY * bench.arguments.per_client
    full = await bench.closed_loop(MANY, count, tokens)
    per_s = full["requests_per_min"] / 60 / 2
    chance = random.Random(0)

    async def arrivals() -> dict[str, Any]:
        questions = bench.questions(count)
        clock, is_wall = bench.target.clock, bench.arguments.clock == "wall"
        start = due = clock()
        skipped = 0.0
        asked: list[asyncio.Task[Seen]] = []
        for question in questions:
            due += chance.expovariate(per_s)
            while (left := due - clock() - skipped) > 0:
                if is_wall or not all(task.done() for task in asked):
                    await asyncio.sleep(min(left, 0.01))
                else:  # nothing computes, so that the clock stands
                    skipped += left
            asked.append(asyncio.create_task(bench.target.ask(question, tokens)))
        seen = await asyncio.gather(*asked)
        return bench.summary(seen, clock() + skipped - start, tokens)

    forms = {
        "idle: one question at a time": lambda: bench.closed_loop(1, count // 2, tokens),
        f"{MANY // 2} clients": lambda: bench.closed_loop(MANY // 2, count, tokens),
        f"at random, {60 * per_s:.1f} a minute": arrivals,
    }
    rows = await in_turn(bench, forms)
    return with_ratios(rows, "first_s", "p95")


async def mixed(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    """The time of a short question beside clients that ask short or long ones."""
    count = 2 * bench.arguments.per_client
    longest = bench.longest_question()
    numbers = iter(range(10**6, 2 * 10**6))

    async def beside(sentences: int) -> dict[str, Any]:
        ended = asyncio.Event()

        async def neighbour() -> None:
            while not ended.is_set():
                await bench.target.ask(word_problem(next(numbers), sentences), tokens)

        neighbours = [asyncio.create_task(neighbour()) for _ in range(BESIDE)]
        await asyncio.sleep(0.5)  # until they are at work
        questions = [word_problem(next(numbers), SHORT) for _ in range(count)]
        start = bench.target.clock()
        seen = await clients(bench.target, questions, tokens, 1)
        seconds = bench.target.clock() - start
        ended.set()
        await asyncio.gather(*neighbours)
        return bench.summary(seen, seconds, tokens)

    rows = await in_turn(
        bench,
        {
            f"beside {BESIDE} short questions": lambda: beside(SHORT),
            f"beside {BESIDE} of {longest} sentences": lambda: beside(longest),
        },
    )
    return with_ratios(rows, "total_s", "p50")


MEASURES: Mapping[str, Callable[[Bench, int], Awaitable[list[dict[str, Any]]]]] = {
    "ratio": ratio,
    "curve": curve,
    "half": half,
    "mixed": mixed,
}


def _partial(
    call: Callable[..., Awaitable[dict[str, Any]]], *arguments: Any
) -> Callable[[], Awaitable[dict[str, Any]]]:
    return lambda: call(*arguments)


async def in_turn(
    bench: Bench, forms: Mapping[str, Callable[[], Awaitable[dict[str, Any]]]]
) -> dict[str, list[dict[str, Any]]]:
    """Measure all forms, one after another, in turns; returns figures by form and turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in forms}
    for turn in range(bench.arguments.repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            found[name].append(await form())
            seconds = time.perf_counter() - start
            print(f"{turn + 1}: {name}, {seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def with_ratios(
    found: Mapping[str, list[dict[str, Any]]], figure: str, part: str | None = None
) -> list[dict[str, Any]]:
    """Return a row for each form: medians of its figures, and its ratio to the first form's."""

    def value(figures: Mapping[str, Any]) -> float:
        return float(figures[figure] if part is None else figures[figure][part])

    first = next(iter(found.values()))
    rows = []
    for name, repeats in found.items():
        ratios = [value(each) / value(one) for each, one in zip(repeats, first, strict=True)]
        rows.append(
            {
                "form": name,
                **{key: middle([each[key] for each in repeats]) for key in repeats[0]},
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "ratio_of": figure if part is None else f"{figure} {part}",
            }
        )
    return rows


def middle(values: Sequence[Any]) -> Any:
    """Return the median of numbers, or of each entry of mappings."""
    if isinstance(values[0], Mapping):
        return {key: statistics.median(value[key] for value in values) for key in values[0]}
    return statistics.median(values)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return percentiles; each is one of the values."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of one measure."""
    first = rows[0]
    lines = [
        "",
        f"{first['measure']}, answers of {first['answer_tokens']} tokens:",
        "",
        "| | requests/min | tokens/s | first token p50 | p95, s | ms a token | whole p50 "
        f"| p95, s | prompt tokens | kept ones | {first['ratio_of']} against the first row |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row) for row in rows),
    ]
    return "\n".join(lines)


def line(row: Mapping[str, Any]) -> str:
    """Return a row of a table."""

    def pair(name: str, form: str) -> list[str]:
        return [format(row[name][f"p{p}"], form) if name in row else "" for p in PERCENTILES]

    spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
    cells = [
        row["form"],
        f"{row['requests_per_min']:.1f}",
        f"{row['tokens_per_s']:.1f}",
        *pair("first_s", ".2f"),
        pair("token_ms", ".1f")[0],
        *pair("total_s", ".2f"),
        f"{row['prompt_tokens']:.0f}",
        f"{row['cached_tokens']:.0f}" if "cached_tokens" in row else "",
        f"{row['ratio']:.2f} ({spread})",
    ]
    return f"| {' | '.join(cells)} |"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
