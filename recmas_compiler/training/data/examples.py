"""Training records: read whole or refused with file and line, split, and measured."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.spec.document.problems import problem_at, show
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import open_regular
from recmas_runtime.core.progress import Progress
from recmas_runtime.core.tables import FORMATS, Row, read_rows
from recmas_runtime.formats.plan import field_place, is_field
from recmas_runtime.prompts.render import field_text
from recmas_runtime.running.records import as_record, check_record

# A file with one mistake often has it in every line.
MAX_PROBLEMS: Final = 20
_CORRECT: Final = "Correct the line, or remove it."

Lengths = Callable[[TrainExample], Mapping[tuple[str, int], int]]
"""Gives the positions of every call of an example, by agent and round."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The data of a run.

    Attributes:
        left_out: How many records are not used, by reason.
        digests: The sha256 of every file read, by what it is for: `train` or `held_out`.
    """

    train: tuple[TrainExample, ...]
    held_out: tuple[TrainExample, ...]
    digests: Mapping[str, str]
    left_out: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()


def load_examples(
    spec: Spec, targets: Mapping[str, str], *, data: Path, held_out: Path | float, seed: int
) -> Examples:
    """Read the records that a spec names and split off what is held out.

    Args:
        spec: Its prompts say which fields a record needs.
        targets: Agent to the field with the text that it should think or say.
        held_out: The file to measure on, or the part of `data` to hold out.

    Raises:
        RecmasError: RM700 with file and line for every record that cannot be used, for a file
            that cannot be read or has no records, and for held-out records to be trained on.
    """
    read = _Reader(spec, targets)
    train, digest = read(data, ("train", "data"))
    digests = {"train": digest}
    if not isinstance(held_out, Path):
        train, measured = _split(train, held_out, seed=seed)
        return Examples(train=train, held_out=measured, digests=digests)
    measured, digest = read(held_out, ("train", "held_out"))
    return Examples(
        train=train,
        held_out=measured,
        digests={**digests, "held_out": digest},
        warnings=_overlap(train, measured, read.prompt_fields, str(held_out)),
    )


def leave_out_long(
    examples: Examples, lengths: Lengths, *, max_length: int, progress: Progress
) -> Examples:
    """Return the examples none of whose calls is too long; the others are counted, never cut.

    Raises:
        RecmasError: RM700 if nothing is left to train on.
    """
    reasons: Counter[str] = Counter()

    def kept(group: tuple[TrainExample, ...]) -> Iterator[TrainExample]:
        for example in group:
            measured = lengths(example)
            too_long = [agent for (agent, _), length in measured.items() if length > max_length]
            if too_long:
                reasons[f"a call of `{too_long[0]}` takes more than {max_length} positions"] += 1
            else:
                yield example
            advance()

    num_examples = len(examples.train) + len(examples.held_out)
    with progress.stage("Measuring records", num_examples) as advance:
        train, held_out = tuple(kept(examples.train)), tuple(kept(examples.held_out))
    if not train:
        counted = "; ".join(f"{number} records: {reason}" for reason, number in reasons.items())
        hint = "Raise `train.max_length`, or shorten the prompts and texts."
        raise fail("RM700", f"no record is left to train on ({counted})", hint=hint)
    warnings = tuple(
        Problem(
            code="RM750",
            severity="warning",
            message=f"{number} of {num_examples} records are left out: {reason}",
            hint="Raise `train.max_length` to use them.",
        )
        for reason, number in reasons.items()
    )
    return replace(
        examples,
        train=train,
        held_out=held_out,
        left_out=dict(reasons),
        warnings=examples.warnings + warnings,
    )


class _Reader:
    """Reads a file of records; errors of the file itself point into the spec."""

    def __init__(self, spec: Spec, targets: Mapping[str, str]) -> None:
        self._targets = targets
        self._spec = spec
        texts = [text for prompts in spec.declared.prompts.values() for _, text in prompts.fields()]
        named = (part.value for text in texts for part in text.parts if part.kind == "field")
        self.prompt_fields = tuple(dict.fromkeys(named))

    def __call__(
        self, path: Path, setting: tuple[str, str]
    ) -> tuple[tuple[TrainExample, ...], str]:
        """Return a file's examples and its sha256."""
        examples: list[TrainExample] = []
        problems: list[Problem] = []
        try:
            with open_regular(path, file=str(path)) as stream:
                seen: dict[str, int] = {}
                for row in read_rows(stream, file=str(path)):
                    wrong = self._problems(row, seen)
                    problems += (
                        Problem(
                            code="RM700", message=why, hint=_CORRECT, file=str(path), line=row.line
                        )
                        for why in wrong
                    )
                    if not wrong:
                        examples.append(self._example(row))
                stream.seek(0)
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(path, setting, str(error.strerror or error)) from error
        except RecmasError as error:
            raise self._unreadable(path, setting, error.problems[0].message) from error
        if problems:
            raise RecmasError(_first(problems, str(path)))
        if not examples:
            message, hint = "there are no records", "Give a file that has some."
            raise fail("RM700", message, file=str(path), hint=hint)
        return tuple(examples), digest

    def _unreadable(self, path: Path, setting: tuple[str, str], why: str) -> RecmasError:
        message = f"`{path}` cannot be read: {why}."
        hint = f"Give a file of {FORMATS}, relative to the spec."
        return RecmasError(problem_at(self._spec.position(*setting), "RM700", message, hint=hint))

    def _example(self, row: Row) -> TrainExample:
        record = as_record(row.fields or {}, row.number - 1)
        texts = {a: str(_target(record.fields, name)) for a, name in self._targets.items()}
        return TrainExample(
            id=str(record.id),
            index=record.index,
            fields=record.fields,
            targets=texts,
            line=row.line,
        )

    def _problems(self, row: Row, seen: dict[str, int]) -> list[str]:
        """Return what is wrong with a row; note the line of its id in `seen`."""
        if row.fields is None:
            return [row.problem]
        try:
            record = as_record(row.fields, row.number - 1)
            check_record(record, self.prompt_fields)
        except RecmasError as error:
            return [error.problems[0].message]
        if str(record.id) in seen:
            return [f"id {record.id!r} is already that of line {seen[str(record.id)]}"]
        seen[str(record.id)] = row.line
        found = ((agent, _why_no_text(row.fields, name)) for agent, name in self._targets.items())
        return [
            f"record {record.id!r} {why}, which is the target of `{agent}`"
            for agent, why in found
            if why is not None
        ]


def _why_no_text(fields: Mapping[str, object], name: str) -> str | None:
    """Return why a field cannot be a target, or None if it can."""
    value = _target(fields, name)
    if value is _MISSING:
        return f"has no field {name!r}"
    if not isinstance(value, str):
        return f"has {show(value)} in field {name!r}, not text"
    if not value.strip():
        return f"has an empty field {name!r}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"holds half a surrogate pair in field {name!r}"
    return None


_MISSING: Final = object()


def _target(fields: Mapping[str, object], name: str) -> object:
    """Return what a field holds, or with `facts[0]` an entry of its list."""
    if name in fields or not is_field(name):
        return fields.get(name, _MISSING)
    place = field_place(name)
    value = fields.get(place.name)
    has_entry = isinstance(value, list) and place.entry is not None and place.entry < len(value)
    return value[place.entry] if has_entry else _MISSING  # type: ignore[index]


def _first(problems: list[Problem], file: str) -> list[Problem]:
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = Problem(
        code="RM700",
        message=f"{len(problems) - MAX_PROBLEMS} more findings are not shown",
        hint="Correct these first.",
        file=file,
    )
    return [*problems[:MAX_PROBLEMS], more]


def _split(
    examples: tuple[TrainExample, ...], fraction: float, *, seed: int
) -> tuple[tuple[TrainExample, ...], tuple[TrainExample, ...]]:
    """Hold out a part by the hash of seed and id, so that new records move few of the old ones."""
    num_held_out = min(round(len(examples) * fraction), len(examples) - 1)
    if fraction > 0 and len(examples) > 1:
        num_held_out = max(num_held_out, 1)
    # An id may hold half a surrogate pair, which JSON can spell.
    ranked = sorted(
        examples,
        key=lambda e: hashlib.sha256(f"{seed}:{e.id}".encode("utf-8", "backslashreplace")).digest(),
    )
    chosen = {example.id for example in ranked[:num_held_out]}
    return (
        tuple(example for example in examples if example.id not in chosen),
        tuple(example for example in examples if example.id in chosen),
    )


def _overlap(
    train: tuple[TrainExample, ...],
    held_out: tuple[TrainExample, ...],
    prompt_fields: tuple[str, ...],
    file: str,
) -> tuple[Problem, ...]:
    """Refuse held-out records that are training records; warn where only what they say is equal.

    Equal contents under two ids may be chance: in a small domain records drawn apart often agree.
    """

    def asked(example: TrainExample) -> str:
        return repr([field_text(shown, example.fields) for shown in prompt_fields])

    known = {example.id: example for example in train}
    same = [
        example
        for example in held_out
        if example.id in known
        and asked(known[example.id]) == asked(example)
        and known[example.id].targets == example.targets
    ]
    if same:
        problems = [
            Problem(
                code="RM700",
                message=f"the held-out record {example.id!r} is in the training data too",
                hint="Remove it from one of the two files.",
                file=file,
                line=example.line,
            )
            for example in same
        ]
        raise RecmasError(_first(problems, file))
    contents = {(asked(example), *example.targets.values()) for example in train}
    prompts = {prompt for prompt, *_ in contents}
    num_equal = sum(asked(example) in prompts for example in held_out)
    if not num_equal:
        return ()
    num_same = sum((asked(e), *e.targets.values()) in contents for e in held_out)
    message = (
        f"{num_equal} of {len(held_out)} held-out records ask what a training record asks, "
        f"{num_same} of them for the same texts"
    )
    hint = "Held-out figures then also measure memory."
    return (Problem(code="RM752", severity="warning", message=message, hint=hint, file=file),)
