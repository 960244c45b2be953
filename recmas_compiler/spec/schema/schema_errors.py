"""What pydantic finds, in plain language: the offending value, what it should be, where."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from recmas_compiler.spec.document.places import Loc, Places
from recmas_compiler.spec.document.position import SourcePosition
from recmas_compiler.spec.document.problems import SET_PREFIX, did_you_mean, problem_at, show
from recmas_compiler.spec.schema.pattern import PATTERN_NAMES
from recmas_compiler.spec.schema.sections import (
    LANGUAGE_VERSION,
    NAMED,
    SECTIONS,
    matches,
    section_at,
)
from recmas_runtime.core.errors import Problem

# pydantic's error type -> what the value should be. `{...}` is filled from the error's context.
_WANTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "held_out": "a fraction from 0 to 0.5, or a file",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "model_type": "a mapping",
    "pair": "a list of two numbers",
    "string_too_long": "text of at most {max_length} characters",
    "string_type": "text",
    "template_value": "true, false, a number or text",
    "tuple_type": "a list",
}
_SLUG_RULE = "lower-case letters, digits, `-` and `_`, beginning with a letter or digit"
_KEY = "[key]"
_YAML_1_1_BOOLS = ("yes", "Yes", "no", "No", "on", "On", "off", "Off")


def schema_problems(error: ValidationError, places: Places) -> tuple[list[Problem], list[Loc]]:
    """Fold a pydantic error.

    Returns:
        The findings, and the path of each in the document.
    """
    details = error.errors(include_url=False)
    locs = [tuple(detail["loc"]) for detail in details]
    problems: list[Problem] = []
    kept: list[Loc] = []
    is_pattern_malformed = any(loc[:1] == ("pattern",) for loc in locs)
    for detail, loc in zip(details, locs, strict=True):
        # a list or mapping with nothing but wrong items counts as empty
        if detail["type"] == "too_short" and any(_is_below(other, loc) for other in locs):
            continue
        # what a pattern would have filled in is missing when the pattern is malformed
        if is_pattern_malformed and detail["type"] == "missing" and loc[0] in ("agents", "answer"):
            continue
        problems.append(_problem(detail, loc, places))
        kept.append(loc)
    return problems, kept


def _is_below(loc: Loc, parent: Loc) -> bool:
    return len(loc) > len(parent) and loc[: len(parent)] == parent


def _problem(detail: ErrorDetails, loc: Loc, places: Places) -> Problem:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(loc, places)
    if kind == "missing":
        return _missing_key(loc, places)
    if kind == "one_pattern":
        return _not_one_pattern(_context(detail)["given"], places)
    if loc[-1] == _KEY:
        return _bad_name(loc[:-1], places)
    place = places.value(loc)
    if loc == ("recmas",):
        message = f"language version {show(detail['input'])} is not known to this recmas."
        hint = f"Write `recmas: {LANGUAGE_VERSION}`, or install the recmas the spec was made for."
        return _at(place, "RM106", message, hint)
    return _at(place, "RM105", _message(detail, loc), _hint(detail, loc))


def _message(detail: ErrorDetails, loc: Loc) -> str:
    kind, value = detail["type"], detail["input"]
    name = _path(loc)
    if value is None or kind == "blank":
        return f"{name} is empty."
    if kind in {"too_short", "string_too_short"}:
        return f"{name} must not be empty."
    if kind == "too_long":
        return f"{name} has {len(value)} entries, more than {_context(detail)['max_length']}."
    if kind == "string_pattern_mismatch":
        return f"{name} is {show(value)}, which is not {_text_rule(loc)}."
    wanted = _WANTED.get(kind, detail["msg"].lower()).format_map(_context(detail))
    if matches(loc, ("agents", "*", "prompt")):
        wanted = "text, or a mapping of `first` and `then`"
    return f"{name} should be {wanted}, is {show(value)}."


def _hint(detail: ErrorDetails, loc: Loc) -> str:
    kind, value = detail["type"], detail["input"]
    if value is None:
        return "Give it a value, or leave it out."
    if kind == "literal_error" and isinstance(value, str):
        suggestion = did_you_mean(value, re.findall(r"'([^']*)'", _context(detail)["expected"]))
        return suggestion if suggestion.startswith("Did") else ""
    if (
        kind == "bool_type"
        and isinstance(value, str)
        and value.lower() in {"yes", "on", "no", "off"}
    ):
        return f"In YAML 1.2 {show(value)} is text: write `true` or `false`."
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f'Put it into quotes: "{show(value)}".'
    if kind in {"int_type", "float_type"} and isinstance(value, str):
        return "Write a number, without quotes."
    return ""


def _unknown_key(loc: Loc, places: Places) -> Problem:
    place = places.key(loc)
    parent, key = loc[:-1], str(loc[-1])
    section = section_at(parent)
    known = section.model_fields if section is not None else {}
    hint = did_you_mean(key, known)
    homes = [_path(path) for path, other in SECTIONS.items() if key in other.model_fields]
    if homes and not hint.startswith("Did"):
        hint = f"It belongs to {' or '.join(homes)}."
    return _at(place, "RM103", f"unknown key `{key}` in {_path(parent)}.", hint)


def _missing_key(loc: Loc, places: Places) -> Problem:
    parent, key = loc[:-1], str(loc[-1])
    hints: dict[Loc, str] = {
        ("recmas",): f"Begin the file with `recmas: {LANGUAGE_VERSION}`.",
        ("agents",): "Write the agents out, or use `pattern`.",
        ("answer",): "Add `answer: {agent: NAME}`.",
        ("train", "data"): "Add `data: FILE.jsonl`, relative to the spec.",
        ("train", "targets"): "Add `targets: {AGENT: FIELD}` with the texts to learn.",
    }
    hint = hints.get(loc, f"Add `{key}: ...` there.")
    return _at(places.key(parent), "RM104", f"{_path(parent)} has no `{key}`.", hint)


def _not_one_pattern(given: Sequence[str], places: Places) -> Problem:
    if not given:
        hint = f"Name one: {', '.join(f'`{name}`' for name in PATTERN_NAMES)}."
        return _at(places.key(("pattern",)), "RM118", "`pattern` names no pattern.", hint)
    named = " and ".join(f"`{name}`" for name in given)
    place = places.key(("pattern", given[1]))
    return _at(place, "RM118", f"`pattern` names {named}.", "Keep one of them.")


def _bad_name(loc: Loc, places: Places) -> Problem:
    parent, name = loc[:-1], str(loc[-1])
    kind = next(kind for pattern, kind in NAMED.items() if matches(parent, pattern))
    rule = "an identifier" if kind == "template variable" else _SLUG_RULE
    return _at(
        places.key(loc), "RM105", f"{show(name)} is not a name for a {kind}.", f"Use {rule}."
    )


_PATHS: Final = frozenset(
    {"source", "weights", "corpus", "data", "held_out", "links_dir", "loss_text"}
)


def _text_rule(loc: Loc) -> str:
    return "a path" if loc[-1] in _PATHS else f"a name ({_SLUG_RULE})"


def _path(loc: Iterable[str | int]) -> str:
    parts = [str(part) for part in loc]
    return f"`{'.'.join(parts)}`" if parts else "the spec"


def _context(detail: ErrorDetails) -> dict[str, Any]:
    """Return pydantic's context, whole numbers without decimals."""
    context = detail.get("ctx", {})
    return {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}


def _at(place: SourcePosition, code: str, message: str, hint: str) -> Problem:
    from_command_line = place.file.startswith(SET_PREFIX)
    return problem_at(place, "RM122" if from_command_line else code, message, hint=hint)
