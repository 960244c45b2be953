"""What a message is made of: the form that a link gives it, and which positions go into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Annotated, Final, Literal

from msgspec import Meta

from recmas_runtime.formats.codec import Count, StrictStruct

Carries = Literal["thoughts", "context", "written", "text", "cache"]
RowsOf = Literal["context", "prompt", "thoughts", "written"]

# What may be handed over together, as it lies in a cache: thoughts and texts begin at one place.
KINDS_OF_ROWS: Final[tuple[tuple[RowsOf, ...], ...]] = (
    ("context",),
    ("prompt",),
    ("thoughts",),
    ("written",),
    ("context", "thoughts"),
    ("context", "written"),
    ("prompt", "thoughts"),
    ("prompt", "written"),
)

MAX_EVERY: Final = 1024
MAX_LAYERS: Final = 4096

Layers = tuple[Annotated[int, Meta(ge=0, le=MAX_LAYERS - 1)], ...]


class MessageForm(StrictStruct, frozen=True, kw_only=True, omit_defaults=True):
    """What a link carries. H are hidden states of the sender after its final norm.

    Attributes:
        carries: `thoughts`: H of the latent steps. `context`: H at the positions of the sender's
            prompt, without its slots and without the generation prompt. `written`: H at the tokens
            that the sender writes. These three become vectors outer(inner(H)) in the receiver's
            slot. `text`: what the sender writes stands in the slot as plain text. `cache`: rows of
            the sender's cache come before the receiver's whole prompt, and the slot shows nothing.
        of: For `context`: the tokens whose characters overlap with this field of the prompt,
            wherever it stands; None for all of the prompt.
        every: For `context`: each so many-th of these positions, counted back from the last.
        pool: For `context`: means over as many equal spans of these positions as the sender has
            latent steps.
        max_tokens: Most tokens that the sender writes, where it writes.
        rows: For `cache`: which rows, in the order in which they lie in the sender's cache;
            `context` is the prompt without the generation prompt, `prompt` all of it.
        layers: For `cache`: the layers whose rows are handed over; None for all.
    """

    carries: Carries
    of: str | None = None
    every: Annotated[int, Meta(ge=1, le=MAX_EVERY)] = 1
    pool: bool = False
    max_tokens: Count | None = None
    rows: tuple[RowsOf, ...] = ()
    layers: Layers | None = None

    @property
    def has_vectors(self) -> bool:
        """Whether it goes through the inner and the outer link into a slot."""
        return self.carries in ("thoughts", "context", "written")

    @property
    def needs_context(self) -> bool:
        """Whether it is made of what the sender's prompt has left."""
        return self.carries == "context" or not {"context", "prompt"}.isdisjoint(self.rows)

    @property
    def needs_thoughts(self) -> bool:
        """Whether the sender takes latent steps for it."""
        return self.carries == "thoughts" or "thoughts" in self.rows

    @property
    def needs_text(self) -> bool:
        """Whether the sender writes for it."""
        return self.carries in ("written", "text") or "written" in self.rows

    @property
    def needs_written_states(self) -> bool:
        """Whether the states or rows of written tokens are handed over."""
        return self.carries == "written" or "written" in self.rows

    def fixed_positions(self, latent_steps: int) -> int:
        """Return how many positions it takes at the receiver, those left out that a record decides.

        Written tokens count with the most.
        """
        if self.carries == "thoughts":
            return latent_steps
        written = (self.max_tokens or 0) if self.needs_written_states else 0
        return written + (max(0, latent_steps - 1) if "thoughts" in self.rows else 0)

    def is_sent(self, latent_steps: int) -> bool:
        """Tell whether a sender of so many latent steps has anything to send."""
        return self.carries != "thoughts" or latent_steps > 0


THOUGHTS: Final = MessageForm(carries="thoughts")


def message_spans(form: MessageForm, positions: int, latent_steps: int) -> list[tuple[int, int]]:
    """Return the spans of positions, each of which gives one vector: the mean of its states.

    Thoughts and written tokens give one vector each; so does each position of a context, unless
    `every` or `pool` says otherwise.

    Args:
        positions: How many states there are.
        latent_steps: Of the sender.
    """
    if positions == 0:
        return []
    if form.pool:
        count = min(latent_steps, positions)
        ends = [index * positions // count for index in range(count + 1)]
        return list(pairwise(ends))
    first = (positions - 1) % form.every
    return [(at, at + 1) for at in range(first, positions, form.every)]


def masked_layers(
    num_layers: int, seen_by: Iterable[Iterable[int] | None]
) -> tuple[tuple[int, ...], ...]:
    """Return the layers from which handed rows are hidden, in groups that see the same rows.

    A decoder has one mask for each group. Layers that see all rows are in none.

    Args:
        num_layers: Of the backbone.
        seen_by: For each link that hands rows over on it, the layers that see them; None for all.
    """
    links = list(dict.fromkeys(frozenset(seen) for seen in seen_by if seen is not None))
    groups: dict[tuple[bool, ...], list[int]] = {}
    for layer in range(num_layers):
        sees = tuple(layer in seen for seen in links)
        if not all(sees):
            groups.setdefault(sees, []).append(layer)
    return tuple(tuple(group) for group in groups.values())


def moved_links(
    links: Iterable[tuple[str, str, MessageForm]],
) -> Iterator[tuple[str, str]]:
    """Yield the source and the target of links whose rows may land where they were not computed.

    The rows of a receiver's only such link land at its first positions. There they were computed,
    too, if they are the beginning of what the sender has read, and no rows came before that.
    Thoughts and written tokens lie behind the sender's generation prompt, which `prompt` has.

    Args:
        links: Source, target and form of each.
    """
    handed = [(source, target, form) for source, target, form in links if form.carries == "cache"]
    num_senders = Counter(target for _, target, _ in handed)
    for source, target, form in handed:
        is_beginning = form.rows == ("context",) or form.rows[:1] == ("prompt",)
        if num_senders[target] > 1 or num_senders[source] > 0 or not is_beginning:
            yield source, target
