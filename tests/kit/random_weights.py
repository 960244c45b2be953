"""Models with random weights, scaled so that every part matters."""

from __future__ import annotations

import math
from typing import Any

import torch


def random_model(loader: Any, config: Any, *, seed: int = 0) -> Any:
    """Return a model whose weights are scaled noise, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        # Noise is added to what some models draw for themselves, such as decays of states; torch
        # begins every process with another seed.
        torch.manual_seed(seed)
        model = loader.from_config(config, dtype=torch.float32)
    scale_weights(model, seed=seed)
    return model


@torch.no_grad()
def scale_weights(model: Any, *, seed: int = 0) -> None:
    """Give a model random weights that all matter."""
    tables = {
        id(table.weight)
        for table in (model.get_input_embeddings(), model.get_output_embeddings())
        if table is not None
    }
    generator = torch.Generator().manual_seed(seed)
    for part, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if id(weight) in tables:
            weight.copy_(noise * 0.6)
        elif "sinks" in part:
            weight.copy_(0.5 + 1.5 * noise)
        elif weight.ndim == 1 or "bias" in part:
            weight.add_(noise * 0.1)
        else:
            weight.copy_(noise * 0.7 / math.sqrt(weight.shape[-1]))
    # Among them the biases by which experts are chosen, and not weighed: zero in a new model.
    stored = model.state_dict().keys()
    for name, buffer in sorted(model.named_buffers()):
        if name in stored and buffer.is_floating_point():
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
