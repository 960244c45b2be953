"""Settings that contradict each other or are not supported; `answer.stop_when` and `answer.tools`.

Every check yields all it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from recmas_compiler.spec.document.places import Loc, Places
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.declared import Declared
from recmas_compiler.spec.schema.sections import (
    RESERVED_TEMPLATE_VARIABLES,
    SearchSection,
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


# Tags that mean something to the runtime: a function of this name could never be called.
RESERVED_TAGS: Final = ("search", "python", "ask", "result", "tool_call")

# Rounds 1 and 2 are compared, and a settled record's next round is its last: round 3 at best.
_FEWEST_ROUNDS_TO_SAVE_ONE: Final = 4


def check_stop_when(declared: Declared) -> Iterator[Problem]:
    """An early end that can never come, or never saves a round."""
    document = declared.document
    if document.answer.stop_when is None:
        return
    place = declared.places.key(("answer", "stop_when"))
    if not any(link.feedback for link in declared.links.values()):
        message = "`stop_when` has no effect: no feedback link carries anything between rounds."
        hint = "Remove it, or add a link with `feedback: true`."
        yield problem_at(place, "RM153", message, hint=hint, severity="warning")
    elif document.rounds < _FEWEST_ROUNDS_TO_SAVE_ONE:
        message = (
            f"`stop_when` has no effect with `rounds: {document.rounds}`: messages are first "
            "compared after round 2, and one more round follows."
        )
        hint = f"Remove it, or set `rounds` to {_FEWEST_ROUNDS_TO_SAVE_ONE} or more."
        yield problem_at(place, "RM153", message, hint=hint, severity="warning")


def check_tools(declared: Declared) -> Iterator[Problem]:
    """Tools that exclude each other, that cannot be called, or that are not there."""
    tools, places = declared.document.answer.tools, declared.places
    if tools is None:
        return
    loc: Loc = ("answer", "tools")
    if not tools.are_on:
        message = "`answer.tools` turns no tool on."
        hint = "Add `search`, `python`, `ask: true` or `functions`, or remove it."
        yield problem_at(places.key(loc), "RM105", message, hint=hint)
    if tools.search is not None:
        yield from _check_search(tools.search, declared.places, (*loc, "search"))
    for i, name in enumerate(tools.functions):
        place = places.value((*loc, "functions", i))
        if name in RESERVED_TAGS:
            message = f"a function cannot be called `{name}`: this tag has a meaning already."
            yield problem_at(place, "RM105", message, hint="Give the function another name.")
        elif name in tools.functions[:i]:
            message = f"the function `{name}` is named twice."
            yield problem_at(place, "RM105", message, hint="Remove one of the two.")


def _check_search(search: SearchSection, places: Places, loc: Loc) -> Iterator[Problem]:
    if search.corpus is None and search.backend is None:
        message = "`answer.tools.search` has nothing to search."
        hint = "Add `corpus: FILE.jsonl`, `corpus: FOLDER` or `backend: tavily`."
        yield problem_at(places.key(loc), "RM105", message, hint=hint)
    if search.corpus is not None and search.backend is not None:
        message = "`answer.tools.search` has both a `corpus` and a `backend`."
        place = places.key((*loc, "backend"))
        yield problem_at(place, "RM105", message, hint="Keep one of them.")
