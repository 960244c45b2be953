"""Killed and ended anywhere: what was there is there, and going on gives what no kill gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from faults.cases import Case, parts, try_cases
from faults.jobs import Job, build_job, eval_job, num_writes, run_job, train_job
from faults.outcome import Outcome, judge
from kit.files import MadeOnce
from recmas_runtime.core.errors import Exit


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A job, what it gives when nothing happens, what was there before it."""

    job: Job
    whole: Any
    before: Any
    writes: int
    seconds: float


@pytest.fixture(scope="session")
def undisturbed(
    backbones: Path,
    whole_bundle: Path,
    made_once: MadeOnce,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Undisturbed]:
    """Run a job by name without a kill, once."""
    import recmas_compiler.evaluation.evaluate
    import recmas_compiler.training.run  # noqa: F401
    import recmas_export.assemble  # noqa: F401
    import recmas_runtime.cli.run  # noqa: F401

    made: dict[str, Undisturbed] = {}

    def earlier(name: str, job: Job, *settings: str) -> Path:
        """Run a job with other settings, for what lies there before."""
        folder = tmp_path_factory.mktemp(f"{name}-before")
        job.prepare(folder)
        outcome = job.run(folder, [*job.arguments, *settings])
        assert outcome.status == 0, outcome.text
        return folder

    def job_of(name: str) -> Job:
        match name:
            case "run":
                return run_job(whole_bundle)
            case "eval":
                return eval_job(whole_bundle)
            case "train":
                return train_job(backbones)
            case "train over":
                other = earlier(name, train_job(backbones), "--set", "train.warmup_steps=1")
                return train_job(backbones, over=other)
            case "build":
                return build_job(backbones, made_once)
            case _:
                first = build_job(backbones, made_once)
                other = earlier(name, first, "--set", "answer.max_new_tokens=5")
                return build_job(backbones, made_once, over=other)

    def make(name: str) -> Undisturbed:
        if name not in made:
            job = job_of(name)
            folder = tmp_path_factory.mktemp(name)
            job.prepare(folder)
            has_before = name.endswith("over")
            before = job.result(folder) if has_before else None
            writes, seconds = num_writes(job, folder)
            whole = job.result(folder)
            assert whole != before
            made[name] = Undisturbed(
                job=job, whole=whole, before=before, writes=writes, seconds=seconds
            )
        return made[name]

    return make


# A job for every case in turn.
TURNS = ("run", "train", "eval", "build", "run", "train over", "eval", "build over")


def attempt(case: Case, undisturbed: Callable[[str], Undisturbed], by: int) -> Iterator[str]:
    random, folder = case.random, case.folder
    name = random.choice(TURNS)
    plain = undisturbed(name)
    job = plain.job
    job.prepare(folder)
    at = 0
    after_s: float | None = None
    if random.random() < 0.6:
        at = random.randrange(1, plain.writes + 1)
        stopped = job.run(folder, job.arguments, stopped_at=at, by=by)
    else:
        after_s = random.uniform(0, plain.seconds * 1.1)
        stopped = job.run(folder, job.arguments, kill_after_s=after_s, kill_by=by)
    place = f"write {at} of {plain.writes}" if at else f"{after_s:.2f} of {plain.seconds:.2f} s"
    faults = ended_rightly(stopped, by)
    faults += [f"left behind: {fault}" for fault in job.intact(folder, plain.whole, plain.before)]
    if by == signal.SIGTERM:
        faults += [f"left behind: {path}" for path in staged(folder)]
    again = job.run(folder, job.again)
    faults += [f"again: {fault}" for fault in judge(again)]
    if again.status != 0:
        faults.append(f"again: ends with status {again.status}")
    else:
        found = job.result(folder)
        if found != plain.whole:
            faults.append(f"again: another result{difference(found, plain.whole)}")
        faults += [f"again leaves {path}" for path in staged(folder)]
    if faults:
        yield f"{name} at {place}: {'; '.join(faults)}"
        yield f"stopped ({stopped.status}): {stopped.text[-700:]!r}"
        yield f"again ({again.status}): {again.text[-700:]!r}"


def ended_rightly(outcome: Outcome, by: int) -> list[str]:
    if outcome.status == 0 or (by == signal.SIGKILL and outcome.status == -by):
        return []
    faults = judge(outcome)
    if outcome.status != Exit.INTERRUPTED:
        faults.append(f"ends with status {outcome.status}")
    return faults


def staged(folder: Path) -> list[str]:
    """Return what is only there while a command runs."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob(".*")
        if not path.name.endswith(".lock")
    )


def difference(found: Any, whole: Any) -> str:
    if isinstance(found, dict) and isinstance(whole, dict):
        return f": {sorted(k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k))}"
    return f": {len(found)} of {len(whole)}"


@parts
def test_killed(part: int, undisturbed: Callable[[str], Undisturbed]) -> None:
    try_cases("killed", 104, part, lambda case: attempt(case, undisturbed, signal.SIGKILL))


@parts
def test_ended(part: int, undisturbed: Callable[[str], Undisturbed]) -> None:
    try_cases("ended", 56, part, lambda case: attempt(case, undisturbed, signal.SIGTERM))


@parts
def test_ended_while_it_starts(part: int, whole_bundle: Path) -> None:
    """In programs of their own: these import what they need while the signal comes."""

    def start(case: Case) -> Iterator[str]:
        module = case.random.choice(["recmas_cli.main", "recmas_runtime.cli.main"])
        command = ["inspect", str(whole_bundle)] if "runtime" in module else ["check", "none.yaml"]
        number = case.random.choice([signal.SIGTERM, signal.SIGHUP])
        process = subprocess.Popen(
            [sys.executable, "-m", module, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=case.folder,
            env={**os.environ},
        )
        try:
            process.wait(case.random.uniform(0.0, 0.7))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        _, printed = process.communicate(timeout=60)
        ends = (-number, Exit.INTERRUPTED, Exit.OK, Exit.SPEC_INVALID)
        if b"Traceback" in printed or process.returncode not in ends:
            yield f"{module} ends with status {process.returncode}: {printed[-700:]!r}"

    try_cases("starting", 16, part, start)
