"""Protocols: how a data set is asked and how its answers are checked, as versioned YAML files.

The classes are the schema: every key with its type, default and meaning. All models are frozen and
refuse unknown keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

from pydantic import Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from recmas_compiler.evaluation.data.converters import CONVERTERS
from recmas_compiler.evaluation.data.readers import READERS
from recmas_compiler.spec.document.places import Places, SourcePosition
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
from recmas_compiler.spec.schema.sections import Section, Slug
from recmas_compiler.spec.spec import apply_overrides
from recmas_runtime.core.errors import Problem, RecmasError, fail

MAX_SEED: Final = 2**20
MAX_ROLLOUTS: Final = 1024

Names = Annotated[list[str], Field(min_length=1)]
"""Where a record's value may stand, best first; `meta.level` is `level` inside of `meta`, and
`a|b|c` is the list of what stands under these names."""

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class DataSection(Section):
    """The data set: where it is published, and which names its records give to what."""

    source: str
    """Where the data set is published."""

    split: str
    """The split that the protocol means, such as `test`."""

    id: Names = Field(default=["id"])
    """The record's name; its line number where it has none."""

    fields: dict[str, Names]
    """What prompts may show; `question` must be among them."""

    gold: dict[str, Names]
    """What only the check sees: the right answer, unit tests."""

    columns: list[str] | None = None
    """Names of the columns of a CSV file whose first line is a record already."""

    reader: str | None = None
    """What reads a published file that is no table of records, by name."""

    convert: str | None = None
    """What brings the values of a published form into ours, by name."""

    append: dict[str, str] = Field(default={})
    """Fields, with a line to introduce each, that are added to the question unless the bundle's
    prompts show them in a place of their own."""


class SelectionSection(Section):
    """Which of the records are asked."""

    kind: Literal["first", "sample"] = "first"
    """The first `n` of the file, or `n` of them by chance."""

    seed: Seed = 0
    """What that chance starts from."""


class MathSection(Section):
    """Mathematical equality."""

    kind: Literal["math"]
    timeout_s: float = Field(default=5.0, gt=0, le=600)
    """Most seconds of one comparison by math-verify, after which it is killed."""


class ChoiceSection(Section):
    """The letter of a choice."""

    kind: Literal["choice"]


class ExactSection(Section):
    """Equal words, case, punctuation and articles aside."""

    kind: Literal["exact"]
    among: Annotated[list[str], Field(min_length=2)] | None = None
    """The only possible answers, such as yes and no."""


class F1Section(Section):
    """Shared words; equal words are correct."""

    kind: Literal["f1"]


class SquadSection(Section):
    """Shared words as SQuAD's own script counts them; equal words are correct."""

    kind: Literal["squad"]


class CodeSection(Section):
    """Unit tests, in the sandbox."""

    kind: Literal["code"]
    timeout_s: float = Field(default=10.0, gt=0, le=600)
    """Most seconds of one run."""

    memory_mb: int = Field(default=512, ge=16, le=65536)
    """Most memory of one run, in MiB."""

    packages: list[str] = Field(default=["numpy"])
    """What programs may import besides the standard library, where it is installed; what the
    records' own tests import they always may."""


CheckSection = Annotated[
    MathSection | ChoiceSection | ExactSection | F1Section | SquadSection | CodeSection,
    Field(discriminator="kind"),
]


class ScoreSection(Section):
    """What is judged: the text that is written, or how likely the right answer's text is."""

    by: Literal["text", "candidates", "likelihood"] = "text"
    """The written text, by the check; the right answer's rank among candidates; or the loss of the
    right answer alone, in nats per token. The last two write nothing."""

    candidates: int = Field(default=10, ge=2, le=64)
    """The right answer and others of its kind; where records have choices, these are they."""

    seed: Seed = 0
    """What the others are drawn from."""

    choices: Literal["text", "letter"] = "text"
    """Whether the text of a choice is scored or its letter."""


class Protocol(Section):
    """A whole protocol."""

    name: Slug
    """What `--protocol` calls it."""

    version: Annotated[int, Field(ge=1)]
    """Raised with every change that can change a figure."""

    description: str
    """What the data set asks, and what the figures mean."""

    data: DataSection

    n: Annotated[int, Field(ge=1)] | None = None
    """Records to ask; all of them if not given."""

    selection: SelectionSection = SelectionSection()

    seeds: list[Seed] = Field(default=[0], min_length=1, max_length=64)
    """Every record is asked once with each."""

    rollouts: int = Field(default=1, ge=1, le=MAX_ROLLOUTS)
    """Answers to each record and seed, for pass@k."""

    temperature: float = Field(default=0.0, ge=0, le=100)
    """0 is greedy."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass."""

    top_k: int = Field(default=0, ge=0, le=2**31)
    """Keep the k likeliest tokens; 0 keeps all."""

    max_new_tokens: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Most tokens of an answer; the bundle's own limit if not given."""

    check: CheckSection

    score: ScoreSection = ScoreSection()

    prompt_digest: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None
    """sha256 of the prompts that published figures were made with; others give a warning."""

    def digest(self) -> str:
        """Return the sha256 of everything that the protocol says."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


FOLDER: Final = Path(__file__).parents[1] / "protocols"

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

    Raises:
        RecmasError: As `load_protocol`; messages name `file`.
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


def _cross_checks(protocol: Protocol, places: Places) -> Iterator[Problem]:
    """Yield what is wrong although every value for itself is right."""
    data, seeds = protocol.data, protocol.seeds

    def problem(place: SourcePosition, message: str, hint: str) -> Problem:
        return _PROTOCOLS.problem(place, "RM600", message, hint)

    if "question" not in data.fields:
        place = places.key(("data", "fields"))
        yield problem(place, "`data.fields` has no `question`.", "Say where the question stands.")
    for name in sorted(set(data.append) - set(data.fields)):
        place, hint = places.key(("data", "append", name)), did_you_mean(name, data.fields)
        yield problem(place, f"`{name}` is not one of `data.fields`.", hint)
    if data.convert is not None and data.convert not in CONVERTERS:
        place, hint = places.value(("data", "convert")), did_you_mean(data.convert, CONVERTERS)
        yield problem(place, f"no converter is called {show(data.convert)}.", hint)
    if data.reader is not None and data.reader not in READERS:
        place, hint = places.value(("data", "reader")), did_you_mean(data.reader, READERS)
        yield problem(place, f"no reader is called {show(data.reader)}.", hint)
    if len(set(seeds)) < len(seeds):
        message = f"the seeds {seeds} are not distinct."
        yield problem(places.value(("seeds",)), message, "Drop one.")
    elif protocol.temperature == 0 and (protocol.rollouts > 1 or len(seeds) > 1):
        key = "rollouts" if protocol.rollouts > 1 else "seeds"
        message = f"`{key}` asks for several answers, and at temperature 0 all are the same."
        yield problem(places.key((key,)), message, "Set `temperature`, or ask once.")
    elif protocol.score.by != "text" and (protocol.rollouts > 1 or len(seeds) > 1):
        key = "rollouts" if protocol.rollouts > 1 else "seeds"
        message = f"`{key}` asks for several answers, and `score.by` has none written."
        yield problem(places.key((key,)), message, "Score by text, or ask once.")
    if protocol.score.by != "text" and protocol.check.kind == "code":
        message = "programs have no right text that could be scored."
        yield problem(places.key(("check",)), message, "Leave `score.by` at `text`.")


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
