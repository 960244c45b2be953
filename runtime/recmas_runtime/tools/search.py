"""The tool `search`: over a local corpus with BM25, or over the web with Tavily."""

from __future__ import annotations

import http.client
import json
import os
import re
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np

from recmas_runtime.core.errors import fail, how_to_install

KEY_VARIABLE: Final = "TAVILY_API_KEY"
# https://docs.tavily.com/api-reference/introduction
TAVILY_ENDPOINT: Final = "https://api.tavily.com/search"
_MAX_REPLY_BYTES: Final = 4 << 20
_HIDDEN: Final = "***"  # stands for the key, should the service repeat it

# Words that questions are full of and that tell passages apart least.
_COMMON_WORDS: Final = (
    "a an and are as at be been by did do does for from had has have how in is it its of on "
    "or that the their there these this those to was were what when where which who whom "
    "whose why will with"
)
_STOP_WORDS: Final = frozenset(_COMMON_WORDS.split())

# Of scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese and
# Japanese; and of Korean, whose words carry their particles.
_UNSPACED: Final = re.compile(
    "([\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u19e0-\u19ff\u3005-\u3007\u3040-\u318f"
    "\u31a0-\u31ff\u3400-\u9fff\ua960-\ua97f\ua9e0-\ua9ff\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]+)"
)


class SearchFailedError(Exception):
    """A search that is not possible here (`refused`) or failed (`error`); the model reads why."""

    def __init__(self, status: Literal["refused", "error"], text: str) -> None:
        super().__init__(text)
        self.status: Literal["refused", "error"] = status


@dataclass(frozen=True)
class Passage:
    """One thing that was found; its source is a passage's `id`, or a web address."""

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

    The corpus is JSON lines `{id, title, text}`; `title` may be left out. At most `top_k` passages
    are returned, and none that shares no word with the query. Where a script has no spaces between
    words, pairs of characters stand for them.

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
                hint=how_to_install("search"),
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
        words = [word for word in _words(query, asked=True) if word in self._words]
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
    texts = []
    for number, passage in enumerate(passages, start=1):
        title = f"{passage.title} " if passage.title else ""
        text = f"[{number}] {title}({passage.source})\n{passage.text.strip()}"
        texts.append(shortened(text, share))
    return gap.join(texts)


def shortened(text: str, max_chars: int) -> str:
    """Return the text, or its beginning within `max_chars` with a note of how much was left out."""
    if len(text) <= max_chars:
        return text
    # The note counts itself out of the room; its length hangs on the number in it.
    kept = max(0, max_chars - len(_left_out(len(text))))
    return text[:kept] + _left_out(len(text) - kept)


def _left_out(count: int) -> str:
    return f" [... {count} characters left out]"


def _words(text: str, *, asked: bool = False) -> list[str]:
    """Return what a text is found by: its words, and pairs of characters where none end words.

    A query (`asked`) has single characters only where they stand alone.
    """
    # One form of what is written in several ways: case, width, accents as characters of their own.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = []
    for word in _runs(text):
        for index, part in enumerate(_UNSPACED.split(word)):
            if index % 2 == 0:
                words += [part] if part and part not in _STOP_WORDS else []
            else:
                words += map("".join, pairwise(part))
                words += part if not asked or len(part) == 1 else ""
    return words


def _runs(text: str) -> list[str]:
    """Return the runs of letters, digits and the marks above, below and around letters."""
    if not text.isascii():
        # Vowels of many scripts are marks, which no class of `re` has.
        text = "".join(
            c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else " " for c in text
        )
        return text.split()
    return re.findall(r"\w+", text)


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


@dataclass(frozen=True)
class TavilySearch:
    """Searches the web with Tavily."""

    top_k: int
    endpoint: str = TAVILY_ENDPOINT

    def find(self, query: str, *, timeout_s: float) -> Sequence[Passage]:
        """Return what the service found. The key from the environment goes into a header only."""
        key = _tavily_key()
        request = urllib.request.Request(  # noqa: S310 - the address is ours
            self.endpoint,
            data=json.dumps({"query": query, "max_results": self.top_k}).encode(),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
            method="POST",
        )
        try:
            with _OPENER.open(request, timeout=timeout_s) as reply:
                body = reply.read(_MAX_REPLY_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = _HTTP_MEANINGS.get(error.code, "the service refused the search")
            raise SearchFailedError("error", f"{said} (HTTP {error.code})") from None
        except TimeoutError:
            raise  # the toolbox says how long it waited
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise TimeoutError from None
            said = f"the service cannot be reached: {getattr(error, 'reason', error)}"
            raise SearchFailedError("error", said.replace(key, _HIDDEN)) from None
        return tuple(
            Passage(
                *(text.replace(key, _HIDDEN) for text in (found.source, found.title, found.text))
            )
            for found in _read_reply(body)[: self.top_k]
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: urllib would send the key along to wherever they lead."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER: Final = urllib.request.build_opener(_NoRedirects)

_HTTP_MEANINGS: Final[Mapping[int, str]] = {
    400: "the service did not accept the query",
    401: "the service does not know the key in TAVILY_API_KEY",
    429: "too many searches in a short time",
    432: "the key's plan is used up",
    433: "the key's pay-as-you-go limit is used up",
}


def _tavily_key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise SearchFailedError(
            "refused", f"web search is not set up: the environment has no {KEY_VARIABLE}"
        )
    # A header with other characters makes http.client raise an error that shows the key.
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise SearchFailedError("refused", f"web search is not set up: {KEY_VARIABLE} is not a key")
    return key


def _read_reply(body: bytes) -> Sequence[Passage]:
    if len(body) > _MAX_REPLY_BYTES:
        raise SearchFailedError("error", "the service's reply is too long")
    try:
        results = json.loads(body)["results"]
        return [Passage(str(r["url"]), str(r["title"]), str(r["content"])) for r in results]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise SearchFailedError("error", "the service's reply has an unknown form") from None
