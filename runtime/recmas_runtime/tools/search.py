"""The tool `search`: what a search is, and an index over a local corpus."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np

from recmas_runtime.core.errors import fail

# Words that questions are full of and that tell passages apart least.
_STOP_WORDS: Final = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "by",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "how",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "that",
        "the",
        "their",
        "there",
        "these",
        "this",
        "those",
        "to",
        "was",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
    ]
)


class SearchFailedError(Exception):
    """A search that is not possible here (`refused`) or went wrong (`error`), told to the model."""

    def __init__(self, status: Literal["refused", "error"], text: str) -> None:
        super().__init__(text)
        self.status: Literal["refused", "error"] = status


@dataclass(frozen=True)
class Passage:
    """One thing that was found.

    Attributes:
        source: Where it is from: a passage's `id`, or a web address.
        title: Its title; may be empty.
        text: Its text.
    """

    source: str
    title: str
    text: str


class Search(Protocol):
    """Finds passages for a query."""

    def find(self, query: str, *, timeout_s: float) -> Sequence[Passage]:
        """Return the best passages, best first.

        Raises:
            SearchFailedError: There is nothing to return.
            TimeoutError: It took longer than `timeout_s` seconds.
        """


class LocalSearch:
    """Ranks the passages of a corpus by BM25; the same query always finds the same.

    Args:
        corpus: JSON lines `{id, title, text}`; `title` may be left out.
        top_k: Most passages to return. Passages that share no word with the query are not returned.

    Raises:
        RecmasError: bm25s is not installed (RM201), or the corpus cannot be used (RM404).
    """

    def __init__(self, corpus: Path, *, top_k: int) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise fail(
                "RM201",
                "bm25s is not installed, which `search` over a corpus needs",
                hint="Install it with `pip install recmas[search]`.",
            ) from error
        self._passages = _read_corpus(corpus)
        self._top_k = top_k
        tokens = [_words(f"{passage.title} {passage.text}") for passage in self._passages]
        self._words = frozenset().union(*tokens)
        # Without a word in the whole corpus there is nothing to index.
        self._index = None
        if self._words:
            self._index = bm25s.BM25(backend="numpy", csc_backend="numpy")
            self._index.index(tokens, show_progress=False)

    def find(self, query: str, *, timeout_s: float) -> Sequence[Passage]:
        """Return the best passages; among equals, the one that comes first in the corpus."""
        words = [word for word in _words(query) if word in self._words]
        if self._index is None or not words:
            return ()
        scores = self._index.get_scores(words)
        best = np.argsort(-scores, kind="stable")[: self._top_k]
        return tuple(self._passages[i] for i in best if scores[i] > 0)


def passages_text(passages: Sequence[Passage], *, max_chars: int) -> str:
    """Return the passages as a model reads them, each with its fair share of `max_chars`."""
    if not passages:
        return "nothing found"
    gap = "\n\n"
    share = max(1, (max_chars + len(gap)) // len(passages) - len(gap))
    return gap.join(
        shortened(_heading(number, passage) + passage.text.strip(), share)
        for number, passage in enumerate(passages, start=1)
    )


def shortened(text: str, max_chars: int) -> str:
    """Return the text, or its beginning within `max_chars` with a note of how much was left out."""
    if len(text) <= max_chars:
        return text
    # The note counts itself out of the room; its length hangs on the number in it.
    kept = max(0, max_chars - len(_left_out(len(text))))
    return text[:kept] + _left_out(len(text) - kept)


def _left_out(count: int) -> str:
    return f" [... {count} characters left out]"


def _heading(number: int, passage: Passage) -> str:
    title = f"{passage.title} " if passage.title else ""
    return f"[{number}] {title}({passage.source})\n"


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _STOP_WORDS]


def _read_corpus(corpus: Path) -> tuple[Passage, ...]:
    try:
        with corpus.open(encoding="utf-8") as lines:
            return tuple(
                _read_passage(line, corpus, number)
                for number, line in enumerate(lines, start=1)
                if line.strip()
            )
    except (OSError, UnicodeDecodeError) as error:
        raise fail(
            "RM404",
            f"the corpus cannot be read: {error}",
            file=str(corpus),
            hint="Build the bundle again from a corpus of UTF-8 JSON lines.",
        ) from error


def _read_passage(line: str, corpus: Path, number: int) -> Passage:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return Passage(str(entry.get("id", number)), str(entry.get("title") or ""), entry["text"])
    raise fail(
        "RM404",
        "a passage of the corpus is no JSON object with a `text`",
        file=str(corpus),
        line=number,
        hint="Write each line as an object with id, title and text.",
    )
