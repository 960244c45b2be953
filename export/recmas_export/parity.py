"""The parity gate: engines against the torch reference on stored, teacher-forced cases.

Free-running latent rollouts amplify rounding, so a case fixes the input of every call and compares
every output. It ships in the bundle and is run again by `recmas verify`.

Shape legend: T positions of the case, N calls it is cut into, K tokens of the greedy continuation,
d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.formats.manifest import LossEntry
from recmas_runtime.formats.tolerances import LOSS_LIMITS, loss_figures, tolerances

Case = dict[str, NDArray[Any]]

_HINT: Final = (
    "No bundle was written. Try another precision or another version of onnxruntime, and report "
    "the model."
)

_TEXT: Final = (
    "Three friends plan a garden with 7 rows of 8 plants. Each plant needs 2 litres of water a "
    "day, and rain brings a quarter of it. They write down what they know, check the numbers "
    "twice, and then say in one sentence how much water they must carry in a week. "
)
_NUM_PROMPT: Final = 48
_NUM_LATENT: Final = 8
_NUM_GREEDY: Final = 16
_NUM_LOGITS: Final = 2
# A case reaches past a sliding window where that is affordable: 2 * 4 MB in the bundle at d = 1024.
_LARGEST_WINDOW: Final = 1024


@torch.no_grad()
def make_case(backbone: TorchBackbone, *, inner: nn.Module) -> Case:
    """Return a case of one backbone, computed by the reference.

    The reference runs without any cache: its own causal mask over the whole sequence. The positions
    after the prompt get what they get in a rollout, outputs of the inner link.

    Args:
        backbone: The reference.
        inner: The inner link that the case is run with.

    Returns:
        `inputs_embeds` [1, T, d], `chunks` [N], `hidden` [1, T, d], `thought_next` [N, 1, d],
        `logits_hidden` [n, d], `logits` [n, V], `greedy_prompt` [P], `greedy_tokens` [K].
    """
    ids_1P = torch.tensor([_prompt(backbone)])
    prompt_1Pd = backbone.embed(ids_1P)
    latent_1Md = inner(_hidden(backbone, prompt_1Pd)[:, -_NUM_LATENT:])
    embeds_1Td = torch.cat([prompt_1Pd, latent_1Md], dim=1)
    hidden_1Td = _hidden(backbone, embeds_1Td)
    chunks = [ids_1P.shape[1], *[1] * _NUM_LATENT]
    last_N = torch.tensor(chunks).cumsum(0) - 1
    logits_hidden = hidden_1Td[0, -_NUM_LOGITS:]
    greedy_prompt = ids_1P[0, :_NUM_PROMPT]
    return {
        "inputs_embeds": _array(embeds_1Td),
        "chunks": np.array(chunks, np.int64),
        "hidden": _array(hidden_1Td),
        "thought_next": _array(inner(hidden_1Td[0, last_N])[:, None]),
        "logits_hidden": _array(logits_hidden),
        "logits": _array(backbone.logits(logits_hidden)),
        "greedy_prompt": _array(greedy_prompt),
        "greedy_tokens": np.array(_greedy(backbone, greedy_prompt), np.int64),
    }


@torch.no_grad()
def link_cases(
    hidden_Nd: NDArray[np.float32],
    *,
    inner: Mapping[str, nn.Module],
    outer: Mapping[str, tuple[str, nn.Module]],
) -> Case:
    """Return `link.ID.x` [N, di] and `link.ID.y` [N, do] for the links that start on one backbone.

    Args:
        hidden_Nd: Hidden states of the backbone: what inner links read.
        inner: By link id.
        outer: By link id, with the id of the source's inner link, whose output outer links read.
    """
    hidden = torch.from_numpy(hidden_Nd.copy())
    inputs = {link: (hidden, module) for link, module in inner.items()}
    inputs |= {link: (inner[source](hidden), module) for link, (source, module) in outer.items()}
    case: Case = {}
    for link, (x, module) in inputs.items():
        case[f"link.{link}.x"] = _array(x)
        case[f"link.{link}.y"] = _array(module(x))
    return case


def beyond_tolerance(
    what: str, figures: Mapping[str, float], *, precision: str
) -> Iterator[Problem]:
    """Yield a problem for each figure that is not within its tolerance.

    Args:
        what: What was measured, for messages.
        figures: By the names of `TOLERANCES`; one that is not a number is beyond.
        precision: Whose tolerances count.
    """
    allowed = tolerances(precision)
    for name, value in figures.items():
        if not value <= allowed[name]:
            message = f"{what}: {name} is {value:.2e}, allowed is {allowed[name]:.0e}."
            yield Problem(code="RM301", message=message, hint=_HINT)


def beyond_limits(what: str, loss: LossEntry, *, precision: str) -> Iterator[Problem]:
    """Yield a problem for each figure of a loss that a precision must not reach.

    Args:
        what: What was measured, for messages.
        loss: What it costs.
        precision: Whose limits count.
    """
    figures = loss_figures(loss)
    for name, limit in LOSS_LIMITS[precision].items():
        if not figures[name] <= limit:
            message = (
                f"{what}: {name} of {precision} is {figures[name]:.3g} over {loss.text}, "
                f"allowed is {limit:g}."
            )
            yield Problem(code="RM301", message=message, hint=_HINT)


def refuse(problems: Iterable[Problem]) -> None:
    """Raise if there is any problem.

    Raises:
        RecmasError: With all of them.
    """
    found = tuple(problems)
    if found:
        raise RecmasError(found)


def _prompt(backbone: TorchBackbone) -> list[int]:
    """Return token ids of a fixed text, past the sliding window if there is one to reach."""
    window = backbone.facts.sliding_window or 0
    wanted = _NUM_PROMPT + (window if window <= _LARGEST_WINDOW else 0)
    wanted = min(wanted, backbone.facts.max_positions - _NUM_LATENT - _NUM_GREEDY)
    ids = backbone.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    return list((ids * -(-wanted // len(ids)))[:wanted])


def _hidden(backbone: TorchBackbone, embeds_1Td: Tensor) -> Tensor:
    hidden: Tensor = backbone.body(inputs_embeds=embeds_1Td, use_cache=False).last_hidden_state
    return hidden


def _greedy(backbone: TorchBackbone, prompt_P: Tensor) -> list[int]:
    """Return the likeliest continuation as the model itself, with its own cache, gives it."""
    cache, ids, tokens = DynamicCache(config=backbone.model.config), prompt_P[None], []
    for _ in range(_NUM_GREEDY):
        output = backbone.model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids = output.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
