"""What the answer agent is told instead of its messages, to see what the messages are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

Control = Literal["none", "null", "shuffled", "mean"]


def controlled(messages_ME: Sequence[Tensor], control: Control) -> list[Tensor]:
    """Return what a slot gets under a control, per record of a batch.

    - `none`: the record's own message;
    - `null`: nothing;
    - `shuffled`: the message of the next record, the last one gets the first one's;
    - `mean`: for all records the same, position by position the mean over the messages that have
      the position. The record's own message is one of them, so in small batches this says a good
      part of what it says, and what `none` gains over it understates communication.

    Args:
        messages_ME: Per record; they may differ in length.
        control: Which one. `shuffled` needs two records or more.
    """
    return CONTROLS[control](messages_ME)


def _own(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    return list(messages_ME)


def _nothing(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    return [message_ME[:0] for message_ME in messages_ME]


def _next(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    assert len(messages_ME) > 1, "one record has no other record's message"
    return [*messages_ME[1:], messages_ME[0]]


def _mean(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    longest = max(len(message_ME) for message_ME in messages_ME)
    means_1E = [
        torch.stack([m[i] for m in messages_ME if len(m) > i]).mean(dim=0, keepdim=True)
        for i in range(longest)
    ]
    mean_ME = torch.cat(means_1E) if means_1E else messages_ME[0]
    return [mean_ME] * len(messages_ME)


CONTROLS: Final = MappingProxyType[Control, Callable[[Sequence[Tensor]], list[Tensor]]](
    {"none": _own, "null": _nothing, "shuffled": _next, "mean": _mean}
)
