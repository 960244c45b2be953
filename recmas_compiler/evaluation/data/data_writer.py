"""A published data set as JSON lines in our form: what `run`, `train` and `bench` read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from recmas_compiler.evaluation.data.data_file import Question, load_data, rows_of, value_at
from recmas_compiler.evaluation.data.protocol import DataSection, Protocol
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import counted


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a file of questions became.

    Attributes:
        text: JSON lines, a record each.
        left_out: How many records are not in it, by reason.
    """

    text: str
    num_written: int
    left_out: Mapping[str, int]


def write_questions(
    path: Path,
    protocol: Protocol,
    *,
    beside: Path | None = None,
    without: Sequence[Path] = (),
    max_words: int | None = None,
    limit: int | None = None,
) -> Written:
    """Return the questions of a data file, and their answers, as JSON lines.

    Every record has the fields that the protocol's prompts may show, and `answer`; where several
    answers are right, `answers` has them all. The protocol reads its own lines as it does the file.

    Args:
        path: As the protocol's data are published.
        beside: The file with the questions, for data sets that are published without them.
        without: Files whose questions are not to be in it: a record with the same id, or with the
            same question about the same text, is left out.
        max_words: Longer texts to read, `context` or all `facts`, are left out.
        limit: Most questions, the first ones that are not left out.

    Raises:
        RecmasError: As `load_data`; RM601 also if nothing is left.
    """
    # All fields are there by themselves, so nothing is added to the question.
    shown = tuple(protocol.data.fields)
    data = load_data(path, protocol, shown=shown, beside=beside)
    known = {name for other in without for name in _names_in(other, protocol.data)}
    kept = [one for one in data.questions if not _names(one.record.id, one.record.fields) & known]
    left_out = Counter(data.left_out)
    left_out["asked in a file of --without"] = len(data.questions) - len(kept)
    if max_words is not None:
        short = [one for one in kept if len(_text(one.record.fields).split()) <= max_words]
        left_out[f"more than {counted(max_words, 'word')} to read"] = len(kept) - len(short)
        kept = short
    kept = kept[:limit]
    if not kept:
        hint = "Give other files with --without, or a higher --max-words."
        raise fail("RM601", "no question is left", file=str(path), hint=hint)
    lines = [json.dumps(_record(one, shown), ensure_ascii=False, default=str) for one in kept]
    return Written(
        text="".join(f"{line}\n" for line in lines), num_written=len(kept), left_out=+left_out
    )


def _names_in(path: Path, data: DataSection) -> Iterator[str]:
    """Yield by what the questions of a file are known.

    Raises:
        RecmasError: RM601 for one without an id: it could not be told that it is the same.
    """
    for row in rows_of(path, data, None):
        if row.fields is None:
            raise fail("RM601", row.problem, file=str(path), line=row.line, hint=_WITHOUT)
        found = value_at(row.fields, [*data.id, "id", "_id"])
        if not isinstance(found, str | int):
            message = "the record has no id, by which it could be left out"
            raise fail("RM601", message, file=str(path), line=row.line, hint=_WITHOUT)
        shown = {name: value_at(row.fields, paths) for name, paths in data.fields.items()}
        yield from _names(found, shown)


_WITHOUT: Final = "Give --without a file that `recmasc data` wrote, or one of this protocol."


def _names(record_id: str | int, fields: Mapping[str, Any]) -> set[str]:
    """Return by what a question is known: its id, and its words with the text they are about."""
    question, text = fields.get("question"), _text(fields)
    names = {str(record_id)}
    if isinstance(question, str) and text:
        names.add(json.dumps([question.strip(), text]))
    return names


def _text(fields: Mapping[str, Any]) -> str:
    """Return what there is to read: `context`, or the facts one after the other."""
    context, facts = fields.get("context"), fields.get("facts")
    if context is None and isinstance(facts, list):
        return " ".join(map(str, facts))
    return context if isinstance(context, str) else ""


def _record(question: Question, names: Sequence[str]) -> dict[str, Any]:
    fields = question.record.fields
    shown = {name: fields[name] for name in names if name in fields}
    record = {"id": question.record.id, **shown, **question.gold}
    answer = record.get("answer")
    if isinstance(answer, list) and answer:
        record |= {"answer": answer[0], "answers": answer}
    return record
