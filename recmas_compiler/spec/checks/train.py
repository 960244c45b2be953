"""What must hold between `train` and the rest of the spec. Every check yields all it finds."""

from __future__ import annotations

from collections.abc import Iterator

from recmas_compiler.spec.document.places import Loc
from recmas_compiler.spec.document.problems import did_you_mean, problem_at, show
from recmas_compiler.spec.schema.declared import Declared
from recmas_compiler.spec.schema.sections import WeightsSection
from recmas_compiler.spec.schema.train import PRESET_KINDS, TrainSection
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import canonical_link_name, link_name


def check_train(declared: Declared) -> Iterator[Problem]:
    """Agents and links that do not exist, targets that are missing, a preset for other links."""
    train = declared.document.train
    if train is None:
        return
    yield from _check_targets(declared, train)
    yield from _check_freeze(declared, train)
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
        if name in train.targets or name == answer or declared.latent_steps(name) == 0:
            continue
        message = (
            f"`{name}` sends thoughts but has no target text: it can only be trained by rollout."
        )
        hint = f"Add `{name}: FIELD` to `train.targets`, or set `train.outer.mode: rollout`."
        yield problem_at(places.key(loc), "RM124", message, hint=hint)


def _check_freeze(declared: Declared, train: TrainSection) -> Iterator[Problem]:
    agents = declared.document.agents
    links = [link_name(*ends) for ends in declared.known_links]
    for i, name in enumerate(train.outer.freeze):
        if name in agents or canonical_link_name(name) in links:
            continue
        message = f"`train.outer.freeze` names {show(name)}, which is no link and no agent."
        hint = did_you_mean(name, [*agents, *links])
        place = declared.places.value(("train", "outer", "freeze", i))
        yield problem_at(place, "RM111", message, hint=hint)


def _check_preset(declared: Declared, train: TrainSection) -> Iterator[Problem]:
    wanted = PRESET_KINDS[train.preset]
    if wanted is None:
        return
    document = declared.document
    all_links: list[tuple[str, WeightsSection]] = [
        *((f"the inner link of `{name}`", agent.inner) for name, agent in document.agents.items()),
        *((f"the link `{name}`", link) for name, link in document.links.items()),
    ]
    others = [(what, link.kind) for what, link in all_links if link.kind not in (None, wanted)]
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
