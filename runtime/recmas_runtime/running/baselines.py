"""Other plans over the same engines and prompts: baselines, and fewer rounds.

Each baseline is a change of the plan, so prompts, sampler, token accounting and the one way of
writing text stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from msgspec import structs

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.ids import outer_link_id
from recmas_runtime.formats.layers import has_states, sequence_bytes, states_bytes
from recmas_runtime.formats.manifest import Manifest
from recmas_runtime.formats.messages import RowsOf
from recmas_runtime.formats.plan import (
    MAX_LATENT_STEPS,
    AgentPlan,
    AskStep,
    CachePlan,
    DecodeStep,
    LinkPlan,
    Message,
    Plan,
    PrefillStep,
    PromptPart,
    PromptStep,
    SendStep,
    SnapshotPlan,
    Step,
    ThinkStep,
    Variant,
    WriteStep,
    cache_capacity,
    prompt_fields,
)
from recmas_runtime.formats.precisions import DTYPE_BYTES
from recmas_runtime.running.controls import MEAN, NULL, SHUFFLED

LATENT: Final = "latent"  # the system itself, with each record's own messages

Parts = tuple[PromptPart, ...]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A plan to compare with.

    Attributes:
        control: `shuffled` or `mean` where the answer agent's messages depend on other records.
    """

    plan: Plan
    control: str | None = None


def apply_baseline(plan: Plan, name: str, manifest: Manifest) -> Baseline:
    """Return the baseline of a latent plan: `latent`, or one of `BASELINES`, `text@N`, `moa@N`.

    N is tokens per text. The manifest says how long prompts may become.

    Raises:
        RecmasError: RM508 for a name that is none, or that this system has no use for.
    """
    if name == LATENT:
        return Baseline(plan=plan)
    found = re.fullmatch(r"([a-z-]+)(?:@([1-9][0-9]{0,5}))?", str(name))
    kind = baseline_name(found[1]) if found else ""
    if found is None or kind not in BASELINES:
        raise _unusable(f"there is no baseline {name!r}")
    limit = found[2]
    if limit is not None and kind not in _WITH_LIMIT:
        raise _unusable(f"{name!r}: only {' and '.join(_WITH_LIMIT)} take a limit of tokens")
    return _CHANGES[kind](plan, manifest, None if limit is None else int(limit))


def with_rounds(plan: Plan, rounds: int) -> Plan:
    """Return a plan that runs fewer rounds of those that were built.

    The first of them are as they were, and the last one is the plan's last, as after an early exit.
    A single round has no messages of a round before it, so its prompts are those of a first round.

    Raises:
        RecmasError: RM506 for more rounds than the plan has, or less than one.
    """
    if not 1 <= rounds <= plan.rounds:
        raise fail(
            "RM506",
            f"rounds is {rounds}, the bundle has {plan.rounds}",
            hint=f"Take 1 to {plan.rounds}, or build with more.",
        )
    if rounds == plan.rounds:
        return plan
    earlier = [step for step in plan.steps if step.round < rounds]
    moved = plan.rounds - rounds
    last: list[Step] = []
    for step in plan.steps:
        if step.round != plan.rounds:
            continue
        changes: dict[str, object] = {"round": rounds}
        if isinstance(step, PromptStep):
            changes["messages"] = tuple(
                structs.replace(message, round=message.round - moved)
                for message in step.messages
                if message.round > moved
            )
            if rounds == 1:
                changes["variants"] = ("first",) * len(step.agents)
        if isinstance(step, DecodeStep | AskStep):
            changes["exits"] = tuple(
                structs.replace(exit_, round=exit_.round - moved)
                for exit_ in step.exits
                if rounds > 2
            )
        last.append(structs.replace(step, **changes))
    stop_when = plan.stop_when if rounds > 2 else None
    return structs.replace(plan, rounds=rounds, steps=(*earlier, *last), stop_when=stop_when)


def baseline_name(name: str) -> str:
    """Return the name of a baseline that may be given by its name of version 0.1."""
    return _OLD_NAMES.get(name, name)


def _single(plan: Plan, manifest: Manifest, _: int | None) -> Baseline:
    """The answer agent alone: lines of its prompt that hold a slot are left out."""
    agent = plan.agents[plan.answer_agent]
    return Baseline(plan=_only_answer(plan, manifest, _without_slots(agent)))


def _all_context(plan: Plan, manifest: Manifest, _: int | None) -> Baseline:
    """The answer agent alone, and it sees everything: the ceiling of what messages can bring.

    The fields that only other agents' prompts show come first, a paragraph each, in the order of
    the agents; then its prompt without the lines that hold a slot.
    """
    agent = _without_slots(plan.agents[plan.answer_agent])
    shown = prompt_fields([agent])
    others = [a for name, a in plan.agents.items() if name != plan.answer_agent]
    parts = [part for a in others for text in (a.system, a.first or (), a.then) for part in text]
    fields = dict.fromkeys(part.value for part in parts if part.kind == "field")
    before: list[PromptPart] = []
    for name in fields:
        if name not in shown:
            before.append(PromptPart(kind="field", value=name))
            before.append(PromptPart(kind="text", value="\n\n"))
    whole = structs.replace(agent, then=(*before, *agent.then))
    return Baseline(plan=_with_room(_only_answer(plan, manifest, whole), manifest))


def _null(plan: Plan, manifest: Manifest, _: int | None) -> Baseline:
    """The answer agent's prompt as it is, all its slots empty.

    Nothing that the other agents do can reach its text, so they do not run.
    """
    agent = plan.agents[plan.answer_agent]
    return Baseline(plan=_only_answer(plan, manifest, agent))


def _shuffled(plan: Plan, manifest: Manifest, _: int | None) -> Baseline:
    """The same run, but the answer is written from the messages of another record."""
    _demand_slots(plan, SHUFFLED)
    return Baseline(plan=plan, control=SHUFFLED)


def _mean(plan: Plan, manifest: Manifest, _: int | None) -> Baseline:
    """The same run, but the answer is written from the mean of all other records' messages."""
    _demand_slots(plan, MEAN)
    for message in plan.answer_prompt.messages:
        link = plan.links[message.link]
        if not link.has_vectors:
            raise _unusable(
                f"{MEAN}: the link {message.link!r} carries {link.carries}, which has no mean"
            )
    return Baseline(plan=plan, control=MEAN)


def _demand_slots(plan: Plan, name: str) -> None:
    if not plan.agents[plan.answer_agent].slots("then"):
        raise _unusable(f"{name}: the answer agent has no slot")


def _text(plan: Plan, manifest: Manifest, limit: int | None) -> Baseline:
    """The same graph and rounds, but every agent that would send anything writes text instead.

    Its text stands in the slots of the agents it would have sent something else to.
    """
    senders = {(step.round, step.source) for step in plan.steps if isinstance(step, SendStep)}
    steps: list[Step] = []
    for step in plan.steps:
        match step:
            case ThinkStep() | WriteStep():
                continue
            case SendStep():
                step = structs.replace(step, apply_inner=False)
            case AskStep() if step is not plan.answer_step:
                step = structs.replace(step, max_new_tokens=limit, greedy=False)
        steps.append(step)
        if isinstance(step, PrefillStep) and senders & {(step.round, a) for a in step.agents}:
            write = WriteStep(
                round=step.round, agents=step.agents, cache=step.cache, max_new_tokens=limit
            )
            steps.append(write)
    links = {
        name: LinkPlan(source=link.source, target=link.target, carries="text")
        for name, link in plan.links.items()
    }
    return Baseline(plan=_with_text(plan, manifest, plan.agents, links, steps))


def _moa(plan: Plan, manifest: Manifest, limit: int | None) -> Baseline:
    """Mixture-of-agents (arXiv 2406.04692): all other agents answer, the answer agent sums up.

    Each round is a layer: from the second on every agent also sees all answers of the layer before.
    Prompts are the agents' own without the lines that hold slots.
    """
    others = [name for name in plan.agents if name != plan.answer_agent]
    if not others:
        raise _unusable("moa: there is no agent besides the answer agent")
    agents = {}
    for name, agent in plan.agents.items():
        alone = _without_slots(agent)
        agents[name] = structs.replace(
            alone, first=alone.then, then=alone.then + _answers_of(others)
        )
    by_backbone = [
        tuple(group)
        for _, group in groupby(
            sorted(others, key=lambda n: agents[n].backbone), key=lambda n: agents[n].backbone
        )
    ]
    groups = [
        group
        for group in (*by_backbone, (plan.answer_agent,))
        if agents[group[0]].backbone not in manifest.remotes
    ]
    links = {
        outer_link_id(source, target): LinkPlan(source=source, target=target, carries="text")
        for source in others
        for target in plan.agents
    }

    def seen(by: Sequence[str], round_: int) -> tuple[Message, ...]:
        """Return the answers of a round, of all others, in the prompts of agents."""
        return tuple(
            Message(agent=target, slot=source, link=outer_link_id(source, target), round=round_)
            for target in by
            for source in others
        )

    caches = {"+".join(group): _cache(plan, manifest, group) for group in groups}
    snapshots = {
        name: SnapshotPlan(
            cache=name,
            bytes_per_sample=len(cache.agents)
            * states_bytes(manifest.backbones[cache.backbone].layers),
        )
        for name, cache in caches.items()
        if cache.agents != (plan.answer_agent,)
        and has_states(manifest.backbones[cache.backbone].layers)
        and plan.rounds > 1
    }
    steps: list[Step] = []
    for round_ in range(1, plan.rounds + 1):
        for group in by_backbone:
            cache = "+".join(group)
            snapshot = cache if cache in snapshots else None
            variants: tuple[Variant, ...] = ("first" if round_ == 1 else "then",) * len(group)
            messages = seen(group, round_ - 1) if round_ > 1 else ()
            if group not in groups:
                asks = AskStep(
                    round=round_,
                    agents=group,
                    variants=variants,
                    messages=messages,
                    max_new_tokens=limit,
                )
                steps.append(asks)
            else:
                steps.append(
                    PrefillStep(
                        round=round_,
                        agents=group,
                        variants=variants,
                        messages=messages,
                        reuse_prefix=round_ > 1,
                        cache=cache,
                        restore=snapshot if round_ > 1 else None,
                        snapshots=(snapshot,) if snapshot and round_ < plan.rounds else (),
                    )
                )
                steps.append(
                    WriteStep(round=round_, agents=group, cache=cache, max_new_tokens=limit)
                )
            steps += [
                SendStep(
                    round=round_,
                    source=source,
                    targets=tuple(agents),
                    links=tuple(outer_link_id(source, target) for target in agents),
                    apply_inner=False,
                )
                for source in group
            ]
    answer = (plan.answer_agent,)
    steps += _answer_steps(plan, manifest, plan.rounds, seen(answer, plan.rounds))
    whole = structs.replace(
        _with_text(plan, manifest, agents, links, steps), caches=caches, snapshots=snapshots
    )
    return Baseline(plan=whole)


def _latentmas(plan: Plan, manifest: Manifest, _: int | None) -> Baseline:
    """LatentMAS (arXiv 2511.20639) with the agents of a system on one backbone, in their order.

    Each agent has the whole turns of all before it, thoughts included, as rows of the cache before
    its own prompt. There is one round, and lines that hold slots are left out of the prompts.
    """
    turns = [a for step in plan.steps if isinstance(step, PromptStep) for a in step.agents]
    others = [name for name in dict.fromkeys(turns) if name != plan.answer_agent]
    _refuse_latentmas(plan, manifest, others)
    roomy = _with_room(plan, manifest)
    order = [*others, plan.answer_agent]
    agents: dict[str, AgentPlan] = {}
    links: dict[str, LinkPlan] = {}
    steps: list[Step] = []
    messages: dict[str, list[Message]] = {name: [] for name in order}
    is_fused = any(step.fused for step in plan.steps if isinstance(step, ThinkStep))
    for place, name in enumerate(order):
        alone = _without_slots(plan.agents[name])
        slots = tuple(PromptPart(kind="slot", value=before) for before in order[:place])
        agents[name] = structs.replace(alone, then=(*slots, *alone.then))
        if name == plan.answer_agent:
            break
        steps.append(_prefill(name, 1, tuple(messages[name])))
        rows: tuple[RowsOf, ...] = ("prompt",)
        if alone.latent_steps > 1:  # the first thought is the prompt's last state
            rows = ("prompt", "thoughts")
            steps.append(ThinkStep(round=1, agents=(name,), fused=is_fused, cache=name))
        later = tuple(order[place + 1 :])
        ids = tuple(outer_link_id(name, target) for target in later)
        for link, target in zip(ids, later, strict=True):
            links[link] = LinkPlan(source=name, target=target, carries="cache", rows=rows)
            messages[target].append(Message(agent=target, slot=name, link=link, round=1))
        steps.append(SendStep(round=1, source=name, targets=later, links=ids, apply_inner=False))
    steps += _answer_steps(plan, manifest, 1, tuple(messages[plan.answer_agent]))
    whole = structs.replace(
        roomy,
        rounds=1,
        agents=agents,
        links=links,
        caches={name: _cache(roomy, manifest, (name,)) for name in order},
        snapshots={},
        steps=tuple(steps),
        fields=prompt_fields(agents.values()),
        stop_when=None,
    )
    return Baseline(plan=whole)


def _refuse_latentmas(plan: Plan, manifest: Manifest, others: Sequence[str]) -> None:
    if not others:
        raise _unusable("latentmas: there is no agent besides the answer agent")
    backbones = sorted({plan.agents[name].backbone for name in (*others, plan.answer_agent)})
    if remote := [name for name in backbones if name in manifest.remotes]:
        raise _unusable(f"latentmas: {remote[0]!r} is a model behind an API, which has no rows")
    if len(backbones) > 1:
        named = ", ".join(map(repr, backbones))
        raise _unusable(f"latentmas: rows of one backbone mean nothing to another, of {named}")
    if has_states(manifest.backbones[backbones[0]].layers):
        raise _unusable(
            f"latentmas: layers of backbone {backbones[0]!r} keep states, not only rows"
        )
    for name in others:
        init = manifest.links[plan.agents[name].inner].init
        if plan.agents[name].latent_steps > 1 and init != "latentmas":
            raise fail(
                "RM508",
                f"latentmas: the inner link of {name!r} is not the rule of LatentMAS but {init!r}",
                hint="Build the spec with `inner: {init: latentmas}` for every agent that thinks, "
                "into a bundle of its own.",
            )


def _looplm(plan: Plan, manifest: Manifest, _: int | None) -> Baseline:
    """A looped language model: the answer agent alone feeds its thoughts back, then answers.

    It takes as many latent steps as all agents of the system in all rounds together, at once and
    behind its prompt without slots; the answer follows the last thought.
    """
    name, entry = plan.answer_agent, manifest.backbones[plan.agents[plan.answer_agent].backbone]
    thinking = [step for step in plan.steps if isinstance(step, ThinkStep)]
    steps = sum(plan.agents[agent].latent_steps for step in thinking for agent in step.agents)
    most = min(MAX_LATENT_STEPS, entry.max_positions - plan.sampling.max_new_tokens - 1)
    if not 0 < steps <= most:
        raise fail(
            "RM508",
            f"looplm: the system takes {steps} latent steps, not 1 to {most}",
            hint="It is for systems whose agents think, as links that carry thoughts have them do.",
        )
    agent = structs.replace(
        _without_slots(plan.agents[name]),
        inner=_looping_link(plan, manifest),
        latent_steps=steps,
    )
    alone = _only_answer(plan, manifest, agent)
    room = entry.max_positions - steps - plan.sampling.max_new_tokens
    longest = min(plan.limits.max_prompt_tokens, room)
    prefill, decode = alone.steps
    think = ThinkStep(
        round=1, agents=(name,), fused=any(step.fused for step in thinking), cache=name
    )
    whole = structs.replace(
        alone,
        limits=structs.replace(plan.limits, max_prompt_tokens=longest),
        caches={name: _cache(plan, manifest, (name,), latent_steps=steps)},
        steps=(prefill, think, decode),
    )
    return Baseline(plan=whole)


def _looping_link(plan: Plan, manifest: Manifest) -> str:
    """Return the inner link of the answer agent, or of another agent if it has no use for its own.

    The closed form is that of the backbone, whoever thinks on it.
    """
    backbone = plan.agents[plan.answer_agent].backbone
    others = [agent.inner for agent in plan.agents.values() if agent.backbone == backbone]
    for inner in (plan.agents[plan.answer_agent].inner, *others):
        if manifest.links[inner].init != "unused":
            return inner
    raise _unusable(f"looplm: nobody on backbone {backbone!r} makes latent steps")


def _only_answer(plan: Plan, manifest: Manifest, agent: AgentPlan) -> Plan:
    """Return a plan of one round in which the answer agent answers at once, its slots empty."""
    name = plan.answer_agent
    is_remote = agent.backbone in manifest.remotes
    caches = {} if is_remote else {name: _cache(plan, manifest, (name,))}
    return structs.replace(
        plan,
        rounds=1,
        agents={name: agent},
        links={},
        caches=caches,
        snapshots={},
        steps=_answer_steps(plan, manifest, 1, ()),
        fields=prompt_fields([agent]),
        stop_when=None,
    )


def _answer_steps(
    plan: Plan, manifest: Manifest, round_: int, messages: tuple[Message, ...]
) -> tuple[Step, ...]:
    name = plan.answer_agent
    if plan.agents[name].backbone in manifest.remotes:
        ask = AskStep(round=round_, agents=(name,), variants=("then",), messages=messages)
        return (ask,)
    decode = DecodeStep(round=round_, agent=name, cache=name)
    return _prefill(name, round_, messages), decode


def _prefill(name: str, round_: int, messages: tuple[Message, ...]) -> PrefillStep:
    """Return the whole prompt of one agent in a cache of its own."""
    return PrefillStep(
        round=round_,
        agents=(name,),
        variants=("then",),
        messages=messages,
        reuse_prefix=False,
        cache=name,
    )


def _with_text(
    plan: Plan,
    manifest: Manifest,
    agents: Mapping[str, AgentPlan],
    links: Mapping[str, LinkPlan],
    steps: Sequence[Step],
) -> Plan:
    whole = structs.replace(
        plan,
        agents=dict(agents),
        links=dict(links),
        steps=tuple(steps),
        fields=prompt_fields(agents.values()),
        stop_when=None,
    )
    return _with_room(whole, manifest)


def _with_room(plan: Plan, manifest: Manifest) -> Plan:
    """Return a plan whose prompts may grow: half of a backbone's positions are left to text."""
    # Remote models have bounds of their own.
    backbones = {agent.backbone for agent in plan.agents.values()} - manifest.remotes.keys()
    positions = min((manifest.backbones[name].max_positions for name in backbones), default=0)
    longest = max(plan.limits.max_prompt_tokens, positions // 2)
    return structs.replace(plan, limits=structs.replace(plan.limits, max_prompt_tokens=longest))


def _cache(
    plan: Plan, manifest: Manifest, agents: tuple[str, ...], *, latent_steps: int = 0
) -> CachePlan:
    """Return a cache for a group of agents, at the limits of the latent plan."""
    backbone = plan.agents[agents[0]].backbone
    entry = manifest.backbones[backbone]
    rows = plan.limits.max_prompt_tokens + latent_steps + plan.sampling.max_new_tokens
    capacity = cache_capacity(rows)
    return CachePlan(
        backbone=backbone,
        agents=agents,
        capacity=capacity,
        bytes_per_sample=len(agents)
        * sequence_bytes(
            entry.layers,
            capacity,
            num_masks=len(entry.masked_layers),
            element_bytes=DTYPE_BYTES[entry.cache_dtype],
        ),
    )


def without_slots(prompt: Parts) -> Parts:
    """Return a prompt without its slots, and without the lines that are about nothing else.

    This is what an agent is asked that is on its own; a line with a field stays. Where all lines
    are about slots, they stay without them: nobody can answer an empty prompt.
    """
    lines: list[list[PromptPart]] = [[]]
    for part in prompt:
        texts = part.value.splitlines(keepends=True) if part.kind == "text" else [part.value]
        for text in texts:
            lines[-1].append(PromptPart(kind=part.kind, value=text))
            if part.kind == "text" and text.endswith("\n"):
                lines.append([])
    kept = [
        line
        for line in lines
        if {part.kind for part in line} >= {"field"} or all(part.kind == "text" for part in line)
    ]
    if not any(part.kind == "field" or part.value.strip() for line in kept for part in line):
        kept = lines
    return tuple(part for line in kept for part in line if part.kind != "slot")


def _without_slots(agent: AgentPlan) -> AgentPlan:
    return structs.replace(agent, first=None, then=without_slots(agent.then))


def _answers_of(agents: Sequence[str]) -> Parts:
    """Return the end of a prompt that shows what the agents answered."""
    parts = [PromptPart(kind="text", value="\n\nAnswers that others gave to the same task:\n")]
    for number, name in enumerate(agents, start=1):
        parts.append(PromptPart(kind="text", value=f"\n{number}. "))
        parts.append(PromptPart(kind="slot", value=name))
        parts.append(PromptPart(kind="text", value="\n"))
    return tuple(parts)


def _unusable(message: str) -> RecmasError:
    """Return the refusal of a baseline, which the message begins with; the others are offered."""
    refused = message.partition(":")[0]
    named = [LATENT, *BASELINES, *(f"{name}@N" for name in _WITH_LIMIT)]
    known = [name for name in named if name.partition("@")[0] != refused]
    return fail("RM508", message, hint=f"Baselines are {', '.join(known)}.")


_CHANGES: Final[dict[str, Callable[[Plan, Manifest, int | None], Baseline]]] = {
    "single": _single,
    "all-context": _all_context,
    "text": _text,
    "moa": _moa,
    "latentmas": _latentmas,
    "looplm": _looplm,
    NULL: _null,
    SHUFFLED: _shuffled,
    MEAN: _mean,
}
_WITH_LIMIT: Final = ("text", "moa")
_OLD_NAMES: Final = {"null-latents": NULL, "shuffled-latents": SHUFFLED}

BASELINES: Final = tuple(_CHANGES)
