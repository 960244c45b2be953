"""Engines against the torch reference: the parity gate, and what a precision costs.

Free-running latent rollouts amplify rounding, so a parity case fixes the input of every call and
compares every output. It ships in the bundle and is run again by `recmas verify`. What a precision
costs is measured over a text, every position teacher-forced too.

Shape legend: R rows, T positions of a case or passage, U of its feedback round, M of a message,
N calls that they are cut into, K tokens of the greedy continuation, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_cache import empty_cache
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.hidden_rows import rows_hidden
from recmas_runtime.checking.parity import hidden_groups
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.engines.interface import Operands
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.formats.layers import has_states
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.manifest import PARITY_ROWS, LossEntry
from recmas_runtime.formats.plan import cache_capacity

Case = dict[str, NDArray[Any]]

_TEXT: Final = (
    "Three friends plan a garden with 7 rows of 8 plants. Each plant needs 2 litres of water a "
    "day, and rain brings a quarter of it. They write down what they know, check the numbers "
    "twice, and then say in one sentence how much water they must carry in a week. "
)
# Of the first round: a beginning that is kept, in a call of its own, the rest of the prompt, and
# latent steps. A second row has less of the first two.
_NUM_KEPT: Final = 24
_NUM_REST: Final = 24
_NUM_LATENT: Final = 8
_NUM_SHORTER: Final = 12
# Of the feedback round, in both rows: a message with text behind it, latent steps, more text.
_FEEDBACK_LENGTHS: Final = ((14, 10), (1, 1), (1, 1), (4, 2))
_NUM_MESSAGE: Final = 8
_NUM_GREEDY_PROMPT: Final = 48
_NUM_GREEDY: Final = 16
_NUM_LOGITS: Final = 2

# Of a text only the first passages are read, so that a build takes no longer for a longer one.
NUM_PASSAGES: Final = 8
PASSAGE_TOKENS: Final = 256


@torch.no_grad()
def make_case(
    backbone: TorchBackbone,
    *,
    inner: nn.Module,
    message_Md: Tensor | None = None,
    capacity: int | None = None,
    masked_layers: Sequence[Sequence[int]] = (),
) -> Case:
    """Return a case of one backbone, computed by the reference: see `measure_backbone_parity`.

    The reference runs without any cache: its own causal mask over each whole sequence. The
    positions after the prompt get what they get in a rollout, outputs of the inner link.

    Args:
        message_Md: What an outer link sends to the backbone; None where there is no such link.
        capacity: Positions of the longest sequence of the system; None for the backbone's own.
        masked_layers: Groups of layers that rows can be hidden from.
    """
    prompt_P = _prompt(backbone, capacity or backbone.facts.max_positions)
    lengths_NR = _first_lengths(len(prompt_P))
    prompt_1Pd = backbone.embed(torch.tensor([prompt_P]))
    latent_1Md = inner(_hidden(backbone, prompt_1Pd)[:, -_NUM_LATENT:])
    embeds_1Td = torch.cat([prompt_1Pd, latent_1Md], dim=1)
    hidden_1Td = _hidden(backbone, embeds_1Td)
    # Other vectors than at these positions before, so that rows left there are wrong ones.
    message_1Md = latent_1Md.flip(1) if message_Md is None else message_Md[None]
    feedback_1Ud = _feedback(backbone, message_1Md, latent_1Md)
    feedback_RUd = torch.cat(
        [
            _hidden(backbone, torch.cat([embeds_1Td[:, :kept], feedback_1Ud], dim=1))[:, kept:]
            for kept in lengths_NR[0]
        ]
    )
    last_NR, last_MR = np.cumsum(lengths_NR, axis=0) - 1, np.cumsum(_FEEDBACK_LENGTHS, axis=0) - 1
    ends_NRd = hidden_1Td[0, torch.from_numpy(last_NR)]
    ends_MRd = feedback_RUd[torch.arange(PARITY_ROWS), torch.from_numpy(last_MR)]
    logits_hidden = hidden_1Td[0, -_NUM_LOGITS:]
    greedy_prompt = torch.tensor(prompt_P[:_NUM_GREEDY_PROMPT])
    masked: Case = {}
    if masked_layers:
        rows = zip(lengths_NR[0], hidden_groups(masked_layers), strict=True)
        behind = [
            _hidden_behind(backbone, embeds_1Td[:, :kept], feedback_1Ud, groups)
            for kept, groups in rows
        ]
        masked["masked_hidden"] = _array(torch.cat(behind))
    return masked | {
        "inputs_embeds": _array(embeds_1Td),
        "lengths": lengths_NR,
        "hidden": _array(hidden_1Td),
        "feedback_embeds": _array(feedback_1Ud),
        "feedback_lengths": np.array(_FEEDBACK_LENGTHS, np.int64),
        "feedback_hidden": _array(feedback_RUd),
        "thought_next": _array(inner(torch.cat([ends_NRd, ends_MRd]))),
        "logits_hidden": _array(logits_hidden),
        "logits": _array(backbone.logits(logits_hidden)),
        "greedy_prompt": _array(greedy_prompt),
        "greedy_tokens": np.array(_greedy(backbone, greedy_prompt), np.int64),
    }


@torch.no_grad()
def make_message(source: TorchBackbone, *, inner: nn.Module, outer: nn.Module) -> Tensor:
    """Return what an outer link sends [M, d], of thoughts of its source about a text."""
    ids = torch.tensor([_ids(source, _NUM_KEPT)])
    message_Md: Tensor = outer(inner(_hidden(source, source.embed(ids))[0, -_NUM_MESSAGE:]))
    return message_Md


@torch.no_grad()
def link_cases(
    hidden_Nd: NDArray[np.float32],
    *,
    inner: Mapping[str, nn.Module],
    outer: Mapping[str, tuple[str, nn.Module]],
) -> Case:
    """Return `link.ID.x` [N, di] and `link.ID.y` [N, do] for the links that start on one backbone.

    An outer link comes with the id of its source's inner link, whose output it reads.
    """
    hidden = torch.from_numpy(hidden_Nd.copy())
    inputs = {link: (hidden, module) for link, module in inner.items()}
    inputs |= {link: (inner[source](hidden), module) for link, (source, module) in outer.items()}
    case: Case = {}
    for link, (x, module) in inputs.items():
        case[f"link.{link}.x"] = _array(x)
        case[f"link.{link}.y"] = _array(module(x))
    return case


def passages_of(backbone: TorchBackbone, text: Path) -> list[NDArray[np.int64]]:
    """Return the beginning of a text in UTF-8, cut into passages of token ids [T], T > 1.

    RM126 if it cannot be read or there is nothing to predict in it.
    """
    tokenizer = backbone.tokenizer
    # The mark that sequences of some models begin with.
    opening: list[int] = tokenizer("").input_ids
    length = min(PASSAGE_TOKENS, backbone.facts.max_positions) - len(opening)
    try:
        # A token has a few bytes, so that these are enough; the last character may be cut.
        start = text.read_bytes()[: 16 * NUM_PASSAGES * PASSAGE_TOKENS].decode(errors="ignore")
    except OSError as error:
        raise _unusable(text, f"cannot be read: {error.strerror}") from error
    ids: list[int] = tokenizer(start, add_special_tokens=False, verbose=False).input_ids
    parts = (opening + ids[i : i + length] for i in range(0, NUM_PASSAGES * length, length))
    passages = [np.array(part) for part in parts if len(part) > max(1, len(opening))]
    if not passages:
        raise _unusable(text, f"has {len(ids)} tokens, too few to predict one")
    return passages


@torch.no_grad()
def measure_loss(
    backbone: TorchBackbone,
    engine: BackboneEngine,
    inner: Operands,
    passages: Sequence[NDArray[np.int64]],
    *,
    text: str,
    by_position: bool = False,
) -> LossEntry:
    """Return how much worse an engine predicts the tokens of passages than the reference does.

    The inner link is any of the backbone's, without the G axis: it plays no part. `text` is how the
    manifest names the passages, of which there is at least one. They run as prompts, or with
    `by_position` through calls of one position each, as steps do.
    """
    run = _in_steps if by_position else _as_prompts
    states = run(engine, stack_operands([inner]), [engine.embed(ids_T[None]) for ids_T in passages])
    cosines, agreements, expected, found = [], [], [], []
    for ids_T, found_Td in zip(passages, states, strict=True):
        embeds_1Td = backbone.embed(torch.from_numpy(ids_T)[None])
        hidden_Td = _array(_hidden(backbone, embeds_1Td)[0, :-1])
        other_Td = np.array(found_Td[:-1])
        logits_TV = _array(backbone.logits(torch.from_numpy(hidden_Td)))
        other_TV = engine.logits(np.ascontiguousarray(other_Td))
        cosines.append(_cosines(other_Td, hidden_Td))
        agreements.append(other_TV.argmax(-1) == logits_TV.argmax(-1))
        expected.append(_surprise(logits_TV, ids_T[1:]))
        found.append(_surprise(other_TV, ids_T[1:]))
    return LossEntry(
        text=text,
        num_tokens=sum(map(len, found)),
        hidden_cosine=min(1.0, _mean(cosines)),  # rounding may lead beyond
        greedy_agreement=_mean(agreements),
        reference_loss=_mean(expected),
        loss=_mean(found),
    )


def _as_prompts(
    engine: BackboneEngine, inner: Operands, passages: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Return hidden states [T, d] of embedded passages [1, T, d], each of them one call."""
    states = []
    for embeds_1Td in passages:
        length = embeds_1Td.shape[1]
        cache, last = engine.new_cache(1, cache_capacity(length)), np.array([length - 1])
        found_1Td, _, _ = engine.forward(cache, embeds_1Td, np.array([0]), last, inner)
        states.append(np.array(found_1Td[0]))
    return states


def _in_steps(
    engine: BackboneEngine, inner: Operands, passages: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Return hidden states [T, d] of embedded passages [1, T, d], one position of all a call."""
    lengths, width = [p.shape[1] for p in passages], passages[0].shape[2]
    rows, longest = len(passages), max(lengths)
    embeds_BTd = np.zeros((rows, longest, width), np.float32)
    for row, embeds_1Td in enumerate(passages):
        embeds_BTd[row, : lengths[row]] = embeds_1Td[0]
    cache, states_BTd = engine.new_cache(rows, cache_capacity(longest)), np.empty_like(embeds_BTd)
    last_B = np.zeros(rows, np.int64)
    for at in range(longest):
        one_B1d = np.ascontiguousarray(embeds_BTd[:, at : at + 1])
        found_B1d, _, _ = engine.forward(cache, one_B1d, np.full(rows, at), last_B, inner)
        states_BTd[:, at] = found_B1d[:, 0]
    return [states_BTd[row, :length] for row, length in enumerate(lengths)]


def _prompt(backbone: TorchBackbone, capacity: int) -> list[int]:
    """Return token ids of a fixed text, what is kept of it past a window that can be reached."""
    window = backbone.facts.sliding_window or 0
    wanted = _NUM_KEPT + _NUM_REST + (window if window < capacity else 0)
    most = backbone.facts.max_positions - _NUM_LATENT - _NUM_GREEDY
    return _ids(backbone, min(wanted, most))


def _ids(backbone: TorchBackbone, wanted: int) -> list[int]:
    ids = backbone.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    return list((ids * -(-wanted // len(ids)))[:wanted])


def _first_lengths(num_prompt: int) -> NDArray[np.int64]:
    """Return the lengths of the first round's calls [N, R], of a prompt of at least 2 positions."""
    rest = min(_NUM_REST, num_prompt // 2)
    kept = num_prompt - rest
    shorter = kept - min(_NUM_SHORTER, kept // 2), max(1, rest // 2)
    steps = [(1, 1)] * _NUM_LATENT
    return np.array([(kept, shorter[0]), (rest, shorter[1]), *steps], np.int64)


def _feedback(backbone: TorchBackbone, message_1Md: Tensor, latent_1Md: Tensor) -> Tensor:
    """Return the input embeddings of the feedback round [1, U, d]."""
    first, *steps, more = (lengths[0] for lengths in _FEEDBACK_LENGTHS)
    ids = _ids(backbone, first - message_1Md.shape[1] + more)
    text_1Sd = backbone.embed(torch.tensor([ids]))
    behind_1Sd, more_1Sd = text_1Sd[:, :-more], text_1Sd[:, -more:]
    latent_1Sd = latent_1Md[:, -sum(steps) :]
    return torch.cat([message_1Md, behind_1Sd, latent_1Sd, more_1Sd], dim=1)


def _hidden(backbone: TorchBackbone, embeds_1Td: Tensor) -> Tensor:
    hidden: Tensor = backbone.body(inputs_embeds=embeds_1Td, use_cache=False).last_hidden_state
    return hidden


def _hidden_behind(
    backbone: TorchBackbone, kept_1Kd: Tensor, embeds_1Ud: Tensor, groups: Sequence[Sequence[int]]
) -> Tensor:
    """Return hidden states [1, U, d] behind positions that some layers do not see."""
    cache = empty_cache(backbone.facts.layers)
    given = with_cache(backbone.body, cache)
    backbone.body(inputs_embeds=kept_1Kd, **given)
    num_kept, num_rows = kept_1Kd.shape[1], kept_1Kd.shape[1] + embeds_1Ud.shape[1]
    is_kept_1C = torch.arange(num_rows)[None] < num_kept
    attending = backbone.facts.attention
    masks = {i: is_kept_1C for group in groups for i in group if attending[i] != "none"}
    with rows_hidden(backbone.body, masks):
        hidden: Tensor = backbone.body(inputs_embeds=embeds_1Ud, **given).last_hidden_state
    return hidden


def _greedy(backbone: TorchBackbone, prompt_P: Tensor) -> list[int]:
    """Return the likeliest continuation as the model itself, with its own cache, gives it.

    Of layers that keep a state, the code for a step differs from that for a prompt in some models:
    there every token is that of the whole text.
    """
    cache, ids, tokens = (
        DynamicCache(config=backbone.model.config.get_text_config()),
        prompt_P[None],
        [],
    )
    whole = has_states(backbone.facts.layers)
    for _ in range(_NUM_GREEDY):
        cached = {"use_cache": False} if whole else with_cache(backbone.model, cache)
        token_11 = backbone.model(input_ids=ids, **cached).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token_11], dim=1) if whole else token_11
        tokens.append(int(token_11))
    return tokens


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _cosines(a_Td: NDArray[Any], b_Td: NDArray[Any]) -> NDArray[np.float64]:
    a, b = a_Td.astype(np.float64), b_Td.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / norms)


def _surprise(logits_TV: NDArray[np.float32], ids_T: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return -log p of each token, in nats."""
    wide = logits_TV.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    chosen = np.take_along_axis(wide, ids_T[:, None], axis=-1)[:, 0]
    return np.asarray(np.log(np.exp(wide).sum(-1)) - chosen)


def _mean(parts: Sequence[NDArray[Any]]) -> float:
    return float(np.concatenate(parts).mean())


def _unusable(path: Path, what: str) -> RecmasError:
    return fail(
        "RM126",
        f"the text {str(path)!r} {what}.",
        hint="Give a text file in UTF-8, of a few thousand words in the manner of your records.",
    )
