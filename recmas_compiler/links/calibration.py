"""What a backbone thinks and says about everyday requests: the data that inner links start from.

Shape legend: B sequences, S positions of a call, N samples of all sequences, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor

from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_cache import empty_cache, padding_mask
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.links.modules import seeded_generator
from recmas_runtime.core.progress import Progress
from recmas_runtime.prompts.chat_template import ChatTemplate

# Answers to requests like an agent's own align better than free text of the same length.
REQUESTS: Final = msgspec.yaml.decode(
    Path(__file__).with_name("requests.yaml").read_bytes(), type=tuple[str, ...]
)
# Per sequence. More take longer and hardly align better.
NUM_TOKENS: Final = 80
TEMPERATURE: Final = 0.6  # keeps a small model from rambling
HELD_OUT_EVERY: Final = 8
# For templates that write the date: a build gives the same links on every day.
_DAY: Final = date(2026, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Pairs of a thought and what followed it.

    Attributes:
        expected_ND: What a link should answer: the mean input embedding of the next token under
            the backbone's own distribution, or the next token's itself where texts were given.
        next_ND: Input embedding of the token that came next.
        token_N: That token's id where texts were given; None for made-up text, which is too little
            to tell tokens apart by.
        is_held_out_N: Samples to measure on, whole sequences.
    """

    hidden_ND: Tensor
    expected_ND: Tensor
    next_ND: Tensor
    token_N: Tensor | None
    is_held_out_N: Tensor


@torch.no_grad()
def calibrate(backbone: TorchBackbone, *, progress: Progress, seed: int = 0) -> Calibration:
    """Collect thoughts from answers to `REQUESTS` that the backbone makes up itself.

    Every position's hidden state and distribution is used as it comes along. A sampled token is one
    draw from the distribution; its mean embedding is what a least-squares link would find from many
    draws. Fitting to the mean gains 0.01 to 0.03 of cosine.
    """
    embedding_VD = _embedding_table(backbone)
    hidden, expected, following = [], [], []
    draw = seeded_generator(f"calibration:{seed}")
    with progress.stage(f"calibrating {backbone.facts.source}", NUM_TOKENS) as advance:
        for hidden_BD, logits_BV, next_B1 in _answer(backbone, TEMPERATURE, draw):
            hidden.append(hidden_BD)
            expected.append(logits_BV.softmax(-1) @ embedding_VD)
            following.append(backbone.embed(next_B1)[:, 0])
            advance()
    is_held_out_B = torch.arange(len(REQUESTS)) % HELD_OUT_EVERY == 0
    return Calibration(
        hidden_ND=_plain(hidden),
        expected_ND=_plain(expected),
        next_ND=_plain(following),
        token_N=None,
        is_held_out_N=is_held_out_B.repeat(NUM_TOKENS),
    )


def sample_prompts(backbone: TorchBackbone) -> list[Tensor]:
    """Return the chats [T] that `REQUESTS` begin with."""
    return [torch.tensor(ids) for ids in _openings(backbone)]


@torch.no_grad()
def sample_answers(backbone: TorchBackbone, *, seed: int = 0) -> list[Tensor]:
    """Return answers to `REQUESTS` from the backbone's own distribution, each with its chat [T]."""
    draw = seeded_generator(f"answers:{seed}")
    answers_BT = torch.cat([next_B1 for *_, next_B1 in _answer(backbone, 1.0, draw)], dim=1)
    return [
        torch.cat([opening_S.to(answer_T.device), answer_T])
        for opening_S, answer_T in zip(sample_prompts(backbone), answers_BT, strict=True)
    ]


def _answer(
    backbone: TorchBackbone, temperature: float, draw: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Answer all `REQUESTS` at once; yield hidden [B, D], logits [B, V] and next ids [B, 1]."""
    ids_BS, mask_BS = _left_padded(backbone, _openings(backbone))
    cache = empty_cache(backbone.facts.layers)
    for _ in range(NUM_TOKENS):
        positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
        hidden_BD = backbone.body(
            inputs_embeds=backbone.embed(ids_BS),
            attention_mask=padding_mask(backbone.facts.layers, mask_BS, ids_BS.shape[1]),
            position_ids=positions_BS,
            **with_cache(backbone.body, cache),
        ).last_hidden_state[:, -1]
        logits_BV = backbone.logits(hidden_BD)
        odds_BV = (logits_BV / temperature).softmax(-1).cpu()
        ids_BS = torch.multinomial(odds_BV, 1, generator=draw).to(ids_BS.device)
        mask_BS = torch.cat([mask_BS, torch.ones_like(ids_BS)], dim=1)
        yield hidden_BD, logits_BV, ids_BS


def _plain(parts: Sequence[Tensor]) -> Tensor:
    """Join samples on the CPU in float32: linear algebra there is the same on every machine."""
    return torch.cat(list(parts)).float().cpu()


def _embedding_table(backbone: TorchBackbone) -> Tensor:
    """Return every token's input embedding [V, D], scaled as the backbone scales it."""
    return backbone.embed(torch.arange(backbone.facts.vocab_size, device=_device(backbone)))


def _openings(backbone: TorchBackbone) -> list[list[int]]:
    template = ChatTemplate(backbone.chat_template, backbone.special_tokens, day=_DAY)
    return [_opening(backbone, template, request) for request in REQUESTS]


def _opening(backbone: TorchBackbone, chat_template: ChatTemplate, request: str) -> list[int]:
    rendered = chat_template.render(
        [{"role": "user", "content": request}], add_generation_prompt=True, enable_thinking=False
    )
    ids: list[int] = backbone.tokenizer(rendered, add_special_tokens=False).input_ids
    return ids


def _left_padded(backbone: TorchBackbone, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids [B, S] and mask [B, S], real tokens at the end."""
    width = max(len(row) for row in rows)
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    device = _device(backbone)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _device(backbone: TorchBackbone) -> torch.device:
    device: torch.device = backbone.model.device
    return device
