"""A file of records of very different lengths: each as there is room for it, against batches.

    python benchmarks/serving/batch_input.py BUNDLE [--data FILE.jsonl] [--limit 200] [--batch 8]
        [--max-new-tokens 256] [--repeats 1] [--threads N] [--clock processor] [--json FILE]

One form answers the records as `recmas run --input` does, at most `--batch` at a time, and begins
the next as soon as one has ended. The other takes batches of `--batch` in the order of the file,
each of which ends with its longest answer. Both run on the same engines, in turn, behind a batch
that warms up. Prints records a minute, and of answers that differ how close the tokens were in the
place of the first difference. Questions are those of `--data` (a field `question`), or word
problems written on the spot. `--clock processor` takes processor seconds: with `--threads 1` a busy
machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from msgspec import structs

import recmas_runtime as rt
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.plan import SamplingPlan

# Questions, and the judge of differences, are the tests' own.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from kit.alike import Outcome, Request, alone, find_tie
from kit.word_problems import word_problems

AS_THEY_COME, IN_BATCHES = "as there is room", "in batches"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Result = rt.Answer | rt.RecmasError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    system = rt.load(arguments.bundle, threads=arguments.threads)
    sampling = structs.replace(
        system.plan.sampling, max_new_tokens=arguments.max_new_tokens, temperature=0.0
    )
    records = read(arguments.data, arguments.limit)
    forms = {
        AS_THEY_COME: lambda asked: as_they_come(system, asked, arguments.batch, sampling),
        IN_BATCHES: lambda asked: in_batches(system, asked, arguments.batch, sampling),
    }
    clock = CLOCKS[arguments.clock]
    figures = measure(forms, records, arguments.batch, arguments.repeats, clock)
    found = figures.pop("answers")
    figures |= {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {arguments.threads} threads",
        "clock": arguments.clock,
        "batch": arguments.batch,
        "max_new_tokens": arguments.max_new_tokens,
        "lengths": lengths(found[AS_THEY_COME]),
        "differences": differences(system, records, found, sampling),
    }
    print(text(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def read(data: Path | None, limit: int) -> list[rt.Record]:
    if data is None:
        questions = word_problems(limit, most=20)
    else:
        lines = data.read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line)["question"] for line in lines[:limit]]
    return [
        rt.Record(id=str(number), fields={"question": question}, index=number)
        for number, question in enumerate(questions)
    ]


def as_they_come(
    system: rt.System, records: Sequence[rt.Record], at_once: int, sampling: SamplingPlan
) -> list[Result]:
    return list(system.answer_all(records, at_once=at_once, sampling=sampling))


def in_batches(
    system: rt.System, records: Sequence[rt.Record], batch: int, sampling: SamplingPlan
) -> list[Result]:
    results: list[Result] = []
    for start in range(0, len(records), batch):
        results += system.run_batch(records[start : start + batch], sampling=sampling)
    return results


def measure(
    forms: dict[str, Callable[[Sequence[rt.Record]], list[Result]]],
    records: Sequence[rt.Record],
    batch: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Answer all records in every form, in turn; returns rates, and the last answers."""
    rates: dict[str, list[float]] = {name: [] for name in forms}
    answers: dict[str, list[Result]] = {}
    for form in forms.values():
        form(records[:batch])  # warms up
    for repeat in range(repeats):
        # The other one first each time: the machine changes its pace.
        for name in list(forms)[:: 1 if repeat % 2 == 0 else -1]:
            start = clock()
            answers[name] = forms[name](records)
            seconds = clock() - start
            rates[name].append(60 * len(records) / seconds)
            print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(rates[AS_THEY_COME], rates[IN_BATCHES], strict=True)]
    return {
        "records_per_min": rates,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "answers": answers,
    }


def lengths(results: Sequence[Result]) -> dict[str, list[int]]:
    """Return the least, the median and the most tokens of prompts and of answers."""
    usages = [result.usage for result in results if isinstance(result, rt.Answer)]
    counts = {
        "prompt": sorted(usage.prompt_tokens for usage in usages),
        "answer": sorted(usage.completion_tokens for usage in usages),
    }
    return {name: [c[0], c[len(c) // 2], c[-1]] for name, c in counts.items()}


def differences(
    system: rt.System,
    records: Sequence[rt.Record],
    found: dict[str, list[Result]],
    sampling: SamplingPlan,
) -> list[dict[str, Any]]:
    """Return where the forms differ from each other, and which choice of a token explains it."""
    rows = []
    for record, one, other in zip(records, found[AS_THEY_COME], found[IN_BATCHES], strict=True):
        outcomes = {AS_THEY_COME: Outcome.of_result(one), IN_BATCHES: Outcome.of_result(other)}
        if outcomes[AS_THEY_COME] == outcomes[IN_BATCHES]:
            continue
        request = Request(
            record=dict(record.given), sampling=structs.asdict(sampling), index=record.index
        )
        wanted = alone(system, request)
        ties = {
            name: find_tie(system, request, wanted, got)
            for name, got in outcomes.items()
            if got != wanted
        }
        rows.append({"record": record.id, "differ_from_alone": ties})
    return rows


def text(figures: dict[str, Any]) -> str:
    lines = [
        f"**{figures['machine']}; {figures['date']}; {figures['clock']} seconds; at most "
        f"{figures['batch']} at a time, answers of at most {figures['max_new_tokens']} tokens**",
        "",
        "| form | records a minute |",
        "|---|---|",
    ]
    for name, rates in figures["records_per_min"].items():
        lines.append(
            f"| {name} | {statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f}) |"
        )
    lines += ["", f"{figures['ratio']:.2f} times the records of batches.", ""]
    for name, (least, middle, most) in figures["lengths"].items():
        lines.append(f"Tokens of {name}s: {least} to {most}, median {middle}.")
    lines.append(f"Answers that differ: {len(figures['differences'])}.")
    for row in figures["differences"]:
        for name, tie in row["differ_from_alone"].items():
            why = tie or "NO CHOICE OF A TOKEN WAS CLOSE"
            lines.append(f"- record {row['record']}, {name}, against alone: {why}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
