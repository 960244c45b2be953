"""What must hold between the parts of a spec. Every check yields all it finds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Final

from recmas_compiler.spec.checks.fields import check_fields
from recmas_compiler.spec.checks.messages import check_messages
from recmas_compiler.spec.checks.prefix_reuse import check_reuse
from recmas_compiler.spec.checks.remote import check_remote
from recmas_compiler.spec.checks.serve import check_serve
from recmas_compiler.spec.checks.settings import (
    check_settings,
    check_stop_when,
    check_support,
    check_tools,
    check_train,
)
from recmas_compiler.spec.checks.speculation import check_speculation
from recmas_compiler.spec.document.problems import did_you_mean, problem_at
from recmas_compiler.spec.schema.declared import Declared
from recmas_compiler.spec.schema.sections import LinkSection
from recmas_runtime.core.errors import Problem
from recmas_runtime.core.text import counted
from recmas_runtime.formats.ids import link_name, path_text

Ends = tuple[str, str]

# Every pass looks at every message of every round: some 0.3 ms for each in all.
MAX_MESSAGES: Final = 16_384


def closing_links(links: Mapping[Ends, LinkSection]) -> list[list[Ends]]:
    """Return cycles of links without feedback, each ending with the link declared last in it.

    Marking every cycle's last link as feedback leaves no cycle, so the list is one set of fixes
    rather than the (possibly huge) set of all cycles.
    """
    remaining = [ends for ends, link in links.items() if not link.feedback]
    rank = {ends: i for i, ends in enumerate(remaining)}
    cycles = []
    while cycle := _find_cycle(remaining):
        last = cycle.index(max(cycle, key=rank.__getitem__))
        cycle = cycle[last + 1 :] + cycle[: last + 1]
        remaining.remove(cycle[-1])
        cycles.append(cycle)
    return cycles


def _find_cycle(links: list[Ends]) -> list[Ends]:
    """Return one cycle, or an empty list."""
    following: dict[str, list[str]] = {}
    for source, target in links:
        following.setdefault(source, []).append(target)
    finished: set[str] = set()
    for start in following:
        path: list[str] = []
        waiting = [(start, 0)]
        while waiting:
            agent, depth = waiting.pop()
            finished.update(path[depth:])
            del path[depth:]
            if agent in path:
                loop = [*path[path.index(agent) :], agent]
                return list(pairwise(loop))
            if agent in finished:
                continue
            path.append(agent)
            waiting += [(target, depth + 1) for target in reversed(following.get(agent, []))]
        finished.update(path)
    return []


def feedbacks_to(answer: str, links: Mapping[Ends, LinkSection]) -> dict[str, int]:
    """Return, for every agent whose thoughts reach `answer`, the fewest feedback links on the way.

    A message takes one more round for each of them.
    """
    fewest = {answer: 0}
    waiting = deque([answer])
    while waiting:
        target = waiting.popleft()
        for (source, end), link in links.items():
            through = fewest[target] + link.feedback
            if end == target and through < fewest.get(source, through + 1):
                fewest[source] = through
                waiting.append(source)
    return fewest


def run_checks(declared: Declared) -> list[Problem]:
    """Return every finding, warnings included, in no particular order."""
    return [problem for check in CHECKS for problem in check(declared)]


def check_size(declared: Declared) -> Iterator[Problem]:
    """More messages in all rounds together than can be compiled in seconds."""
    num_links, rounds = len(declared.links), declared.document.rounds
    if num_links * rounds > MAX_MESSAGES:
        message = f"{counted(num_links, 'link')} in {counted(rounds, 'round')} are "
        message += f"{num_links * rounds} messages, more than {MAX_MESSAGES}."
        place = declared.places.value(("rounds",))
        yield problem_at(place, "RM105", message, hint="Lower `rounds`, or remove links.")


def check_names(declared: Declared) -> Iterator[Problem]:
    """Backbones and agents that are named but not declared."""
    document, places = declared.document, declared.places
    for name, agent in document.agents.items():
        if agent.backbone not in document.backbones:
            place = places.value(("agents", name, "backbone"))
            message = f"`{name}` runs on `{agent.backbone}`, which is no backbone."
            hint = did_you_mean(agent.backbone, document.backbones)
            yield problem_at(place, "RM110", message, hint=hint)
    for source, target in declared.links:
        for end in dict.fromkeys((source, target)):
            if end not in document.agents:
                message = (
                    f"the link `{link_name(source, target)}` names `{end}`, which is no agent."
                )
                hint = did_you_mean(end, document.agents)
                place = declared.link_place(source, target)
                yield problem_at(place, "RM111", message, hint=hint)
    if document.answer.agent not in document.agents:
        message = f"the answer is to be written by `{document.answer.agent}`, which is no agent."
        hint = did_you_mean(document.answer.agent, document.agents)
        yield problem_at(places.value(("answer", "agent")), "RM111", message, hint=hint)


def check_prompts(declared: Declared) -> Iterator[Problem]:
    """Prompts that are more than text, fields and slots; slots for agents that do not exist."""
    for agent, prompts in declared.prompts.items():
        for field, prompt in prompts.fields():
            for issue in prompt.issues:
                place = declared.inside_prompt(agent, field, issue.start, issue.length)
                yield problem_at(place, "RM117", issue.message, hint=issue.hint)
            for slot in prompt.first_slots:
                place = declared.inside_prompt(agent, field, slot.start, slot.length)
                if field == "system":
                    message = f"the system text of `{agent}` has a slot for `{slot.agent}`."
                    hint = "Slots belong into the prompt: move it there."
                    yield problem_at(place, "RM117", message, hint=hint)
                elif slot.agent not in declared.document.agents:
                    message = f"the slot names `{slot.agent}`, which is no agent."
                    hint = did_you_mean(slot.agent, declared.document.agents)
                    yield problem_at(place, "RM111", message, hint=hint)


def check_use(declared: Declared) -> Iterator[Problem]:
    """Backbones without agents; agents without links; agents whose thoughts end nowhere."""
    document, places = declared.document, declared.places
    used = {agent.backbone for agent in document.agents.values()}
    for name in document.backbones.keys() - used:
        message = f"no agent runs on the backbone `{name}`."
        hint = "Remove it, or name it as the `backbone` of an agent."
        yield problem_at(places.key(("backbones", name)), "RM112", message, hint=hint)
    answer = document.answer.agent
    if answer not in document.agents:
        return
    linked = {end for ends in declared.links for end in ends}
    distance = feedbacks_to(answer, declared.known_links)
    for name in document.agents:
        place = places.key(("agents", name))
        if name == answer:
            continue
        if name not in linked:
            message = f"the agent `{name}` has no link and does not write the answer."
            settings = _settings(declared, name, answer)
            hint = f"Remove it, or link it, such as `{link_name(name, answer)}: {settings}`."
            yield problem_at(place, "RM112", message, hint=hint)
        elif name not in distance:
            message = f"the thoughts of `{name}` never reach `{answer}`, which writes the answer."
            settings = _settings(declared, name, answer)
            hint = f"Add a link from it, such as `{link_name(name, answer)}: {settings}`, "
            hint += "or remove it."
            yield problem_at(place, "RM151", message, hint=hint, severity="warning")
        elif distance[name] >= document.rounds:
            needed = distance[name] + 1
            message = (
                f"the thoughts of `{name}` reach `{answer}` only after {distance[name]} "
                f"feedback {'link' if distance[name] == 1 else 'links'}, "
                f"but `rounds` is {document.rounds}."
            )
            hint = f"Set `rounds` to {needed} or more, or add a link that is not feedback."
            yield problem_at(place, "RM151", message, hint=hint, severity="warning")


def _settings(declared: Declared, source: str, target: str) -> str:
    """Return the settings of a new link: one that would close a cycle is feedback."""
    within = {ends: link for ends, link in declared.known_links.items() if not link.feedback}
    closes = source == target or target in feedbacks_to(source, within)
    return "{feedback: true}" if closes else "{}"


def check_slots(declared: Declared) -> Iterator[Problem]:
    """Slots without a link, links without a slot."""
    agents = declared.document.agents
    # what names an agent that does not exist is reported, and may be what seems to be missing
    doubtful = {target for source, target in declared.links if source not in agents}
    for target, prompts in declared.prompts.items():
        for field, prompt in prompts.fields():
            for slot in prompt.first_slots:
                source = slot.agent
                is_reported = field == "system" or source not in agents or target in doubtful
                if is_reported or (source, target) in declared.links:
                    continue
                place = declared.inside_prompt(target, field, slot.start, slot.length)
                message = f"`{target}` has a slot for `{source}`, but no link brings its message."
                settings = _settings(declared, source, target)
                hint = (
                    f"Add `{link_name(source, target)}: {settings}` to `links`, or remove the slot."
                )
                yield problem_at(place, "RM113", message, hint=hint)
    for source, target in declared.known_links:
        prompt = declared.prompts[target].then
        is_doubtful = prompt.issues or not agents.keys() >= set(prompt.slot_agents)
        if is_doubtful or source in prompt.slot_agents:
            continue
        where = "`then` prompt" if agents[target].prompt.first is not None else "prompt"
        message = (
            f"the {where} of `{target}` has no slot for what `{link_name(source, target)}` brings."
        )
        hint = f"Put `{{{{ latent.{source} }}}}` into it, or remove the link."
        place = declared.link_place(source, target)
        yield problem_at(place, "RM114", message, hint=hint)


def check_cycles(declared: Declared) -> Iterator[Problem]:
    """Cycles within one round."""
    for cycle in closing_links(declared.known_links):
        source, target = cycle[-1]
        path = path_text(*(end for end, _ in cycle), cycle[0][0])
        message = f"the links form a cycle within one round: `{path}`."
        hint = f"Mark the link that begins the next round, such as `{link_name(source, target)}`, "
        hint += "with `feedback: true`."
        yield problem_at(declared.link_place(source, target), "RM115", message, hint=hint)


def check_first(declared: Declared) -> Iterator[Problem]:
    """Prompts for the time before a feedback link has brought anything."""
    for target, prompts in declared.prompts.items():
        feedback = {
            source
            for (source, end), link in declared.known_links.items()
            if end == target and link.feedback
        }
        waiting = [name for name in prompts.then.slot_agents if name in feedback]
        place = declared.places.key(("agents", target, "prompt"))
        if prompts.first is None:
            if waiting:
                message = (
                    f"`{target}` waits for `{waiting[0]}`, whose feedback link brings nothing "
                    "before round 2, and its prompt has no `first`."
                )
                hint = "Write the prompt as a mapping: `first` for round 1, without that slot, and "
                hint += "`then` for the rounds after it."
                yield problem_at(place, "RM116", message, hint=hint)
            continue
        for slot in prompts.first.first_slots:
            if slot.agent in feedback:
                slot_place = declared.inside_prompt(target, "first", slot.start, slot.length)
                message = (
                    f"`first` of `{target}` has a slot for `{slot.agent}`, whose feedback link "
                    "brings nothing before round 2."
                )
                hint = "Remove the slot from `first`; it belongs into `then`."
                yield problem_at(slot_place, "RM116", message, hint=hint)
        if not waiting and not prompts.then.issues:
            message = f"`first` of `{target}` is never used: no feedback link feeds this agent."
            hint = "Remove `first`, or mark a link to this agent with `feedback: true`."
            yield problem_at(
                declared.places.key(("agents", target, "prompt", "first")),
                "RM116",
                message,
                hint=hint,
                severity="warning",
            )


CHECKS: tuple[Callable[[Declared], Iterator[Problem]], ...] = (
    check_size,
    check_names,
    check_prompts,
    check_fields,
    check_use,
    check_slots,
    check_cycles,
    check_first,
    check_messages,
    check_remote,
    check_settings,
    check_support,
    check_reuse,
    check_stop_when,
    check_speculation,
    check_tools,
    check_serve,
    check_train,
)
