"""What a bundle carries beside its engines: passages to search, and receipts of trained links.

Passages are written as JSON lines of one form. A receipt says of the training that made links what
it was made from.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from recmas_compiler.ir.ops import SEARCH_CORPUS
from recmas_compiler.links.link_set import RECEIPT_NAME
from recmas_compiler.links.trained import ReceiptError, read_receipt
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import sha256_of

RECEIPTS_FOLDER: Final = "training"

_TEXT_SUFFIXES: Final = (".md", ".txt")

# JSON can spell what UTF-8 cannot.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

# Longer than any passage that fits into a prompt; bounds what one bad file can take.
_MAX_PASSAGE_BYTES: Final = 2**24


def corpus_lines(corpus: Path) -> Iterator[str]:
    """Yield a line of JSON `{id, title, text}` per passage, each with its line break.

    A corpus is a file of JSON lines, each with a `text` and optionally a `title` and an `id`, or a
    folder whose `.txt` and `.md` files, sub-folders included, are passages. Blank lines and empty
    files are skipped.

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


def corpus_digest(corpus: Path) -> str:
    """Return the sha256 of the passages as the bundle will have them, all of them checked."""
    digest = hashlib.sha256()
    for line in corpus_lines(corpus):
        digest.update(line.encode())
    return digest.hexdigest()


def corpus_bytes(corpus: Path) -> int:
    """Return the bytes of a corpus as it is found; in the bundle it takes about as many."""
    files = corpus.rglob("*") if corpus.is_dir() else [corpus]
    return sum(file.stat().st_size for file in files if file.is_file())


def write_corpus(corpus: Path, folder: Path) -> None:
    """Write the passages into a bundle."""
    path = folder / SEARCH_CORPUS
    path.parent.mkdir()
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(corpus_lines(corpus))


def receipts_of(link_files: Iterable[Path]) -> tuple[Path, ...]:
    """Return the training receipts that hold the hash of at least one of the files, in order."""
    digests: dict[Path, set[str]] = {}
    for file in link_files:
        digests.setdefault(file.parent, set()).add(sha256_of(file))
    found = []
    for folder, used in digests.items():
        try:
            receipt = read_receipt(folder / RECEIPT_NAME)
        except ReceiptError:
            continue  # it confirms nothing; where trained links are looked for, that is said
        digests_then = () if receipt is None else (e.sha256 for e in receipt.links.values())
        if not used.isdisjoint(digests_then):
            found.append(folder / RECEIPT_NAME)
    return tuple(found)


def write_receipts(receipts: Iterable[Path], folder: Path) -> None:
    """Copy receipts into a bundle: `training/receipt.json`, then `receipt-2.json` and so on."""
    for number, receipt in enumerate(receipts, start=1):
        name = RECEIPT_NAME if number == 1 else f"receipt-{number}.json"
        target = folder / RECEIPTS_FOLDER / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(receipt, target)


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
