"""What textual gradients gave: prompts, what became of every proposal, and what it took."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

from recmas_compiler.text_gradients.prompts import with_texts
from recmas_runtime.core.text import counted
from recmas_runtime.formats.plan import Plan
from recmas_runtime.running.system import System

Fate = Literal[
    "kept", "taken back", "unchanged", "no tags", "empty", "fields", "spec", "too long", "engine"
]
# What a fate means, for people.
FATES: Final[Mapping[Fate, str]] = {
    "kept": "in use",
    "taken back": "fewer validation records were right with it",
    "unchanged": "the text that it had",
    "no tags": "the reply had no improved text between its tags",
    "empty": "an empty text",
    "fields": "its fields and slots were other ones",
    "spec": "the spec with it does not pass the check",
    "too long": "a record's prompt with it is over the bundle's limit",
    "engine": "the request for it was over what the backward engine reads",
}


_STOPPED: Final = {
    "steps": "all steps were made",
    "tokens": "stopped at `max_tokens`",
    "seconds": "stopped at `max_seconds`",
    "interrupted": "interrupted, --resume goes on",
}


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run took, resumed parts together.

    Attributes:
        forward_tokens: Read and written by the text system, on training and validation records.
        backward_tokens: Read and written by the backward engine: losses, gradients, updates.
        calls: Of the backward engine.
        untold_calls: Those of them whose tokens the endpoint did not tell; they are not counted.
    """

    forward_tokens: int = 0
    backward_tokens: int = 0
    calls: int = 0
    untold_calls: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.forward_tokens + self.backward_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{name: getattr(self, name) + getattr(other, name) for name in asdict(self)})


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A text that the optimiser wrote for one parameter, and what became of it.

    Attributes:
        text: The whole reply where it had no tags.
        why: Of `spec`, `too long` and `engine`, the message.
    """

    parameter: str
    fate: Fate
    text: str
    has_tags: bool = True
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step.

    Attributes:
        records: Ids of its records.
        num_wrong: Those answered wrong, which gave the gradients.
        num_failed: Those that could not be asked.
        num_cut: Wrong ones whose gradients were over what the backward engine reads.
        validation: Share of validation records that were right with its proposals; None where
            there was nothing to measure.
    """

    number: int
    records: tuple[str, ...]
    num_wrong: int
    num_failed: int
    num_cut: int
    proposals: tuple[Proposal, ...]
    validation: float | None
    spent: Spent


@dataclass(frozen=True, kw_only=True)
class LinkCost:
    """What a loop of `recmasc train` took, beside which textual gradients are told."""

    trainable_parameters: int
    steps: int
    seconds: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class TextGradients:
    """The outcome of a run.

    Attributes:
        start: The texts before, by parameter.
        texts: The texts now, those of the best step.
        baseline: `text` or `text@N`, whose prompts these are.
        rewrites: What a parameter is: instructions, or a whole prompt.
        start_validation: Share of validation records right before; None without any.
        validation: With the texts now.
        spec_file: The spec with these prompts; None if the run was stopped before the first step.
        has_relative_paths: Whether it names files from where the bundle's spec stood.
        links: What a training of links took, by loop, where one was named.
        stopped: `steps`, `tokens`, `seconds`, or `interrupted`.
        engine: What criticised, in words.
    """

    start: Mapping[str, str]
    texts: Mapping[str, str]
    baseline: str
    rewrites: str
    start_validation: float | None
    validation: float | None
    num_records: int
    num_validation: int
    steps: tuple[StepReport, ...]
    spent: Spent
    engine: str
    stopped: str
    spec_file: Path | None
    has_relative_paths: bool
    links: Mapping[str, LinkCost] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """Whether steps are left, which `resume` would make."""
        return self.stopped == "interrupted"

    @property
    def fates(self) -> Mapping[Fate, int]:
        """How many proposals there were of each fate, in the order of `FATES`."""
        found = Counter(one.fate for step in self.steps for one in step.proposals)
        return {fate: found[fate] for fate in FATES if found[fate]}

    @property
    def step_seconds(self) -> float:
        """Median seconds per step; None of the first measurement is in it. 0 without a step."""
        return median(step.spent.seconds for step in self.steps) if self.steps else 0.0

    @property
    def digest(self) -> str:
        """The sha256 of all texts."""
        return hashlib.sha256(json.dumps(dict(self.texts), sort_keys=True).encode()).hexdigest()

    def plan(self, plan: Plan) -> Plan:
        """Return the plan that was optimised, with these prompts."""
        return with_texts(plan, self.texts, rewrites=self.rewrites)

    def system(self, base: System) -> System:
        """Return the text system with these prompts, on the engines of the latent one."""
        return base.with_plan(self.plan(base.plan)).baseline(self.baseline)

    def to_json(self) -> dict[str, Any]:
        """Return everything, for programs."""
        return {
            "stopped": self.stopped,
            "engine": self.engine,
            "baseline": self.baseline,
            "steps": [asdict(step) for step in self.steps],
            "spent": {**asdict(self.spent), "tokens": self.spent.tokens},
            "fates": dict(self.fates),
            "records": self.num_records,
            "validation_records": self.num_validation,
            "start_validation": self.start_validation,
            "validation": self.validation,
            "start": dict(self.start),
            "texts": dict(self.texts),
            "links": {name: asdict(one) for name, one in self.links.items()},
            "step_seconds": self.step_seconds,
            "spec": None if self.spec_file is None else str(self.spec_file),
        }

    def to_text(self) -> str:
        """Return what people read: the budget, the fates, and the prompts that changed."""
        spent = self.spent
        lines = [
            f"TextGrad: {counted(len(self.steps), 'step')} on {self.num_records} records by "
            f"{self.engine}; {spent.tokens:,} tokens ({spent.forward_tokens:,} of the system, "
            f"{spent.backward_tokens:,} in {counted(spent.calls, 'backward call')}), "
            f"{spent.seconds:.0f} s; {_STOPPED[self.stopped]}."
        ]
        for count, what in (
            (sum(step.num_failed for step in self.steps), "could not be asked"),
            (sum(step.num_cut for step in self.steps), "had gradients over what the engine reads"),
        ):
            if count:
                lines.append(f"{counted(count, 'record')} {what}.")
        if spent.untold_calls:
            lines.append(
                f"The endpoint did not tell the tokens of {counted(spent.untold_calls, 'call')}, "
                "which are not counted."
            )
        lines += [
            f"Links, {name}: {counted(one.steps, 'step')}, {one.tokens:,.0f} tokens with a loss, "
            f"{one.seconds:.0f} s, {one.trainable_parameters:,} parameters."
            for name, one in self.links.items()
        ]
        if self.fates:
            fates = "; ".join(
                f"{count} {fate} ({FATES[fate]})" for fate, count in self.fates.items()
            )
            bare = sum(not one.has_tags for step in self.steps for one in step.proposals)
            lines.append(f"Proposals: {fates}.")
            if bare:
                lines.append(f"{counted(bare, 'proposal')} had no tags around the new text.")
        if self.start_validation is not None and self.validation is not None:
            lines.append(
                f"Validation, {self.num_validation} records: {self.start_validation:.1%} right "
                f"before, {self.validation:.1%} now."
            )
        changed = [name for name in self.texts if self.texts[name] != self.start[name]]
        lines += [f"{name} is now: {self.texts[name]}" for name in changed]
        if not changed:
            lines.append("No prompt has changed.")
        if self.spec_file is not None:
            lines.append(f"Wrote {self.spec_file}.")
            if self.has_relative_paths:
                lines.append(
                    "Relative paths in it are those of the spec that the bundle was built from: "
                    "put it beside that one."
                )
        return "\n".join(lines)
