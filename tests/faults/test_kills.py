"""Killed and ended anywhere: what was there is there, and going on gives what no kill gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.cases import Case, parts, try_cases
from faults.outcome import Outcome, judge
from faults.undisturbed import TURNS, Undisturbed
from recmas_runtime.core.errors import Exit


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
        # a small file that nothing reads may stay where its writer was killed
        faults += [f"again leaves {path}" for path in staged(folder) if (folder / path).is_dir()]
    if faults:
        yield f"{name} at {place}: {'; '.join(faults)}"
        yield f"stopped ({stopped.status}): {stopped.text[-700:]!r}"
        yield f"again ({again.status}): {again.text[-700:]!r}"


def ended_rightly(outcome: Outcome, by: int) -> list[str]:
    # Until `main` begins the signal itself ends the program, which has done nothing then.
    by_system = outcome.status == -by and (by == signal.SIGKILL or not outcome.text)
    if outcome.status == 0 or by_system:
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
        ends = (-number, -signal.SIGINT, Exit.INTERRUPTED, Exit.OK, Exit.SPEC_INVALID)
        if b"Traceback" in printed or process.returncode not in ends:
            yield f"{module} ends with status {process.returncode}: {printed[-700:]!r}"

    try_cases("while_it_starts", 16, part, start)
