"""Commands that write, tiny: what each begins with, what it leaves, when it is stopped.

`stopped_at` ends a process between two of its writes, wherever they are in the program; a time
ends it anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from faults.outcome import Outcome, forked
from kit.bundles import each_backbone_exported_once
from kit.files import MadeOnce, lines
from kit.training import SPEC, write_case
from recmas_cli.main import main as recmasc
from recmas_runtime.cli.main import main as recmas

NUM_RECORDS: Final = 24
# What Python reports before it does it, and what changes a folder.
WRITES: Final = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"})
TIMES: Final = ("timing_ms", "ms", "made", "savings", "seconds")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that is run beside what it needs.

    Attributes:
        arguments: Of the command; it runs in the folder that `prepare` filled.
        again: What goes on with it after it was stopped.
        result: What must be equal in the end, times left out.
        intact: What is wrong with what a stopped run left, given the results of a whole run and
            of the one before it, if there was one.
    """

    command: Callable[[list[str]], object]
    arguments: Sequence[str]
    again: Sequence[str]
    prepare: Callable[[Path], None]
    result: Callable[[Path], Any]
    intact: Callable[[Path, Any, Any], list[str]]
    once: MadeOnce | None = None

    def run(self, folder: Path, arguments: Sequence[str], **how: Any) -> Outcome:
        """Run in a child; `stopped_at` and `by` as `stopped_at` takes them."""
        number, by = how.pop("stopped_at", 0), how.pop("by", signal.SIGKILL)
        count = how.pop("count", None)

        def action() -> object:
            os.chdir(folder)
            if number or count is not None:
                stop_at(number, by=by, count=count)
            if self.once is None:
                return self.command(list(arguments))
            with each_backbone_exported_once(self.once):
                return self.command(list(arguments))

        return forked(action, **how)


def stop_at(number: int, *, by: int, count: mmap.mmap | None = None) -> None:
    """Send this process a signal before its `number`th write below the folder it runs in."""
    here, seen = str(Path.cwd()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in WRITES:
            path = arguments[0]
        else:
            return
        text = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        if os.path.isabs(text) and not text.startswith(here):  # noqa: PTH117
            return
        seen += 1
        if count is not None:
            count[:8] = seen.to_bytes(8, "little")
        if seen == number:
            os.kill(os.getpid(), by)

    sys.addaudithook(hook)


def num_writes(job: Job, folder: Path) -> tuple[int, float]:
    """Run a job undisturbed in `folder`; return how often it writes and how long it takes."""
    count = mmap.mmap(-1, 8)
    outcome = job.run(folder, job.arguments, count=count)
    assert outcome.status == 0, outcome.text
    return int.from_bytes(count[:8], "little"), outcome.seconds


def timeless(value: Any) -> Any:
    """Return JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder; nothing if it is not there."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _answers(path: Path) -> list[Any]:
    """Return the whole lines of a file of answers."""
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    return [timeless(json.loads(line)) for line in whole.splitlines()]


def _records(folder: Path) -> None:
    rows = [
        {"id": f"r{n}", "question": f"What comes at {n % 10}", "answer": f"#### {n}"}
        for n in range(NUM_RECORDS)
    ]
    (folder / "data.jsonl").write_text(lines(*rows))


def _same_or_shorter(found: Sequence[Any], whole: Sequence[Any]) -> list[str]:
    return [] if list(found) == list(whole)[: len(found)] else ["answers that are not its own"]


def run_job(bundle: Path) -> Job:
    """Answer records into a file, with a trace."""
    arguments = ["run", str(bundle), "--input", "data.jsonl", "--output", "out.jsonl"]
    arguments += ["--batch", "2", "--quiet", "--threads", "1"]
    return Job(
        command=recmas,
        arguments=arguments,
        again=[*arguments, "--resume"],
        prepare=_records,
        result=lambda folder: _answers(folder / "out.jsonl"),
        intact=lambda folder, whole, _: _same_or_shorter(_answers(folder / "out.jsonl"), whole),
    )


def eval_job(bundle: Path) -> Job:
    """Evaluate the system and one baseline."""
    arguments = ["eval", str(bundle), "--data", "data.jsonl", "--protocol", "gsm8k", "--out", "out"]
    arguments += ["--batch", "2", "--quiet", "--threads", "1", "--set", "max_new_tokens=4"]
    arguments += ["--baseline", "latent", "--baseline", "null-latents"]

    def result(folder: Path) -> Any:
        report = json.loads((folder / "out/report.json").read_text())
        answers = {p.name: _answers(p) for p in sorted((folder / "out").glob("answers-*.jsonl"))}
        return {"report": timeless(report), "answers": answers}

    def intact(folder: Path, whole: Any, _: Any) -> list[str]:
        return [
            fault
            for path in sorted((folder / "out").glob("answers-*.jsonl"))
            for fault in _same_or_shorter(_answers(path), whole["answers"][path.name])
        ]

    return Job(
        command=recmasc,
        arguments=arguments,
        again=[*arguments, "--resume"],
        prepare=_records,
        result=result,
        intact=intact,
    )


def _trained_set(folder: Path) -> Any:
    return digests(folder / "links/pair")


def _one_of(found: Any, *expected: Any) -> list[str]:
    if not found or found in expected:
        return []
    return [f"neither the set before nor the one after: {sorted(found)}"]


def train_job(backbones: Path, *, over: Path | None = None) -> Job:
    """Train both stages; `over` holds the links of an earlier training."""

    def prepare(folder: Path) -> None:
        for name in ("llama", "qwen2"):
            (folder / name).symlink_to(backbones / name)
        write_case(folder)
        if over is not None:
            copy_of(over / "links", folder / "links")

    arguments = ["train", "spec.yaml", "--quiet", "--steps", "6"]

    def intact(folder: Path, whole: Any, before: Any) -> list[str]:
        found = _trained_set(folder)
        if before and not found:
            return ["the links of the training before are gone"]
        return _one_of(found, whole, before)

    return Job(
        command=recmasc,
        arguments=arguments,
        again=[*arguments, "--resume"],
        prepare=prepare,
        result=_trained_set,
        intact=intact,
    )


def build_job(backbones: Path, once: MadeOnce, *, over: Path | None = None) -> Job:
    """Build a bundle; `over` holds one of another spec at its place."""

    def prepare(folder: Path) -> None:
        for name in ("llama", "qwen2"):
            (folder / name).symlink_to(backbones / name)
        text = SPEC[: SPEC.index("train:")]
        (folder / "spec.yaml").write_text(text)
        if over is not None:
            copy_of(over / "bundle", folder / "bundle")

    arguments = ["build", "spec.yaml", "-o", "bundle", "--quiet"]

    def result(folder: Path) -> Any:
        return digests(folder / "bundle")

    def intact(folder: Path, whole: Any, before: Any) -> list[str]:
        found = result(folder)
        if before and not found:
            return ["the bundle before is gone"]
        return _one_of(found, whole, before)

    return Job(
        command=recmasc,
        arguments=arguments,
        again=arguments,
        prepare=prepare,
        result=result,
        intact=intact,
        once=once,
    )


def copy_of(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target, symlinks=True)
