"""What an evaluation is of: so that a resumed one is the same one, and a report says it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import fail
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.plan import Plan

NAME: Final = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that must be equal for answers to belong together.

    Attributes:
        protocol: sha256 of the protocol, overrides included.
        data: sha256 of the data file.
        bundle: The bundle's fingerprint.
        prompts: sha256 of the prompts.
        untrained_bundle: The fingerprint of the bundle with untrained links; None without one.
        batch_size: Most records per batch.
    """

    protocol: str
    data: str
    bundle: str
    prompts: str
    untrained_bundle: str | None
    batch_size: int


_WORDS: Final = {
    "protocol": "the protocol",
    "data": "the data",
    "bundle": "the bundle",
    "prompts": "the bundle's prompts",
    "untrained_bundle": "the bundle with untrained links",
    "batch_size": "the batch size",
}


def prompt_digest(plan: Plan) -> str:
    """Return the sha256 of every prompt and system text of a plan, by agent."""
    prompts = {
        name: {
            "system": to_json(agent.system),
            "first": to_json(agent.first),
            "then": to_json(agent.then),
            "chat_template": to_json(agent.chat_template),
        }
        for name, agent in plan.agents.items()
    }
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()


def claim_folder(folder: Path, identity: Identity, *, resume: bool) -> bool:
    """Make sure that the answers in a folder belong to this evaluation, and say so in it.

    Returns:
        Whether there are answers to go on from.

    Raises:
        RecmasError: RM302 if there are answers and they are not to be resumed, RM603 if they are of
            another evaluation, RM503 if the folder cannot be written.
    """
    path = folder / NAME
    if path.exists():
        if not resume:
            raise fail(
                "RM302",
                f"{folder} holds an evaluation already",
                hint="Pass --resume to go on with it, or choose another --out.",
            )
        _compare(path, identity)
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(identity), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise fail(
            "RM503",
            f"cannot write to {folder}: {error.strerror}",
            hint="Choose another --out.",
        ) from error
    return False


def _compare(path: Path, identity: Identity) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
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
    return value[:12] if isinstance(value, str) else str(value)
