"""Protocol files: found by name or path, parsed, and refused with the place of every mistake."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from recmas_compiler.evaluation.data.converters import CONVERTERS
from recmas_compiler.evaluation.protocol import CheckSection, Protocol
from recmas_compiler.spec.document.places import Places
from recmas_compiler.spec.document.problems import (
    Language,
    did_you_mean,
    in_reading_order,
    schema_errors,
    schema_problem,
    sections_of,
    show,
)
from recmas_compiler.spec.document.yaml_source import Value, parse_mapping, read_text
from recmas_compiler.spec.overrides import apply_overrides
from recmas_compiler.spec.schema.section import Section
from recmas_runtime.core.errors import Problem, RecmasError, fail

FOLDER: Final = Path(__file__).parent / "protocols"

# kind of a check -> its section
_CHECKS: Final[dict[str, type[Section]]] = {
    kind: section
    for section in get_args(get_args(CheckSection)[0])
    for kind in get_args(section.model_fields["kind"].annotation)
}


def protocol_names() -> tuple[str, ...]:
    """Return the names of the protocols that come with recmas."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


_PROTOCOLS: Final = Language(
    noun="protocol",
    start_hint="Begin with `name: NAME`.",
    file_hint=f"Give a .yaml file or one of {', '.join(protocol_names())}.",
    code="RM600",
    sections=sections_of(Protocol),
    missing_hints={("check", "kind"): f"Known here: {', '.join(_CHECKS)}."},
)


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
    text = read_text(path, file=str(path), language=_PROTOCOLS)
    return parse_protocol(text, file=str(path), overrides=overrides)


def parse_protocol(text: str, *, file: str, overrides: Iterable[str] = ()) -> Protocol:
    """Parse the text of a protocol file.

    Args:
        text: YAML.
        file: How messages name it.
        overrides: `KEY.PATH=VALUE`, in order.

    Raises:
        RecmasError: As `load_protocol`.
    """
    root, places, problems = parse_mapping(text, file=file, language=_PROTOCOLS)
    problems += apply_overrides(root, places, overrides)
    try:
        protocol = Protocol.model_validate(root)
    except ValidationError as error:
        language = _with_check(root.get("check"))
        details = map(_without_kind, schema_errors(error))
        problems += [schema_problem(detail, places, language) for detail in details]
        raise RecmasError(in_reading_order(problems)) from None
    problems += _cross_checks(protocol, places)
    if problems:
        raise RecmasError(in_reading_order(problems))
    return protocol


def _cross_checks(protocol: Protocol, places: Places) -> list[Problem]:
    """Return what is wrong although every value for itself is right."""
    problems = []
    data, seeds = protocol.data, protocol.seeds
    if "question" not in data.fields:
        place = places.key(("data", "fields"))
        hint = "Say where the question stands."
        problems.append(
            _PROTOCOLS.problem(place, "RM600", "`data.fields` has no `question`.", hint)
        )
    for name in sorted(set(data.append) - set(data.fields)):
        place = places.key(("data", "append", name))
        hint = did_you_mean(name, data.fields)
        problems.append(
            _PROTOCOLS.problem(place, "RM600", f"`{name}` is not one of `data.fields`.", hint)
        )
    if data.convert is not None and data.convert not in CONVERTERS:
        place = places.value(("data", "convert"))
        hint = did_you_mean(data.convert, CONVERTERS)
        problems.append(
            _PROTOCOLS.problem(
                place, "RM600", f"no converter is called {show(data.convert)}.", hint
            )
        )
    if len(set(seeds)) < len(seeds):
        place = places.value(("seeds",))
        problems.append(
            _PROTOCOLS.problem(place, "RM600", f"the seeds {seeds} are not distinct.", "Drop one.")
        )
    elif protocol.temperature == 0 and (protocol.rollouts > 1 or len(seeds) > 1):
        key = "rollouts" if protocol.rollouts > 1 else "seeds"
        message = f"`{key}` asks for several answers, and at temperature 0 all are the same."
        hint = "Set `temperature`, or ask once."
        problems.append(_PROTOCOLS.problem(places.key((key,)), "RM600", message, hint))
    return problems


def _with_check(check: Value) -> Language:
    """Return the language with the section for the kind of a protocol's check."""
    kind = check.get("kind") if isinstance(check, dict) else None
    section = _CHECKS.get(kind, Section) if isinstance(kind, str) else Section
    return replace(_PROTOCOLS, sections={**_PROTOCOLS.sections, ("check",): section})


def _without_kind(detail: ErrorDetails) -> ErrorDetails:
    """Return pydantic's error with its path in the file, and `kind` as a key like any other."""
    loc, context = detail["loc"], detail.get("ctx", {})
    match detail["type"]:
        case "union_tag_not_found":
            return {**detail, "type": "missing", "loc": (*loc, "kind")}
        case "union_tag_invalid":
            expected = {"expected": context["expected_tags"]}
            loc, kind = (*loc, "kind"), context["tag"]
            return {**detail, "type": "literal_error", "loc": loc, "input": kind, "ctx": expected}
        case _ if loc[0] == "check":
            return {**detail, "loc": (loc[0], *loc[2:])}
    return detail
