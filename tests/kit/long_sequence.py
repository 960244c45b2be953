"""Cache rows that agents hand over, said without a cache: one long sequence, run as a whole.

A receiver's sequence holds everything that was ever computed for the rows it was handed: a copy of
the sender's whole sequence for each piece, at the positions where the piece lands. A mask lets
every copy see only itself, and the receiver only the rows that it was handed. So nothing is cut
from a cache and no key is turned.

Shape legend: N all positions of the long sequence, T those of the agent's own cache, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recmas_compiler.backbones.torch_model import TorchBackbone


@dataclass(frozen=True, kw_only=True)
class LongSequence:
    """What an agent has in its cache, and everything that this was computed from.

    Attributes:
        places_N: The position that each input is at; below 0 for some that nobody was handed.
        sees_NN: Which inputs each input sees, sliding windows apart.
        members: Of these inputs, those of the agent's own cache in order; the i-th is at place i.
    """

    embeds_ND: Tensor
    places_N: Tensor
    sees_NN: Tensor
    members: tuple[int, ...]

    @classmethod
    def behind(cls, pieces: Sequence[Piece], embeds_TD: Tensor) -> LongSequence:
        """Return the sequence of a prompt [T, D] that comes behind pieces of other sequences."""
        embeds, places, sees = [embeds_TD[:0]], [torch.zeros(0, dtype=torch.long)], []
        members: list[int] = []
        for piece in pieces:
            whole, num_before = piece.sequence, sum(map(len, embeds))
            offset = len(members) - piece.first
            members += [num_before + m for m in whole.members[piece.first : piece.last]]
            embeds.append(whole.embeds_ND)
            places.append(whole.places_N + offset)
            sees.append(whole.sees_NN)
        handed = cls(
            embeds_ND=torch.cat(embeds),
            places_N=torch.cat(places),
            sees_NN=torch.block_diag(*sees).bool() if sees else torch.zeros(0, 0).bool(),
            members=tuple(members),
        )
        return handed.grown(embeds_TD)

    def grown(self, embeds_TD: Tensor) -> LongSequence:
        """Return the sequence with inputs [T, D] behind it; each sees all of the agent's cache."""
        before, count, first = len(self.embeds_ND), len(embeds_TD), len(self.members)
        sees_NN = torch.zeros(before + count, before + count).bool()
        sees_NN[:before, :before] = self.sees_NN
        sees_NN[before:, list(self.members)] = True
        sees_NN[before:, before:] = torch.ones(count, count).tril().bool()
        return LongSequence(
            embeds_ND=torch.cat([self.embeds_ND, embeds_TD]),
            places_N=torch.cat([self.places_N, torch.arange(first, first + count)]),
            sees_NN=sees_NN,
            members=(*self.members, *range(before, before + count)),
        )

    def states(self, backbone: TorchBackbone) -> Tensor:
        """Return the hidden states [T, D] at what is in the agent's own cache."""
        given = {} if len(self.members) == len(self.embeds_ND) else self._masks(backbone)
        out = backbone.body(inputs_embeds=self.embeds_ND[None], use_cache=False, **given)
        states_TD: Tensor = out.last_hidden_state[0, list(self.members)]
        return states_TD

    def _masks(self, backbone: TorchBackbone) -> dict[str, object]:
        """Return the arguments that say where inputs are and what they see, in every layer."""
        config = backbone.model.config.get_text_config()
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", [])
        distance_NN = self.places_N[:, None] - self.places_N[None]
        near_NN = self.sees_NN & (distance_NN < window) if window else self.sees_NN
        masks = {
            "full_attention": _additive(self.sees_NN),
            "sliding_attention": _additive(near_NN),
        }
        if len(set(kinds or [])) > 1:
            mask: object = {kind: masks[kind] for kind in set(kinds)}
        else:
            (kind,) = set(kinds or ["sliding_attention"])
            mask = masks[kind]
        return {"attention_mask": mask, "position_ids": self.places_N[None]}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows `first` to `last` of what an agent has in its cache."""

    sequence: LongSequence
    first: int
    last: int


def _additive(sees_NN: Tensor) -> Tensor:
    nothing = torch.zeros(sees_NN.shape)
    return nothing.masked_fill(~sees_NN, torch.finfo(torch.float32).min)[None, None]
