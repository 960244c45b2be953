"""Settings that contradict each other, and settings that this version does not support."""

from __future__ import annotations

from collections.abc import Iterator

from recmas_compiler.spec.document.places import Loc
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.declared import Declared
from recmas_compiler.spec.schema.sections import (
    RESERVED_TEMPLATE_VARIABLES,
    WeightsSection,
)
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.precisions import PRECISIONS, PrecisionName
from recmas_runtime.formats.targets import precision_hint


def check_settings(declared: Declared) -> Iterator[Problem]:
    """Settings that exclude each other."""
    document, places = declared.document, declared.places
    for loc, _, weights in _all_weights(declared):
        if weights.weights is not None and weights.init is not None:
            place = places.key((*loc, "init"))
            message = f"`init: {weights.init}` has no effect, because `weights` is given."
            yield problem_at(place, "RM105", message, hint="Remove one of the two.")
    for name, agent in document.agents.items():
        for variable in sorted(agent.chat_template.keys() & RESERVED_TEMPLATE_VARIABLES):
            place = places.key(("agents", name, "chat_template", variable))
            message = f"the template variable `{variable}` is set by recmas itself."
            yield problem_at(place, "RM105", message, hint="Remove it.")
    limit = document.build.max_prompt_tokens
    for name, prompts in declared.prompts.items():
        slots = [slot.agent for slot in prompts.then.slots if slot.agent in document.agents]
        positions = sum(declared.latent_steps(agent) for agent in slots)
        if positions >= limit:
            message = (
                f"the messages to `{name}` alone take {positions} positions, "
                f"but `build.max_prompt_tokens` is {limit}."
            )
            hint = "Raise the limit, or lower `latent_steps`."
            yield problem_at(places.key(("agents", name)), "RM105", message, hint=hint)


def check_support(declared: Declared) -> Iterator[Problem]:
    """Settings of the language that this version of recmas does not run."""
    target, places = declared.document.build.target, declared.places
    for loc, precision in _all_precisions(declared):
        reason = PRECISIONS[precision].refusals.get(target)
        if reason is not None:
            message = f"precision `{precision}` is not supported for target `{target}`: {reason}."
            hint = precision_hint(target)
            yield problem_at(places.value(loc), "RM121", message, hint=hint)
    for loc, what, weights in _all_weights(declared):
        if weights.weights is None and weights.init == "random":
            place = places.key((*loc, "init"))
            message = f"{what} starts from random weights: expect no sensible answers."
            hint = "Give `weights`, or use `init: aligned`."
            yield problem_at(place, "RM152", message, hint=hint, severity="warning")


def _all_precisions(declared: Declared) -> Iterator[tuple[Loc, PrecisionName]]:
    """Yield every precision that is written down, and its path."""
    yield ("build", "precision"), declared.document.build.precision
    for name, backbone in declared.document.backbones.items():
        if backbone.precision is not None:
            yield ("backbones", name, "precision"), backbone.precision


def _all_weights(declared: Declared) -> Iterator[tuple[Loc, str, WeightsSection]]:
    """Yield every link: its path, its name in messages and its settings."""
    for name, agent in declared.document.agents.items():
        yield ("agents", name, "inner"), f"the inner link of `{name}`", agent.inner
    for name, link in declared.document.links.items():
        yield ("links", name), f"the link `{name}`", link
