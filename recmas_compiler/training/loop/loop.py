"""The loop of every task: steps, measurements, checkpoints, and going on where a run stopped."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from recmas_compiler.spec.schema.train import InnerStageSection, OuterStageSection, TrainSection
from recmas_compiler.training.loop.checkpoint import (
    check_same_run,
    latest_checkpoint,
    load_checkpoint,
    restore_tensors,
    run_tensors,
    save_checkpoint,
    writing,
)
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.metrics import METRICS_NAME, peak_memory_mb
from recmas_runtime.core.errors import fail
from recmas_runtime.core.jsonl import JsonLines
from recmas_runtime.core.progress import Progress

CHECKPOINTS: Final = "checkpoints"

# How torch words that the processor's memory is used up; it has no exception of its own for that.
_NO_MEMORY: Final = ("can't allocate memory", "not enough memory")

# The mean over about the last twenty steps is what is judged: single batches differ.
_KEPT: Final = 0.95
# A loss this many times its best mean, and more by this much, does not come back.
_FACTOR: Final = 3.0
_MARGIN: Final = 1.0

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


class Task(Protocol):
    """What a loop trains.

    Attributes:
        name: For messages.
        links: What learns, by link id.
        num_examples: Records to learn from.
    """

    name: str
    links: Mapping[str, nn.Module]
    num_examples: int

    def loss(self, places: Sequence[int]) -> StepLoss:
        """Return the loss of the records at these places."""

    def measure(self, world: World) -> Mapping[str, Any]:
        """Return figures on what is held out; empty if nothing is."""

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return figures about the gradients of a step of so many tokens, besides norms by link."""


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How a loop ended.

    Attributes:
        loss: Running mean of the training loss.
    """

    steps: int
    interrupted: bool
    loss: float | None
    first: Mapping[str, Any]
    last: Mapping[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        """What a report says about the loop."""
        return {
            "steps": self.steps,
            "loss": self.loss,
            "before": dict(self.first),
            "after": dict(self.last),
        }


@dataclass(frozen=True, kw_only=True)
class Health:
    """The running mean of the loss and the lowest it has been; None before the first step."""

    mean: float | None = None
    lowest: float | None = None

    def after(self, loss: float) -> Health:
        """Return the state after one more step."""
        mean = loss if self.mean is None else _KEPT * self.mean + (1 - _KEPT) * loss
        return Health(mean=mean, lowest=mean if self.lowest is None else min(self.lowest, mean))

    def why_stop(self, loss: float, gradient_norm: float) -> str | None:
        """Return what is wrong with a step of this loss and norm; None if nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient is {gradient_norm}"
        after = self.after(loss)
        assert after.mean is not None
        assert after.lowest is not None
        if after.mean > _FACTOR * after.lowest + _MARGIN:
            return f"the loss diverges: its mean rose from {after.lowest:.3g} to {after.mean:.3g}"
        return None


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
def interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop after the step; the second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set handlers
        return

    def note(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _State:
    """What changes from step to step besides tensors; all of it is in a checkpoint."""

    step: int = 0
    health: Health = field(default_factory=Health)
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)


class Loop:
    """Trains a task; `identity` is what the run is made of, others' checkpoints are refused."""

    def __init__(
        self,
        task: Task,
        section: TrainSection,
        stage: StageSection,
        *,
        folder: Path,
        identity: Mapping[str, str],
        world: World,
        sink: Sink | None = None,
    ) -> None:
        self._task = task
        self._section = section
        self._stage = stage
        self._folder = folder
        self._identity = identity
        self._world = world
        self._sink = sink
        self._at = _State()
        self._log: JsonLines | None = None
        self._weights = [w for link in task.links.values() for w in link.parameters()]
        self._optimizer = torch.optim.AdamW(
            [{"params": self._weights, "initial_lr": stage.lr}],
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
                    self._log.keep(kept_bytes)  # what came after the checkpoint is done again
            with interrupts() as interrupted, self._named_failures():
                return self._steps(title, progress, interrupted)
        finally:
            if self._log is not None:
                self._log.close()

    def _begin(self, *, resume: bool) -> int:
        """Take up the last checkpoint; return how much of the metrics belongs to it."""
        latest = latest_checkpoint(self._folder / CHECKPOINTS)
        if latest is not None and not resume:
            raise fail(
                "RM302",
                f"{self._folder} holds a run already, up to {latest.name}",
                hint="Go on with --resume, name another --out, or delete the folder.",
            )
        kept_bytes = 0
        if latest is not None:
            checkpoint = load_checkpoint(latest)
            check_same_run(checkpoint, self._identity)
            restore_tensors(checkpoint.tensors, self._task.links, self._optimizer)
            state = checkpoint.state
            self._at = _State(
                step=checkpoint.step,
                health=Health(**state["health"]),
                first=state["first"],
                last=state["last"],
            )
            kept_bytes = int(state["metrics_bytes"])
        for weight in self._weights:
            self._world.copy_from_main(weight)
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        return kept_bytes

    def _steps(self, title: str, progress: Progress, interrupted: threading.Event) -> LoopResult:
        at, section, num_steps = self._at, self._section, self._stage.steps
        factor = partial(rate_factor, steps=num_steps, warmup_steps=section.warmup_steps)
        rates = LambdaLR(self._optimizer, factor, last_epoch=at.step - 1)
        if at.step == 0:
            self._measure()
        stopped = False
        with progress.stage(title, num_steps, done=at.step) as advance:
            while at.step < num_steps and not stopped:
                loss, stopped = self._step(rates, interrupted)
                at.step += 1
                advance(note=f"loss {loss:.4f}")
                is_last = at.step == num_steps
                if at.step % section.eval_every == 0 or is_last:
                    self._measure()
                if at.step % section.checkpoint_every == 0 or is_last or stopped:
                    self._save()
        return LoopResult(
            steps=at.step,
            interrupted=at.step < num_steps,
            loss=at.health.mean,
            first=at.first,
            last=at.last,
        )

    def _step(self, rates: LambdaLR, interrupted: threading.Event) -> tuple[float, bool]:
        """Take a step; return its loss, and whether any process wants to stop."""
        at, section, world = self._at, self._section, self._world
        started = time.perf_counter()
        places = batch_of(
            at.step,
            num_examples=self._task.num_examples,
            batch_size=self._stage.batch_size,
            seed=section.seed,
        )
        self._optimizer.zero_grad()
        total, tokens = self._backward(world.share(places))
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
        (rate,) = rates.get_last_lr()
        self._optimizer.step()
        rates.step()
        at.health = at.health.after(loss)
        seconds = time.perf_counter() - started
        self._write(
            {
                "kind": "step",
                "step": at.step + 1,
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

    def _backward(self, places: Sequence[int]) -> tuple[float, int]:
        """Add the gradients of this process's records, piece by piece; return loss and tokens."""
        num_pieces = min(self._section.accumulation, len(places))
        total, tokens = 0.0, 0
        for piece in range(num_pieces):
            found = self._task.loss(places[piece::num_pieces])
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
            f"training of {self._task.name} stopped at step {self._at.step + 1}: {why}; {good}",
            hint="Lower the stage's `lr`, or raise `train.warmup_steps`.",
        )

    def _measure(self) -> None:
        figures = self._task.measure(self._world)
        if not figures:
            return
        self._at.first = self._at.first or figures
        self._at.last = figures
        self._write({"kind": "eval", "step": self._at.step, **figures})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._log is not None:
            with writing(self._folder / METRICS_NAME):
                self._log.append(entry)
            if self._sink is not None:
                self._sink(entry)

    def _save(self) -> None:
        if self._log is not None:
            at = self._at
            with writing(self._folder / METRICS_NAME):
                num_bytes = self._log.sync()
            save_checkpoint(
                self._folder / CHECKPOINTS,
                step=at.step,
                identity=self._identity,
                state={
                    "metrics_bytes": num_bytes,
                    "health": asdict(at.health),
                    "first": at.first,
                    "last": at.last,
                },
                tensors=run_tensors(self._task.links, self._optimizer),
            )
        self._world.wait()

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Say which setting to lower when memory is used up."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch's own error is a RuntimeError
            known = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not known and not any(words in str(error) for words in _NO_MEMORY):
                raise
            latest = latest_checkpoint(self._folder / CHECKPOINTS)
            kept = "" if latest is None else f"; the last good checkpoint is {latest}"
            raise fail(
                "RM702",
                f"memory ran out in step {self._at.step + 1} of {self._task.name}, with batches of "
                f"{self._stage.batch_size} in {self._section.accumulation} pieces{kept}",
                hint="Raise `train.accumulation` or lower the stage's `batch_size`; then "
                "`train.max_length`, or `checkpoint_calls: true`.",
            ) from error
