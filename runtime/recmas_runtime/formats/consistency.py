"""Whether a plan and a manifest fit together: everything the executor takes for granted.

A table of rules, each a generator of complaints; the checks of files and of single values come
before (`bundle`, `codec`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import inner_link_id, outer_link_id
from recmas_runtime.formats.layers import LayerShape, RowPositions, cache_tensors, has_states
from recmas_runtime.formats.link_kinds import FORMS
from recmas_runtime.formats.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    RESERVED,
    SPEC_NAME,
    Manifest,
)
from recmas_runtime.formats.messages import KINDS_OF_ROWS, moved_links
from recmas_runtime.formats.plan import (
    AskStep,
    CacheStep,
    DecodeStep,
    LinkPlan,
    Plan,
    PrefillStep,
    PromptStep,
    SendStep,
    ThinkStep,
    WriteStep,
    agents_of,
    field_place,
    form_of,
    is_field,
)
from recmas_runtime.formats.precisions import (
    DEVICE_PATTERN,
    DTYPE_BYTES,
    PRECISIONS,
    TOLERANCES,
    buildable,
)

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
    paths = [PLAN_NAME, SPEC_NAME, *graph_files(manifest)]
    for backbone in manifest.backbones.values():
        paths += [backbone.tokenizer, backbone.chat_template]
    return tuple(dict.fromkeys(paths))


def graph_files(manifest: Manifest) -> tuple[str, ...]:
    """Return the ONNX graphs."""
    paths = [manifest.link_engine, manifest.probe]
    for backbone in manifest.backbones.values():
        paths += [backbone.decoder, backbone.embed, backbone.head]
        paths += [path for path in (backbone.cpu_decoder, backbone.cpu_head) if path is not None]
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
        where = f"backbones.{name}"
        if backbone.dtype not in DTYPE_BYTES:
            yield f"{where}.dtype", f"unknown element type {backbone.dtype!r}"
        if backbone.cache_dtype not in DTYPE_BYTES:
            yield f"{where}.cache_dtype", f"unknown element type {backbone.cache_dtype!r}"
        if re.fullmatch(DEVICE_PATTERN, backbone.device) is None:
            yield f"{where}.device", f"unknown device {backbone.device!r}"
        if backbone.precision not in buildable():
            yield f"{where}.precision", f"unknown precision {backbone.precision!r}"
        size = backbone.vocab_size
        for token_id in backbone.eos_token_ids:
            if token_id >= size:
                yield f"{where}.eos_token_ids", f"token {token_id} of a vocabulary of {size}"


def drafts_can_be_verified(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Text is drafted only where a verified draft is the text that there is without one."""
    if plan.speculation is None:
        return
    writers = [a for step in plan.steps if isinstance(step, WriteStep) for a in step.agents]
    for agent in dict.fromkeys((plan.answer_agent, *writers)):
        backbone = manifest.backbones.get(plan.agents[agent].backbone)
        if backbone is None:
            continue  # behind an API, whose service drafts or does not
        if PRECISIONS[backbone.precision].draft_margin is None or has_states(backbone.layers):
            yield "speculation", f"text of {agent!r} cannot be drafted on its backbone"


def remote_models_are_told_apart(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """A name is that of a backbone or of a remote model; what recmas says is not said again."""
    for name, remote in manifest.remotes.items():
        if name in manifest.backbones:
            yield f"remotes.{name}", "a backbone has that name"
        for key in sorted(remote.body.keys() & RESERVED):
            yield f"remotes.{name}.body", f"{key!r} is what the runtime says itself"


def row_positions_fit_their_layers(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Rows that turn are in the cache, in a known way, and pairs lie within their width."""
    for name, backbone in manifest.backbones.items():
        if backbone.row_positions is not None:
            for what in _misturned(backbone.layers, backbone.row_positions):
                yield f"backbones.{name}.row_positions", what


def _misturned(layers: Sequence[LayerShape], positions: RowPositions) -> Iterator[str]:
    widths = {t.name: t.shape[-1] for t in cache_tensors(layers) if not t.is_state}
    for tensor, index in positions.tensors.items():
        if tensor not in widths:
            yield f"the cache has no rows {tensor!r}"
        elif index >= len(positions.rotations):
            yield f"there is no rotation {index} among {len(positions.rotations)}"
        elif positions.rotations[index].end > widths[tensor]:
            end = positions.rotations[index].end
            yield f"{end} numbers turn in rows {tensor!r} of width {widths[tensor]}"


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
    """Backbone and inner link exist and fit; remote agents have none; the answer agent exists."""
    if plan.answer_agent not in plan.agents:
        yield "answer_agent", f"unknown agent {plan.answer_agent!r}"
    for name, agent in plan.agents.items():
        if agent.backbone in manifest.remotes:
            if agent.inner or agent.latent_steps:
                yield f"agents.{name}", f"latent steps on a remote model, {agent.backbone!r}"
            continue
        backbone = manifest.backbones.get(agent.backbone)
        if backbone is None:
            yield f"agents.{name}.backbone", f"unknown backbone {agent.backbone!r}"
            continue
        where, inner = f"agents.{inner_link_id(name)}", manifest.links.get(agent.inner)
        if inner is None or inner.role != "inner":
            yield where, f"unknown inner link {agent.inner!r}"
        elif inner.in_dim != backbone.width:
            yield where, f"width {inner.in_dim} on a backbone of width {backbone.width}"


def prompts_use_what_exists(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """System texts have no slots, fields are declared."""
    for name, agent in plan.agents.items():
        if any(part.kind == "slot" for part in agent.system):
            yield f"agents.{name}.system", "a slot in a system text"
        for part in (*agent.system, *(agent.first or ()), *agent.then):
            if part.kind == "field" and part.value not in plan.fields:
                yield f"agents.{name}", f"field {part.value!r} is not among the plan's fields"
    for value in plan.fields:
        if not is_field(value):
            yield "fields", f"{value!r} names neither a field nor an entry of one"


def conversations_fill_fields(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Parts of a conversation go into fields; one takes the last question, none what another has.

    Prompts need not show them: agents that never run are left out of a plan.
    """
    if plan.serve is None:
        return
    for name in plan.serve.fields:
        if not is_field(name) or field_place(name).entry is not None or name == "id":
            yield "serve.fields", f"{name!r} names no field that a conversation can fill"
    parts = list(plan.serve.fields.values())
    if parts.count("last_user") != 1:
        yield "serve.fields", f"{parts.count('last_user')} fields take the last question"
    if parts.count("system") > 1:
        yield "serve.fields", f"{parts.count('system')} fields take the system messages"


def rows_are_hidden_where_links_say(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """A decoder has masks for all groups of layers that do not see all rows."""
    for name, backbone in manifest.backbones.items():
        needed = plan.masked_layers(name, backbone.num_layers)
        if not _are_parts(backbone.masked_layers, needed):
            what = f"{_groups(backbone.masked_layers)}, and the links need {_groups(needed)}"
            yield f"backbones.{name}.masked_layers", what


def _are_parts(groups: Sequence[Sequence[int]], needed: Sequence[Sequence[int]]) -> bool:
    """Tell whether distinct layers make up each of the needed groups, and maybe more."""
    layers = [layer for group in groups for layer in group]
    wanted = {layer: number for number, group in enumerate(needed) for layer in group}
    return (
        len(set(layers)) == len(layers)
        and wanted.keys() <= set(layers)
        and all(len({wanted.get(layer) for layer in group}) == 1 for group in groups)
    )


def _groups(groups: Sequence[Sequence[int]]) -> str:
    return "; ".join(", ".join(map(str, group)) for group in groups) or "none"


def links_fit_their_agents(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Vectors go through an outer link from one width to another, rows stay on one backbone."""
    for name, link in plan.links.items():
        where = f"links.{name}"
        unknown = [agent for agent in (link.source, link.target) if agent not in plan.agents]
        if unknown:
            yield where, f"unknown agent {unknown[0]!r}"
            continue
        source, target = (plan.agents[agent].backbone for agent in (link.source, link.target))
        remote = [name for name in (source, target) if name in manifest.remotes]
        if remote and link.carries != "text":
            yield f"{where}.carries", f"a remote model, {remote[0]!r}, takes and gives text only"
            continue
        if not link.has_vectors:
            for key, what in _impossible(manifest, link, (source, target)):
                yield f"{where}.{key}", what
            continue
        outer = manifest.links.get(name)
        if outer is None or outer.role != "outer":
            yield where, f"unknown outer link {name!r}"
            continue
        widths = manifest.backbones[source].width, manifest.backbones[target].width
        if (outer.in_dim, outer.out_dim) != widths:
            needed = f"the agents need {widths[0]} to {widths[1]}"
            yield where, f"link {name!r} maps {outer.in_dim} to {outer.out_dim}, {needed}"


def _impossible(
    manifest: Manifest, link: LinkPlan, backbones: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    """Complain about text without a bound, and about rows that cannot be handed over."""
    if link.needs_text and link.max_tokens is None:
        yield "max_tokens", "a text that is handed over has a bound"
    if link.carries != "cache":
        return
    if backbones[0] != backbones[1]:
        yield "carries", f"rows of backbone {backbones[0]!r} mean nothing to {backbones[1]!r}"
    layers = manifest.backbones[backbones[0]].layers
    if has_states(layers):
        yield "carries", f"layers of backbone {backbones[0]!r} keep states, not only rows"
    beyond = [layer for layer in link.layers or () if layer >= len(layers)]
    if beyond:
        yield "layers", f"there is no layer {beyond[0]} among {len(layers)}"
    if link.rows not in KINDS_OF_ROWS:
        yield "rows", f"{', '.join(link.rows) or 'none'} cannot be handed over"


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
        longest = plan.limits.max_prompt_tokens
        if cache.capacity % 64 or cache.capacity < longest:
            what = f"is no multiple of 64 that holds a prompt of {longest} tokens"
            yield f"{where}.capacity", f"{cache.capacity} {what}"


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
        if isinstance(step, AskStep):
            for agent in step.agents:
                if agent in plan.agents and plan.agents[agent].backbone not in manifest.remotes:
                    yield where, f"agent {agent!r} is on no remote model"
        if isinstance(step, CacheStep):
            if step.cache not in plan.caches:
                yield f"{where}.cache", f"unknown cache {step.cache!r}"
            elif agents_of(step) != plan.caches[step.cache].agents:
                yield f"{where}.cache", f"cache {step.cache!r} is not that of the step's agents"


def sends_use_their_links(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """A send has, for each of its targets, the link that goes there."""
    for index, step in enumerate(plan.steps):
        if not isinstance(step, SendStep):
            continue
        ends = [
            (plan.links[name].source, plan.links[name].target)
            for name in step.links
            if name in plan.links
        ]
        if not step.targets or ends != [(step.source, target) for target in step.targets]:
            wanted = ", ".join(outer_link_id(step.source, target) for target in step.targets)
            found = ", ".join(step.links)
            yield f"steps[{index}].links", f"expected {wanted}; found {found}"
        elif len({form_of(plan.links[name]) for name in step.links}) > 1:
            yield f"steps[{index}].links", "messages of one send are of one form"


def snapshots_are_of_states(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """A snapshot is of layers that keep states, and of the rows that its user keeps or copies."""
    for name, snapshot in plan.snapshots.items():
        where = f"snapshots.{name}.cache"
        if snapshot.cache not in plan.caches:
            yield where, f"unknown cache {snapshot.cache!r}"
        elif not _keeps_states(manifest, plan, snapshot.cache):
            yield where, f"no layer of the backbone of cache {snapshot.cache!r} keeps a state"
    made: set[str] = set()
    restored: set[str] = set()
    behind: dict[str, str] = {}  # cache -> the last step in it, where its layers keep states
    for index, step in enumerate(plan.steps):
        if isinstance(step, PrefillStep):
            for key, what in _misplaced(plan, step, made):
                yield f"steps[{index}].{key}", what
            made.update(step.snapshots)
            restored.update(() if step.restore is None else (step.restore,))
        if not isinstance(step, CacheStep):
            continue
        if behind.get(step.cache) == "think" and isinstance(step, ThinkStep | DecodeStep):
            yield f"steps[{index}]", "the layer states are those behind a rollout already"
        if _keeps_states(manifest, plan, step.cache):
            behind[step.cache] = step.op
    for name in plan.snapshots.keys() - (made & restored):
        yield f"snapshots.{name}", "no step makes it, or none restores it"


def _keeps_states(manifest: Manifest, plan: Plan, cache: str) -> bool:
    return has_states(manifest.backbones[plan.caches[cache].backbone].layers)


def _misplaced(plan: Plan, step: PrefillStep, made: set[str]) -> Iterator[tuple[str, str]]:
    """Complain about the snapshots of a prefill, given those that were made before."""
    if step.restore is not None:
        snapshot = plan.snapshots.get(step.restore)
        kept_from = step.cache if step.reuse_prefix else step.prefix_from
        if snapshot is None:
            yield "restore", f"unknown snapshot {step.restore!r}"
        elif step.restore not in made:
            yield "restore", f"no prefill before has made snapshot {step.restore!r}"
        elif snapshot.cache != kept_from:
            kept = f"those of cache {kept_from!r}" if kept_from else "none"
            what = f"snapshot {step.restore!r} is of cache {snapshot.cache!r}"
            yield "restore", f"{what}, the rows that are kept are {kept}"
    for name in step.snapshots:
        snapshot = plan.snapshots.get(name)
        if snapshot is None:
            yield "snapshots", f"unknown snapshot {name!r}"
        elif snapshot.cache != step.cache:
            yield "snapshots", f"snapshot {name!r} is of cache {snapshot.cache!r}"
    if len(set(step.snapshots)) != len(step.snapshots):
        yield "snapshots", "each is made once"


def moved_rows_can_be_moved(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Where rows may land at other positions, the manifest says how they depend on them."""
    links = ((link.source, link.target, link) for link in plan.links.values())
    for source, target in moved_links(links):
        backbone = plan.agents[target].backbone
        if manifest.backbones[backbone].row_positions is None:
            where = f"links.{outer_link_id(source, target)}"
            yield where, f"rows of backbone {backbone!r} are moved, and nothing says how"


def exits_are_what_the_last_round_takes(
    manifest: Manifest, plan: Plan
) -> Iterator[tuple[str, str]]:
    """An early exit leaves out no message that the last round takes from the round before."""
    taken = {
        (message.link, message.round)
        for step in plan.steps
        if isinstance(step, PromptStep) and step.round == plan.rounds
        for message in step.messages
        if message.round < plan.rounds
    }
    for index, step in enumerate(plan.steps):
        if isinstance(step, DecodeStep | AskStep) and index == len(plan.steps) - 1:
            exits = {(exit_.link, exit_.round) for exit_ in step.exits}
            if exits != (taken if plan.rounds > 2 else set()):
                yield f"steps[{index}].exits", "not the messages that the last round waits for"


def steps_come_in_order(manifest: Manifest, plan: Plan) -> Iterator[tuple[str, str]]:
    """Thinking follows a prefill, sending a thought; slots are filled; the last step decodes."""
    prefilled: dict[str, int] = {}  # cache -> round of its last prefill
    read: dict[str, int] = {}  # agent -> round of its last prompt
    written: dict[str, WriteStep | AskStep] = {}  # agent -> its last text
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
                    what = "is no cache that other agents on this backbone have filled"
                    yield f"{where}.prefix_from", f"{step.prefix_from!r} {what}"
                for what in _misrouted(plan, step, sent):
                    yield f"{where}.messages", what
                prefilled[step.cache] = step.round
                read.update(dict.fromkeys(step.agents, step.round))
            case ThinkStep():
                if prefilled.pop(step.cache, None) != step.round:
                    yield where, "there is no prefill of this round to think from"
                lengths = {plan.agents[agent].latent_steps for agent in step.agents}
                if len(lengths) > 1:
                    yield f"{where}.agents", "they do not take equally many latent steps"
                if 0 in lengths:
                    yield f"{where}.agents", "a rollout has at least one step"
                prefilled[step.cache] = step.round
                thought.update(dict.fromkeys(step.agents, step))
            case SendStep():
                form = plan.links[step.links[0]]
                think, write = thought.get(step.source), written.get(step.source)
                if form.needs_context and read.get(step.source) != step.round:
                    yield where, f"{step.source!r} has read no prompt in this round"
                if form.needs_thoughts and (think is None or think.round != step.round):
                    yield where, f"{step.source!r} has no thoughts of this round"
                if form.needs_text and (write is None or write.round != step.round):
                    yield where, f"{step.source!r} has written nothing in this round"
                keeps = isinstance(write, WriteStep) and write.keeps_states
                if form.needs_written_states and write is not None and not keeps:
                    yield where, f"{step.source!r} keeps no states of what it has written"
                in_think = form.carries == "thoughts" and think is not None and think.fused
                if form.has_vectors and not step.apply_inner and not in_think:
                    yield f"{where}.apply_inner", "nothing has applied the inner link"
                sent.update((link, step.round) for link in step.links)
            case WriteStep():
                if prefilled.get(step.cache) != step.round:
                    yield where, "there is no prefill of this round to write from"
                written.update(dict.fromkeys(step.agents, step))
            case AskStep():
                if len(step.variants) != len(step.agents):
                    yield f"{where}.variants", "one is needed for each agent"
                    continue
                for what in _misrouted(plan, step, sent):
                    yield f"{where}.messages", what
                written.update(dict.fromkeys(step.agents, step))
            case DecodeStep():
                if step.agent != plan.answer_agent or step.round != plan.rounds:
                    yield where, "only the answer agent decodes, in the last round"
                if prefilled.get(step.cache) != step.round:
                    yield where, "there is no prefill of this round to decode from"
    last = plan.steps[-1] if plan.steps else None
    asks = isinstance(last, AskStep) and (last.agents, last.round) == (
        (plan.answer_agent,),
        plan.rounds,
    )
    places = [i for i, step in enumerate(plan.steps) if isinstance(step, DecodeStep)]
    if places != ([] if asks else [len(plan.steps) - 1]):
        yield "steps", f"exactly the last step must decode, found it at {places}"


def _misrouted(plan: Plan, step: PromptStep, sent: set[tuple[str, int]]) -> Iterator[str]:
    """Complain about prompts that do not exist, and about slots and messages that do not fit."""
    messages = list(step.messages)
    for agent, variant in zip(step.agents, step.variants, strict=True):
        if variant == "first" and plan.agents[agent].first is None:
            yield f"agent {agent!r} has no prompt `first`"
            return
        for slot in dict.fromkeys(plan.agents[agent].slots(variant)):
            if slot not in plan.agents:
                yield f"agent {agent!r} has a slot for unknown agent {slot!r}"
            elif messages and (messages[0].agent, messages[0].slot) == (agent, slot):
                message = messages.pop(0)
                link = plan.links.get(message.link)
                if link is None or (link.source, link.target) != (slot, agent):
                    yield f"{message.link!r} is no link from {slot!r} to {agent!r}"
                elif (message.link, message.round) not in sent:
                    yield f"nothing was sent over {message.link!r} in round {message.round}"
            elif plan.agents[slot].latent_steps > 0 or outer_link_id(slot, agent) in plan.links:
                # Without latent steps the message is empty, and nothing need be sent.
                yield f"agent {agent!r} has a slot for {slot!r}, who has sent nothing"
    for message in messages:
        yield f"agent {message.agent!r} has no slot {message.slot!r} here that is still empty"


# Rules of a later stage may take for granted what those of the stages before it check.
STAGES: Final[tuple[tuple[str, tuple[Rule, ...]], ...]] = (
    (
        MANIFEST_NAME,
        (
            backbones_are_usable,
            remote_models_are_told_apart,
            row_positions_fit_their_layers,
            links_are_of_known_form,
            parity_cases_have_backbones,
        ),
    ),
    (
        PLAN_NAME,
        (
            agents_have_what_they_name,
            prompts_use_what_exists,
            conversations_fill_fields,
            search_has_its_corpus,
        ),
    ),
    (PLAN_NAME, (links_fit_their_agents, caches_fit_their_agents, steps_name_what_exists)),
    (
        PLAN_NAME,
        (
            rows_are_hidden_where_links_say,
            sends_use_their_links,
            moved_rows_can_be_moved,
            snapshots_are_of_states,
            drafts_can_be_verified,
            steps_come_in_order,
            exits_are_what_the_last_round_takes,
        ),
    ),
)
