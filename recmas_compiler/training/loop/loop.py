"""The loop of every task: steps, measurements, checkpoints, and going on where a run stopped."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from recmas_compiler.spec.schema.train import InnerStageSection, OuterStageSection, TrainSection
from recmas_compiler.training.loop.checkpoint import (
    newest_whole_checkpoint,
    restore_tensors,
    run_tensors,
    save_checkpoint,
    writing,
)
from recmas_compiler.training.loop.checkpoint_head import (
    CHECKPOINTS,
    LoopState,
    check_unused,
    damaged_checkpoint,
    latest_checkpoint,
)
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.memory import memory_named
from recmas_compiler.training.loop.metrics import METRICS_NAME, peak_memory_mb
from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.jsonl import JsonLines
from recmas_runtime.core.progress import Progress

_FINISHING: Final = b"\nfinishing this step; once more stops without saving\n"

StageSection = InnerStageSection | OuterStageSection

Sink = Callable[[Mapping[str, Any]], None]
"""Receives every entry of the metrics file."""


class StepLoss(Protocol):
    """The loss of some records: a sum over tokens, so that parts of a batch can be added up."""

    @property
    def total(self) -> Tensor:
        """The sum, a scalar with gradients."""

    @property
    def tokens(self) -> int:
        """What to divide it by for the mean."""


@dataclass(frozen=True, kw_only=True)
class AtStep:
    """Where a loop stands.

    Attributes:
        step: Steps done before this one.
        steps: All of the loop.
        places: The step's records, of all processes and pieces.
    """

    step: int
    steps: int
    places: tuple[int, ...]


class Task(Protocol):
    """What a loop trains.

    Attributes:
        name: For messages.
        links: What learns, by link id.
        num_examples: Records to learn from.
        rates: Highest learning rates by link id, where they are not the stage's.
    """

    name: str
    links: Mapping[str, nn.Module]
    num_examples: int
    rates: Mapping[str, float]

    def loss(self, places: Sequence[int], at: AtStep) -> StepLoss:
        """Return the loss of the records at these places, some of the step's."""

    def finish_step(self, at: AtStep, world: World) -> None:
        """Do what comes after the optimizer's step."""

    def measure(self, world: World) -> Mapping[str, Any]:
        """Return figures on what is held out; empty if nothing is."""

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return figures about the gradients of a step of so many tokens, besides norms by link."""


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How a loop ended.

    Attributes:
        loss: Running mean of the training loss.
        warnings: What was found when it was gone on with.
    """

    steps: int
    interrupted: bool
    loss: float | None
    first: Mapping[str, Any]
    last: Mapping[str, Any]
    warnings: tuple[Problem, ...] = ()

    @property
    def figures(self) -> dict[str, Any]:
        """What a report says about the loop."""
        return {
            "steps": self.steps,
            "loss": self.loss,
            "before": dict(self.first),
            "after": dict(self.last),
        }


def rate_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """Return a step's part of the highest rate: a linear rise, then half a cosine's cycle to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batch_of(step: int, *, num_examples: int, batch_size: int, seed: int) -> tuple[int, ...]:
    """Return the places of a step's records, from 0.

    Every epoch is a permutation of its own; a batch may reach from one into the next. Seed and step
    say everything, so there is nothing to save. torch's samplers draw another order, and end an
    epoch with a shorter batch: runs that were begun could not be resumed bit for bit.
    """
    first = step * batch_size
    places = range(first, first + batch_size)
    return tuple(
        _permutation(num_examples, seed, place // num_examples)[place % num_examples]
        for place in places
    )


@lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311
    return tuple(order)


@contextmanager
def interrupts(*, tell: bool = True) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop after the step; the second one stops at once.

    With `tell` a line on stderr says so at once: a step may take minutes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set handlers
        return

    def note(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        if tell:
            with suppress(OSError):  # nobody may be there to read
                # Not through sys.stderr, which the signal may have found in the middle of a write.
                os.write(2, _FINISHING)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class Loop:
    """Trains a task.

    `identity` is what the run is made of: others' checkpoints are refused. `machine` is what its
    last bits depend on, besides threads and versions: where that changes, it is said.
    """

    def __init__(
        self,
        task: Task,
        section: TrainSection,
        stage: StageSection,
        *,
        folder: Path,
        identity: Mapping[str, str],
        machine: Mapping[str, str] | None = None,
        world: World,
        sink: Sink | None = None,
    ) -> None:
        self._task = task
        self._section = section
        self._stage = stage
        self._folder = folder
        self._identity = identity
        self._machine = {
            "threads": str(torch.get_num_threads()),
            "processes": str(world.size),
            "device": world.device.type,
            "torch": torch.__version__,
            **(machine or {}),
        }
        self._world = world
        self._sink = sink
        self._step_done = 0
        self._at = LoopState()
        self._warnings: tuple[Problem, ...] = ()
        self._log: JsonLines | None = None
        self._weights = [w for link in task.links.values() for w in link.parameters()]
        self._optimizer = torch.optim.AdamW(
            _groups(task, stage.lr),
            lr=stage.lr,
            betas=section.betas,
            weight_decay=section.weight_decay,
            foreach=False,
        )

    def run(self, *, resume: bool, title: str, progress: Progress) -> LoopResult:
        """Train to the last step, or until it is interrupted.

        Raises:
            RecmasError: RM302 if the folder holds a run and `resume` is off, RM303 if the disk is
                full, RM701 if the loss diverges, RM702 if memory does not suffice, RM703 if the
                checkpoint is of another run.
        """
        kept_bytes = self._begin(resume=resume)
        try:
            if self._world.is_main:
                with writing(self._folder / METRICS_NAME):
                    self._log = JsonLines(self._folder / METRICS_NAME)
                    if not self._log.is_regular:  # a pipe would take some lines, then wait for ever
                        raise OSError(errno.EINVAL, "it is not a regular file")
                    self._log.keep(kept_bytes)  # what came after the checkpoint is done again
            with (
                interrupts(tell=self._world.is_main) as interrupted,
                memory_named(self._where, self._folder / CHECKPOINTS),
            ):
                return self._steps(title, progress, interrupted)
        finally:
            if self._log is not None:
                self._log.close()

    def _begin(self, *, resume: bool) -> int:
        """Take up the last checkpoint; return how much of the metrics belongs to it."""
        check_unused(self._folder, resume=resume)
        folder = self._folder / CHECKPOINTS
        found, self._warnings = newest_whole_checkpoint(
            folder, self._task.links, identity=self._identity
        )
        if found is not None:
            if found.step > self._stage.steps:
                raise damaged_checkpoint(found.path, f"there are {self._stage.steps} steps")
            self._warnings += other_machine(found.path, found.head.machine, self._machine)
            restore_tensors(found.tensors, self._task.links, self._optimizer)
            self._step_done, self._at = found.step, found.head.state
        for weight in self._weights:
            self._world.copy_from_main(weight)
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._at.metrics_bytes

    def _steps(self, title: str, progress: Progress, interrupted: threading.Event) -> LoopResult:
        at, section, num_steps = self._at, self._section, self._stage.steps
        factor = partial(rate_factor, steps=num_steps, warmup_steps=section.warmup_steps)
        rates = LambdaLR(self._optimizer, factor, last_epoch=self._step_done - 1)
        if self._step_done == 0:
            with progress.stage(f"{title}: measuring what is held out"):
                self._measure()
        stopped = False
        with progress.stage(title, num_steps, done=self._step_done) as advance:
            while self._step_done < num_steps and not stopped:
                loss, stopped = self._step(rates, interrupted)
                self._step_done += 1
                advance(note=f"loss {loss:.4f}{_held_out(at.last)}")
                is_last = self._step_done == num_steps
                if self._step_done % section.eval_every == 0 or is_last:
                    self._measure()
                if self._step_done % section.checkpoint_every == 0 or is_last or stopped:
                    self._save()
        return LoopResult(
            steps=self._step_done,
            interrupted=self._step_done < num_steps,
            loss=at.health.mean,
            first=at.first,
            last=at.last,
            warnings=self._warnings,
        )

    def _step(self, rates: LambdaLR, interrupted: threading.Event) -> tuple[float, bool]:
        """Take a step; return its loss, and whether any process wants to stop."""
        at, section, world = self._at, self._section, self._world
        started = time.perf_counter()
        places = batch_of(
            self._step_done,
            num_examples=self._task.num_examples,
            batch_size=self._stage.batch_size,
            seed=section.seed,
        )
        at_step = AtStep(step=self._step_done, steps=self._stage.steps, places=places)
        self._optimizer.zero_grad()
        total, tokens = self._backward(world.share(places), at_step)
        # One sum for all that the processes have to agree on.
        sums = world.add_up(
            torch.tensor(
                [total, tokens, float(interrupted.is_set())],
                dtype=torch.float64,
                device=world.device,
            )
        )
        total, tokens, num_stopping = sums.tolist()
        loss = total / max(tokens, 1.0)
        norms = self._finish_gradients(max(tokens, 1.0))
        norm = math.sqrt(sum(n * n for n in norms.values()))
        self._check(loss, norm)
        if section.clip and norm > section.clip:
            # Not clip_grad_norm_: it adds 1e-6 to the norm, and old curves would not come back.
            for weight in self._weights:
                assert weight.grad is not None
                weight.grad *= section.clip / norm
        rate = self._stage.lr * rates.lr_lambdas[0](self._step_done)
        self._optimizer.step()
        self._task.finish_step(at_step, world)
        rates.step()
        at.health = at.health.after(loss)
        seconds = time.perf_counter() - started
        self._write(
            {
                "kind": "step",
                "step": self._step_done + 1,
                "loss": loss,
                "lr": rate,
                "tokens": int(tokens),
                "grad_norm": norms,
                "tokens_per_s": tokens / seconds,
                "memory_mb": peak_memory_mb(world.device),
                **self._task.gradient_figures(max(tokens, 1.0)),
            }
        )
        return loss, num_stopping > 0

    def _backward(self, places: Sequence[int], at: AtStep) -> tuple[float, int]:
        """Add the gradients of this process's records, piece by piece; return loss and tokens."""
        num_pieces = min(self._section.accumulation, len(places))
        total, tokens = 0.0, 0
        for piece in range(num_pieces):
            found = self._task.loss(places[piece::num_pieces], at)
            found.total.backward()  # type: ignore[no-untyped-call]
            total += found.total.item()
            tokens += found.tokens
        return total, tokens

    def _finish_gradients(self, tokens: float) -> dict[str, float]:
        """Make sums over records means over all tokens of all processes; return norms by link."""
        for weight in self._weights:
            if weight.grad is None:  # of a link that nothing in this program listens to
                weight.grad = torch.zeros_like(weight)
        flat = torch.cat([w.grad.flatten() for w in self._weights if w.grad is not None])
        self._world.add_up(flat)
        flat /= tokens
        first = 0
        for weight in self._weights:
            part = flat[first : first + weight.numel()]
            weight.grad = part.view_as(weight)
            first += weight.numel()
        return {
            link_id: math.sqrt(
                sum(float(w.grad.square().sum()) for w in link.parameters() if w.grad is not None)
            )
            for link_id, link in self._task.links.items()
        }

    def _check(self, loss: float, norm: float) -> None:
        why = self._at.health.why_stop(loss, norm)
        if why is None:
            return
        latest = latest_checkpoint(self._folder / CHECKPOINTS)
        good = "there is no checkpoint yet" if latest is None else f"the last good one is {latest}"
        raise fail(
            "RM701",
            f"training of {self._task.name} stopped at step {self._step_done + 1}: {why}; {good}",
            hint="Lower the stage's `lr`, or raise `train.warmup_steps`.",
        )

    def _measure(self) -> None:
        figures = self._task.measure(self._world)
        if not figures:
            return
        self._at.first = self._at.first or dict(figures)
        self._at.last = dict(figures)
        self._write({"kind": "eval", "step": self._step_done, **figures})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._log is not None:
            with writing(self._folder / METRICS_NAME):
                self._log.append(entry)
            if self._sink is not None:
                self._sink(entry)

    def _save(self) -> None:
        if self._log is not None:
            with writing(self._folder / METRICS_NAME):
                self._at.metrics_bytes = self._log.sync()
            save_checkpoint(
                self._folder / CHECKPOINTS,
                step=self._step_done,
                identity=self._identity,
                machine=self._machine,
                state=self._at,
                tensors=run_tensors(self._task.links, self._optimizer),
            )
        self._world.wait()

    def _where(self) -> str:
        return (
            f"in step {self._step_done + 1} of {self._task.name}, with batches of "
            f"{self._stage.batch_size} in {self._section.accumulation} pieces"
        )


def _groups(task: Task, lr: float) -> list[dict[str, Any]]:
    """Return the weights by their highest learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for link_id, link in task.links.items():
        groups.setdefault(task.rates.get(link_id, lr), []).extend(link.parameters())
    return [{"params": weights, "lr": rate, "initial_lr": rate} for rate, weights in groups.items()]


def other_machine(
    path: Path, then: Mapping[str, str], now: Mapping[str, str]
) -> tuple[Problem, ...]:
    """Warn that a run goes on where sums are rounded otherwise."""
    other = [
        f"{name} {then.get(name, 'unknown')}, now {value}"
        for name, value in now.items()
        if then.get(name) != value
    ]
    if not other:
        return ()
    message = f"{path.name} was made otherwise ({'; '.join(other)})"
    hint = "The weights will be as good, but not those of an unbroken run bit for bit."
    return (Problem(code="RM754", severity="warning", message=message, hint=hint, file=str(path)),)


def _held_out(figures: Mapping[str, Any]) -> str:
    """Return the first of the newest held-out figures, to stand beside the loss."""
    return next((f", held out: {name} {value:.4f}" for name, value in figures.items()), "")
