"""Protocols: how a data set is asked and how its answers are checked, as versioned YAML files.

The classes are the schema: every key with its type, default and meaning. All models are frozen and
refuse unknown keys.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from recmas_compiler.spec.schema.section import Section, Slug

MAX_SEED: Final = 2**20
MAX_ROLLOUTS: Final = 1024

Names = Annotated[list[str], Field(min_length=1)]
"""Where a record's value may stand, best first; `meta.level` is `level` inside of `meta`."""

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


class CodeSection(Section):
    """Unit tests, in the sandbox."""

    kind: Literal["code"]
    timeout_s: float = Field(default=10.0, gt=0, le=600)
    """Most seconds of one run."""

    memory_mb: int = Field(default=512, ge=16, le=65536)
    """Most memory of one run, in MiB."""


CheckSection = Annotated[
    MathSection | ChoiceSection | ExactSection | F1Section | CodeSection,
    Field(discriminator="kind"),
]


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

    prompt_digest: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = None
    """sha256 of the prompts that published figures were made with; others give a warning."""

    def digest(self) -> str:
        """Return the sha256 of everything that the protocol says."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
