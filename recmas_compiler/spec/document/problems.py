"""Findings about a YAML file: built at a position, with close names suggested, in reading order.

What pydantic finds becomes plain language here: the offending value, what it should be, where.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recmas_compiler.spec.document.places import UNKNOWN, Loc, Places, SourcePosition
from recmas_runtime.core.errors import Problem

# Values given on the command line have no line; their "file" is the argument itself.
SET_PREFIX = "--set "
# No key of a file begins so.
_FORM: Final = "\0"
_SHOWN_CHARACTERS = 40
_SHOWN_NAMES = 8

# pydantic's error type -> what the value should be. `{...}` is filled from the error's context.
# Errors of our own say it themselves, as "should be ...".
_WANTED: Final[Mapping[str, str]] = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "string_too_long": "text of at most {max_length} characters",
    "string_type": "text",
    "tuple_type": "a list",
}


# What other programs call element types and precisions.
SYNONYMS: Final[Mapping[str, str]] = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "q8": "int8",
    "8bit": "int8",
    "i4": "int4",
    "q4": "int4",
    "4bit": "int4",
}


@dataclass(frozen=True, kw_only=True)
class Language:
    """What messages say about one kind of YAML file, such as specs.

    Attributes:
        file_hint: What to give where a file cannot be read.
        code: The one code of its findings; None where every kind of finding has its own.
        sections: The mappings with fixed keys, by path; see `sections_of`.
        missing_hints: What to do about a missing key, by its path.
        text_rules: What text is that matches a pattern, by the pattern.
    """

    noun: str
    start_hint: str = ""
    file_hint: str = ""
    code: str | None = None
    sections: Mapping[tuple[str, ...], type[BaseModel]] = field(default_factory=dict)
    missing_hints: Mapping[Loc, str] = field(default_factory=dict)
    text_rules: Mapping[str, str] = field(default_factory=dict)

    def problem(self, place: SourcePosition, code: str, message: str, hint: str) -> Problem:
        """Return a finding of this language; on the command line, it is the setting's."""
        own = "RM122" if place.file.startswith(SET_PREFIX) else self.code or code
        return problem_at(place, own, message, hint=hint)


def problem_at(
    position: SourcePosition,
    code: str,
    message: str,
    *,
    hint: str = "",
    severity: Literal["error", "warning"] = "error",
) -> Problem:
    """Return a finding at `position`; without a place if that is `UNKNOWN`."""
    has_line = position != UNKNOWN and not position.file.startswith(SET_PREFIX)
    return Problem(
        code=code,
        message=message,
        hint=hint,
        severity=severity,
        file=None if position == UNKNOWN else position.file,
        line=position.line if has_line else None,
        column=position.column if has_line else None,
    )


def in_reading_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Sort by place in the file, `--set` arguments last as given; equal findings appear once."""

    def key(problem: Problem) -> tuple[bool, int, int, str]:
        if problem.line is None or problem.column is None:
            return (True, 0, 0, "")
        return (False, problem.line, problem.column, problem.code)

    return tuple(sorted(dict.fromkeys(problems), key=key))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the closest known name, or lists what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{close[0]}`?"
    if not names:
        return ""
    listed = ", ".join(f"`{n}`" for n in names[:_SHOWN_NAMES])
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"Known here: {listed}{more}."


def show(value: object) -> str:
    """Return a short form of an offending value for a message."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= _SHOWN_CHARACTERS else value[: _SHOWN_CHARACTERS - 3] + "..."
        return '"' + text.replace("\n", "\\n") + '"'
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence):
        return "a list"
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def sections_of(model: type[BaseModel]) -> dict[tuple[str, ...], type[BaseModel]]:
    """Return every mapping with fixed keys, by its path; `*` stands for any name."""
    sections: dict[tuple[str, ...], type[BaseModel]] = {(): model}
    for key, item in model.model_fields.items():
        for path, section in _models_in(item.annotation):
            below = sections_of(section).items()
            sections |= {(key, *path, *rest): other for rest, other in below}
    return sections


def _models_in(annotation: object) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    name = ("*",) if get_origin(annotation) is dict else ()
    for argument in get_args(annotation):
        for path, model in _models_in(argument):
            yield (*name, *path), model


def matches(loc: Loc, pattern: tuple[str, ...]) -> bool:
    """Tell whether a path is one of those that `pattern` stands for."""
    return len(loc) == len(pattern) and all(
        wanted in ("*", part) for part, wanted in zip(loc, pattern, strict=True)
    )


def schema_errors(error: ValidationError) -> list[ErrorDetails]:
    """Return what pydantic found; a list or mapping with nothing but wrong items is not empty."""
    details = error.errors(include_url=False)
    for detail in details:
        detail["loc"] = tuple(part for part in detail["loc"] if not _is_form(part))
    around = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    return [d for d in details if d["type"] != "too_short" or d["loc"] not in around]


def form_tag(name: str) -> str:
    """Return pydantic's tag of one form of a value that has several; no key of a file is so."""
    return f"{_FORM}{name}"


def _is_form(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith(_FORM)


def schema_problem(detail: ErrorDetails, places: Places, language: Language) -> Problem:
    """Return the finding for an error of pydantic's."""
    loc = detail["loc"]
    parent, key = loc[:-1], loc[-1] if loc else ""
    if detail["type"] == "extra_forbidden":
        hint = _known_keys(parent, str(key), language)
        message = f"unknown key `{key}` in {_path(parent, language)}."
        return language.problem(places.key(loc), "RM103", message, hint)
    if detail["type"] == "missing":
        hint = language.missing_hints.get(loc, f"Add `{key}: ...` there.")
        message = f"{_path(parent, language)} has no `{key}`."
        return language.problem(places.key(parent), "RM104", message, hint)
    return language.problem(places.value(loc), "RM105", _message(detail, language), _hint(detail))


def _known_keys(parent: Loc, key: str, language: Language) -> str:
    sections = language.sections
    known = [s.model_fields for pattern, s in sections.items() if matches(parent, pattern)]
    hint = did_you_mean(key, known[0] if known else ())
    homes = [_path(path, language) for path, s in sections.items() if key in s.model_fields]
    if homes and not hint.startswith("Did"):
        return f"It belongs to {' or '.join(homes)}."
    return hint


def _message(detail: ErrorDetails, language: Language) -> str:
    kind, value = detail["type"], detail["input"]
    context = {
        key: f"{bound:g}" if isinstance(bound, float) else bound
        for key, bound in detail.get("ctx", {}).items()
    }
    name = _path(detail["loc"], language)
    if value is None or kind == "blank":
        return f"{name} is empty."
    if kind == "string_too_short" or (kind == "too_short" and not value):
        return f"{name} must not be empty."
    if kind == "too_short":
        return f"{name} has {len(value)} entries, fewer than {context['min_length']}."
    if kind == "too_long":
        return f"{name} has {len(value)} entries, more than {context['max_length']}."
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        rule = language.text_rules.get(pattern, f"text of the form {pattern}")
        return f"{name} is {show(value)}, which is not {rule}."
    if kind in _WANTED:
        wanted = _WANTED[kind].format_map(context)
    else:
        wanted = detail["msg"].lower().removeprefix("input ").removeprefix("should be ")
    return f"{name} should be {wanted}, is {show(value)}."


def _hint(detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    if value is None:
        return "Give it a value, or leave it out."
    if kind == "literal_error" and isinstance(value, str):
        known = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        if SYNONYMS.get(value.lower()) in known:
            return f"Did you mean `{SYNONYMS[value.lower()]}`?"
        suggestion = did_you_mean(value, known)
        return suggestion if suggestion.startswith("Did") else ""
    if kind == "bool_type" and str(value).lower() in {"yes", "on", "no", "off"}:
        return f"In YAML 1.2 {show(value)} is text: write `true` or `false`."
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f'Put it into quotes: "{show(value)}".'
    if kind in {"int_type", "float_type"} and isinstance(value, str):
        return "Write a number, without quotes."
    return ""


def _path(loc: Loc, language: Language) -> str:
    return f"`{'.'.join(map(str, loc))}`" if loc else f"the {language.noun}"
