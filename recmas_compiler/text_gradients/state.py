"""The state of a run on disk, so that one that was interrupted goes on: JSON, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from recmas_compiler.text_gradients.result import Proposal, Spent, StepReport
from recmas_runtime.core.errors import fail
from recmas_runtime.core.files import write_whole

NAME: Final = "state.json"
_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known after a whole step.

    Attributes:
        texts: The best so far, by parameter.
        start_validation: Share of validation records right before the first step.
        validation: With `texts`.
        other_spent: What measuring before the first step took.
    """

    texts: Mapping[str, str]
    steps: tuple[StepReport, ...] = ()
    start_validation: float | None = None
    validation: float | None = None
    other_spent: Spent = field(default_factory=Spent)

    @property
    def spent(self) -> Spent:
        """All that the run took so far."""
        return sum((step.spent for step in self.steps), start=self.other_spent)


def save_state(folder: Path, state: State, identity: Mapping[str, Any]) -> None:
    """Write a state.

    Raises:
        RecmasError: RM503 if it cannot be written; what was there stays.
    """
    content = {"version": _VERSION, "identity": identity, **asdict(state)}
    try:
        write_whole(folder / NAME, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise fail(
            "RM503",
            f"the state cannot be written: {error.strerror}",
            file=str(folder / NAME),
            hint="Make room or choose another --out; --resume goes on from the last whole step.",
        ) from error


def load_state(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> State | None:
    """Return the state in a folder; None if there is none.

    Raises:
        RecmasError: RM302 if there is one and it is not to be resumed, RM603 if it is of another
            run or cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        return None
    if not resume:
        raise fail(
            "RM302",
            f"{folder} holds a run of textgrad already",
            hint="Pass --resume to go on with it, or choose another --out.",
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("version") != _VERSION:
            raise ValueError
        before = found.pop("identity")
        state = State(
            texts=found["texts"],
            steps=tuple(_step(one) for one in found["steps"]),
            start_validation=found["start_validation"],
            validation=found["validation"],
            other_spent=Spent(**found["other_spent"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise fail(
            "RM603",
            f"{path} is no state of textgrad that this version reads",
            hint="Choose another --out to start afresh.",
        ) from error
    changed = sorted(
        name for name in {*before, *identity} if before.get(name) != identity.get(name)
    )
    if changed:
        shown = "; ".join(
            f"{name} was {before.get(name)!r} and is {identity.get(name)!r}" for name in changed
        )
        raise fail(
            "RM603",
            f"the run in {folder} is another one: {shown}",
            hint="Resume with what it began with, or choose another --out.",
        )
    return state


def _step(found: Mapping[str, Any]) -> StepReport:
    return StepReport(
        **{
            **found,
            "records": tuple(found["records"]),
            "proposals": tuple(Proposal(**one) for one in found["proposals"]),
            "spent": Spent(**found["spent"]),
        }
    )
