"""Which layers get rows that are handed over, where a spec says only how many.

The layers that pay most attention to a context are those that its rows are worth most to
(KVComm, arXiv 2510.03346): a layer's score is its attention on a text that stands before the
question, the middle of the model preferred. The texts are recmas's own, so that the choice belongs
to the backbone and is the same in every build.

Shape legend: L layers, H query heads, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.named_layers import backbones_with_chosen_layers, name_layers
from recmas_runtime.core.errors import fail
from recmas_runtime.formats.manifest import LayerScores

# What is read, and what is then asked about it.
_TEXTS: Final = (
    (
        "The old lighthouse at Carrow Point was built in 1862 by the engineer Ines Dahl. It is 41 "
        "metres tall, and its lamp was lit with whale oil until 1911. Since 1978 nobody lives "
        "there; the keeper's house is a small museum that opens on Sundays.",
        "Question: Who built the lighthouse, and when is the museum open? Answer:",
    ),
    (
        "Mara has three brothers. Tom, the oldest, works in a bakery in Lund. Pavel studies "
        "chemistry and shares a flat with Jon, who is eleven months younger and plays the oboe.",
        "Question: Which instrument does the youngest of Mara's brothers play? Answer:",
    ),
    (
        "To reset the pump, close the red valve, wait two minutes, and hold the green button until "
        "the display shows 00. If it shows E4, the filter is blocked: rinse it with cold water.",
        "Question: What should be done when the display shows E4? Answer:",
    ),
)

# The share of attention in a score; the rest is the preference for the middle. On SmolLM2 135M the
# first layers attend to everything and their rows alone are worth nothing: with 0.3 of the layers,
# attention by itself closes 0.06 of the gap to reading the text, the layers of the middle 0.21.
_ATTENTION: Final = 0.2
# Of that preference, in layers of a model of 30: its width grows with the model.
_WIDTH: Final = 1 / 3


def choose_layers(
    program: Graph, backbones: Mapping[str, TorchBackbone]
) -> tuple[Graph, dict[str, LayerScores]]:
    """Return the program with the layers of each link named, and the scores by shared backbone.

    Nothing is measured where every link says its layers.

    Args:
        program: Of level PLANNED, or of UNROLLED.
        backbones: By shared name.

    Raises:
        RecmasError: RM300 where a backbone does not tell its attention.
    """
    names = backbones_with_chosen_layers(program)
    scores = {name: score_layers(backbones[name]) for name in names}
    return name_layers(program, scores), scores


@torch.no_grad()
def score_layers(backbone: TorchBackbone) -> LayerScores:
    """Measure how much attention each layer of a backbone pays to what it was given to read.

    Raises:
        RecmasError: RM300 where its attention cannot be seen.
    """
    masses_NL = np.stack([_masses(backbone, *text) for text in _TEXTS])
    mass_L = masses_NL.mean(axis=0)
    able = np.isfinite(mass_L)
    scores_L = _ATTENTION * _unit(mass_L, able) + (1 - _ATTENTION) * _unit(_middle(able.size), able)
    return LayerScores(
        attention=tuple(_told(mass_L, able)),
        scores=tuple(_told(scores_L, able)),
    )


def _masses(backbone: TorchBackbone, context: str, question: str) -> NDArray[np.float64]:
    """Return the attention that a question's positions pay to a text, by layer; nan for none."""
    tokenizer = backbone.tokenizer
    read: list[int] = tokenizer(context).input_ids
    asked: list[int] = tokenizer(f"\n{question}", add_special_tokens=False).input_ids
    with _attention_told(backbone.model):
        weights = backbone.body(
            input_ids=torch.tensor([read + asked]), use_cache=False, output_attentions=True
        ).attentions
    masses = np.full(backbone.facts.num_layers, np.nan)
    with_rows = [
        layer
        for layer, kind in enumerate(backbone.facts.attention)
        if kind != "none" and backbone.facts.layers[layer].rows is not None
    ]
    told = [each for each in weights or () if each is not None]
    if not told or len(told) < len(with_rows):
        raise fail(
            "RM300",
            f"backbone {backbone.facts.source!r} (model type {backbone.facts.model_type!r}) does "
            "not tell what it attends to, so that no layers can be chosen.",
            hint="Name the layers of the link, or hand the rows to all of them.",
        )
    attending = [layer for layer, kind in enumerate(backbone.facts.attention) if kind != "none"]
    by_layer = dict(zip(attending, told, strict=False))
    for layer in with_rows:
        weights_1HSS = by_layer[layer]
        # Not the first position, which takes what has nowhere else to go.
        on_text = weights_1HSS[0, :, len(read) :, 1 : len(read)]
        masses[layer] = float(on_text.double().sum(-1).mean())
    return masses


@contextmanager
def _attention_told(model: Any) -> Iterator[None]:
    """Let a model compute its attention in a way that has weights to tell."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _middle(num_layers: int) -> NDArray[np.float64]:
    """Return a bell over the depth, 1 in the middle."""
    depth_L = np.linspace(-0.5, 0.5, num_layers)
    return np.exp(-0.5 * (depth_L / _WIDTH) ** 2)


def _unit(values: NDArray[np.float64], able: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return values from 0 to 1 among those that count."""
    low, high = values[able].min(), values[able].max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _told(values: Iterable[float], able: Iterable[bool]) -> Iterator[float | None]:
    for value, is_one in zip(values, able, strict=True):
        yield round(float(value), 6) if is_one else None
