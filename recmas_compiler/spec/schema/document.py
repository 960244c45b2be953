"""The whole document: its schema, and plain values to it, going on after errors where it can."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Final, get_args

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from recmas_compiler.spec.document.places import Loc, Places, SourcePosition
from recmas_compiler.spec.document.problems import (
    SET_PREFIX,
    SYNONYMS,
    Language,
    did_you_mean,
    matches,
    schema_errors,
    schema_problem,
    sections_of,
    show,
)
from recmas_compiler.spec.document.yaml_source import Value
from recmas_compiler.spec.schema.backbones import SECRET_KEYS, BackboneSection
from recmas_compiler.spec.schema.sections import (
    MAX_AGENTS,
    PATH_PATTERN,
    PATTERN_NAMES,
    AgentSection,
    AnswerSection,
    BuildSection,
    Day,
    Given,
    LinkName,
    LinkSection,
    PatternSection,
    Section,
    ServeSection,
    Slug,
    blank_is_default,
)
from recmas_compiler.spec.schema.train import TrainSection
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import SLUG_PATTERN
from recmas_runtime.formats.manifest import URL_PATTERN
from recmas_runtime.formats.plan import (
    FIELD_PATTERN,
    MAX_LATENT_STEPS,
    MAX_ROUNDS,
    ConversationPart,
    History,
)
from recmas_runtime.formats.precisions import buildable

LANGUAGE_VERSION: Final = 1


class SpecDocument(Section):
    """A latent multi-agent system."""

    recmas: int = Field(
        ge=LANGUAGE_VERSION, le=LANGUAGE_VERSION, json_schema_extra={"const": LANGUAGE_VERSION}
    )
    """Version of the language."""

    name: Slug
    """Name of the system."""

    rounds: int = Field(default=1, ge=1, le=MAX_ROUNDS)
    """Passes over the agents. The answer is written in the last one."""

    latent_steps: int = Field(default=16, ge=0, le=MAX_LATENT_STEPS)
    """Latent steps of every agent that does not say otherwise; 0 sends empty messages."""

    date: Given[Day] = None
    """The day, as YYYY-MM-DD, for chat templates that write it into prompts. Without it that is the
    day on which a bundle is loaded."""

    pattern: Given[PatternSection] = None
    """A known arrangement of agents, instead of writing it out."""

    backbones: dict[Slug, BackboneSection] = Field(min_length=1, max_length=MAX_AGENTS)
    """The language models, by name. Agents may share one."""

    agents: dict[Slug, AgentSection] = Field(min_length=1, max_length=MAX_AGENTS)
    """The agents, by name."""

    links: dict[LinkName, Annotated[LinkSection, BeforeValidator(blank_is_default)]] = Field(
        default_factory=dict, max_length=MAX_AGENTS**2
    )
    """Who sends thoughts to whom, as `source -> target`."""

    answer: AnswerSection
    """Which agent writes the text, and how."""

    build: BuildSection = Field(default_factory=BuildSection)
    """What to build, and for which limits."""

    serve: Given[ServeSection] = None
    """Which part of a conversation becomes which field, where a built system is served. Without it
    `question`, or the prompts' only field, takes the last user message."""

    train: Given[TrainSection] = None
    """What to train the links on, and how; only `recmasc train` needs it."""


SECTIONS: Final = sections_of(SpecDocument)
"""Every mapping with fixed keys, by its path."""

# Mappings whose keys are names that the user chooses.
NAMED: Final[dict[tuple[str, ...], str]] = {
    ("backbones",): "backbone",
    ("agents",): "agent",
    ("links",): "link",
    ("agents", "*", "chat_template"): "template variable",
    ("backbones", "*", "body"): "key of a request",
    ("train", "targets"): "agent",
    ("train", "outer", "rates"): "link",
}

_IDENTIFIERS: Final = ("template variable", "key of a request")
_SLUG_RULE: Final = "lower-case letters, digits, `-` and `_`, beginning with a letter or digit"
_START_HINT: Final = "`recmasc init sequential` writes a spec to begin with."

SPECS: Final = Language(
    noun="spec",
    start_hint=_START_HINT,
    file_hint=f"Give the path of a YAML file; {_START_HINT}",
    sections=SECTIONS,
    missing_hints={
        ("recmas",): f"Begin the file with `recmas: {LANGUAGE_VERSION}`.",
        ("agents",): "Write the agents out, or use `pattern`.",
        ("answer",): "Add `answer: {agent: NAME}`.",
        ("train", "data"): "Add `data: FILE.jsonl`, relative to the spec.",
        ("train", "targets"): "Add `targets: {AGENT: FIELD}` with the texts to learn.",
    },
    text_rules={
        URL_PATTERN: "the address of an endpoint, such as http://127.0.0.1:8000/v1",
        f"^{SLUG_PATTERN}$": f"a name ({_SLUG_RULE})",
        f"^{FIELD_PATTERN}$": "a field (such as `question`, or `facts[0]` for an entry of a list)",
        PATH_PATTERN: "a path",
    },
)

# Settings that have a default and that no check between sections looks at: without a wrong one the
# other findings are still true. Never so: names, prompts and links.
_INDEPENDENT: Final[tuple[tuple[str, ...], ...]] = (
    ("rounds",),
    ("latent_steps",),
    ("date",),
    ("train",),
    ("build",),
    ("build", "*"),
    ("serve",),
    ("serve", "*"),
    ("backbones", "*", "dtype"),
    ("backbones", "*", "precision"),
    ("backbones", "*", "template"),
    ("backbones", "*", "base_url"),
    ("backbones", "*", "api_key_env"),
    ("backbones", "*", "timeout_s"),
    ("backbones", "*", "max_retries"),
    ("backbones", "*", "prices"),
    ("backbones", "*", "body"),
    ("backbones", "*", "leave_out"),
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
        details = schema_errors(error)
    if any(detail["loc"][:1] == ("pattern",) for detail in details):
        # what a pattern would have filled in is missing when the pattern is malformed
        filled_in = ("agents", "answer")
        details = [d for d in details if d["type"] != "missing" or d["loc"][0] not in filled_in]
    problems = [_problem(detail, places) for detail in details]
    unknown_version = [p for p in problems if p.code == "RM106"]
    if unknown_version:
        return None, unknown_version  # of a language we do not know nothing else can be said
    # what an unknown key was meant to be is there by default, or missed below
    prunable = [
        detail["loc"] if detail["type"] == "extra_forbidden" else _prunable(detail["loc"])
        for detail in details
    ]
    sound = deepcopy(root)
    for loc in prunable:
        if loc is None or not _remove(sound, loc):
            return None, problems
    try:
        return SpecDocument.model_validate(sound), problems
    except ValidationError:
        return None, problems


def _problem(detail: ErrorDetails, places: Places) -> Problem:
    """Return the finding for an error; here stand those that only specs have."""
    loc = detail["loc"]
    if loc[:1] == ("backbones",) and len(loc) > 2 and is_secret(str(loc[-1]), detail):
        return secret_problem(places.key(loc), ".".join(map(str, loc)))
    if detail["type"] == "one_pattern":
        given = detail["ctx"]["given"]
        place = places.key(("pattern", *given[1:2]))
        if given:
            message = f"`pattern` names {' and '.join(f'`{name}`' for name in given)}."
            return SPECS.problem(place, "RM118", message, "Keep one of them.")
        hint = f"Name one: {', '.join(f'`{name}`' for name in PATTERN_NAMES)}."
        return SPECS.problem(place, "RM118", "`pattern` names no pattern.", hint)
    if loc[-1] == "[key]":  # so pydantic's paths end where a name is wrong
        kind = next(kind for pattern, kind in NAMED.items() if matches(loc[:-2], pattern))
        rule = "an identifier" if kind in _IDENTIFIERS else _SLUG_RULE
        message = f"{show(loc[-2])} is not a name for a {kind}."
        return SPECS.problem(places.key(loc[:-1]), "RM105", message, f"Use {rule}.")
    if loc == ("recmas",) and detail["type"] != "missing":
        message = f"language version {show(detail['input'])} is not known to this recmas."
        hint = f"Write `recmas: {LANGUAGE_VERSION}`, or install the recmas the spec was made for."
        return SPECS.problem(places.value(loc), "RM106", message, hint)
    if loc[:1] == ("serve",) and detail["type"] == "literal_error":
        return _misused_part(detail, places)
    if loc[-1] == "precision" and detail["type"] == "literal_error":
        return _unknown_precision(detail, places)
    return schema_problem(detail, places, SPECS)


def is_secret(key: str, detail: ErrorDetails) -> bool:
    """Tell whether what was refused may be a key or a password."""
    if detail["type"] == "extra_forbidden":
        return key.lower() in SECRET_KEYS
    if detail["type"] != "string_pattern_mismatch":
        return False
    return key == "api_key_env" or (
        key == "base_url" and not {"@", "?"}.isdisjoint(detail["input"])
    )


def secret_problem(place: SourcePosition, path: str) -> Problem:
    """Return the finding for a secret in a spec, which is shown nowhere."""
    if place.file.startswith(SET_PREFIX):
        place = replace(place, file=f"{SET_PREFIX}{path}=...")
    message = f"`{path}` seems to hold a secret, which a spec and its bundle must not hold."
    hint = (
        "Put the key into an environment variable, and name that with `api_key_env: VARIABLE` "
        "(capital letters, digits and _)."
    )
    return SPECS.problem(place, "RM130", message, hint)


def _misused_part(detail: ErrorDetails, places: Places) -> Problem:
    """Return the finding for a value in `serve`: of `history`, or of a field of the record."""
    problem = schema_problem(detail, places, SPECS)
    if detail["loc"][-1] != "history":
        if detail["input"] in get_args(History):
            return replace(problem, hint=f"Write `history: {detail['input']}`.")
        return problem
    if detail["input"] not in get_args(ConversationPart):
        return problem
    hint = "`history` is a setting here: a field that takes a part of a conversation needs another "
    return replace(problem, hint=f"{hint}name.")


def _unknown_precision(detail: ErrorDetails, places: Places) -> Problem:
    """Return the finding for a precision that there is none of."""
    offered = buildable()
    listed = f"{', '.join(offered[:-1])} or {offered[-1]}"
    given, path = detail["input"], ".".join(map(str, detail["loc"]))
    meant = SYNONYMS.get(given.lower(), "") if isinstance(given, str) else ""
    message = f"`{path}` should be {listed}, is {show(given)}."
    if meant in offered:
        hint = f"Did you mean `{meant}`?"
    else:
        close = did_you_mean(str(given), offered)
        hint = close if close.startswith("Did") else ""
    return SPECS.problem(places.value(detail["loc"]), "RM105", message, hint)


def _prunable(loc: Loc) -> Loc | None:
    """Return the setting that an error belongs to, if the rest can be checked without it."""
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
