"""Cross-entropy of the answer agent's text, by record and round.

Shape legend: B records, N target tokens of all records, D width of the agent, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.training_graph.calls import Call
from recmas_runtime.prompts.render import Tokens

# What `supervise: all` gives the rounds before the last one, all together.
EARLIER_ROUNDS_WEIGHT: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class RoundLoss:
    """The cross-entropy of one round.

    Attributes:
        is_exact_B: By record, whether greedy decoding would write the target.
    """

    sum_B: Tensor
    tokens: tuple[int, ...]
    is_exact_B: Tensor


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The cross-entropy of a batch.

    Attributes:
        total: Sum over the answer agent's target tokens, weighted earlier rounds included. A sum,
            so that parts of a batch add up and whoever adds them divides once.
        tokens: Target tokens of the last round: what `total` is divided by.
        per_record_sum: [B], without gradients; adds up to `total`.
        per_record_exact: [B], whether greedy decoding would write the target in the last round, up
            to the token that ends it.
        rounds: Unweighted sum and number of tokens by round.
    """

    total: Tensor
    tokens: int
    per_record_sum: Tensor
    per_record_tokens: Tensor
    per_record_exact: Tensor
    rounds: Mapping[int, tuple[Tensor, int]]

    @property
    def mean(self) -> Tensor:
        """The loss that training lowers."""
        return self.total / self.tokens


def turn_loss(
    backbone: TorchBackbone,
    turns_TD: Sequence[Tensor],
    calls: Sequence[Call],
    *,
    checkpointed: bool,
) -> RoundLoss:
    """Return the loss of target texts.

    Args:
        turns_TD: By record, hidden states from the position before the first target token on.
        checkpointed: Compute the logits again for their gradients instead of keeping them.
    """
    tokens = tuple(call.num_target_tokens for call in calls)
    # A token is seen from the position before it; from the last one there is nothing to see.
    states_ND = torch.cat([turn_TD[:-1] for turn_TD in turns_TD])
    targets_N = torch.tensor([i for call in calls for i in _target_ids(call)])

    def run(states_ND: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = backbone.logits(states_ND)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        wanted_N = targets_N.to(logits_NV.device)
        is_first_N = logits_NV.detach().argmax(-1) == wanted_N
        return cross_entropy(logits_NV, wanted_N, reduction="none"), is_first_N

    if checkpointed and torch.is_grad_enabled():
        found = checkpoint(run, states_ND, use_reentrant=False, preserve_rng_state=False)
    else:
        found = run(states_ND)
    losses, is_first = (torch.split(values_N, list(tokens)) for values_N in found)
    said = [_num_said(call, backbone.eos_token_ids) for call in calls]
    # Each token is the likeliest after the target's own tokens before it, so greedy decoding, which
    # begins with the first of them, writes them all; and if one is not, it goes another way there.
    exact = [is_first_T[:num].all() for is_first_T, num in zip(is_first, said, strict=True)]
    return RoundLoss(
        sum_B=torch.stack([losses_T.sum() for losses_T in losses]),
        tokens=tokens,
        is_exact_B=torch.stack(exact),
    )


def weighted_loss(final: RoundLoss, *, last_round: int, earlier: Mapping[int, RoundLoss]) -> Loss:
    """Return the loss of the last round, with a small part of that of earlier ones."""
    sum_B = final.sum_B
    for loss in earlier.values():
        sum_B = sum_B + EARLIER_ROUNDS_WEIGHT / len(earlier) * loss.sum_B
    return Loss(
        total=sum_B.sum(),
        tokens=sum(final.tokens),
        per_record_sum=sum_B.detach(),
        per_record_tokens=torch.tensor(final.tokens),
        per_record_exact=final.is_exact_B,
        rounds={
            round_: (loss.sum_B.detach().sum(), sum(loss.tokens))
            for round_, loss in {**earlier, last_round: final}.items()
        },
    )


def _target_ids(call: Call) -> tuple[int, ...]:
    last = call.items[-1]
    assert isinstance(last, Tokens), "the target is text"
    return last.ids[-call.num_target_tokens :]


def _num_said(call: Call, ends: Sequence[int]) -> int:
    """Return how many target tokens an answer has; what a template writes behind its end is not."""
    ids = _target_ids(call)
    return next((place + 1 for place, i in enumerate(ids) if i in ends), len(ids))
