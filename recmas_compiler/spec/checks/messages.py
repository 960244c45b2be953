"""What links carry: settings that belong to another kind of message, and messages nobody can send.

Every check yields all it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from recmas_compiler.spec.document.places import Loc
from recmas_compiler.spec.document.problems import did_you_mean, problem_at
from recmas_compiler.spec.schema.declared import Declared, Prompt
from recmas_compiler.spec.schema.sections import LinkSection
from recmas_runtime.core.errors import Problem
from recmas_runtime.core.text import listed
from recmas_runtime.formats.ids import link_name
from recmas_runtime.formats.messages import Carries

# What a key is for; keys that are not here are for every link.
_BELONGS_TO: Final[dict[str, tuple[Carries, ...]]] = {
    "of": ("context",),
    "every": ("context",),
    "pool": ("context",),
    "max_tokens": ("written", "text", "cache"),
    "rows": ("cache",),
    "layers": ("cache",),
    "kind": ("thoughts", "context", "written"),
    "init": ("thoughts", "context", "written"),
    "weights": ("thoughts", "context", "written"),
}


def check_messages(declared: Declared) -> Iterator[Problem]:
    """Links that cannot carry what they say."""
    for ends, link in declared.known_links.items():
        misplaced = list(_misplaced(declared, ends, link))
        yield from misplaced
        if misplaced:
            continue
        match link.carries:
            case "context":
                yield from _check_context(declared, ends, link)
            case "cache":
                yield from _check_rows(declared, ends, link)
                yield from _check_cache(declared, ends)
        if link.form.needs_text:
            yield from _check_text(declared, ends, link)


def _loc(ends: tuple[str, str]) -> Loc:
    return "links", link_name(*ends)


def _misplaced(declared: Declared, ends: tuple[str, str], link: LinkSection) -> Iterator[Problem]:
    """Keys that mean nothing for what a link carries."""
    for key, kinds in _BELONGS_TO.items():
        given = getattr(link, key)
        if given in (None, False):
            continue
        place = declared.places.key((*_loc(ends), key))
        if link.carries not in kinds:
            message = f"`{key}` means nothing for a link that carries `{link.carries}`."
            hint = f"It belongs to links that carry {listed(f'`{kind}`' for kind in kinds)}."
            yield problem_at(place, "RM127", message, hint=hint)
        elif key == "max_tokens" and not link.form.needs_text:
            message = "`max_tokens` means nothing for a link whose sender does not write for it."
            hint = "Remove it, or add `written` to `rows`."
            yield problem_at(place, "RM127", message, hint=hint)


def _check_context(
    declared: Declared, ends: tuple[str, str], link: LinkSection
) -> Iterator[Problem]:
    source, _ = ends
    if link.every is not None and link.pool:
        place = declared.places.key((*_loc(ends), "pool"))
        message = "`every` and `pool` shorten the same message in two ways."
        yield problem_at(place, "RM127", message, hint="Remove one of the two.")
    if link.pool and declared.latent_steps(source) == 0:
        place = declared.places.key((*_loc(ends), "pool"))
        message = f"`pool` makes as many means as `{source}` has latent steps, which are 0."
        hint = "Set `latent_steps` of that agent to the number of vectors."
        yield problem_at(place, "RM127", message, hint=hint)
    if link.of is None:
        return
    prompts = declared.prompts[source]
    for name, prompt in prompts.fields():
        if name == "system" or prompt.issues:
            continue
        if link.of in {*_fields(prompts.system), *_fields(prompt)}:
            continue
        place = declared.places.value((*_loc(ends), "of"))
        title = "prompt" if prompts.first is None else f"prompt `{name}`"
        message = f"the {title} of `{source}` does not show the field `{link.of}`."
        hint = did_you_mean(link.of, _fields(prompt))
        hint += f" Or write `{{{{ {link.of} }}}}` into the prompt."
        yield problem_at(place, "RM127", message, hint=hint.strip())


def _fields(prompt: Prompt) -> list[str]:
    return [part.value for part in prompt.parts if part.kind == "field"]


def _check_rows(declared: Declared, ends: tuple[str, str], link: LinkSection) -> Iterator[Problem]:
    source, _ = ends
    rows = link.form.rows
    place = declared.places.value((*_loc(ends), "rows" if link.rows is not None else "carries"))
    if len(set(rows)) != len(rows):
        yield problem_at(place, "RM127", "`rows` names the same rows twice.", hint="Remove one.")
    elif {"thoughts", "written"} <= set(rows):
        message = "`rows` has `thoughts` and `written`, which lie in the same place of the cache."
        yield problem_at(place, "RM127", message, hint="Keep one of the two.")
    elif set(rows) == {"context", "prompt"}:
        message = "`rows` has `context` and `prompt`; the first is the beginning of the second."
        yield problem_at(place, "RM127", message, hint="Keep one of the two.")
    elif len(rows) == 2 and rows[1] in ("context", "prompt"):
        message = f"`rows` has `{rows[0]}` before `{rows[1]}`, which lie the other way round."
        yield problem_at(place, "RM127", message, hint=f"Write `[{rows[1]}, {rows[0]}]`.")
    if "thoughts" in rows and declared.latent_steps(source) < 2:
        message = (
            f"`{source}` leaves no rows of thoughts: every latent step but the first leaves one, "
            f"and it takes {declared.latent_steps(source)}."
        )
        hint = "Raise its `latent_steps`, or hand over other rows."
        yield problem_at(place, "RM127", message, hint=hint)
    layers = link.form.layers
    if layers is not None and len(set(layers)) != len(layers):
        place = declared.places.value((*_loc(ends), "layers"))
        yield problem_at(place, "RM127", "`layers` names a layer twice.", hint="Remove one.")


def _check_cache(declared: Declared, ends: tuple[str, str]) -> Iterator[Problem]:
    source, target = ends
    document = declared.document
    names = [document.agents[agent].backbone for agent in ends]
    sections = [document.backbones.get(name) for name in names]
    if None not in sections and sections[0] != sections[1]:
        place = declared.places.value((*_loc(ends), "carries"))
        message = (
            f"rows of the cache of `{source}` mean nothing to `{target}`: they run on `{names[0]}` "
            f"and `{names[1]}`."
        )
        hint = "Let both run on one backbone, or let the link carry `context`, `written` or `text`."
        yield problem_at(place, "RM127", message, hint=hint)
    for field, prompt in declared.prompts[target].fields():
        for slot in prompt.slots:
            if field == "system" or slot.agent != source:
                continue
            if _is_behind_something(declared, target, prompt, slot.start):
                place = declared.inside_prompt(target, field, slot.start, slot.length)
                message = (
                    f"the rows that `{link_name(source, target)}` brings come before the whole "
                    f"prompt, but the slot for `{source}` stands behind something."
                )
                hint = f"Put `{{{{ latent.{source} }}}}` first in the prompt; it shows nothing."
                yield problem_at(place, "RM127", message, hint=hint)


def _is_behind_something(declared: Declared, target: str, prompt: Prompt, start: int) -> bool:
    """Tell whether anything but rows of other agents, or the same again, stands before a slot."""
    number = [slot.start for slot in prompt.slots].index(start)
    before = [slot.agent for slot in prompt.slots[:number]]
    rows = {
        source
        for (source, end), link in declared.known_links.items()
        if end == target and link.carries == "cache"
    }
    leading = [part for part in prompt.parts if part.kind != "text" or part.value.strip()]
    slots = [part.value for part in leading[: number + 1] if part.kind == "slot"]
    is_repeated = prompt.slots[number].agent in before
    return is_repeated or not rows.issuperset(before) or len(slots) != number + 1


def _check_text(declared: Declared, ends: tuple[str, str], link: LinkSection) -> Iterator[Problem]:
    source, _ = ends
    others = [other.form for other in declared.sent_by(source).values() if other.form.needs_text]
    if others[0].max_tokens != link.form.max_tokens:
        key = "max_tokens" if link.max_tokens is not None else "carries"
        place = declared.places.value((*_loc(ends), key))
        message = (
            f"`{source}` writes one text for all its links, of at most {others[0].max_tokens} "
            f"tokens for one and {link.form.max_tokens} for this one."
        )
        yield problem_at(place, "RM127", message, hint="Give them the same `max_tokens`.")
    limit = declared.document.build.max_prompt_tokens
    most = link.form.max_tokens or 0
    if link.form.carries == "written" and most >= limit:
        place = declared.places.value((*_loc(ends), "max_tokens"))
        message = f"a message of {most} vectors does not fit into prompts of {limit} positions."
        hint = "Raise `build.max_prompt_tokens`, or lower `max_tokens`."
        yield problem_at(place, "RM127", message, hint=hint)
