"""Plain values to the typed document, going on after errors that nothing else depends on."""

from __future__ import annotations

from copy import deepcopy
from typing import Final

from pydantic import ValidationError

from recmas_compiler.spec.document.places import Loc, Places
from recmas_compiler.spec.document.yaml_source import Value
from recmas_compiler.spec.schema.schema_errors import schema_problems
from recmas_compiler.spec.schema.sections import SpecDocument, matches
from recmas_runtime.core.errors import Problem

# Settings that have a default and that no check between sections looks at: with a wrong one put
# aside, the other findings are still true. Never so: names, prompts and links.
_INDEPENDENT: Final[tuple[tuple[str, ...], ...]] = (
    ("rounds",),
    ("latent_steps",),
    ("train",),
    ("build",),
    ("build", "*"),
    ("backbones", "*", "dtype"),
    ("backbones", "*", "precision"),
    ("agents", "*", "system"),
    ("agents", "*", "latent_steps"),
    ("agents", "*", "chat_template"),
    ("agents", "*", "inner"),
    ("agents", "*", "inner", "*"),
    ("answer", "*"),
)


def validate(root: dict[str, Value], places: Places) -> tuple[SpecDocument | None, list[Problem]]:
    """Check the values against the schema.

    Returns:
        The document, or None where the errors go too deep for any further check, and the findings.
        A document that comes with errors lacks the settings that they are about.
    """
    try:
        return SpecDocument.model_validate(root), []
    except ValidationError as error:
        problems, locs = schema_problems(error, places)
    unknown_version = [p for p in problems if p.code == "RM106"]
    if unknown_version:
        return None, unknown_version  # of a language we do not know nothing else can be said
    prunable = [_prunable(loc) for loc in locs]
    sound = deepcopy(root)
    for loc in prunable:
        if loc is None or not _remove(sound, loc):
            return None, problems
    try:
        return SpecDocument.model_validate(sound), problems
    except ValidationError:
        return None, problems


def _prunable(loc: Loc) -> Loc | None:
    """Return the setting that an error belongs to, if it can be put aside."""
    for length in range(len(loc), 0, -1):
        setting = loc[:length]
        if setting != ("answer", "agent") and any(matches(setting, p) for p in _INDEPENDENT):
            return setting
    return None


def _remove(root: dict[str, Value], loc: Loc) -> bool:
    """Remove a setting, if it is there or has just been removed; not so for one that is missing."""
    section: Value = root
    for key in loc[:-1]:
        if not isinstance(section, dict) or key not in section:
            return True
        section = section[str(key)]
    if not isinstance(section, dict):
        return False
    section.pop(str(loc[-1]), None)
    return True
