"""Models that run their own layers several times over: which of them run here, and which do not.

Where transformers' code unrolls its loop into a cache of one entry for every visit, such a model is
one of more layers than it has weights for. What has code beside its weights only, or hands messages
from one pass to the next, is refused by name: run as a plain model it would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from recmas_compiler.backbones.config.entries import count

LOOP_HINT: Final = (
    "Let an agent feed its thoughts back instead: `--baseline looplm`, or a spec as "
    "specs/self_loop.yaml."
)

_OWN_CODE: Final = (
    "whose code comes with its weights, and recmas runs none but that of transformers"
)
_PASSES_SPEAK: Final = (
    "runs its middle layers in several passes, with messages from each to the next"
)
_LOOPED: Final[Mapping[str, str]] = {
    "huginn_raven": f"runs its core layers over and over, {_OWN_CODE}",
    "inkling2_loop": _PASSES_SPEAK,
    "inkling2_loop_text": _PASSES_SPEAK,
    "ouro": f"runs all its layers over and over, {_OWN_CODE}",
}

# What configs call the passes over layers; one pass is no loop.
_PASSES: Final = ("total_ut_steps", "loop_num_passes", "mean_recurrence")


def why_looped(model_type: str, values: Mapping[str, Any]) -> str | None:
    """Return why a model that loops its own layers cannot run, None if nothing says so.

    Args:
        model_type: That of the text model.
        values: The entries of its config.
    """
    for name in (str(values.get("outer_type")), model_type):
        if name in _LOOPED:
            return f"`{name}` {_LOOPED[name]}"
    for name in _PASSES:
        passes = values.get(name)
        if isinstance(passes, int | float) and not isinstance(passes, bool) and passes > 1:
            return (
                f"it runs its own layers {passes:g} times over (`{name}`), which the code of "
                f"`{model_type}` does not"
            )
    return None


def unrolled(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries whose number of layers counts every visit, as transformers' caches do.

    Older files of HRM have the layers of one stack there; newer ones have them beside.
    """
    each = count(values, "num_hidden_layers")
    if model_type != "hrm_text" or not each or count(values, "num_layers_per_stack"):
        return dict(values)
    high, low = count(values, "H_cycles") or 2, count(values, "L_cycles") or 3
    visits = each * high * (low + 1)
    return {**values, "num_layers_per_stack": each, "num_hidden_layers": visits}
