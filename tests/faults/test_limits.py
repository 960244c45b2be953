"""Full disks, read-only places, few descriptors, little memory, odd streams and names, company."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from faults.cases import Case, parts, try_cases
from faults.jobs import Job
from faults.outcome import Outcome, forked, judge
from faults.own_mounts import disk_of, in_own_mounts, read_only, writable
from faults.undisturbed import TURNS, Undisturbed
from recmas_cli.main import main as recmasc
from recmas_runtime.cli.main import main as recmas
from recmas_runtime.core.errors import Exit

Plain = Callable[[str], Undisturbed]
MANY = 256 * 2**20


def limited_and_again(
    job: Job, folder: Path, plain: Undisturbed, limited: Outcome, *, natively: bool = False
) -> list[str]:
    """Return what is wrong with a run under a limit and with going on without it."""
    faults = judge(limited, natively=natively)
    faults += [f"left behind: {fault}" for fault in job.intact(folder, plain.whole, plain.before)]
    again = job.run(folder, job.again)
    if again.status != 0:
        faults += [f"again: status {again.status}", *(f"again: {f}" for f in judge(again))]
    elif job.result(folder) != plain.whole:
        faults.append("again: another result")
    if limited.status == 0 and limited.text.count("error["):
        faults.append("an error with status 0")
    return [*faults, f"limited ({limited.status}): {limited.text[-700:]!r}",
            f"again ({again.status}): {again.text[-500:]!r}"] if faults else []  # fmt: skip


def full_disk(case: Case, name: str, plain: Undisturbed) -> list[str] | None:
    random, folder = case.random, case.folder

    def inside() -> list[str]:
        disk_of(folder, MANY)
        plain.job.prepare(folder)
        used = sum(p.lstat().st_blocks * 512 for p in folder.rglob("*"))
        needed = plain.num_bytes
        disk_of(folder, used + random.randrange(4096, max(8192, needed)), grown=True)
        limited = plain.job.run(folder, plain.job.arguments)
        disk_of(folder, MANY, grown=True)
        return limited_and_again(plain.job, folder, plain, limited)

    return in_own_mounts(inside, limit_s=180)


def read_only_place(case: Case, name: str, plain: Undisturbed) -> list[str] | None:
    folder = case.folder / "place"
    folder.mkdir()

    def inside() -> list[str]:
        plain.job.prepare(folder)
        part = case.random.choice(["", "out", "links"])
        place = folder / part
        place.mkdir(exist_ok=True)
        read_only(place)
        limited = plain.job.run(folder, plain.job.arguments)
        writable(place)
        if part == "links" and not any(place.iterdir()):
            place.rmdir()
        return limited_and_again(plain.job, folder, plain, limited)

    return in_own_mounts(inside, limit_s=180)


def short_files(case: Case, name: str, plain: Undisturbed) -> list[str]:
    plain.job.prepare(case.folder)
    size = case.random.choice([0, 1, 100, 4096, 20_000, 100_000])
    limits = [(resource.RLIMIT_FSIZE, size)]
    limited = plain.job.run(case.folder, plain.job.arguments, limits=limits)
    return limited_and_again(plain.job, case.folder, plain, limited)


def few_descriptors(case: Case, name: str, plain: Undisturbed) -> list[str]:
    plain.job.prepare(case.folder)
    limits = [(resource.RLIMIT_NOFILE, case.random.randrange(4, 40))]
    limited = plain.job.run(case.folder, plain.job.arguments, limits=limits)
    return limited_and_again(plain.job, case.folder, plain, limited)


def little_memory(case: Case, name: str, plain: Undisturbed) -> list[str]:
    plain.job.prepare(case.folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = case.random.choice([0, 1, 4, 8, 16, 32, 64, 128, 256]) * 2**20
    room += case.random.randrange(2**20)
    limits = [(resource.RLIMIT_AS, pages * resource.getpagesize() + room)]
    limited = plain.job.run(case.folder, plain.job.arguments, limits=limits)
    return limited_and_again(plain.job, case.folder, plain, limited, natively=True)


def two_at_once(case: Case, name: str, plain: Undisturbed) -> list[str]:
    job, folder = plain.job, case.folder
    job.prepare(folder)
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(job.run, folder, job.arguments, limit_s=180) for _ in range(2)]
        both = [one.result() for one in started]
    faults = [f"{n}: {fault}" for n, one in enumerate(both) for fault in judge(one)]
    if not any(one.status == 0 for one in both):
        faults.append("neither has done it")
    refused = next((one for one in both if one.status != 0), both[0])
    if not faults and job.result(folder) != plain.whole:
        faults.append("another result than one of them gives")
    faults += limited_and_again(job, folder, plain, refused)
    return faults


LIMITS: tuple[Callable[[Case, str, Undisturbed], list[str] | None], ...] = (
    full_disk, read_only_place, short_files, few_descriptors, little_memory, two_at_once,
)  # fmt: skip


@parts
def test_limits(part: int, undisturbed: Plain) -> None:
    refused = []

    def attempt(case: Case) -> Iterator[str]:
        # each part meets all of them
        limit = LIMITS[case.number // 8 % len(LIMITS)]
        name = case.random.choice(TURNS)
        found = limit(case, name, undisturbed(name))
        if found is None:
            refused.append(limit.__name__)
        elif found:
            yield f"{limit.__name__}, {name}: {'; '.join(found)}"

    try_cases("limits", 72, part, attempt)
    if refused:
        pytest.skip(f"this machine lets nobody mount: {', '.join(refused)}")


ODD_NAMES = (
    "a b", "[b]", "[/b]", "-x", "--help", "\x1b[31m", "a\nb", "\u202e", os.fsdecode(b"\xe9"),
    "n" * 255, "n" * 256, "'", '"', "$(x)", "{{ x }}", "%s", "*", "~", "CON", "a:b", "\\",
    "p/" * 2100, ".", "..", "/", "", "taken", "taken/below", "circle", "circle/below",
    "/dev/full", "/dev/null", "/proc/x",
)  # fmt: skip


@parts
def test_odd_names(part: int, whole_bundle: Path, backbones: Path) -> None:
    """Names of everything that a command reads or writes."""

    def attempt(case: Case) -> Iterator[str]:
        random, folder = case.random, case.folder
        odd = ODD_NAMES[case.number % len(ODD_NAMES)]
        (folder / "taken").write_text("mine")
        (folder / "circle").symlink_to("circle")
        (folder / "data.jsonl").write_text('{"question": "What comes at 7", "answer": "#### 7"}\n')
        (folder / "small").symlink_to(backbones / "llama")
        write_spec(folder)
        bundle = str(whole_bundle)
        commands: Sequence[tuple[Callable[[list[str]], object], list[str]]] = (
            (recmas, ["run", bundle, "--input", odd, "--output", "out.jsonl"]),
            (recmas, ["run", bundle, "--input", "data.jsonl", "--output", odd]),
            (recmas, ["run", bundle, "7", "--trace", odd]),
            (recmas, ["run", odd, "7"]),
            (recmas, ["verify", odd]),
            (recmas, ["inspect", odd]),
            (recmas, ["bench", bundle, "--data", odd, "--repeats", "1"]),
            (recmasc, ["check", odd]),
            (recmasc, ["graph", odd]),
            (recmasc, ["ir", "spec.yaml", "--dump-ir", odd]),
            (recmasc, ["init", odd]),
            (recmasc, ["build", "spec.yaml", "-o", odd, "--quiet"]),
            (recmasc, ["eval", bundle, "--data", odd, "--protocol", "gsm8k", "--out", "o"]),
            (recmasc, ["eval", bundle, "--data", "data.jsonl", "--protocol", odd, "--out", "o"]),
            (recmasc, ["eval", bundle, "--data", "data.jsonl", "--protocol", "gsm8k", "--out", odd,
                       "--set", "max_new_tokens=2"]),
        )  # fmt: skip
        chosen = random.sample(commands, 3)
        for program, asked in chosen:
            # progress moves the cursor of a terminal
            quiet = ["--quiet"] if asked[0] in ("run", "verify", "bench", "eval") else []
            arguments = [*asked, *quiet]
            outcome = run_in(folder, program, arguments, on_terminal=random.random() < 0.5)
            data = arguments[0] in ("run", "graph", "ir", "init")
            faults = judge(outcome, data_on_stdout=data and not outcome.on_terminal)
            if (folder / "taken").read_text() != "mine" and odd != "taken":
                faults.append("another file was overwritten")
            if faults:
                shown = outcome.text[-700:]
                yield f"{' '.join(arguments)!r}: {'; '.join(faults)} ({outcome.status}): {shown!r}"

    try_cases("names", 2 * len(ODD_NAMES), part, attempt)


def write_spec(folder: Path) -> None:
    from kit.specs import PAIR

    (folder / "spec.yaml").write_text(PAIR)


def run_in(
    folder: Path, program: Callable[[list[str]], object], arguments: list[str], **how: Any
) -> Outcome:
    def action() -> object:
        os.chdir(folder)
        return program(arguments)

    return forked(action, **how)


STREAMS = {
    "input closed": "<&-",
    "output closed": ">&-",
    "errors closed": "2>&-",
    "output and errors closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "output full": ">/dev/full",
    "errors full": "2>/dev/full",
    "both full": ">/dev/full 2>/dev/full",
    "input empty": "</dev/null",
    "nobody reads": "| true",
}
STREAMED = {
    "question": "recmas_runtime.cli.main run {bundle} 7",
    "json": "recmas_runtime.cli.main run {bundle} 7 --json",
    "records": "recmas_runtime.cli.main run {bundle} --input data.jsonl",
    "from input": "recmas_runtime.cli.main run {bundle} --input -",
    "inspect": "recmas_runtime.cli.main inspect {bundle}",
    "verify": "recmas_runtime.cli.main verify {bundle}",
    "check": "recmas_cli.main check spec.yaml",
    "graph": "recmas_cli.main graph spec.yaml --json",
    "refusal": "recmas_cli.main check nothing.yaml",
}


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("command", STREAMED)
def test_streams(
    command: str, streams: str, whole_bundle: Path, backbones: Path, tmp_path: Path
) -> None:
    """In programs of their own, which begin with the streams that a shell gives them."""
    (tmp_path / "small").symlink_to(backbones / "llama")
    records = '{"id": "a", "question": "What comes at 7"}\n{"id": "b", "question": "And at 1"}\n'
    (tmp_path / "data.jsonl").write_text(records)
    write_spec(tmp_path)
    line = STREAMED[command].format(bundle=f"'{whole_bundle}'")
    script = f"set -o pipefail; {sys.executable} -m {line} {STREAMS[streams]}"
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        input=records.encode(),
    )
    outcome = Outcome(status=ran.returncode, stdout=ran.stdout, stderr=ran.stderr, seconds=0)
    hidden = "errors" in streams or "both" in streams or "all" in streams
    faults = [f for f in judge(outcome, data_on_stdout=True) if not (hidden and "a code" in f)]
    has_output = not (command == "from input" and "input" in streams)
    if "full" in streams and "errors" not in streams and ran.returncode == Exit.OK and has_output:
        faults.append("the output was lost, with status 0")
    if "errors closed" in streams and command == "refusal" and ran.stdout:
        faults.append("what belongs to the errors is in the output")
    assert not faults, outcome.text[-1500:]
