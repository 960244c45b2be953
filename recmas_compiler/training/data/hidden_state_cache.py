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
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.training.loop.checkpoint import writing
from recmas_compiler.training.loop.distributed import World
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import open_regular, sync_folder
from recmas_runtime.core.progress import Progress

# Positions that run at once, padding included.
_POSITIONS_AT_ONCE: Final = 8192
_PIECE_BYTES: Final = 2**20
# Calls among which equal lengths are looked for.
_WINDOW: Final = 256


@dataclass(frozen=True, kw_only=True)
class TargetCall:
    """An agent's prompt as tokens alone, and behind it its target: what it should think or say."""

    ids: tuple[int, ...]
    num_target_tokens: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The tokens of the target."""
        return self.ids[len(self.ids) - self.num_target_tokens :]


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenStates:
    """Pairs of a hidden state and the token that follows it in a target, call by call.

    Attributes:
        stored_ND: The states of all calls in a row, on disk; None to run the backbone whenever
            they are asked for.
    """

    backbone: TorchBackbone
    calls: Sequence[TargetCall]
    stored_ND: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self.calls)

    @property
    def is_stored(self) -> bool:
        """Whether pairs are read from disk, and cost nothing to have again."""
        return self.stored_ND is not None

    def pairs(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return hidden states [N, D] in float32 and token ids [N] of the calls at these places."""
        calls = [self.calls[place] for place in places]
        device = self.backbone.model.device
        if self.stored_ND is None:
            hidden_ND = torch.cat(list(_hidden_states(self.backbone, calls)))
        else:
            rows = [self.stored_ND[self._ends[i] : self._ends[i + 1]] for i in places]
            hidden_ND = torch.from_numpy(np.concatenate(rows).astype(np.float32)).to(device)
        return hidden_ND, torch.tensor([i for c in calls for i in c.target_ids], device=device)

    def part(self, first: int, count: int) -> HiddenStates:
        """Return those of `count` neighbouring calls."""
        calls = self.calls[first : first + count]
        if self.stored_ND is None:
            return replace(self, calls=calls)
        rows = self.stored_ND[self._ends[first] : self._ends[first + count]]
        return replace(self, calls=calls, stored_ND=rows)

    @cached_property
    def _ends(self) -> list[int]:
        """How many rows lie before each call, and at the end all of them."""
        return list(accumulate((call.num_target_tokens for call in self.calls), initial=0))


def cached_hidden_states(
    backbone: TorchBackbone,
    calls: Sequence[TargetCall],
    *,
    folder: Path,
    max_bytes: int,
    world: World,
    progress: Progress,
) -> HiddenStates:
    """Return the hidden states of calls, from disk if they fit.

    They are kept as float32, as float16 if only that fits, and else not at all. A file of equal
    calls and backbone is used again if it is what was written.

    Args:
        calls: At least one, none without target tokens.

    Raises:
        RecmasError: RM303 if the disk is full or not writable.
    """
    computed = HiddenStates(backbone=backbone, calls=calls)
    num_rows, width = sum(call.num_target_tokens for call in calls), backbone.facts.width
    fitting = [
        np.dtype(name)
        for name in ("float32", "float16")
        if num_rows * width * np.dtype(name).itemsize <= max_bytes
    ]
    if not fitting:
        return computed
    dtype = fitting[0]
    path = folder / f"{_digest(backbone, calls)}.{dtype}"
    num_bytes = num_rows * width * dtype.itemsize
    if world.is_main and not _is_whole(path, num_bytes):
        _store(computed, path, dtype=dtype, num_bytes=num_bytes, progress=progress)
    world.wait()
    if not path.is_file():  # another machine, without the main process's disk
        return computed
    return replace(computed, stored_ND=np.memmap(path, dtype, "r", shape=(num_rows, width)))


def _is_whole(path: Path, num_bytes: int) -> bool:
    """Tell whether a file of hidden states is there as it was written, its digest at its end."""
    digest, left = hashlib.sha256(), num_bytes
    try:
        with open_regular(path, file=path.name) as stream:
            while left and (piece := stream.read(min(left, _PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
            return not left and stream.read() == digest.digest()
    except (RecmasError, OSError):
        return False


def _store(
    states: HiddenStates,
    path: Path,
    *,
    dtype: np.dtype[Any],
    num_bytes: int,
    progress: Progress,
) -> None:
    """Write a file beside its place and rename it.

    Plain writes: a full disk under a memory map would kill the process instead of being an error.
    """
    staged = path.with_name(f".{path.name}.writing")
    digest = hashlib.sha256()
    title = f"Computing hidden states of {states.backbone.facts.source}"
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if free < num_bytes:
                raise fail(
                    "RM303",
                    f"hidden states take {num_bytes / 2**20:.0f} MiB, but {path.parent} has "
                    f"{free / 2**20:.0f} MiB free",
                    hint="Make room, or lower `train.cache_mb` to compute them in every step.",
                )
            with progress.stage(title, len(states)) as advance, staged.open("wb") as file:
                for hidden_ND in _hidden_states(states.backbone, states.calls):
                    content = hidden_ND.cpu().numpy().astype(dtype).tobytes()
                    digest.update(content)
                    file.write(content)
                    advance()
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            if path.is_dir() and not path.is_symlink():  # whatever a damaged disk left there
                shutil.rmtree(path)
            staged.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # it would hide what went wrong above
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


def _digest(backbone: TorchBackbone, calls: Sequence[TargetCall]) -> str:
    digest = hashlib.sha256(f"{backbone.facts.identity} {backbone.model.dtype}".encode())
    for call in calls:
        digest.update(f"{call.num_target_tokens} {call.ids}\n".encode())
    return digest.hexdigest()[:32]
