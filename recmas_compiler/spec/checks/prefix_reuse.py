"""The warning about prompts that change too early: what must be recomputed in every round."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import tokenizers

from recmas_compiler.spec.document.places import is_file, path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.declared import Declared
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.prompts.tokenizer import read_tokenizer

# English text has about four characters per token with the vocabularies of today.
_CHARACTERS_PER_TOKEN = 4


def check_reuse(declared: Declared) -> Iterator[Problem]:
    """Slots that stand before text which is the same in every round."""
    if declared.document.rounds == 1:
        return
    takes_rows = {target for (_, target), link in declared.links.items() if link.carries == "cache"}
    for agent, prompts in declared.prompts.items():
        if agent in takes_rows or declared.is_remote(agent):
            continue  # nothing of its prompt stays here, wherever its slots are
        kept = _after_first_slot(prompts.then.parts)
        fields = dict.fromkeys(part.value for part in kept if part.kind == "field")
        if not fields:
            continue
        text = "".join(part.value for part in kept if part.kind == "text")
        slot = prompts.then.slots[0]
        place = declared.inside_prompt(agent, "then", slot.start, slot.length)
        named = " and ".join(f"`{name}`" for name in fields)
        amount = _tokens(declared, agent, text)
        message = (
            f"the slot for `{slot.agent}` stands before {named}, so {named} and {amount} of text "
            f"around {'it' if len(fields) == 1 else 'them'} are computed again in every round."
        )
        hint = f"Move the slot behind {named}: what comes before a prompt's first slot is reused."
        yield problem_at(place, "RM150", message, hint=hint, severity="warning")


def _after_first_slot(parts: tuple[PromptPart, ...]) -> tuple[PromptPart, ...]:
    """Return what could stand before the first slot: up to the last field, without the slots."""
    kinds = [part.kind for part in parts]
    if "slot" not in kinds or "field" not in kinds:
        return ()
    last_field = len(kinds) - 1 - kinds[::-1].index("field")
    between = parts[kinds.index("slot") : last_field + 1]
    return tuple(part for part in between if part.kind != "slot")


def _tokens(declared: Declared, agent: str, text: str) -> str:
    """Count the tokens of `text`, exactly where the backbone's folder has a tokenizer."""
    backbone = declared.document.backbones.get(declared.document.agents[agent].backbone)
    exact = None
    if backbone is not None:
        folder = path_of(backbone.source, declared.base_dir)
        exact = count_tokens(folder / "tokenizer.json", text)
    count = -(-len(text) // _CHARACTERS_PER_TOKEN) if exact is None else exact
    unit = "token" if count == 1 else "tokens"
    return f"{count} {unit}" if exact is not None else f"about {count} {unit}"


def count_tokens(tokenizer_json: Path, text: str) -> int | None:
    """Return the number of tokens of `text`, or None if there is no readable tokenizer."""
    tokenizer = _load(tokenizer_json) if is_file(tokenizer_json) else None
    return None if tokenizer is None else len(tokenizer.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=8)
def _load(tokenizer_json: Path) -> tokenizers.Tokenizer | None:
    try:
        return read_tokenizer(tokenizer_json)
    except RecmasError:
        return None  # without a tokenizer the count is an estimate
