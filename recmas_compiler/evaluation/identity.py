"""What an evaluation is of, in a file beside its answers, so that others are not mixed in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import write_whole
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.plan import Plan

NAME: Final = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that must be equal for answers to belong together: digests and fingerprints.

    Attributes:
        sampling: The settings of every answer but for its seed.
        date: The day that chat templates write; None where none writes it.
        judge: The packages that decide what is right, with their versions.
        left_out: Ids of records that are not asked; None for none.
        others: Systems that are made for this evaluation, with their digests; None for none.
    """

    protocol: str
    data: str
    bundle: str
    prompts: str
    untrained_bundle: str | None
    batch_size: int
    sampling: str
    date: str | None
    judge: str
    left_out: str | None
    others: str | None = None


_WORDS: Final = {
    "protocol": "the protocol",
    "data": "the data",
    "bundle": "the bundle",
    "prompts": "the bundle's prompts",
    "untrained_bundle": "the bundle with untrained links",
    "batch_size": "the batch size",
    "sampling": "the sampling",
    "date": "the date in the prompts",
    "judge": "the judge",
    "left_out": "what is left out",
    "others": "what was made for it",
}


def prompt_digest(plan: Plan) -> str:
    """Return the sha256 of every prompt and system text of a plan, by agent."""
    parts = ("system", "first", "then", "chat_template")
    prompts = {
        name: {part: to_json(getattr(agent, part)) for part in parts}
        for name, agent in plan.agents.items()
    }
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()


def made_folder(folder: Path) -> None:
    """Make the folder of an evaluation if it is not there.

    Raises:
        RecmasError: RM503 if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> RecmasError:
    return fail(
        "RM503",
        f"cannot write to {folder}: {error.strerror}",
        hint="Choose another --out.",
    )


def claim_folder(folder: Path, identity: Identity, *, resume: bool) -> bool:
    """Make sure that the answers in a folder belong to this evaluation, and say so in it.

    Returns:
        Whether there are answers to go on from.

    Raises:
        RecmasError: RM302 if there are answers and they are not to be resumed, RM603 if they are of
            another evaluation, RM503 if the folder cannot be written.
    """
    path = folder / NAME
    if refuse_taken(folder, resume=resume):
        _compare(path, identity)
        return True
    try:
        write_whole(path, json.dumps(asdict(identity), indent=2) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return False


def refuse_taken(folder: Path, *, resume: bool) -> bool:
    """Return whether a folder has answers of an evaluation to go on from.

    Raises:
        RecmasError: RM302 if it has and they are not to be resumed.
    """
    path = folder / NAME
    taken = path.exists() and not _is_empty_start(path)
    if taken and not resume:
        raise fail(
            "RM302",
            f"{folder} holds an evaluation already",
            hint="Pass --resume to go on with it, or choose another --out.",
        )
    return taken


def _is_empty_start(path: Path) -> bool:
    """Tell whether an evaluation was cut off before it said what it is and answered anything."""
    answers = path.parent.glob("answers-*.jsonl")
    return path.stat().st_size == 0 and not any(answer.stat().st_size for answer in answers)


def _compare(path: Path, identity: Identity) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        # What was written before there were others says nothing of them.
        found.setdefault("others", None)
        before = Identity(**{field.name: found[field.name] for field in fields(Identity)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise fail(
            "RM603",
            f"{path} does not say which evaluation this is",
            hint="Choose another --out to start afresh.",
        ) from error
    then, now = asdict(before), asdict(identity)
    changed = [name for name in then if then[name] != now[name]]
    if changed:
        differences = "; ".join(
            f"{_WORDS[name]} was {_short(then[name])} and is {_short(now[name])}"
            for name in changed
        )
        raise fail(
            "RM603",
            f"the answers in {path.parent} are of another evaluation: {differences}",
            hint="Resume with what it began with, or choose another --out.",
        )


def _short(value: object) -> str:
    is_digest = isinstance(value, str) and len(value) == 64
    return str(value)[:12] if is_digest else str(value)
