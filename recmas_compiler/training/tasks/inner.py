"""The inner stage: an agent's hidden states become the embeddings of what it should think next.

Shape legend: N target tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.links.aligned import align_inner
from recmas_compiler.links.calibration import HELD_OUT_EVERY, Calibration
from recmas_compiler.links.modules import make_link, randomize
from recmas_compiler.training.data.hidden_state_cache import HiddenStates
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.loop import AtStep
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.link_kinds import LinkKind

# Pairs to align from: where hidden states have to be computed for it, and where they are on disk.
# Twice the pairs are worth about 0.01 of cosine.
NUM_COMPUTED_PAIRS: Final = 16_384
NUM_STORED_PAIRS: Final = 65_536
# Records that run at once.
_ALIGNED_AT_ONCE: Final = 8 * HELD_OUT_EVERY
# With fewer pairs, text that the backbone makes up itself aligns better.
FEWEST_ALIGNED_PAIRS: Final = 2048
# Held-out pairs for the expectation over the vocabulary, whose cost grows with the vocabulary.
_NUM_EXPECTED: Final = 512
_MEASURED_AT_ONCE: Final = 16


class InnerLoss(NamedTuple):
    """The loss of some records: a sum over target tokens, and how many they are."""

    total: Tensor
    tokens: int


@dataclass(eq=False)
class InnerTask:
    """Trains one agent's inner link."""

    agent: str
    link: nn.Module
    _: KW_ONLY
    train: HiddenStates
    held_out: HiddenStates
    mse_weight: float

    def __post_init__(self) -> None:
        self.name = f"the inner link of `{self.agent}`"
        self.links: Mapping[str, nn.Module] = {inner_link_id(self.agent): self.link}
        self.num_examples = len(self.train)
        self.rates: Mapping[str, float] = {}

    def loss(self, places: Sequence[int], at: AtStep | None = None) -> InnerLoss:
        """Return one minus the cosine, and the weighted squared error, summed over tokens."""
        hidden_ND, next_N = self.train.pairs(places)
        wanted_ND = embeddings(self.train.backbone, next_N)
        answer_ND = self.link(hidden_ND)
        total = (1 - cosine_similarity(answer_ND, wanted_ND, dim=-1)).sum()
        if self.mse_weight:
            total = total + self.mse_weight * (answer_ND - wanted_ND).square().mean(-1).sum()
        return InnerLoss(total=total, tokens=len(next_N))

    def finish_step(self, at: AtStep, world: World) -> None:
        """Do nothing: a step is the optimizer's."""

    def measure(self, world: World) -> Mapping[str, Any]:
        """Return the mean cosine on held-out tokens."""
        if not len(self.held_out):
            return {}
        return {"cosine": mean_cosine(self.link, self.held_out, world)}

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return nothing more: there is one link and no round."""
        return {}


@torch.no_grad()
def mean_cosine(link: Callable[[Tensor], Tensor], states: HiddenStates, world: World) -> float:
    """Return the mean cosine between a link's answers and the embeddings they should be."""
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    batches = range(0, len(states), _MEASURED_AT_ONCE)
    for first in world.share(batches):
        places = range(first, min(first + _MEASURED_AT_ONCE, len(states)))
        hidden_ND, next_N = states.pairs(places)
        wanted_ND = embeddings(states.backbone, next_N)
        cosine_N = cosine_similarity(link(hidden_ND), wanted_ND, dim=-1)
        sums[0] += cosine_N.double().sum()
        sums[1] += len(next_N)
    total, count = world.add_up(sums).tolist()
    return float(total / count)


def calibration_of(states: HiddenStates) -> Calibration:
    """Return what a closed-form inner link is fitted to: hidden states of the first records."""
    most = NUM_STORED_PAIRS if states.is_stored else NUM_COMPUTED_PAIRS
    hidden, following, tokens = [], [], []
    held_out: list[bool] = []
    for first in range(0, len(states), _ALIGNED_AT_ONCE):
        if len(held_out) >= most:
            break
        places = list(range(first, min(first + _ALIGNED_AT_ONCE, len(states))))
        known = [place for place in places if place % HELD_OUT_EVERY]
        for is_held_out, some in ((True, places[::HELD_OUT_EVERY]), (False, known)):
            if some:
                hidden_ND, next_N = states.pairs(some)
                hidden.append(hidden_ND.cpu())
                following.append(embeddings(states.backbone, next_N).cpu())
                tokens.append(next_N.cpu())
                held_out += [is_held_out] * len(next_N)
    next_ND = torch.cat(following)
    return Calibration(
        hidden_ND=torch.cat(hidden),
        expected_ND=next_ND,
        next_ND=next_ND,
        token_N=torch.cat(tokens),
        is_held_out_N=torch.tensor(held_out),
    )


@torch.no_grad()
def inner_baselines(
    agent: str,
    kind: LinkKind,
    *,
    train: HiddenStates,
    held_out: HiddenStates,
    aligned: nn.Module | None,
    world: World,
) -> dict[str, float]:
    """Return the held-out cosine of what costs no training.

    Args:
        aligned: A link that was aligned already, to `train` if that sufficed; None to make one.

    Returns:
        `random`: a link with random weights; `aligned`: the closed form from the training texts,
        where there are enough of them; `constant`: always the mean embedding; `expectation`: the
        mean embedding under the backbone's own prediction, on the first tokens only.
    """
    width, device = train.backbone.facts.width, world.device
    calibration = calibration_of(train)
    link = make_link(kind, "inner", width, width).to(device)
    randomize(link, link_id=inner_link_id(agent))
    figures = {"random": mean_cosine(link, held_out, world)}
    if can_align(calibration):
        if aligned is None:
            aligned = make_link(kind, "inner", width, width)
            align_inner(aligned, calibration, link_id=inner_link_id(agent))
        figures["aligned"] = mean_cosine(aligned.to(device), held_out, world)
    mean_D = calibration.next_ND.mean(0).to(device)
    figures["constant"] = mean_cosine(mean_D.expand_as, held_out, world)
    figures["expectation"] = _expectation_cosine(held_out)
    return figures


def can_align(calibration: Calibration) -> bool:
    """Tell whether there are enough pairs, and some to choose the ridge's strength by."""
    known = int((~calibration.is_held_out_N).sum())
    return known >= FEWEST_ALIGNED_PAIRS and bool(calibration.is_held_out_N.any())


@torch.no_grad()
def embeddings(backbone: TorchBackbone, ids_N: Tensor) -> Tensor:
    """Return the input embeddings [N, D] of tokens in float32."""
    return backbone.embed(ids_N).float()


def _expectation_cosine(held_out: HiddenStates) -> float:
    backbone = held_out.backbone
    device = backbone.model.device
    table_VD = backbone.embed(torch.arange(backbone.facts.vocab_size, device=device))
    cosines: list[Tensor] = []
    num_pairs = 0
    for place in range(len(held_out)):
        hidden_ND, next_N = held_out.pairs([place])
        odds_NV = backbone.logits(hidden_ND.to(table_VD.dtype)).softmax(-1)
        expected_ND = (odds_NV @ table_VD).float()
        cosines.append(cosine_similarity(expected_ND, embeddings(backbone, next_N), dim=-1))
        num_pairs += len(next_N)
        if num_pairs >= _NUM_EXPECTED:
            break
    return float(torch.cat(cosines).mean())
