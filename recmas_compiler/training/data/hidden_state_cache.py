"""Hidden states over target texts: computed once, kept on disk, or made anew where they do not fit.

A backbone never changes, so neither do its hidden states: the inner stage reads them from a
memory-mapped file. What slots hold here is text, because real messages depend on links that are
about to learn.

Shape legend: B calls, S positions, N target tokens of all calls, D width.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.training.loop.checkpoint import unwritable
from recmas_compiler.training.loop.distributed import World
from recmas_runtime.core.errors import fail
from recmas_runtime.core.progress import Progress

# Positions that run at once, padding included.
_POSITIONS_AT_ONCE: Final = 8192
# Calls among which equal lengths are looked for.
_WINDOW: Final = 256


@dataclass(frozen=True, kw_only=True)
class TargetCall:
    """An agent's prompt as tokens alone, and behind it what it should think or say.

    Attributes:
        ids: All tokens.
        num_target_tokens: How many at the end are the target.
    """

    ids: tuple[int, ...]
    num_target_tokens: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The tokens of the target."""
        return self.ids[len(self.ids) - self.num_target_tokens :]


class Thoughts(Protocol):
    """Pairs of a hidden state and the token that follows it in a target."""

    @property
    def is_stored(self) -> bool:
        """Whether pairs are read from disk, and cost nothing to have again."""

    def pairs(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return hidden states [N, D] in float32 and token ids [N] of the calls at these places."""

    def __len__(self) -> int:
        """Return the number of calls."""


class ComputedThoughts:
    """Runs the backbone whenever it is asked."""

    is_stored: Final = False

    def __init__(self, backbone: TorchBackbone, calls: Sequence[TargetCall]) -> None:
        self._backbone = backbone
        self._calls = calls

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._calls)

    def pairs(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Compute and return hidden states and token ids."""
        calls = [self._calls[place] for place in places]
        hidden = torch.cat(list(_hidden_states(self._backbone, calls)))
        return hidden, _next_ids(calls, hidden.device)


class StoredThoughts:
    """Reads a file that `thoughts_of` wrote."""

    is_stored: Final = True

    def __init__(
        self, path: Path, calls: Sequence[TargetCall], *, dtype: str, device: torch.device
    ) -> None:
        self._calls = calls
        self._ends = list(accumulate(call.num_target_tokens for call in calls))
        self._hidden: np.ndarray[Any, Any] = np.memmap(path, dtype=dtype, mode="r").reshape(
            self._ends[-1], -1
        )
        self._device = device

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._calls)

    def pairs(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return hidden states and token ids."""
        calls = [self._calls[place] for place in places]
        rows = [
            self._hidden[self._ends[place] - call.num_target_tokens : self._ends[place]]
            for place, call in zip(places, calls, strict=True)
        ]
        hidden = torch.from_numpy(np.concatenate(rows).astype(np.float32))
        return hidden.to(self._device), _next_ids(calls, self._device)


class ThoughtsPart:
    """Some neighbouring calls of others, counted from 0.

    Args:
        whole: All of them.
        first: The first of this part.
        count: How many.
    """

    def __init__(self, whole: Thoughts, *, first: int, count: int) -> None:
        self.is_stored = whole.is_stored
        self._whole = whole
        self._first = first
        self._count = count

    def __len__(self) -> int:
        """Return the number of calls."""
        return self._count

    def pairs(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return hidden states and token ids."""
        return self._whole.pairs([self._first + place for place in places])


def thoughts_of(
    backbone: TorchBackbone,
    calls: Sequence[TargetCall],
    *,
    folder: Path,
    max_bytes: int,
    world: World,
    progress: Progress,
) -> Thoughts:
    """Return the thoughts of calls, from disk if they fit.

    They are kept as float32, as float16 if only that fits, and else not at all. A file of equal
    calls and backbone is used again.

    Args:
        backbone: On its device.
        calls: At least one, none without target tokens.
        folder: Where files are kept.
        max_bytes: The largest file.
        world: Only the main process writes.
        progress: Sees the computation.

    Raises:
        RecmasError: RM303 if the disk is full or not writable.
    """
    num_values = sum(call.num_target_tokens for call in calls) * backbone.facts.width
    dtypes = [
        name for name, size in (("float32", 4), ("float16", 2)) if num_values * size <= max_bytes
    ]
    if not dtypes:
        return ComputedThoughts(backbone, calls)
    dtype = dtypes[0]
    path = folder / f"{_digest(backbone, calls)}.{dtype}"
    num_bytes = num_values * np.dtype(dtype).itemsize
    if world.is_main and not (path.is_file() and path.stat().st_size == num_bytes):
        _store(backbone, calls, path, dtype=dtype, num_bytes=num_bytes, progress=progress)
    world.wait()
    if not path.is_file():  # another machine, without the main process's disk
        return ComputedThoughts(backbone, calls)
    return StoredThoughts(path, calls, dtype=dtype, device=world.device)


def _store(
    backbone: TorchBackbone,
    calls: Sequence[TargetCall],
    path: Path,
    *,
    dtype: str,
    num_bytes: int,
    progress: Progress,
) -> None:
    """Write a file beside its place and rename it; plain writes, so that a full disk is an error.

    (A full disk under a memory map would kill the process instead.)
    """
    staged = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes:
            raise fail(
                "RM303",
                f"hidden states take {num_bytes / 2**20:.0f} MiB, but {path.parent} has "
                f"{free / 2**20:.0f} MiB free",
                hint="Make room, or lower `train.cache_mb` to compute them in every step.",
            )
        with (
            progress.stage(f"Computing thoughts of {backbone.facts.source}", len(calls)) as advance,
            staged.open("wb") as file,
        ):
            for hidden_ND in _hidden_states(backbone, calls):
                file.write(hidden_ND.cpu().numpy().astype(dtype).tobytes())
                advance()
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        staged.unlink(missing_ok=True)


@torch.no_grad()
def _hidden_states(backbone: TorchBackbone, calls: Sequence[TargetCall]) -> Iterator[Tensor]:
    """Yield for every call, in order, the states [N, D] from which its target is predicted."""
    for first in range(0, len(calls), _WINDOW):
        window = calls[first : first + _WINDOW]
        found: dict[int, Tensor] = {}
        for batch in _batches([len(call.ids) for call in window]):
            width = max(len(window[i].ids) for i in batch)
            # Padding at the end: causal attention never looks there, so it needs no mask.
            ids_BS = torch.tensor(
                [[*window[i].ids, *[0] * (width - len(window[i].ids))] for i in batch],
                device=backbone.model.device,
            )
            hidden_BSD = backbone.body(
                inputs_embeds=backbone.embed(ids_BS), use_cache=False
            ).last_hidden_state
            for row, i in enumerate(batch):
                last = len(window[i].ids) - 1  # nothing follows the last token
                start = last - window[i].num_target_tokens
                found[i] = hidden_BSD[row, start:last].float()
        for i in range(len(window)):
            yield found[i]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group places so that calls of like lengths run together."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[place] > _POSITIONS_AT_ONCE:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _next_ids(calls: Sequence[TargetCall], device: torch.device) -> Tensor:
    return torch.tensor([i for call in calls for i in call.target_ids], device=device)


def _digest(backbone: TorchBackbone, calls: Sequence[TargetCall]) -> str:
    digest = hashlib.sha256(f"{backbone.facts.identity} {backbone.model.dtype}".encode())
    for call in calls:
        digest.update(f"{call.num_target_tokens} {call.ids}\n".encode())
    return digest.hexdigest()[:32]
