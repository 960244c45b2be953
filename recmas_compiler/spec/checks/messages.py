"""What links carry: settings that belong to another kind of message, and messages nobody can send.

Every check yields all it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from recmas_compiler.spec.document.places import Loc
from recmas_compiler.spec.document.problems import did_you_mean, problem_at
from recmas_compiler.spec.schema.declared import Declared, Prompt
from recmas_compiler.spec.schema.sections import DEFAULT_MAX_TOKENS, LinkSection
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
_KINDS: Final[dict[Carries, str]] = {
    "thoughts": "vectors",
    "context": "vectors",
    "written": "vectors",
    "text": "text",
    "cache": "rows",
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
            is_written = (*_loc(ends), "carries") in declared.places.values
            carried = f"`{link.carries}`" if is_written else f"`{link.carries}`, the default"
            message = f"`{key}` means nothing for a link that carries {carried}."
            hint = f"Remove it; it is for links that carry {listed(f'`{kind}`' for kind in kinds)}."
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
        shown = _fields(prompts.system) + _fields(prompt)
        write = f"rite `{{{{ {link.of} }}}}` into the prompt, or leave `of` out."
        hint = f"{did_you_mean(link.of, shown)} Or w{write}" if shown else f"W{write}"
        yield problem_at(place, "RM127", message, hint=hint)


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
        seen: set[str] = set()
        for slot in prompt.slots:
            is_repeated = slot.agent in seen
            seen.add(slot.agent)
            if field == "system" or slot.agent != source:
                continue
            before = _before_slot(declared, target, prompt, slot.start)
            if before is None and not is_repeated:
                continue
            if is_repeated:
                message = (
                    f"the slot for `{source}` stands here once more, but the rows that "
                    f"`{link_name(source, target)}` brings come once, before the whole prompt."
                )
                hint = "Keep the one at the beginning of the prompt."
            else:
                message = (
                    f"the rows that `{link_name(source, target)}` brings come before the whole "
                    f"prompt, but the slot for `{source}` stands behind {before}."
                )
                hint = f"Put `{{{{ latent.{source} }}}}` first in the prompt; it shows nothing."
            place = declared.inside_prompt(target, field, slot.start, slot.length)
            yield problem_at(place, "RM127", message, hint=hint)


def _before_slot(declared: Declared, target: str, prompt: Prompt, start: int) -> str | None:
    """Return what stands before a slot but slots of other rows; None if nothing does."""
    number = [slot.start for slot in prompt.slots].index(start)
    slots_before = 0
    for part in prompt.parts:
        if part.kind != "slot":
            if part.kind == "field":
                return f"the field `{part.value}`"
            if part.value.strip():
                return "text"
            continue
        if slots_before == number:
            return None
        slots_before += 1
        link = declared.known_links.get((part.value, target))
        if link is not None and link.carries != "cache":
            return f"the message of `{part.value}`, which is {_KINDS[link.carries]}"
    return None


def _check_text(declared: Declared, ends: tuple[str, str], link: LinkSection) -> Iterator[Problem]:
    source, _ = ends
    sent = declared.sent_by(source).items()
    first, other = next((end, other.form) for end, other in sent if other.form.needs_text)
    if other.max_tokens != link.form.max_tokens:
        key = "max_tokens" if link.max_tokens is not None else "carries"
        place = declared.places.value((*_loc(ends), key))
        message = (
            f"`{source}` writes one text for all its links, but `{link_name(*first)}` takes at "
            f"most {other.max_tokens} tokens of it, and this one {link.form.max_tokens}."
        )
        hint = f"Give both the same `max_tokens`; without it, it is {DEFAULT_MAX_TOKENS}."
        yield problem_at(place, "RM127", message, hint=hint)
