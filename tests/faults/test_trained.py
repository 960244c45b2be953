"""Damaged checkpoints, receipts and links: refused by a code, told, or of no effect at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from faults.cases import Case, parts, try_cases
from faults.jobs import Job, copy_of, digests, train_job
from faults.mutators import other_bytes, other_json, other_numbers, other_safetensors
from faults.outcome import Outcome, judge, warnings_in

# Said of links that start at random, trained or not.
ALWAYS_SAID = frozenset({"RM152"})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A whole training in `folder`, the links it gave, and the losses of records with them."""

    job: Job
    folder: Path
    links: Any
    losses: Any


@pytest.fixture(scope="session")
def trained(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    import recmas_compiler.training.run  # noqa: F401

    job = train_job(backbones)
    folder = tmp_path_factory.mktemp("trained")
    job.prepare(folder)
    outcome = job.run(folder, job.arguments)
    assert outcome.status == 0, outcome.text
    links = job.result(folder)
    return Trained(job=job, folder=folder, links=links, losses=losses_of(measure(job, folder)))


def measure(job: Job, folder: Path) -> Outcome:
    return job.run(folder, ["train", "spec.yaml", "--eval-only", "--json", "--quiet"])


def losses_of(outcome: Outcome) -> dict[str, float]:
    assert outcome.status == 0, outcome.text
    return {one["id"]: one["loss"] for one in outcome.json()["data"]["records"]}


def damage(random: Random, path: Path) -> str:
    """Damage a file, or put something else in its place; return what was done."""
    raw = path.read_bytes()
    if random.random() < 0.25:
        kind = random.choice(["removed", "folder", "pipe", "circle", "empty"])
        path.unlink()
        match kind:
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case "circle":
                path.symlink_to(path)
            case "empty":
                path.touch()
        return f"{path.name} {kind}"
    changes = {
        ".safetensors": other_safetensors,
        ".json": other_json,
        ".float32": other_numbers,
    }
    change = random.choice([changes.get(path.suffix, other_bytes), other_bytes])
    path.write_bytes(change(random, raw))
    return f"{path.name} by {change.__name__}"


def damaged(random: Random, files: list[Path]) -> str:
    count = min(len(files), random.choice([1, 1, 1, 2]))
    return ", ".join(damage(random, path) for path in random.sample(files, count))


def attempt_resume(case: Case, trained: Trained) -> Iterator[str]:
    """Go on from a checkpoint in the middle when something of the run's folder is damaged."""
    random, folder, job = case.random, case.folder, trained.job
    job.prepare(folder)
    copy_of(trained.folder / "out", folder / "out")
    run = folder / "out/pair-training"
    # as a run that was killed at that moment
    stopped_in = random.choice(["outer", "outer", "inner/solver"])
    if stopped_in == "inner/solver":
        shutil.rmtree(run / "outer")
        shutil.rmtree(run / "inner/links", ignore_errors=True)
    if random.random() < 0.8:
        shutil.rmtree(run / stopped_in / "checkpoints/step-00000006")
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.suffix != ".png")
    kept = [p for p in files if "checkpoints" in p.parts]
    done = damaged(random, kept if random.random() < 0.65 else files)
    outcome = job.run(folder, job.again)
    faults = judge(outcome)
    if outcome.status == 0 and not faults and job.result(folder) != trained.links:
        faults.append("goes on to other links")
    if faults:
        yield f"in {stopped_in}: {done}: {'; '.join(faults)}"
        yield f"printed ({outcome.status}): {outcome.text[-900:]!r}"


def attempt_use(case: Case, trained: Trained) -> Iterator[str]:
    """Use trained links of which something is damaged."""
    random, folder, job = case.random, case.folder, trained.job
    job.prepare(folder)
    copy_of(trained.folder / "links", folder / "links")
    links = folder / "links/pair"
    files = sorted(links.iterdir())
    receipt = links / "receipt.json"
    chosen = [receipt, random.choice(files)] if random.random() < 0.5 else files
    done = damaged(random, sorted(set(chosen)))
    before = digests(links)
    checked = job.run(folder, ["check", "spec.yaml"])
    measured = measure(job, folder)
    faults = [f"check: {fault}" for fault in judge(checked)]
    found = judge(measured, data_on_stdout=True)
    if measured.status == 0 and not found:
        told = set(warnings_in(measured)) - ALWAYS_SAID
        if losses_of(measured) != trained.losses and not told:
            found.append("other links are used, and nothing is said")
    if digests(links) != before:
        found.append("it changed the trained links")
    faults += [f"train --eval-only: {fault}" for fault in found]
    if faults:
        yield f"{done}: {'; '.join(faults)}"
        yield f"check ({checked.status}): {checked.text[-500:]!r}"
        yield f"train --eval-only ({measured.status}): {measured.text[-900:]!r}"


@parts
def test_going_on_from_damaged_checkpoints(part: int, trained: Trained) -> None:
    try_cases("checkpoints", 200, part, lambda case: attempt_resume(case, trained))


@parts
def test_using_damaged_links_and_receipts(part: int, trained: Trained) -> None:
    try_cases("receipts", 120, part, lambda case: attempt_use(case, trained))
