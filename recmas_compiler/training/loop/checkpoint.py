"""Checkpoints: all that a run needs to go on as if it had never stopped; written whole or not.

A checkpoint is a folder `step-00000100` with `tensors.safetensors` (links, optimizer, random state)
and `state.json`. It is written beside its place and renamed; the last two are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from recmas_runtime.core.errors import RecmasError, fail

NUM_KEPT: Final = 2

_TENSORS: Final = "tensors.safetensors"
_STATE: Final = "state.json"
_MOMENTS: Final = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a folder holds: `identity` says what the run was made of, by name."""

    path: Path
    step: int
    identity: Mapping[str, str]
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    identity: Mapping[str, str],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write a checkpoint and remove all but the last ones.

    Raises:
        RecmasError: RM303 if the disk is full or not writable; the checkpoints before are kept.
    """
    place = folder / f"step-{step:08d}"
    staged = folder / f".{place.name}.writing"
    text = json.dumps({"step": step, "identity": dict(identity), "state": dict(state)}, indent=1)
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        _write_durably(staged / _TENSORS, save(flat))
        _write_durably(staged / _STATE, text.encode())
        shutil.rmtree(place, ignore_errors=True)
        staged.rename(place)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise _unwritable(place, error, last_good=latest_checkpoint(folder)) from error
    for old in _checkpoints(folder)[:-NUM_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the last checkpoint, or None if there is none."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        RecmasError: RM703 if it is damaged.
    """
    try:
        head = json.loads((path / _STATE).read_bytes())
        tensors = load_file(path / _TENSORS)
        return Checkpoint(
            path=path,
            step=int(head["step"]),
            identity=dict(head["identity"]),
            state=dict(head["state"]),
            tensors=tensors,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise fail(
            "RM703",
            f"the checkpoint {path} cannot be read: {error}",
            hint="Delete this folder to go on from the checkpoint before it.",
        ) from error


def check_same_run(checkpoint: Checkpoint, identity: Mapping[str, str]) -> None:
    """Refuse to go on with a checkpoint of another spec, data, settings or links.

    Raises:
        RecmasError: RM703 naming what is different.
    """
    other = [name for name, value in identity.items() if checkpoint.identity.get(name) != value]
    if other:
        raise fail(
            "RM703",
            f"the checkpoint {checkpoint.path} is of another run: {' and '.join(other)} differ",
            hint="Set them back, or train anew into another --out.",
        )


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


def restore_tensors(
    tensors: Mapping[str, Tensor], links: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Put back what `run_tensors` returned, bit for bit."""
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
    reason = error.strerror if isinstance(error, OSError) else error
    kept = "" if last_good is None else f"; the last good checkpoint is {last_good}"
    return fail(
        "RM303",
        f"cannot write {path}: {reason}{kept}",
        hint="Make room, then go on with --resume.",
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
