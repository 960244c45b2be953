"""The same team in LangGraph, CrewAI, AutoGen, AVP and recmas, on the same weights.

    python benchmarks/frameworks/race.py --data FILE.jsonl [--rounds 3:20,2:10,1:10] [--limit 20]
        [--systems NAME,...] [--endpoints llama.cpp,'recmas serve'] [--precision int4]
        [--environments .frameworks] [--out out/frameworks] [--table-only]

`make bench-frameworks DATA=FILE.jsonl` installs what it needs and runs it. Every cell, which is a
system on an endpoint at a number of rounds over a block of questions, has processes of its own and
leaves a file in `OUT/cells`. What is there already is not run again: after Ctrl-C the same command
goes on. The table, the picture and all figures are written anew from the cells at the end, with
`--table-only` from those that are there.

Questions are the first of a file with the fields `question` and `answer`. All texts, hand-overs and
answers, are greedy and end after `--max-tokens` tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from cells import ENDPOINTS, LLAMA_CPP, RACERS, RECMAS, Setting, plan, run_cell
from race_table import write_report
from team import TEAM, endpoint_spec, team_spec

from recmas_compiler.backbones.sources import SMOLLM2, resolve_source
from recmas_runtime.checking.machine import describe_machine

HERE = Path(__file__).parent
DEFAULT_SYSTEMS = ("langgraph", "crewai", "autogen", "avp", "text", "latent")
PRECISIONS = ("int4", "float32")
MAX_ROUNDS = 3
MAX_AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="question and answer, JSON lines")
    parser.add_argument("--rounds", default="3,2,1", help="of each, or ROUNDS:QUESTIONS,...")
    parser.add_argument("--limit", type=int, default=20, help="questions [default: 20]")
    parser.add_argument("--systems", default=",".join(DEFAULT_SYSTEMS), help=", ".join(RACERS))
    parser.add_argument("--endpoints", default=",".join(ENDPOINTS))
    parser.add_argument("--precision", choices=PRECISIONS, default="int4")
    parser.add_argument("--at-once", default="1", help="1 [default], 8, or 1,8")
    parser.add_argument("--block", type=int, default=10, help="questions of a cell [default: 10]")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each text [default: 96]")
    parser.add_argument("--latent-steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="of what computes [default: 2]")
    parser.add_argument("--environments", type=Path, default=Path(".frameworks"))
    parser.add_argument("--out", type=Path, default=Path("out/frameworks"))
    parser.add_argument("--table-only", action="store_true", help="of the cells that are there")
    given = parser.parse_args()

    by_rounds = read_rounds(given.rounds, given.limit)
    systems = _known("system", given.systems, tuple(RACERS))
    endpoints = _known("endpoint", given.endpoints, ENDPOINTS)
    questions = read_questions(given.data, max(by_rounds.values()))
    folder = given.out / given.precision
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    keep_settings(folder, given, questions)
    at_once = read_at_once(given.at_once)
    cells = plan(systems, endpoints, by_rounds, given.block, at_once)
    files = {cell: folder / "cells" / f"{cell.name}.json" for cell in cells}
    left = [cell for cell in cells if not files[cell].exists()]
    if not given.table_only and left:
        # Whatever ends this program ends the servers and systems that it started.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        setting = prepare(given, systems, endpoints)
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        try:
            for number, cell in enumerate(left, start=1):
                print(f"{number} of {len(left)}: {cell.name}", file=sys.stderr, flush=True)
                start = cell.block * given.block
                end = min(start + given.block, by_rounds[cell.rounds])
                _write(files[cell], run_cell(cell, questions[start:end], setting, logs))
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            sys.exit(130)
    print(write_report(folder, questions))


def read_rounds(text: str, limit: int) -> dict[int, int]:
    """Return questions by rounds: `3:20,1:10`, or `3,1` with `limit` questions each."""
    found = {}
    for part in text.split(","):
        rounds, _, questions = part.partition(":")
        if not (rounds.isdecimal() and 1 <= int(rounds) <= MAX_ROUNDS):
            raise SystemExit(f"--rounds {text}: {rounds!r} is not one of 1 to {MAX_ROUNDS}")
        if questions and not (questions.isdecimal() and int(questions)):
            raise SystemExit(f"--rounds {text}: {questions!r} is no number of questions")
        found[int(rounds)] = int(questions or limit)
    return found


def read_at_once(text: str) -> list[int]:
    """Return how many questions run at a time, each number a set of cells of its own."""
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= MAX_AT_ONCE for part in parts):
        raise SystemExit(f"--at-once {text}: numbers from 1 to {MAX_AT_ONCE}, commas between them")
    return [int(part) for part in parts]


def read_questions(path: Path, limit: int) -> list[dict[str, str]]:
    """Return the first questions of a file, each with `id`, `question` and `answer`."""
    if not path.exists():
        raise SystemExit(f"--data {path}: there is no such file; docs/data.md says how to get one")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < limit:
        raise SystemExit(f"--data {path}: {len(lines)} questions, {limit} are asked for")
    records = [json.loads(line) for line in lines[:limit]]
    return [
        {"id": str(number), "question": record["question"], "answer": str(record["answer"])}
        for number, record in enumerate(records)
    ]


def keep_settings(
    folder: Path, given: argparse.Namespace, questions: Sequence[Mapping[str, str]]
) -> None:
    """Write what all cells have in common, or refuse if other cells are there already."""
    machine = describe_machine()
    settings = {
        "team": hashlib.sha256(TEAM.read_bytes()).hexdigest(),
        "first_question": questions[0]["question"],
        "precision": given.precision,
        "max_tokens": given.max_tokens,
        "latent_steps": given.latent_steps,
        "block": given.block,
        "threads": given.threads,
        "cpu": machine["cpu"],
        "onnxruntime": machine["packages"]["onnxruntime"],
    }
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differ = [key for key, value in settings.items() if before.get(key) != value]
        if differ:
            raise SystemExit(
                f"{folder} has cells of another {', '.join(differ)}: take another --out"
            )
    else:
        _write(path, {**settings, "date": date.today().isoformat()})


def prepare(given: argparse.Namespace, systems: Sequence[str], endpoints: Sequence[str]) -> Setting:
    """Make the bundles and files of weights that are missing."""
    made = given.out / given.precision / "made"
    made.mkdir(parents=True, exist_ok=True)
    gguf = resolve_source(SMOLLM2, base_dir=Path()).gguf_path
    assert gguf is not None
    built = given.environments / "llama.cpp/build/bin"
    setting = Setting(
        team_file=TEAM,
        max_tokens=given.max_tokens,
        latent_steps=given.latent_steps,
        threads=given.threads,
        environments=given.environments,
        llama_server=built / "llama-server",
        model=gguf if given.precision == "int4" else made / "model-f32.gguf",
        weights=given.out / "avp-weights",
        single=made / "single",
        team=made / "team",
    )
    needed = {racer.environment for name, racer in RACERS.items() if name in systems} - {""}
    missing = [given.environments / name for name in sorted(needed)]
    missing += [setting.llama_server] * (LLAMA_CPP in endpoints)
    missing = [path for path in missing if not path.exists()]
    if missing:
        raise SystemExit(f"{missing[0]} is missing: `make frameworks` installs it")
    if not setting.model.exists():
        _run(built / "llama-quantize", "--allow-requantize", gguf, setting.model, "F32")
    if "avp" in systems and not setting.weights.exists():
        python = given.environments / "avp/bin/python"
        _run(python, HERE / "adapters/avp_weights.py", gguf, setting.weights)
    asking = any(RACERS[system].asks for system in systems)
    specs = {}
    if asking and RECMAS in endpoints:
        specs[setting.single] = endpoint_spec(precision=given.precision)
    if {"text", "latent"} & set(systems):
        team = json.loads(TEAM.read_text(encoding="utf-8"))
        specs[setting.team] = team_spec(
            team,
            rounds=MAX_ROUNDS,
            latent_steps=given.latent_steps,
            precision=given.precision,
        )
    for bundle, spec in specs.items():
        if not bundle.exists():
            print(f"building {bundle.name}", file=sys.stderr, flush=True)
            path = bundle.with_suffix(".yaml")
            path.write_text(spec, encoding="utf-8")
            _run(Path(sys.executable).with_name("recmasc"), "build", path, "--out", bundle)
    return setting


def _known(what: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return names


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


def _write(path: Path, what: Mapping[str, Any]) -> None:
    """Write a file at once: one that is there is whole."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    new.rename(path)


if __name__ == "__main__":
    main()
