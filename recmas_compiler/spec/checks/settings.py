"""Settings that contradict each other, are not supported or have no effect; `answer` and `train`.

Every check yields all it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from recmas_compiler.spec.document.places import Loc, Places, SourcePosition
from recmas_compiler.spec.document.problems import did_you_mean, problem_at, show
from recmas_compiler.spec.schema.declared import Declared
from recmas_compiler.spec.schema.sections import (
    RESERVED_TEMPLATE_VARIABLES,
    SearchSection,
    WeightsSection,
)
from recmas_compiler.spec.schema.train import (
    BIAS_HINT,
    LINK_GROUPS,
    PRESET_KINDS,
    OuterStageSection,
    TrainSection,
    no_bias,
)
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import canonical_link_name, link_name
from recmas_runtime.formats.link_kinds import FORMS, LATENTMAS_KIND
from recmas_runtime.formats.precisions import (
    PRECISIONS,
    TARGETS,
    TENSORRT,
    PrecisionName,
    device_hint,
    device_named,
    precision_hint,
)


def check_settings(declared: Declared) -> Iterator[Problem]:
    """Settings that exclude each other."""
    document, places = declared.document, declared.places
    for loc, _, weights in _all_weights(declared):
        if weights.weights is not None and weights.init is not None:
            place = places.key((*loc, "init"))
            message = f"`init: {weights.init}` has no effect, because `weights` is given."
            yield problem_at(place, "RM105", message, hint="Remove one of the two.")
        elif weights.init == "latentmas" and loc[0] == "links":
            message = "`init: latentmas` is a rule for inner links, and this one leads to an agent."
            hint = "Let the link carry `cache`, as LatentMAS does, or use `init: aligned`."
            yield problem_at(places.key((*loc, "init")), "RM105", message, hint=hint)
        elif weights.init == "latentmas" and weights.kind != LATENTMAS_KIND:
            message = f"`init: latentmas` does not lead to a link of kind `{weights.kind}`."
            hint = f"Leave `kind` out, which is `{LATENTMAS_KIND}` then."
            yield problem_at(places.key((*loc, "kind")), "RM105", message, hint=hint)
    for name, agent in document.agents.items():
        for variable in sorted(agent.chat_template.keys() & RESERVED_TEMPLATE_VARIABLES):
            place = places.key(("agents", name, "chat_template", variable))
            message = f"the template variable `{variable}` is set by recmas itself."
            yield problem_at(place, "RM105", message, hint="Remove it.")
    limit = document.build.max_prompt_tokens
    for name, prompts in declared.prompts.items():
        slots = [slot.agent for slot in prompts.then.slots if slot.agent in document.agents]
        sent = [
            (agent, link.form) for agent in slots if (link := declared.links.get((agent, name)))
        ]
        positions = sum(form.fixed_positions(declared.latent_steps(agent)) for agent, form in sent)
        if positions >= limit:
            message = (
                f"the messages to `{name}` alone take {positions} positions, "
                f"but `build.max_prompt_tokens` is {limit}."
            )
            writes = any(form.needs_written_states for _, form in sent)
            less = "`latent_steps` or `max_tokens`" if writes else "`latent_steps`"
            hint = f"Raise the limit, or lower {less}."
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
    yield from _refused_devices(declared)
    for loc, what, weights in _all_weights(declared):
        if weights.weights is None and weights.init == "random":
            place = places.key((*loc, "init"))
            message = f"{what} starts from random weights: expect no sensible answers."
            hint = "Give `weights`, or use `init: aligned`."
            yield problem_at(place, "RM152", message, hint=hint, severity="warning")


def _refused_devices(declared: Declared) -> Iterator[Problem]:
    """Yield devices whose engines the target does not build, or not in a backbone's precision."""
    build, places = declared.document.build, declared.places
    for name, backbone in declared.document.backbones.items():
        loc: Loc = ("backbones", name)
        if backbone.device is None or backbone.is_remote:
            continue
        kind = device_named(backbone.device).kind
        if kind == TENSORRT and TARGETS[build.target].machine_engines != TENSORRT:
            message = f"target `{build.target}` builds no engines for device `{kind}`."
            hint = "Use target `tensorrt`, or device `cuda`."
            yield problem_at(places.value((*loc, "device")), "RM121", message, hint=hint)
            continue
        precision = backbone.precision or build.precision
        reason = PRECISIONS[precision].device_refusals.get(kind)
        if reason is not None:
            own = places.value((*loc, "precision" if backbone.precision else "device"))
            message = f"precision `{precision}` is not supported on device `{kind}`: {reason}."
            hint = device_hint(kind)
            yield problem_at(own, "RM121", message, hint=hint)


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

# Rounds 1 and 2 are compared, and a converged record's next round is its last: round 3 at best.
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
    elif not any(link.feedback and link.carries == "thoughts" for link in declared.links.values()):
        message = "`stop_when` has no effect: no feedback link carries thoughts to compare."
        hint = "Remove it, or let a feedback link carry thoughts."
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


def check_train(declared: Declared) -> Iterator[Problem]:
    """Agents and links that do not exist, targets that are missing, a preset for other links."""
    train = declared.document.train
    if train is None:
        return
    yield from _check_targets(declared, train)
    yield from _check_freeze(declared, train)
    yield from _check_outer(declared, train.outer)
    yield from _check_preset(declared, train)
    if train.held_out == train.data:
        message = f"`train.held_out` is the training data itself, `{train.data}`."
        hint = "Name another file, or give a fraction, such as 0.05."
        place = declared.places.value(("train", "held_out"))
        yield problem_at(place, "RM124", message, hint=hint)


def _check_targets(declared: Declared, train: TrainSection) -> Iterator[Problem]:
    document, places = declared.document, declared.places
    loc: Loc = ("train", "targets")
    for name in train.targets:
        if name not in document.agents:
            message = f"`train.targets` names `{name}`, which is no agent."
            hint = did_you_mean(name, document.agents)
            yield problem_at(places.key((*loc, name)), "RM111", message, hint=hint)
    if not train.targets.keys() <= document.agents.keys():
        return  # what seems to be missing may be what is misspelled
    answer = document.answer.agent
    if answer in document.agents and answer not in train.targets:
        message = f"`train.targets` has no text for `{answer}`, which writes the answer."
        hint = f"Add `{answer}: FIELD` with the record field that holds the text to learn."
        yield problem_at(places.key(loc), "RM124", message, hint=hint)
    if train.outer.mode != "teacher_forced":
        return
    senders = dict.fromkeys(source for source, _ in declared.known_links)
    for name in senders:
        thinks = any(link.form.needs_thoughts for link in declared.sent_by(name).values())
        if name in train.targets or name == answer or not thinks:
            continue
        message = (
            f"`{name}` sends thoughts but has no target text: it can only be trained by rollout."
        )
        hint = f"Add `{name}: FIELD` to `train.targets`, or set `train.outer.mode: rollout`."
        yield problem_at(places.key(loc), "RM124", message, hint=hint)


def _check_freeze(declared: Declared, train: TrainSection) -> Iterator[Problem]:
    for i, name in enumerate(train.outer.freeze):
        if not _is_link_or_agent(declared, name):
            place = declared.places.value(("train", "outer", "freeze", i))
            yield _no_link(declared, "freeze", name, place)


def _is_link_or_agent(declared: Declared, name: str) -> bool:
    links = [link_name(*ends) for ends in declared.known_links]
    return name in declared.document.agents or canonical_link_name(name) in links


def _no_link(declared: Declared, key: str, name: str, place: SourcePosition) -> Problem:
    message = f"`train.outer.{key}` names {show(name)}, which is no link and no agent."
    links = [link_name(*ends) for ends in declared.known_links]
    hint = did_you_mean(name, [*declared.document.agents, *links])
    return problem_at(place, "RM111", message, hint=hint)


def _check_outer(declared: Declared, outer: OuterStageSection) -> Iterator[Problem]:
    """Additions to the outer stage's loss that cannot be had."""
    loc: Loc = ("train", "outer")
    for name in outer.rates or ():
        if name not in LINK_GROUPS and not _is_link_or_agent(declared, name):
            yield _no_link(declared, "rates", name, declared.places.key((*loc, "rates", name)))
    if outer.mismatch is not None and outer.batch_size == 1:
        message = "`mismatch` needs another record's messages, and a batch has one record."
        hint = "Raise `train.outer.batch_size`."
        yield problem_at(declared.places.key((*loc, "mismatch")), "RM105", message, hint=hint)
    if outer.mix is not None and outer.mix.end > outer.mix.start:
        message = (
            f"`mix` goes from messages to text: its share rises from {outer.mix.start:g} to "
            f"{outer.mix.end:g}."
        )
        hint = "Let `end` be at most `start`."
        yield problem_at(declared.places.key((*loc, "mix")), "RM105", message, hint=hint)
    if not outer.center:
        return
    for name, link in declared.document.links.items():  # in their canonical form
        if link.kind is None or link.weights is not None:  # the file knows
            continue
        if link.form.has_vectors and not FORMS[link.kind, "outer"].has_biases:
            message = no_bias(name, link.kind)
            hint = BIAS_HINT
            yield problem_at(declared.places.key((*loc, "center")), "RM105", message, hint=hint)
            return


def _check_preset(declared: Declared, train: TrainSection) -> Iterator[Problem]:
    wanted = PRESET_KINDS[train.preset]
    if wanted is None:
        return
    links = [(what, link.kind) for _, what, link in _all_weights(declared)]
    others = [(what, kind) for what, kind in links if kind not in (None, wanted)]
    if not others:
        return
    what, kind = others[0]
    more = f", and {len(others) - 1} more links are of another kind too" if len(others) > 1 else ""
    message = (
        f"the preset `{train.preset}` is for links of kind `{wanted}`, but {what} is of kind "
        f"`{kind}`{more}."
    )
    hint = f"Set `kind: {wanted}` for all links, or choose another preset."
    place = declared.places.value(("train", "preset"))
    yield problem_at(place, "RM125", message, hint=hint)
