"""The passages that an answer agent may search, as JSON lines of one form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from recmas_runtime.core.errors import RecmasError, fail

_TEXT_SUFFIXES: Final = (".md", ".txt")

# JSON can spell what UTF-8 cannot.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

# Longer than any passage that fits into a prompt; bounds what one bad file can take.
_MAX_PASSAGE_BYTES: Final = 2**24


def corpus_lines(corpus: Path) -> Iterator[str]:
    """Yield a line of JSON `{id, title, text}` per passage, each with its line break.

    Args:
        corpus: A file of JSON lines, each with a `text` and optionally a `title` and an `id`, or a
            folder whose `.txt` and `.md` files, sub-folders included, are passages. Blank lines
            and empty files are skipped.

    Raises:
        RecmasError: RM123 with file and line for what is no passage, an id that is there twice, or
            a corpus without any.
    """
    lines = _of_folder(corpus) if corpus.is_dir() else _of_file(corpus)
    is_empty = True
    for line in lines:
        is_empty = False
        yield line
    if is_empty:
        raise fail(
            "RM123",
            "the search corpus holds no passages.",
            file=str(corpus),
            hint="Give JSON lines with a `text` each, or a folder with .txt and .md files.",
        )


def _of_folder(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix not in _TEXT_SUFFIXES or not path.is_file():
            continue
        try:
            with path.open("rb") as stream:
                raw = stream.read(_MAX_PASSAGE_BYTES + 1)
        except OSError as error:
            raise _unusable(path, None, f"it cannot be read: {error.strerror}") from error
        if len(raw) > _MAX_PASSAGE_BYTES:
            raise _unusable(path, None, f"it is longer than {_MAX_PASSAGE_BYTES} bytes")
        text = _decoded(raw, path, None)
        if text.strip():
            yield _line(path.relative_to(folder).as_posix(), path.stem, text)


def _of_file(path: Path) -> Iterator[str]:
    seen: dict[str, int] = {}
    try:
        with path.open("rb") as stream:
            number = 0
            while raw := stream.readline(_MAX_PASSAGE_BYTES + 1):
                number += 1
                if len(raw) > _MAX_PASSAGE_BYTES:
                    raise _unusable(path, number, f"it is longer than {_MAX_PASSAGE_BYTES} bytes")
                if not raw.strip():
                    continue
                passage_id, title, text = _parsed(_decoded(raw, path, number), path, number)
                if passage_id in seen:
                    why = f"id {passage_id!r} is already that of line {seen[passage_id]}"
                    raise _unusable(path, number, why)
                seen[passage_id] = number
                yield _line(passage_id, title, text)
    except OSError as error:
        raise _unusable(path, None, f"it cannot be read: {error.strerror}") from error


def _parsed(line: str, path: Path, number: int) -> tuple[str, str, str]:
    """Return id, title and text of a passage."""
    try:
        passage: Any = json.loads(line)
    except json.JSONDecodeError as error:
        why = f"it is not valid JSON: {error.msg} at column {error.colno}"
        raise _unusable(path, number, why) from None
    except (ValueError, RecursionError) as error:
        raise _unusable(path, number, f"it is not valid JSON: {error}") from None
    if not isinstance(passage, dict):
        raise _unusable(path, number, "it is not a JSON object")
    passage_id, title = passage.get("id", number), passage.get("title", "")
    text = passage.get("text")
    if type(passage_id) not in (str, int) or passage_id == "":
        raise _unusable(path, number, f"its id {passage_id!r} is neither text nor an integer")
    if not isinstance(title, str):
        raise _unusable(path, number, f"its title {title!r} is not text")
    if not isinstance(text, str) or not text.strip():
        raise _unusable(path, number, "it has no text")
    if _SURROGATE.search(f"{passage_id}{title}{text}"):
        raise _unusable(path, number, "it holds half a surrogate pair")
    return str(passage_id), title, text


def _line(passage_id: str, title: str, text: str) -> str:
    passage = {"id": passage_id, "title": title, "text": text}
    return json.dumps(passage, ensure_ascii=False) + "\n"


def _decoded(raw: bytes, path: Path, number: int | None) -> str:
    try:
        return raw.decode("utf-8-sig" if number in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        raise _unusable(path, number, f"it is not UTF-8 at byte {error.start + 1}") from None


def _unusable(path: Path, number: int | None, why: str) -> RecmasError:
    what = "this file" if number is None else "this line"
    return fail(
        "RM123",
        f"{what} is no passage to search: {why}.",
        file=str(path),
        line=number,
        hint="Correct it, or leave it out.",
    )
