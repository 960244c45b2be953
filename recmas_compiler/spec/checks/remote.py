"""Models behind an API: what their agents cannot do, and keys that mean nothing for one side.

Every check yields all it finds.
"""

from __future__ import annotations

from collections.abc import Iterator

from recmas_compiler.spec.document.places import Loc
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.backbones import (
    LOCAL_KEYS,
    REMOTE_KEYS,
    SECRET_KEYS,
    BackboneSection,
)
from recmas_compiler.spec.schema.declared import Declared
from recmas_compiler.spec.schema.document import secret_problem
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import link_name
from recmas_runtime.formats.manifest import OPENAI, RESERVED

_LATENT: dict[str, str] = {
    "thoughts": "the hidden states of latent steps",
    "context": "hidden states at a prompt's positions",
    "written": "hidden states at written tokens",
    "cache": "rows of a key/value cache",
}
_WHY: dict[str, str] = {
    "device": "it does not run here",
    "dtype": "its weights are not here",
    "precision": "its weights are not here",
    "template": "prompts go there as chat messages, which the service's own template renders",
    "inner": "it has no hidden states that a link could map",
    "chat_template": "the service's own template renders its prompts",
}


def check_remote(declared: Declared) -> Iterator[Problem]:
    """Agents on models behind an API take and give text."""
    for name, backbone in declared.document.backbones.items():
        yield from _check_backbone(declared, name, backbone)
    for agent in declared.remote_agents:
        yield from _check_agent(declared, agent)
    yield from _check_one_is_here(declared)
    yield from _check_links(declared)
    yield from _check_answer(declared)
    yield from _check_train(declared)


def _check_backbone(declared: Declared, name: str, backbone: BackboneSection) -> Iterator[Problem]:
    places = declared.places
    loc: Loc = ("backbones", name)
    for key in LOCAL_KEYS if backbone.is_remote else REMOTE_KEYS:
        if (*loc, key) not in places.values:
            continue
        if backbone.is_remote:
            message = f"`{key}` means nothing for `{name}`, a model behind an API: {_WHY[key]}."
            hint = "Remove it."
        else:
            message = f"`{key}` means nothing for `{name}`, whose weights are here."
            hint = f"Remove it; it is for `source: {OPENAI}MODEL`."
        yield problem_at(places.key((*loc, key)), "RM129", message, hint=hint)
    if not backbone.is_remote:
        return
    if not backbone.source.removeprefix(OPENAI).strip():
        message = f"`{backbone.source}` names no model."
        hint = f"Write `{OPENAI}MODEL`, with the name that the service has for it."
        yield problem_at(places.value((*loc, "source")), "RM105", message, hint=hint)
    for key in backbone.body:
        place = places.key((*loc, "body", key))
        if key.lower() in SECRET_KEYS:
            yield secret_problem(place, ".".join(("backbones", name, "body", key)))
        elif key in RESERVED:
            message = f"`{key}` is what recmas itself says in a request."
            hint = "Remove it: sampling settings stand in `answer`, `leave_out` drops one."
            yield problem_at(place, "RM105", message, hint=hint)


def _check_agent(declared: Declared, agent: str) -> Iterator[Problem]:
    section, places = declared.document.agents[agent], declared.places
    loc: Loc = ("agents", agent)
    if section.latent_steps:
        message = (
            f"`{agent}` runs on `{section.backbone}`, a model behind an API, which takes no latent "
            f"steps: `latent_steps` is {section.latent_steps}."
        )
        hint = "Remove it, or give the agent a backbone whose weights are here."
        yield problem_at(places.value((*loc, "latent_steps")), "RM129", message, hint=hint)
    for key in ("inner", "chat_template"):
        if (*loc, key) in places.values:
            message = (
                f"`{key}` means nothing for `{agent}`, which runs on `{section.backbone}`, a model "
                f"behind an API: {_WHY[key]}."
            )
            yield problem_at(places.key((*loc, key)), "RM129", message, hint="Remove it.")


def _check_one_is_here(declared: Declared) -> Iterator[Problem]:
    agents = declared.document.agents
    known = all(agent.backbone in declared.document.backbones for agent in agents.values())
    if known and len(declared.remote_agents) == len(agents):
        message = "every agent runs on a model behind an API, so there is nothing to build."
        hint = "Give one of them a backbone whose weights are here."
        yield problem_at(declared.places.key(("agents",)), "RM129", message, hint=hint)


def _check_links(declared: Declared) -> Iterator[Problem]:
    for (source, target), link in declared.known_links.items():
        remote = [end for end in (source, target) if declared.is_remote(end)]
        if not remote or link.carries == "text":
            continue
        loc: Loc = ("links", link_name(source, target))
        is_written = (*loc, "carries") in declared.places.values
        carried = f"`{link.carries}`" if is_written else f"`{link.carries}`, the default"
        does = "gives" if remote[0] == source else "takes"
        message = (
            f"`{remote[0]}` runs on a model behind an API, which {does} text and never "
            f"{_LATENT[link.carries]}: this link carries {carried}."
        )
        hint = "Write `carries: text`, or give the agent a backbone whose weights are here."
        place = (*loc, "carries")
        where = declared.places.value(place) if is_written else declared.places.key(loc)
        yield problem_at(where, "RM129", message, hint=hint)


def _check_answer(declared: Declared) -> Iterator[Problem]:
    answer = declared.document.answer
    if answer.agent not in declared.document.agents or not declared.is_remote(answer.agent):
        return
    if answer.tools is not None:
        message = (
            f"`{answer.agent}` runs on a model behind an API, and tools are called by what recmas "
            "reads token by token as it is written here."
        )
        hint = "Remove `tools`, or let an agent answer whose weights are here."
        yield problem_at(declared.places.key(("answer", "tools")), "RM129", message, hint=hint)


def _check_train(declared: Declared) -> Iterator[Problem]:
    if declared.document.train is None or not declared.remote_agents:
        return
    agent = declared.remote_agents[0]
    message = (
        f"links are trained through the whole system, and `{agent}` runs on a model behind an API, "
        "through which there are no gradients."
    )
    hint = (
        "Train a spec without such agents, and name the links' files in this one with `weights`; "
        "remove `train` here."
    )
    yield problem_at(declared.places.key(("train",)), "RM129", message, hint=hint)
