"""Several processes that train as one: who this one is, sums over all, and how to start them.

The same code runs alone: a world of one adds nothing up.
"""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from recmas_runtime.core.errors import Exit

T = TypeVar("T")

# Names the file in which the first process leaves its exit status; only `launch` sets it.
STATUS_FILE: Final = "RECMAS_TRAINING_STATUS_FILE"
# The others wait while the first one computes hidden states, which may take hours. A process that
# ends is noticed without this.
_LONGEST_WAIT: Final = timedelta(days=7)


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, as one of them sees it: its rank, their number, its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of what all of them work through."""
        return items[self.rank :: self.size]

    def add_up(self, values: Tensor) -> Tensor:
        """Replace `values` by their sum over all processes and return them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def copy_from_main(self, values: Tensor) -> None:
        """Give `values` the content that they have in the main process."""
        if self.size > 1:
            dist.broadcast(values.data, src=0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the processes that torchrun started; a process that it did not start is alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        if size > 1:
            dist.destroy_process_group()


class Ended(NamedTuple):
    """The exit status of the process that ended a run, and what is left to show of the run."""

    status: int
    stdout: str = ""
    stderr: str = ""


def launch(num_processes: int, module: str, arguments: Sequence[str]) -> Ended:
    """Run `python -m MODULE ARGUMENTS` in several processes on this machine.

    Only the first process shows anything. What another one says is left to show if that one failed
    and the first one did not.

    Args:
        module: Joins them with `joined_world`; its first process leaves the exit status of the run
            in the file that `STATUS_FILE` names.
    """
    # torchrun would give every process a single thread, and warn that it does.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    debug = "--debug" in arguments
    if not debug:
        logging.disable()  # torchrun logs every process that it ends
    both_streams = ",".join(f"{rank}:3" for rank in range(1, num_processes))
    with TemporaryDirectory(prefix="recmas-train-") as name:
        folder = Path(name)
        os.environ[STATUS_FILE] = str(folder / "status")
        options = [f"--nproc-per-node={num_processes}", f"--redirects={both_streams}"]
        options += ["--standalone", f"--log-dir={folder}"]
        try:
            torchrun([*options, "-m", module, *arguments])
        except (ChildFailedError, SignalException) as ended:
            trace = traceback.format_exc() if debug else ""
            if (folder / "status").exists():
                return Ended(int((folder / "status").read_text()), stderr=trace)
            if isinstance(ended, ChildFailedError):
                return _first_failure(ended, folder, trace)
            is_interrupt = ended.sigval in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            return Ended(Exit.INTERRUPTED if is_interrupt else Exit.RUN_FAILED, stderr=trace)
    return Ended(Exit.OK)


def _first_failure(error: ChildFailedError, logs: Path, trace: str) -> Ended:
    """Return the output and the exit status of the process that failed first."""
    rank, failure = error.get_first_failure()
    stdout, stderr = (
        "".join(
            log.read_text(encoding="utf-8", errors="replace")
            for log in logs.glob(f"*/attempt_0/{rank}/{stream}.log")
        )
        for stream in ("stdout", "stderr")
    )
    if failure.exitcode >= 0:
        return Ended(failure.exitcode, stdout, trace + stderr)
    name = signal.Signals(-failure.exitcode).name
    stderr += f"process {rank} of the run was ended by {name}\n"
    return Ended(Exit.RUN_FAILED, stdout, trace + stderr)
