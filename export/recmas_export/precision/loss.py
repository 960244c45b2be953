"""What a precision costs: engines against the float32 reference over a text.

Every position is teacher-forced. Shape legend: T tokens of a passage, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.engines.onnx.backbone import BackboneEngine, Operands
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.manifest import LossEntry
from recmas_runtime.formats.plan import cache_capacity

# Of a text only the first passages are read, so that a build takes no longer for a longer one.
NUM_PASSAGES: Final = 8
PASSAGE_TOKENS: Final = 256

# Questions and answers written for this purpose, for specs that name no text.
OWN_TEXT: Final = Path(__file__).with_name("held_out.txt")


def passages_of(backbone: TorchBackbone, text: Path) -> list[NDArray[np.int64]]:
    """Return the beginning of a text in UTF-8, cut into passages of token ids [T], T > 1.

    Raises:
        RecmasError: RM126 if it cannot be read or there is nothing to predict in it.
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


def measure_loss(
    backbone: TorchBackbone,
    engine: BackboneEngine,
    inner: Operands,
    passages: Sequence[NDArray[np.int64]],
    *,
    text: str,
) -> LossEntry:
    """Return how much worse an engine predicts than the reference does.

    Args:
        backbone: The reference.
        engine: Its engine in another precision.
        inner: Operands of any of its inner links, without the G axis; they play no part.
        passages: What to predict, each token from those before it; at least one.
        text: How the manifest names them.
    """
    grouped = stack_operands([inner])
    cosines, agreements, expected, found = [], [], [], []
    for ids_T in passages:
        hidden_Td = _reference_hidden(backbone, ids_T)[:-1]
        other_Td = _engine_hidden(engine, ids_T, grouped)[:-1]
        logits_TV = _reference_logits(backbone, hidden_Td)
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


@torch.no_grad()
def _reference_hidden(backbone: TorchBackbone, ids_T: NDArray[np.int64]) -> NDArray[np.float32]:
    embeds = backbone.embed(torch.from_numpy(ids_T)[None])
    hidden = backbone.body(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return np.asarray(hidden[0].numpy())


@torch.no_grad()
def _reference_logits(
    backbone: TorchBackbone, hidden_Td: NDArray[np.float32]
) -> NDArray[np.float32]:
    return np.asarray(backbone.logits(torch.from_numpy(hidden_Td)).numpy())


def _engine_hidden(
    engine: BackboneEngine, ids_T: NDArray[np.int64], inner: Operands
) -> NDArray[np.float32]:
    cache = engine.new_cache(1, cache_capacity(len(ids_T)))
    last = np.array([len(ids_T) - 1])
    hidden, _, _ = engine.forward(cache, engine.embed(ids_T[None]), np.array([0]), last, inner)
    return np.array(hidden[0])


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
