"""Protocol files: found by name or path, parsed, and refused with the place of every mistake."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from recmas_compiler.evaluation.data.converters import CONVERTERS
from recmas_compiler.evaluation.protocol import (
    ChoiceSection,
    CodeSection,
    DataSection,
    ExactSection,
    F1Section,
    MathSection,
    Protocol,
    Section,
    SelectionSection,
)
from recmas_compiler.spec.document.places import Loc, Places
from recmas_compiler.spec.document.position import SourcePosition
from recmas_compiler.spec.document.problems import (
    SET_PREFIX,
    did_you_mean,
    in_reading_order,
    problem_at,
    show,
)
from recmas_compiler.spec.document.yaml_source import parse_yaml
from recmas_compiler.spec.overrides import apply_overrides
from recmas_runtime.core.errors import Problem, RecmasError, fail

FOLDER: Final = Path(__file__).parent / "protocols"
MAX_BYTES: Final = 1 << 16


def protocol_names() -> tuple[str, ...]:
    """Return the names of the protocols that come with recmas."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_protocol(name: str, *, overrides: Iterable[str] = ()) -> Protocol:
    """Load a protocol by its name or from a file.

    Args:
        name: One of `protocol_names()`, or the path of a `.yaml` file.
        overrides: `KEY.PATH=VALUE`, in order.

    Raises:
        RecmasError: RM600 for a protocol that is not there or malformed, every finding with its
            place; RM122 for an override that it refuses.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in protocol_names():
        path = FOLDER / f"{name}.yaml"
    else:
        hint = did_you_mean(name, protocol_names())
        raise fail("RM600", f"no protocol is called {name!r}", hint=f"{hint} Or give a .yaml file.")
    return parse_protocol(_read(path), file=str(path), overrides=overrides)


def parse_protocol(text: str, *, file: str, overrides: Iterable[str] = ()) -> Protocol:
    """Parse the text of a protocol file.

    Args:
        text: YAML.
        file: How messages name it.
        overrides: `KEY.PATH=VALUE`, in order.

    Raises:
        RecmasError: As `load_protocol`.
    """
    if all(line.strip() == "" or line.lstrip().startswith("#") for line in text.splitlines()):
        raise fail("RM600", "the protocol is empty", file=file, hint="Begin with `name: NAME`.")
    source = parse_yaml(text, file=file)
    if not isinstance(source.value, dict):
        raise fail("RM600", "a protocol is a mapping", file=file, hint="Begin with `name: NAME`.")
    problems = [*source.problems, *apply_overrides(source.value, source.places, overrides)]
    try:
        protocol = Protocol.model_validate(source.value)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [_problem(detail, source.places) for detail in details]
        raise RecmasError(in_reading_order(problems)) from None
    problems += _cross_checks(protocol, source.places)
    if problems:
        raise RecmasError(in_reading_order(problems))
    return protocol


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) <= MAX_BYTES:
            return raw.decode("utf-8")
        reason = f"it is larger than {MAX_BYTES} bytes"
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
    raise fail(
        "RM600",
        f"cannot read the protocol {path}: {reason}",
        hint=f"Give a .yaml file or one of {', '.join(protocol_names())}.",
    )


def _cross_checks(protocol: Protocol, places: Places) -> list[Problem]:
    """Return what is wrong although every value for itself is right."""
    problems = []
    data, seeds = protocol.data, protocol.seeds
    if "question" not in data.fields:
        place = places.key(("data", "fields"))
        hint = "Say where the question stands."
        problems.append(_problem_at(place, "`data.fields` has no `question`.", hint))
    for name in sorted(set(data.append) - set(data.fields)):
        place = places.key(("data", "append", name))
        hint = did_you_mean(name, data.fields)
        problems.append(_problem_at(place, f"`{name}` is not one of `data.fields`.", hint))
    if data.convert is not None and data.convert not in CONVERTERS:
        place = places.value(("data", "convert"))
        hint = did_you_mean(data.convert, CONVERTERS)
        problems.append(_problem_at(place, f"no converter is called {show(data.convert)}.", hint))
    if len(set(seeds)) < len(seeds):
        place = places.value(("seeds",))
        problems.append(_problem_at(place, f"the seeds {seeds} are not distinct.", "Drop one."))
    elif protocol.temperature == 0 and (protocol.rollouts > 1 or len(seeds) > 1):
        key = "rollouts" if protocol.rollouts > 1 else "seeds"
        message = f"`{key}` asks for several answers, and at temperature 0 all are the same."
        hint = "Set `temperature`, or ask once."
        problems.append(_problem_at(places.key((key,)), message, hint))
    return problems


_SECTIONS: Final[dict[Loc, type[Section]]] = {
    ("data",): DataSection,
    ("selection",): SelectionSection,
}
_CHECKS: Final[dict[str, type[Section]]] = {
    "math": MathSection,
    "choice": ChoiceSection,
    "exact": ExactSection,
    "f1": F1Section,
    "code": CodeSection,
}
# pydantic's error type -> what the value should be. `{...}` is filled from the error's context.
_WANTED: Final = {
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
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_too_long": "text of at most {max_length} characters",
    "string_type": "text",
    "too_long": "at most {max_length} entries",
}


def _problem(detail: ErrorDetails, places: Places) -> Problem:
    """Return what pydantic found, in plain words and at its place."""
    loc = tuple(detail["loc"])
    section = _SECTIONS.get(loc[:-1], Protocol)
    if loc[0] == "check" and len(loc) > 1:
        # The kind of the check is part of pydantic's path, but not of the file's.
        section, loc = _CHECKS[str(loc[1])], (loc[0], *loc[2:])
    path, key = ".".join(map(str, loc)), str(loc[-1])
    match detail["type"]:
        case "extra_forbidden":
            place, message = places.key(loc), f"unknown key `{path}`."
            hint = did_you_mean(key, section.model_fields)
        case "missing":
            where = f"`{'.'.join(map(str, loc[:-1]))}`" if loc[:-1] else "the protocol"
            place, message = places.key(loc[:-1]), f"{where} has no `{key}`."
            hint = f"Add `{key}: ...`."
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = ", ".join(_CHECKS)
            place, hint = places.value((*loc, "kind")), f"Known here: {kinds}."
            given = detail.get("ctx", {}).get("tag")
            message = f"`{path}` has {f'the unknown kind {given!r}' if given else 'no `kind`'}."
        case "too_short":
            place, hint = places.value(loc), ""
            context = detail["ctx"]
            message = f"`{path}` has {context['actual_length']} entries, fewer than "
            message += f"{context['min_length']}."
        case kind:
            numbers = detail.get("ctx", {}).items()
            context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in numbers}
            wanted = _WANTED.get(kind, detail["msg"].lower()).format_map(context)
            place, hint = places.value(loc), ""
            message = f"`{path}` should be {wanted}, is {show(detail['input'])}."
    return _problem_at(place, message, hint)


def _problem_at(place: SourcePosition, message: str, hint: str) -> Problem:
    from_command_line = place.file.startswith(SET_PREFIX)
    return problem_at(place, "RM122" if from_command_line else "RM600", message, hint=hint)
