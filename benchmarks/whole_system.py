"""A whole system built now against one built before, question by question in one run.

    python benchmarks/whole_system.py OLD_BUNDLE NEW_BUNDLE --data FILE.jsonl [--questions 50]
        [--rounds 3] [--latent-steps 16] [--loss-questions 200] [--threads N] [--json FILE]

Both are run by the runtime of this tree, each in a process of its own that waits while the other
one answers; which begins changes from question to question. Rounds and steps are those of the
bundles unless others are named: those are other plans on the same engines. Prints seconds a
question, the ratio question by question, the mean loss of the right answers (`solution`, or
`answer`) and the most memory that each process ever held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

import msgspec

import recmas_runtime as rt
from recmas_runtime.bench.report import Spread, machine_facts
from recmas_runtime.checking.machine import peak_resident_bytes
from recmas_runtime.core.text import markdown_table
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.plan import Plan

# Loss needs no quiet machine, and batches are faster.
BATCH: Final = 8
PHASES: Final = ("prefill", "think", "decode", "total")


def main() -> None:
    if sys.argv[1:2] == ["--answer"]:
        answer(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs=2, metavar="BUNDLE", help="old and new")
    parser.add_argument("--data", type=Path, required=True, help="question and answer, JSON lines")
    parser.add_argument("--questions", type=int, default=50, help="that are timed [default: 50]")
    parser.add_argument("--loss-questions", type=int, default=200, help="[default: 200]")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--latent-steps", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="[default: 64]")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not given.data.exists():
        raise SystemExit(f"--data {given.data}: there is no such file; see docs/data.md")
    records = [json.loads(line) for line in given.data.read_text(encoding="utf-8").splitlines()]
    for name in ("questions", "loss_questions"):
        if not 0 <= getattr(given, name) <= len(records):
            raise SystemExit(f"{name}: {getattr(given, name)} of {len(records)} in {given.data}")
    figures = measure(given, records)
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if figures["interrupted"]:
        sys.exit(130)


@dataclass(frozen=True)
class Asked:
    """What a process is started with."""

    bundle: str
    plan: str
    threads: int
    max_new_tokens: int


def answer(options: str) -> None:
    """Answer requests until the input ends: a question, or records whose answers are scored."""
    asked = Asked(**json.loads(options))
    base = rt.load(asked.bundle, threads=asked.threads)
    system = base.with_plan(msgspec.json.decode(Path(asked.plan).read_bytes(), type=Plan))
    sampling = msgspec.structs.replace(
        system.plan.sampling, temperature=0.0, max_new_tokens=asked.max_new_tokens
    )
    print(json.dumps({"rounds": system.plan.rounds}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "question" in request:
            found = system.run(request["question"], sampling=sampling)
            reply: dict[str, Any] = {
                **{phase: getattr(found.timing_ms, phase) / 1e3 for phase in PHASES},
                "tokens": found.usage.completion_tokens,
                "peak": peak_resident_bytes(),
            }
        else:
            records = [
                rt.Record(id=str(i), fields={"question": q}, index=i)
                for i, q in enumerate(request["questions"])
            ]
            scored = system.score_batch(records, [[text] for text in request["answers"]])
            kept = [s for s in scored if not isinstance(s, rt.RecmasError)]
            reply = {
                "loss": sum(s.losses[0] for s in kept),
                "tokens": sum(s.num_tokens[0] for s in kept),
                "left_out": len(scored) - len(kept),
            }
        print(json.dumps(reply), flush=True)


class Process:
    """A bundle in a process of its own."""

    def __init__(self, asked: Asked) -> None:
        command = [sys.executable, __file__, "--answer", json.dumps(asdict(asked))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        self.about = self._reply()

    def ask(self, request: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._reply()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a bundle's process ended with {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def processes(given: argparse.Namespace) -> Iterator[list[Process]]:
    """Run a process for each bundle, with the plan that was asked for."""
    from recmas_export.replan import Replanner
    from recmas_runtime.formats.bundle import open_bundle

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        opened = []
        for number, path in enumerate(given.bundles):
            bundle = open_bundle(path)
            plan = bundle.plan
            if given.rounds or given.latent_steps:
                rounds = given.rounds or plan.rounds
                plan = Replanner(bundle).plan(rounds=rounds, latent_steps=given.latent_steps)
            file = Path(folder, f"{number}.json")
            file.write_bytes(msgspec.json.encode(plan))
            opened.append(Process(Asked(str(path), str(file), given.threads, given.max_new_tokens)))
            stack.callback(opened[-1].close)
        yield opened


def measure(given: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ask both everything; Ctrl-C keeps what there is."""
    figures: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_facts(),
        "load_average": os.getloadavg()[0],
        "threads": given.threads,
        "rounds": given.rounds,
        "latent_steps": given.latent_steps,
        "bundles": [str(path) for path in given.bundles],
        "replies": [],
        "losses": [],
        "interrupted": False,
    }
    try:
        with processes(given) as both:
            figures["rounds"] = [each.about["rounds"] for each in both]
            for number, record in enumerate(records[: given.questions], start=-1):
                order = (0, 1) if number % 2 else (1, 0)
                asked = {"question": record["question"]}
                replies = {place: both[place].ask(asked) for place in order}
                if number >= 0 or given.questions == 1:  # the first one warms up
                    figures["replies"].append([replies[0], replies[1]])
            for start in range(0, given.loss_questions, BATCH):
                some = records[start : min(start + BATCH, given.loss_questions)]
                asked_all = {
                    "questions": [r["question"] for r in some],
                    "answers": [str(r.get("solution", r["answer"])) for r in some],
                }
                figures["losses"].append([each.ask(asked_all) for each in both])
    except KeyboardInterrupt:
        figures["interrupted"] = True
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """Return what was found, as Markdown."""
    replies, losses = figures["replies"], figures["losses"]
    rows = []
    for place, name in enumerate(("old", "new")):
        mine, scored = [r[place] for r in replies], [r[place] for r in losses]
        tokens = sum(s["tokens"] for s in scored)
        rows.append(
            [
                f"{name}, {figures['bundles'][place]}",
                *(_spread([r[phase] for r in mine], ".3f") for phase in PHASES[::-1]),
                f"{statistics.fmean(r['tokens'] for r in mine):.0f}" if mine else "",
                f"{sum(s['loss'] for s in scored) / tokens:.4f}" if tokens else "",
                f"{max(r['peak'] for r in mine) / 2**20:.0f}" if mine else "",
            ]
        )
    head = ["build", "s a question", "text", "steps", "prompts", "tokens", "loss", "peak MiB"]
    old = [r[0] for r in replies]
    new = [r[1] for r in replies]
    ratio = [o["total"] / n["total"] for o, n in zip(old, new, strict=True)]
    latent = [
        (o["total"] - o["decode"]) / (n["total"] - n["decode"])
        for o, n in zip(old, new, strict=True)
    ]
    left_out = sum(r[0]["left_out"] for r in losses)
    lines = [
        f"{figures['machine']['cpu']}, {figures['threads']} threads, {figures['date']}, rounds "
        f"{figures['rounds']}; load average before it began: {figures['load_average']:.2f}",
        "",
        markdown_table(head, rows),
        "",
        f"Old over new, question by question: {_spread(ratio, '.2f')}, without the answer's text "
        f"{_spread(latent, '.2f')}.",
    ]
    if left_out:
        lines.append(f"{left_out} questions have no loss: they do not fit.")
    if figures["interrupted"]:
        lines.append("**interrupted: only what ended before counts**")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    return Spread.of(values).to_text(form) if values else ""


if __name__ == "__main__":
    main()
