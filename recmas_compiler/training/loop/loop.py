"""The loop of both stages: steps, measurements, checkpoints, and going on where a run stopped."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from recmas_compiler.training.data.order import batch_of
from recmas_compiler.training.loop.checkpoint import (
    check_same_run,
    latest_checkpoint,
    load_checkpoint,
    restore_tensors,
    run_tensors,
    save_checkpoint,
    unwritable,
)
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.health import Health
from recmas_compiler.training.loop.interrupts import interrupts
from recmas_compiler.training.loop.learning_rate import learning_rate
from recmas_compiler.training.loop.metrics import METRICS_NAME, MetricsLog, peak_memory_mb
from recmas_compiler.training.task import LoopResult, LoopSettings, Sink, Task, Watch
from recmas_runtime.core.errors import fail

CHECKPOINTS: Final = "checkpoints"

# How torch words that the processor's memory is used up; it has no exception of its own for that.
_NO_MEMORY: Final = ("can't allocate memory", "not enough memory")


@dataclass
class _Progress:
    """What changes from step to step besides tensors; all of it is in a checkpoint."""

    step: int = 0
    health: Health = field(default_factory=Health)
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)


class Loop:
    """Trains a task.

    Args:
        task: What.
        settings: How.
        folder: Where metrics and checkpoints go.
        identity: What the run is made of; checkpoints of another one are refused.
        world: The processes that share the work.
        sinks: See every entry of the metrics.
    """

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        *,
        folder: Path,
        identity: Mapping[str, str],
        world: World,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._task = task
        self._settings = settings
        self._folder = folder
        self._identity = identity
        self._world = world
        self._sinks = sinks
        self._at = _Progress()
        self._log: MetricsLog | None = None
        self._weights = [w for link in task.links.values() for w in link.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            foreach=False,
        )

    def run(self, *, resume: bool, watch: Watch) -> LoopResult:
        """Train to the last step, or until somebody interrupts.

        Args:
            resume: Go on from the last checkpoint, if there is one.
            watch: Sees every step.

        Raises:
            RecmasError: RM302 if the folder holds a run and `resume` is off, RM303 if the disk is
                full, RM701 if the loss diverges, RM702 if memory does not suffice, RM703 if the
                checkpoint is of another run.
        """
        kept_bytes = self._begin(resume=resume)
        if self._world.is_main:
            self._log = MetricsLog(self._folder / METRICS_NAME, keep_bytes=kept_bytes)
        try:
            with interrupts() as interrupted, self._named_failures():
                return self._steps(watch, interrupted)
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
            self._at = _Progress(
                step=checkpoint.step,
                health=Health(**state["health"]),
                first=state["first"],
                last=state["last"],
            )
            kept_bytes = int(state["metrics_bytes"])
        for weight in self._weights:
            self._world.copy_from_main(weight)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        return kept_bytes

    def _steps(self, watch: Watch, interrupted: threading.Event) -> LoopResult:
        at, settings = self._at, self._settings
        if at.step == 0:
            self._measure()
        stopped = False
        watch(at.step, at.health.mean or math.nan)
        while at.step < settings.steps and not stopped:
            loss, stopped = self._step(interrupted)
            at.step += 1
            watch(at.step, loss)
            is_last = at.step == settings.steps
            if at.step % settings.eval_every == 0 or is_last:
                self._measure()
            if at.step % settings.checkpoint_every == 0 or is_last or stopped:
                self._save()
        return LoopResult(
            steps=at.step,
            interrupted=at.step < settings.steps,
            loss=at.health.mean,
            first=at.first,
            last=at.last,
        )

    def _step(self, interrupted: threading.Event) -> tuple[float, bool]:
        """Take one step; return its loss and whether somebody wants to stop after it."""
        at, settings, world = self._at, self._settings, self._world
        started = time.perf_counter()
        places = batch_of(
            at.step,
            num_examples=self._task.num_examples,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        rate = learning_rate(
            at.step, steps=settings.steps, peak=settings.lr, warmup_steps=settings.warmup_steps
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
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
        if settings.clip and norm > settings.clip:
            for weight in self._weights:
                assert weight.grad is not None
                weight.grad *= settings.clip / norm
        self._optimizer.step()
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
        num_pieces = min(self._settings.accumulation, len(places))
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
        if self._log is None:
            return
        self._log.write(entry)
        for sink in self._sinks:
            sink(entry)

    def _save(self) -> None:
        if self._log is not None:
            at = self._at
            save_checkpoint(
                self._folder / CHECKPOINTS,
                step=at.step,
                identity=self._identity,
                state={
                    "metrics_bytes": self._log.sync(),
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
                f"{self._settings.batch_size} in {self._settings.accumulation} pieces{kept}",
                hint="Raise `train.accumulation` or lower the stage's `batch_size`; then "
                "`train.max_length`, or `checkpoint_calls: true`.",
            ) from error
