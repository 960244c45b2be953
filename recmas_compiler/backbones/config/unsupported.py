"""Why a model cannot run, told from its config alone: what a build would find out after minutes.

A table made from transformers' classes says what the code of a family does; the rest is in entries
of the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from recmas_compiler.backbones.config.defaults import family_defaults
from recmas_compiler.backbones.config.entries import count

# Families whose code cannot be traced for any length, and what in it prevents that: written down
# by hand, and held against a build of each by the test of every causal type.
NOT_TRACED: Final[Mapping[str, str]] = {
    "dbrx": "loops over the experts that tokens chose",
    "git": "makes one mask for an image and a text, of sizes that belong together",
    "gpt_neo": "cuts its windows out of a table by the length of the cache",
    "mpt": "cuts its position biases out of a table by the length of the cache",
    "qwen4_exp_text": "chooses keys by what was computed",
    "zaya": "keeps a state of values that it delays, beside keys and values",
}

_CODE: Final[Mapping[str, str]] = {
    "draft": "drafts for another model, whose rows it reads",
    "encoder": "is an encoder, or reads what an encoder made of another text",
    "state": "keeps a state in code of its own, which recmas cannot replace",
    "no cache": "takes no cache",
    "no causal class": "has no causal class of its own in transformers",
}


def why_unsupported(model_type: str, values: Mapping[str, Any]) -> str | None:
    """Return why no target runs a model, None if its config says nothing against it.

    Args:
        model_type: That of the text model.
        values: The entries of its config, with what its family fills in; `outer_type` is that of
            the model that it is a part of.
    """
    for name in (str(values.get("outer_type")), model_type):
        if name in NOT_TRACED:
            return f"the code of `{name}` {NOT_TRACED[name]}"
        code = family_defaults(name).get("code")
        if code is not None:
            return f"`{name}` {_CODE[code]}"
    if count(values, "hidden_size_per_layer_input"):
        return "its layers take inputs of their own for every token, which a thought does not have"
    return _why_masks(values)


def _why_masks(values: Mapping[str, Any]) -> str | None:
    """Return which part of a model's masks is no rule of positions, None if none is."""
    kept, most = values.get("keep_window_size"), values.get("max_position_embeddings")
    if isinstance(kept, int) and isinstance(most, int) and kept < most:
        return "its layers choose which keys they see, by what was computed (`keep_window_size`)"
    if values.get("alibi") is True:
        return "it computes its position biases in bfloat16 (`alibi`)"
    return None
