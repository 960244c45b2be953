"""The schema of `answer`: who writes the text and how, its early begin, and its tools."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from recmas_compiler.spec.schema.section import FilePath, Given, Section, Slug


class StopSection(Section):
    """When the recursion may end before its last round."""

    cosine: float = Field(gt=0.0, le=1.0)
    """A record is settled once every message of a round has at least this mean cosine to the same
    link's message of the round before; its next round is then its last. 0.999 is a start."""


class SearchSection(Section):
    """The tool `search`; exactly one of `corpus` and `backend`."""

    corpus: Given[FilePath] = None
    """Passages to search: a file of JSON lines `{id, title, text}` or a folder of `.txt` and `.md`
    files, relative to the spec. It is copied into the bundle."""

    backend: Given[Literal["tavily"]] = None
    """A web service instead of a corpus: `tavily`, with its key in `TAVILY_API_KEY`."""

    top_k: int = Field(default=3, ge=1, le=50)
    """Passages that a search returns."""


class PythonSection(Section):
    """The tool `python`: code that the model wrote, in a sandbox or not at all."""

    memory_mb: int = Field(default=256, ge=16, le=65_536)
    """Most memory of the program, in MiB."""


class ToolsSection(Section):
    """What the answer agent may call while it writes, and the bounds of it."""

    search: Given[SearchSection] = None
    """Lets it search: `<search>words</search>`."""

    python: Given[PythonSection] = None
    """Lets it run programs: `<python>code</python>`. `{}` takes the defaults."""

    ask: bool = False
    """Lets it ask a human: `<ask>question</ask>`."""

    functions: tuple[Slug, ...] = Field(default=(), strict=False, max_length=32)
    """Functions that the caller of the runtime provides, by name: `<NAME>argument</NAME>`."""

    max_calls: int = Field(default=4, ge=1, le=64)
    """Most calls of one answer; later ones are answered with a refusal."""

    timeout_s: float = Field(default=10.0, gt=0.0, le=600.0)
    """Most seconds of one call."""

    max_result_chars: int = Field(default=2000, ge=1, le=100_000)
    """Most characters of a result; a longer one says how much was left out."""

    @property
    def are_on(self) -> bool:
        """Whether there is any tool."""
        return bool(self.search or self.python or self.ask or self.functions)


class AnswerSection(Section):
    """Which agent writes the text, and how its tokens are chosen."""

    agent: Slug
    """The agent that writes the answer in the last round."""

    max_new_tokens: int = Field(default=256, ge=1, le=32_768)
    """Most tokens of an answer."""

    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    """0 takes the likeliest token; higher is more varied."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the likeliest tokens that together have this probability."""

    top_k: int = Field(default=0, ge=0, le=1_000_000)
    """Sample from the k likeliest tokens; 0 keeps all."""

    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Drop tokens below this share of the likeliest one's probability."""

    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    """Above 1 makes tokens that were already written less likely."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the first record of a batch; record i uses seed + i."""

    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(
        default=(), strict=False, max_length=16
    )
    """Texts that end the answer; they are not part of it."""

    stop_when: Given[StopSection] = None
    """Early end of the recursion; without it all rounds run."""

    tools: Given[ToolsSection] = None
    """Tools of the answer agent; without it there are none."""
