"""What a checkpoint says of itself: its form, its digests, which run it is of. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import open_regular
from recmas_runtime.core.text import first_line

CHECKPOINTS: Final = "checkpoints"
CHECKPOINT_VERSION: Final = 2
STATE: Final = "state.json"
PREFIX: Final = "step-"

# The mean over about the last twenty steps is what is judged: single batches differ.
_KEPT: Final = 0.95
# A loss this many times its best mean, and more by this much, does not come back.
_FACTOR: Final = 3.0
_MARGIN: Final = 1.0

# Larger than any state: a few figures, and a digest by name.
_MAX_STATE_BYTES: Final = 2**24
_ANEW: Final = "Train anew into another --out, or delete this folder."

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Health(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class LoopState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What changes from step to step besides tensors.

    Attributes:
        metrics_bytes: How much of the metrics file belongs to the steps so far.
        first: Held-out figures before the first step.
        last: The newest ones.
    """

    metrics_bytes: Count = 0
    health: Health = Health()
    first: dict[str, float] = {}
    last: dict[str, float] = {}


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `state.json` holds; `sha256` is that of all the rest.

    Attributes:
        identity: What the run is made of, by name: a checkpoint of another one is refused.
        machine: What weights depend on in their last bits, by name: threads, versions.
    """

    sha256: str
    checkpoint: Literal[2]
    step: Count
    identity: dict[str, str]
    machine: dict[str, str]
    state: LoopState
    tensors_sha256: str


def head_text(
    *,
    step: int,
    identity: Mapping[str, str],
    machine: Mapping[str, str],
    state: LoopState,
    tensors_sha256: str,
) -> str:
    """Return what `read_head` reads."""
    values = {
        "checkpoint": CHECKPOINT_VERSION,
        "step": step,
        "identity": dict(identity),
        "machine": dict(machine),
        "state": msgspec.to_builtins(state),
        "tensors_sha256": tensors_sha256,
    }
    return json.dumps({"sha256": _digest(values), **values}, indent=1)


def read_head(path: Path) -> Head:
    """Read what the checkpoint in a folder says of itself, without its tensors.

    Raises:
        RecmasError: RM703 if it is not what was written.
    """
    try:
        with open_regular(path / STATE, file=STATE) as stream:
            raw = stream.read(_MAX_STATE_BYTES + 1)
        if len(raw) > _MAX_STATE_BYTES:
            raise ValueError(f"{STATE} is larger than any state")
        values = json.loads(raw)
        if isinstance(values, dict) and "checkpoint" not in values and "identity" in values:
            raise ValueError("an older recmas wrote it, without digests")
        head = msgspec.convert(values, Head)
        if values.pop("sha256") != _digest(values):
            raise ValueError(f"{STATE} is not what was written")
        if f"{PREFIX}{head.step:08d}" != path.name:
            raise ValueError(f"it is of step {head.step}")
    except RecmasError as error:
        raise damaged_checkpoint(path, error.problems[0].message) from error
    except RecursionError:
        raise damaged_checkpoint(path, f"{STATE} is nested too deeply") from None
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise damaged_checkpoint(path, first_line(error)) from error
    return head


def newest_head(folder: Path) -> tuple[Path, Head] | None:
    """Return the newest checkpoint that says what it is, and what it says; None if none does."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_head(path)
        except RecmasError:
            continue
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a loop's checkpoints, oldest first."""
    try:
        return sorted(folder.glob(f"{PREFIX}*"))
    except OSError:  # it is no folder, or none that can be read
        return []


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the last checkpoint, or None if there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def check_unused(folder: Path, *, resume: bool) -> None:
    """Refuse a loop's folder that holds a run, unless that is to be gone on with.

    Raises:
        RecmasError: RM302.
    """
    latest = latest_checkpoint(folder / CHECKPOINTS)
    if latest is not None and not resume:
        raise fail(
            "RM302",
            f"{folder} holds a run already, up to {latest.name}",
            hint="Go on with --resume, name another --out, or delete the folder.",
        )


def check_same_run(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with a checkpoint of another spec, data, settings or links.

    Raises:
        RecmasError: RM703 naming what is different.
    """
    other = [name for name, value in now.items() if then.get(name) != value]
    if other:
        raise fail(
            "RM703",
            f"the checkpoint {path} is of another run: {' and '.join(other)} differ",
            hint="Set them back, or train anew into another --out.",
        )


def fallen_back(damaged: Sequence[Problem], used: Path) -> tuple[Problem, ...]:
    """Say of checkpoints that could not be used which one is in their place."""
    return tuple(
        Problem(
            code="RM753",
            severity="warning",
            message=f"{problem.message}; the run goes on from {used.name}",
            hint="The steps behind it are done again.",
        )
        for problem in damaged
    )


def damaged_checkpoint(path: Path, why: str) -> RecmasError:
    """Return the error about a checkpoint that cannot be used."""
    return fail("RM703", f"the checkpoint {path} cannot be read: {why}", hint=_ANEW)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
