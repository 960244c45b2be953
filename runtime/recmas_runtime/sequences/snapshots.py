"""Snapshots of layer states while a plan runs: where they are made, and what may begin with them.

A state cannot be cut back to the end of a prompt's beginning, as rows can. So the prompt runs in
parts, and the states are copied where one of the later prompts that the plan names parts from it.
Each row of a snapshot knows the tokens that it stands behind: it is restored for a prompt that
begins with these tokens, over rows that hold them, and for no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from recmas_runtime.formats.plan import Plan, PrefillStep, slot_positions
from recmas_runtime.prompts.render import Prompt, PromptSource, common_prefix
from recmas_runtime.sequences.sequence_batch import (
    MIN_SHARED_PREFIX_FRACTION,
    SavedRow,
    SequenceBatch,
)

# The last token before a text may be written as one with the first of the text.
_TOKENS_A_TEXT_MAY_CHANGE: Final = 1


@dataclass(kw_only=True)
class Snapshots:
    """The snapshots of one batch of records.

    Attributes:
        prompts: As the executor gets them; a text that is not written yet leaves its slot empty.
    """

    plan: Plan
    prompts: PromptSource
    num_records: int
    _saved: dict[str, list[SavedRow | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._slots = slot_positions(self.plan)

    def take(
        self,
        step: PrefillStep,
        source: SequenceBatch,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        stops: Mapping[str, Sequence[int]],
    ) -> list[SavedRow | None]:
        """Return what each prompt of a step may begin with, None for those that run whole.

        What no later step restores, or this one will replace, is forgotten.

        Args:
            source: Whose rows are kept or copied.
            prompts: Leading token ids of each.
            lengths: All positions of each.
            stops: Where the states of each are to be saved; nothing may begin behind that.
        """
        # Nothing is there where none is planned, or where an early exit has left it out.
        saved = self._saved.get(step.restore or "", [])
        for name in self._saved.keys() - (self._needed_behind(step) - set(step.snapshots)):
            del self._saved[name]
        found: list[SavedRow | None] = []
        for row, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
            first_stop = min((at[row] for at in stops.values() if at[row]), default=length - 1)
            usable = [
                entry
                for place in self._sources(step, row, len(saved))
                if (entry := saved[place]) is not None
                and entry.ids == tuple(ids[: len(entry.ids)])
                and entry.ids == source.prefixes[place][: len(entry.ids)]
                and len(entry.ids) <= min(first_stop, length - 1)
            ]
            found.append(max(usable, key=lambda entry: len(entry.ids), default=None))
        return found

    def stops(
        self, step: PrefillStep, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> dict[str, list[int]]:
        """Return how many positions of each row a snapshot is to stand behind, 0 for none.

        Snapshots that no row needs are left out.

        Args:
            prompts: Leading token ids of the step's prompts.
            lengths: All positions of each.
        """
        wanted = {name: self._stops(step, name, prompts, lengths) for name in step.snapshots}
        return {name: stops for name, stops in wanted.items() if any(stops)}

    def _stops(
        self,
        step: PrefillStep,
        name: str,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
    ) -> list[int]:
        shared: list[list[int]] = [[] for _ in prompts]
        for later in self._users(step, name):
            for row, prompt in enumerate(self._later_prompts(later)):
                ids, length = self._known(later, row, prompt)
                common = {
                    place: common_prefix(prompts[place], ids)
                    for place in self._sources(later, row, len(prompts))
                }
                place = max(common, key=common.__getitem__)
                # The last position always runs: its hidden state is what comes next.
                count = min(common[place], length - 1, lengths[place] - 1)
                least = 1 if later.reuse_prefix else MIN_SHARED_PREFIX_FRACTION * length
                if count >= least:
                    shared[place].append(count)
        return [min(counts, default=0) for counts in shared]

    def _users(self, step: PrefillStep, name: str) -> list[PrefillStep]:
        """Return the steps that restore a snapshot of this step, before another replaces it."""
        users: list[PrefillStep] = []
        for later in self._prefills_behind(step):
            users += [later] if later.restore == name else []
            if name in later.snapshots:
                break
        return users

    def _later_prompts(self, step: PrefillStep) -> list[Prompt]:
        return [
            self.prompts(b, agent, variant, {})
            for agent, variant in zip(step.agents, step.variants, strict=True)
            for b in range(self.num_records)
        ]

    def _known(self, step: PrefillStep, row: int, prompt: Prompt) -> tuple[tuple[int, ...], int]:
        """Return the leading ids of a prompt that is still to come, and how long it is at least."""
        agent = step.agents[row // self.num_records]
        variant = step.variants[row // self.num_records]
        length = prompt.num_positions(self._slots.get((agent, variant), {}))
        links = (self.plan.links[m.link] for m in step.messages if m.agent == agent)
        ids = prompt.leading_ids
        if any(link.carries == "text" for link in links):
            ids = ids[:-_TOKENS_A_TEXT_MAY_CHANGE]
        return ids, length

    def _sources(self, step: PrefillStep, row: int, num_sources: int) -> range:
        """Return the rows of a snapshot that one of a step that restores it may begin with."""
        if step.reuse_prefix:
            return range(row, min(row + 1, num_sources))
        return range(row % self.num_records, num_sources, self.num_records)

    def keep(self, saved: Mapping[str, list[SavedRow | None]]) -> None:
        """Hold what a step has saved."""
        self._saved.update(saved)

    def _needed_behind(self, step: PrefillStep) -> set[str | None]:
        return {later.restore for later in self._prefills_behind(step)}

    def _prefills_behind(self, step: PrefillStep) -> list[PrefillStep]:
        later = self.plan.steps[self.plan.steps.index(step) + 1 :]
        return [other for other in later if isinstance(other, PrefillStep)]
