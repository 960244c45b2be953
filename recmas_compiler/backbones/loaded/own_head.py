"""A causal model without its body: what is left is all that it does after it.

Heads are more than a matrix: soft caps, scales, multipliers, biases. Whatever a model does, its own
code does it here too, in the reference and in the graph that is exported.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


def body_of(model: Any) -> Any:
    """Return the decoder layers and the final norm of a causal model.

    Of some, `get_decoder` of transformers returns a part of the head, or the model itself.
    """
    found = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not model:
        # of a model that also sees it is the whole language model, in some families with its head
        return found if found.get_output_embeddings() is None else body_of(found)
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def head_of(model: Any) -> Any:
    """Return a causal model that takes hidden states for `inputs_embeds` and applies its head.

    The model is left as it was. Both have the same weights in memory.
    """
    body = body_of(model)
    name, child = next(
        (name, child)
        for name, child in model.named_children()
        if any(part is body for part in child.modules())
    )
    head = copy.copy(model)
    head._modules = dict(model._modules)
    setattr(head, name, _Passed(child, body))
    return head


class _Passed(nn.Module):
    """Stands in for a body: what goes in comes out as the last hidden state."""

    def __init__(self, replaced: Any, body: Any) -> None:
        super().__init__()
        # in a tuple: as a module of this one its layers would be part of the head
        self._replaced = (replaced, body)

    def forward(self, *_args: object, inputs_embeds: Any, **_others: object) -> _Output:
        """Return `inputs_embeds` unchanged; all else that a model hands its body plays no part."""
        return _Output(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        """Return what a head's code reads from its body; bodies within bodies are passed too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            body, decoder = self.__dict__["_replaced"]
            found = getattr(body, name)
            return self if found is decoder else found


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers is untyped
    """The output of a body that has nothing but hidden states: all else is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
