"""Checkpoints: all that a run needs to go on as if it had never stopped; written whole or not.

A checkpoint is a folder `step-00000100` with `tensors.safetensors` (links, optimizer, random state)
and `state.json`, which holds the sha256 of both. It is written beside its place and renamed; the
last two are kept. What is damaged is never taken: the one before it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from recmas_compiler.training.loop.checkpoint_head import (
    PREFIX,
    STATE,
    Head,
    LoopState,
    check_same_run,
    checkpoints,
    damaged_checkpoint,
    fallen_back,
    head_text,
    latest_checkpoint,
    read_head,
)
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import open_regular, sync_folder
from recmas_runtime.core.text import first_line

NUM_KEPT: Final = 2

_TENSORS: Final = "tensors.safetensors"
_MOMENTS: Final = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder holds."""

    path: Path
    head: Head
    tensors: Mapping[str, Tensor]

    @property
    def step(self) -> int:
        """How many steps were done."""
        return self.head.step


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    identity: Mapping[str, str],
    machine: Mapping[str, str],
    state: LoopState,
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write a checkpoint and remove all but the last ones.

    Raises:
        RecmasError: RM303 if the disk is full or not writable; the checkpoints before are kept.
    """
    place = folder / f"{PREFIX}{step:08d}"
    staged = folder / f".{place.name}.writing"
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    text = head_text(
        step=step, identity=identity, machine=machine, state=state, tensors_sha256=digest
    )
    try:
        for left in folder.glob(f".{PREFIX}*.writing"):  # a killed run's
            _remove(left)
        staged.mkdir(parents=True)
        _write_durably(staged / _TENSORS, content)
        _write_durably(staged / STATE, text.encode())
        sync_folder(staged)
        _remove(place)
        staged.rename(place)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise _unwritable(place, error, last_good=latest_checkpoint(folder)) from error
    known = checkpoints(folder)
    # What lies behind this step is damaged, or the run would have gone on from there.
    behind = [path for path in known if path.name > place.name]
    for old in [*known[: len(known) - len(behind)][:-NUM_KEPT], *behind]:
        _remove(old)
    return place


def newest_whole_checkpoint(
    folder: Path, links: Mapping[str, nn.Module], *, identity: Mapping[str, str]
) -> tuple[Checkpoint | None, tuple[Problem, ...]]:
    """Return the newest checkpoint that a run of these links can use, and warnings of the others.

    Returns:
        None if there never was one.

    Raises:
        RecmasError: RM703 if one is of another run, or all are damaged.
    """
    damaged: list[Problem] = []
    for path in reversed(checkpoints(folder)):
        try:
            found = load_checkpoint(path)
        except RecmasError as error:
            damaged += error.problems
            continue
        check_same_run(path, found.head.identity, identity)
        try:
            check_tensors(found, links)
        except RecmasError as error:
            damaged += error.problems
        else:
            return found, fallen_back(damaged, path)
    if damaged:
        raise RecmasError(damaged)
    return None, ()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and compare it with the digests in it.

    Raises:
        RecmasError: RM703 if it is damaged.
    """
    head = read_head(path)
    try:
        with open_regular(path / _TENSORS, file=_TENSORS) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != head.tensors_sha256:
            raise ValueError(f"{_TENSORS} is not what was written")
        tensors = load_file(path / _TENSORS)
    except RecmasError as error:
        raise damaged_checkpoint(path, error.problems[0].message) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        # The bytes are those that the head names, so somebody wrote both: torch may refuse forms
        # that the file format allows, each in its own way.
        raise damaged_checkpoint(path, first_line(error)) from error
    return Checkpoint(path=path, head=head, tensors=tensors)


def run_tensors(
    links: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return all tensors of a run by name: weights, the optimizer's moments, random state."""
    tensors: dict[str, Tensor] = {}
    for link_id, link in links.items():
        for name, weight in link.named_parameters():
            tensors[f"links/{link_id}/{name}"] = weight
            moments = optimizer.state.get(weight, {})
            for moment in _MOMENTS:
                if moment in moments:
                    tensors[f"optimizer/{link_id}/{name}/{moment}"] = moments[moment]
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def check_tensors(checkpoint: Checkpoint, links: Mapping[str, nn.Module]) -> None:
    """Make sure that a checkpoint holds what a run of these links has, in the same forms.

    Raises:
        RecmasError: RM703 naming the first tensor that is missing, foreign or of another form.
    """
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for link_id, link in links.items():
        for name, weight in link.named_parameters():
            form = tuple(weight.shape), weight.dtype
            wanted[f"links/{link_id}/{name}"] = form
            for moment in _MOMENTS if checkpoint.step else ():
                place = f"optimizer/{link_id}/{name}/{moment}"
                wanted[place] = ((), torch.float32) if moment == "step" else form
    wanted["random/cpu"] = tuple(torch.get_rng_state().shape), torch.uint8
    found = {name: (tuple(t.shape), t.dtype) for name, t in checkpoint.tensors.items()}
    if torch.cuda.is_available():
        wanted["random/cuda"] = tuple(torch.cuda.get_rng_state().shape), torch.uint8
    # A machine without a GPU goes on without its random state, and the other way round.
    absent = {"random/cuda"} - (wanted.keys() & found.keys())
    for name in dict.fromkeys((*wanted, *found)):
        if name in absent or wanted.get(name) == found.get(name):
            continue
        why = "is foreign" if name not in wanted else "has another form"
        why = why if name in found else "is missing"
        raise damaged_checkpoint(checkpoint.path, f"`{name}` {why}")
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise damaged_checkpoint(checkpoint.path, f"`{name}` holds NaN or infinity")
    try:
        torch.Generator().set_state(checkpoint.tensors["random/cpu"])
    except RuntimeError as error:
        raise damaged_checkpoint(checkpoint.path, first_line(error)) from error
    health = checkpoint.head.state.health
    if any(value is not None and not isfinite(value) for value in (health.mean, health.lowest)):
        raise damaged_checkpoint(checkpoint.path, "its mean loss is no number")


def restore_tensors(
    tensors: Mapping[str, Tensor], links: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Put back what `run_tensors` returned, bit for bit; `check_tensors` has seen it."""
    with torch.no_grad():
        for link_id, link in links.items():
            for name, weight in link.named_parameters():
                weight.copy_(tensors[f"links/{link_id}/{name}"])
                moments = {
                    moment: tensors[key].to("cpu" if moment == "step" else weight.device)
                    for moment in _MOMENTS
                    if (key := f"optimizer/{link_id}/{name}/{moment}") in tensors
                }
                if moments:
                    optimizer.state[weight] = moments
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file of a run cannot be written, and how to go on.

    Raises:
        RecmasError: RM303.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error


def _unwritable(
    path: Path, error: OSError | SafetensorError, *, last_good: Path | None = None
) -> RecmasError:
    # A full disk is a `SafetensorError` where that package writes by itself.
    reason = (error.strerror or error) if isinstance(error, OSError) else error
    kept = "" if last_good is None else f"; the last good checkpoint is {last_good}"
    return fail(
        "RM303",
        f"cannot write {path}: {reason}{kept}",
        hint="Make room, then go on with --resume.",
    )


def _remove(path: Path) -> None:
    """Remove a folder, or what a damaged disk or somebody else put in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
