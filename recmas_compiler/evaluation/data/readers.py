"""Files that data sets are published in and that are no tables of records.

A reader gets a whole file and yields its questions as rows of a table, whose names a protocol then
gives to what prompts show. It returns None for a file of another form, which is read as a table:
one protocol reads what was published and what `recmasc data` made of it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final, TypeVar

from recmas_runtime.core.tables import Row

_Kind = TypeVar("_Kind")

_GZIP: Final = b"\x1f\x8b"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published file.

    Attributes:
        content: All of it, unpacked.
        name: The file's, without folders and suffixes; records without ids are named after it.
        beside: Rows of the file that the questions stand in, where that is another one.
    """

    content: bytes
    name: str
    beside: Iterable[Mapping[str, Any]] | None = None

    @classmethod
    def of(
        cls, raw: bytes, *, file: str, beside: Iterable[Mapping[str, Any]] | None = None
    ) -> Published:
        """Return the file of these bytes, which may be gzipped.

        Raises:
            OSError: It is damaged.
            EOFError: It is cut off.
        """
        content = gzip.decompress(raw) if raw.startswith(_GZIP) else raw
        name = PurePath(file).name.removesuffix(".gz")
        return cls(content=content, name=PurePath(name).stem, beside=beside)

    def mapping(self) -> dict[str, Any] | None:
        """Return the one JSON object that the file is; None if it is something else."""
        value = None
        with suppress(ValueError, RecursionError):
            value = json.loads(self.content.decode("utf-8-sig"))
        return value if isinstance(value, dict) else None


Reader = Callable[[Published], Iterator[Row] | None]


class NeedsQuestionsError(Exception):
    """The file has no questions, and nothing was given beside it."""


def squad(published: Published) -> Iterator[Row] | None:
    """SQuAD, XQuAD: articles of paragraphs, each with its questions.

    Rows have `id`, `title`, `context`, `question` and `answers`; their number is that of the
    question.
    """
    document = published.mapping()
    articles = _all(dict, {} if document is None else document.get("data"))
    if not articles or not any("paragraphs" in article for article in articles):
        return None
    return _numbered(_squad_questions(articles))


def _squad_questions(articles: list[dict[str, Any]]) -> Iterator[Mapping[str, Any] | str]:
    for place, article in enumerate(articles, start=1):
        title = article.get("title", "")
        paragraphs = _all(dict, article.get("paragraphs"))
        if not paragraphs:
            yield f"article {place} has no list `paragraphs`"
            continue
        for paragraph in paragraphs:
            asked = _all(dict, paragraph.get("qas"))
            if asked is None:
                yield f"a paragraph of article {place} has no list `qas`"
                continue
            shared = {"title": title, "context": paragraph.get("context")}
            yield from ({**shared, **question} for question in asked)


def r4c(published: Published) -> Iterator[Row] | None:
    """R4C: derivations of three annotators by the ids of HotpotQA, whose file has the questions.

    Rows have `id`, `question`, `answer`, `facts` and `fact_titles` of the first annotator. One
    whose question is not in the file beside has none.

    Raises:
        NeedsQuestionsError: There is no file beside it.
    """
    document = published.mapping()
    if not document or not all(_is_derivations(value) for value in document.values()):
        return None
    if published.beside is None:
        raise NeedsQuestionsError
    asked = {str(row.get("_id", row.get("id"))): row for row in published.beside}
    return _numbered(
        {
            **{key: asked[name][key] for key in ("question", "answer") if name in asked},
            "id": name,
            "facts": [" ".join(map(str, triple)) for _, _, triple in steps],
            "fact_titles": [title for title, _, _ in steps],
        }
        for name, (steps, *_) in document.items()
    )


def _is_derivations(value: object) -> bool:
    """Return whether this is a list of derivations: lists of (title, sentence, triple)."""
    derivations = _all(list, value)
    return bool(derivations) and all(
        isinstance(step, list)
        and len(step) == 3
        and isinstance(step[0], str)
        and isinstance(step[2], list)
        for steps in derivations or ()
        for step in steps
    )


_BABI_LINE: Final = re.compile(r"(?P<number>[1-9][0-9]{0,5}) (?P<text>.*)")


def babi(published: Published) -> Iterator[Row] | None:
    """Read stories of bAbI: numbered lines, of which a question has its answer behind a tab.

    Rows have `id`, `question`, `answer`, `facts` (what was told before it) and `support` (places
    among these of the facts that are needed, from 0).
    """
    try:
        lines = published.content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        return None
    first = next((line for line in lines if line.strip()), "")
    found = _BABI_LINE.fullmatch(first)
    return _babi_rows(lines, published.name) if found and found["number"] == "1" else None


def _babi_rows(lines: list[str], name: str) -> Iterator[Row]:
    facts: list[str] = []
    places: dict[str, int] = {}  # number of a line -> its place among the facts
    count = last = 0
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        found = _BABI_LINE.fullmatch(text)
        number = int(found["number"]) if found else 0
        if found is None or number not in (1, last + 1):
            count += 1
            problem = "the line is not the next one of a story"
            yield Row(number=count, line=line, problem=problem)
            last = number
            continue
        if number == 1:
            facts, places = [], {}
        last = number
        question, *behind = found["text"].split("\t")
        if not behind:
            places[found["number"]] = len(facts)
            facts.append(question.strip())
            continue
        count += 1
        answer, needed = behind[0].strip(), behind[1].split() if len(behind) == 2 else []
        if not answer or not needed or not all(one in places for one in needed):
            problem = "the question needs an answer, and numbers of lines that were told before it"
            yield Row(number=count, line=line, problem=problem)
            continue
        fields = {
            "id": f"{name}-{count}",
            "question": question.strip(),
            "answer": answer,
            "facts": list(facts),
            "support": [places[one] for one in needed],
        }
        yield Row(number=count, line=line, fields=fields)


def _numbered(found: Iterable[Mapping[str, Any] | str]) -> Iterator[Row]:
    """Yield fields, or the problem there is instead, as rows; a JSON value has no lines."""
    for number, one in enumerate(found, start=1):
        if isinstance(one, str):
            yield Row(number=number, line=number, problem=one)
        else:
            yield Row(number=number, line=number, fields=one)


def _all(kind: type[_Kind], value: object) -> list[_Kind] | None:
    """Return a list if all that it holds is of one kind; None for anything else."""
    if not isinstance(value, list):
        return None
    found = [one for one in value if isinstance(one, kind)]
    return found if len(found) == len(value) else None


READERS: Final[dict[str, Reader]] = {"babi": babi, "r4c": r4c, "squad": squad}
