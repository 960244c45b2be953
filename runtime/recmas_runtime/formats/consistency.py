"""Whether a plan and a manifest fit together: everything the executor takes for granted.

A table of rules, each a generator of complaints; the checks of files and of single values come
before (`bundle`, `codec`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.links import FORMS
from recmas_runtime.formats.manifest import MANIFEST_NAME, PLAN_NAME, SPEC_NAME, Manifest
from recmas_runtime.formats.plan import (
    AgentPlan,
    DecodeStep,
    Plan,
    PrefillStep,
    PromptPart,
    SendStep,
    Step,
    ThinkStep,
    Variant,
    WriteStep,
)
from recmas_runtime.formats.tolerances import TOLERANCES

DTYPES: Final = ("float32", "float16", "bfloat16")
PRECISIONS: Final = ("float32", "int8", "int4")

# Yields (where in the file, what is wrong).
Rule = Callable[[Manifest, Plan], Iterator[tuple[str, str]]]


def referenced_files(manifest: Manifest) -> tuple[str, ...]:
    """Return the path of every file that the manifest's entries name, and of the fixed ones."""
    paths = [*interpreted_files(manifest)]
    paths += [backbone.weights for backbone in manifest.backbones.values()]
    paths += [link.file for link in manifest.links.values()]
    paths += [case.file for case in manifest.parity]
    return tuple(dict.fromkeys(paths))


def interpreted_files(manifest: Manifest) -> tuple[str, ...]:
    """Return those of the files that say what is done; the others hold only numbers."""
    paths = [PLAN_NAME, SPEC_NAME, manifest.link_engine, manifest.probe]
    for backbone in manifest.backbones.values():
        paths += [backbone.decoder, backbone.embed, backbone.head]
        paths += [backbone.tokenizer, backbone.chat_template]
        paths += [backbone.cpu_decoder] if backbone.cpu_decoder is not None else []
    return tuple(dict.fromkeys(paths))


def check_consistency(manifest: Manifest, plan: Plan) -> tuple[Problem, ...]:
    """Return every RM404 problem; later rules run only where earlier ones found nothing."""
    for file, rules in STAGES:
        problems = tuple(
            Problem(
                code="RM404",
                message=f"{where}: {what}",
                hint="Build the bundle again with one version of recmas.",
                file=file,
            )
            for rule in rules
            for where, what in rule(manifest, plan)
        )
        if problems:
            return problems
    return ()


def backbones_are_usable(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Element types and precisions are known and end tokens are in the vocabulary."""
    for name, backbone in manifest.backbones.items():
        if backbone.dtype not in DTYPES:
            yield f"backbones.{name}.dtype", f"unknown element type {backbone.dtype!r}"
        if backbone.precision not in PRECISIONS:
            yield f"backbones.{name}.precision", f"unknown precision {backbone.precision!r}"
        for token_id in backbone.eos_token_ids:
            if token_id >= backbone.vocab_size:
                yield (
                    f"backbones.{name}.eos_token_ids",
                    f"token {token_id} of a vocabulary of {backbone.vocab_size}",
                )


def links_are_of_known_form(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Kind and role are known; an inner link has one width."""
    for name, link in manifest.links.items():
        if (link.kind, link.role) not in FORMS:
            yield f"links.{name}", f"no link is of kind {link.kind!r} and role {link.role!r}"
        elif link.role == "inner" and link.in_dim != link.out_dim:
            yield f"links.{name}", f"an inner link of widths {link.in_dim} and {link.out_dim}"


def parity_cases_have_backbones(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Every parity case runs a backbone of this bundle, and there are limits for its figures."""
    for index, case in enumerate(manifest.parity):
        if case.backbone not in manifest.backbones:
            yield f"parity[{index}].backbone", f"unknown backbone {case.backbone!r}"
        for name in sorted(case.figures.keys() - TOLERANCES.keys()):
            yield f"parity[{index}].figures", f"unknown figure {name!r}"


def agents_have_what_they_name(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Backbone and inner link exist and fit; the answer agent exists."""
    if plan.answer_agent not in plan.agents:
        yield "answer_agent", f"unknown agent {plan.answer_agent!r}"
    for name, agent in plan.agents.items():
        backbone = manifest.backbones.get(agent.backbone)
        if backbone is None:
            yield f"agents.{name}.backbone", f"unknown backbone {agent.backbone!r}"
            continue
        inner = manifest.links.get(agent.inner)
        if inner is None or inner.role != "inner":
            yield f"agents.{name}.inner", f"unknown inner link {agent.inner!r}"
        elif inner.in_dim != backbone.width:
            yield (
                f"agents.{name}.inner",
                f"width {inner.in_dim} on a backbone of width {backbone.width}",
            )


def prompts_use_what_exists(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """System texts have no slots, fields are declared."""
    for name, agent in plan.agents.items():
        if any(part.kind == "slot" for part in agent.system):
            yield f"agents.{name}.system", "a slot in a system text"
        for part in (*agent.system, *(agent.first or ()), *agent.then):
            if part.kind == "field" and part.value not in plan.fields:
                yield f"agents.{name}", f"field {part.value!r} is not among the plan's fields"


def feedback_links_exist(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Every feedback link is an outer link of the manifest."""
    for link in plan.feedback_links:
        if link not in manifest.links or manifest.links[link].role != "outer":
            yield "feedback_links", f"unknown outer link {link!r}"


def search_has_its_corpus(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """A search over a local index has passages in the bundle."""
    search = None if plan.tools is None else plan.tools.search
    if search is None:
        return
    if (search.backend == "local") != (search.corpus is not None):
        yield "tools.search.corpus", "a local index needs one, and nothing else has one"
    elif search.corpus is not None and search.corpus not in manifest.files:
        yield "tools.search.corpus", f"the manifest does not list {search.corpus!r}"


def caches_fit_their_agents(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """A cache's agents exist, are distinct and share its backbone; it holds a whole prompt."""
    for name, cache in plan.caches.items():
        where = f"caches.{name}"
        if cache.backbone not in manifest.backbones:
            yield f"{where}.backbone", f"unknown backbone {cache.backbone!r}"
        if not cache.agents or len(set(cache.agents)) != len(cache.agents):
            yield f"{where}.agents", "needs one or more agents, each once"
        for agent in cache.agents:
            if agent not in plan.agents:
                yield f"{where}.agents", f"unknown agent {agent!r}"
            elif plan.agents[agent].backbone != cache.backbone:
                yield f"{where}.agents", f"agent {agent!r} is on another backbone"
        if cache.capacity % 64 or cache.capacity < plan.limits.max_prompt_tokens:
            yield (
                f"{where}.capacity",
                f"{cache.capacity} is no multiple of 64 that holds a prompt of "
                f"{plan.limits.max_prompt_tokens} tokens",
            )


def steps_name_what_exists(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Agents, caches and links of steps exist; rounds are within bounds and in order."""
    last_round = 1
    for index, step in enumerate(plan.steps):
        where = f"steps[{index}]"
        if not last_round <= step.round <= plan.rounds:
            yield f"{where}.round", f"round {step.round} after {last_round}, of {plan.rounds}"
        last_round = step.round
        for agent in agents_of(step):
            if agent not in plan.agents:
                yield where, f"unknown agent {agent!r}"
        if not isinstance(step, SendStep):
            if step.cache not in plan.caches:
                yield f"{where}.cache", f"unknown cache {step.cache!r}"
            elif agents_of(step) != plan.caches[step.cache].agents:
                yield f"{where}.cache", f"cache {step.cache!r} is not that of the step's agents"


def agents_of(step: Step) -> tuple[str, ...]:
    """Return the agents that a step runs; for a send, source and targets."""
    match step:
        case PrefillStep() | ThinkStep() | WriteStep():
            return step.agents
        case SendStep():
            return (step.source, *step.targets)
        case DecodeStep():
            return (step.agent,)


def sends_use_fitting_links(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """A send has one link per target, from its source's width to the target's."""
    for index, step in enumerate(plan.steps):
        if not isinstance(step, SendStep):
            continue
        where = f"steps[{index}].links"
        wanted = tuple(f"{step.source}->{target}" for target in step.targets)
        if not wanted or step.links != wanted:
            yield where, f"expected {', '.join(wanted)}; found {', '.join(step.links)}"
            continue
        for target, name in zip(step.targets, step.links, strict=True):
            link = manifest.links.get(name)
            dims = tuple(
                manifest.backbones[plan.agents[agent].backbone].width
                for agent in (step.source, target)
            )
            if link is None or link.role != "outer":
                yield where, f"unknown outer link {name!r}"
            elif (link.in_dim, link.out_dim) != dims:
                yield (
                    where,
                    f"link {name!r} maps {link.in_dim} to {link.out_dim}, the agents need "
                    f"{dims[0]} to {dims[1]}",
                )


def steps_come_in_order(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Thinking follows a prefill, sending a thought; slots are filled; the last step decodes."""
    prefilled: dict[str, int] = {}  # cache -> round of its last prefill
    thought: dict[str, ThinkStep] = {}  # agent -> its last rollout
    sent: set[tuple[str, int]] = set()  # (link, round)
    for index, step in enumerate(plan.steps):
        where = f"steps[{index}]"
        match step:
            case PrefillStep():
                if len(step.variants) != len(step.agents):
                    yield f"{where}.variants", "one is needed for each agent"
                    continue
                if step.reuse_prefix and step.cache not in prefilled:
                    yield f"{where}.reuse_prefix", "there is no earlier prefill to reuse"
                if step.prefix_from is not None and (
                    step.prefix_from == step.cache
                    or step.prefix_from not in prefilled
                    or plan.caches[step.prefix_from].backbone != plan.caches[step.cache].backbone
                ):
                    yield (
                        f"{where}.prefix_from",
                        f"{step.prefix_from!r} is no cache that other agents on this backbone "
                        "have filled",
                    )
                for agent, variant in zip(step.agents, step.variants, strict=True):
                    for what in _unfilled(plan, agent, variant, step.round, sent):
                        yield where, what
                prefilled[step.cache] = step.round
            case ThinkStep():
                if prefilled.pop(step.cache, None) != step.round:
                    yield where, "there is no prefill of this round to think from"
                if any(plan.agents[a].latent_steps != step.num_steps for a in step.agents):
                    yield f"{where}.num_steps", f"{step.num_steps} is not what its agents say"
                if step.num_steps < 1:
                    yield f"{where}.num_steps", "a rollout has at least one step"
                prefilled[step.cache] = step.round
                thought.update(dict.fromkeys(step.agents, step))
            case SendStep():
                think = thought.get(step.source)
                if think is None or think.round != step.round:
                    yield where, f"{step.source!r} has no thoughts of this round"
                elif not step.apply_inner and not think.fused:
                    yield f"{where}.apply_inner", "the rollout did not apply the inner link"
                sent.update((link, step.round) for link in step.links)
            case WriteStep():
                yield where, "a bundle's agents hand over thoughts, not text"
            case DecodeStep():
                if step.agent != plan.answer_agent or step.round != plan.rounds:
                    yield where, "only the answer agent decodes, in the last round"
                if prefilled.get(step.cache) != step.round:
                    yield where, "there is no prefill of this round to decode from"
    places = [i for i, step in enumerate(plan.steps) if isinstance(step, DecodeStep)]
    if places != [len(plan.steps) - 1]:
        yield "steps", f"exactly the last step must decode, found it at {places}"


def _unfilled(
    plan: Plan, agent: str, variant: Variant, round_: int, sent: set[tuple[str, int]]
) -> Iterator[str]:
    """Complain about a prompt that does not exist or has slots without a message."""
    parts = prompt_of(plan.agents[agent], variant)
    if parts is None:
        yield f"agent {agent!r} has no prompt `{variant}`"
        return
    for source in (part.value for part in parts if part.kind == "slot"):
        if source not in plan.agents:
            yield f"agent {agent!r} has a slot for unknown agent {source!r}"
            continue
        link = f"{source}->{agent}"
        sent_in = round_ - 1 if link in plan.feedback_links else round_
        # Without latent steps the message is empty, and nothing need be sent.
        if plan.agents[source].latent_steps > 0 and (link, sent_in) not in sent:
            yield f"agent {agent!r} has a slot for {source!r}, who has sent nothing"


def prompt_of(agent: AgentPlan, variant: Variant) -> tuple[PromptPart, ...] | None:
    """Return the parts of one of an agent's prompts; None if it has no such prompt."""
    return agent.first if variant == "first" else agent.then


# Rules of a later stage may take for granted what those of the stages before it check.
STAGES: Final[tuple[tuple[str, tuple[Rule, ...]], ...]] = (
    (
        MANIFEST_NAME,
        (
            backbones_are_usable,
            links_are_of_known_form,
            parity_cases_have_backbones,
        ),
    ),
    (
        PLAN_NAME,
        (
            agents_have_what_they_name,
            prompts_use_what_exists,
            feedback_links_exist,
            search_has_its_corpus,
        ),
    ),
    (PLAN_NAME, (caches_fit_their_agents, steps_name_what_exists)),
    (PLAN_NAME, (sends_use_fitting_links, steps_come_in_order)),
)
