"""What a bundle's prompts are in tokens: kept at build, computed again by `recmas verify`.

Another version of the tokenizers library, of Jinja or of this runtime may render or cut a prompt
in another way; a bundle then answers, but not as it was made to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import date
from typing import Final

from recmas_runtime.formats.plan import Plan, PrefillStep
from recmas_runtime.prompts.exerciser import SAMPLES
from recmas_runtime.prompts.render import Chat, Prompt, Tokens, build_prompt

# What stands in every field, and the day of templates that write one.
SAMPLE_FIELD: Final = "\n".join(SAMPLES)
SAMPLE_DAY: Final = date(2025, 1, 1)

# agent -> `first` or `then` -> digest of its prompt's tokens
PromptDigests = dict[str, dict[str, str]]


def prompt_digests(plan: Plan, chats: Mapping[str, Chat]) -> PromptDigests:
    """Return a digest of the tokens of every prompt that a plan uses, with sample texts in fields.

    Args:
        chats: By backbone.

    Raises:
        RecmasError: RM206 if a chat template cannot render a prompt, RM500 if no ordinary tokens
            spell a sample text.
    """
    record = {"id": "sample", **dict.fromkeys(plan.fields, SAMPLE_FIELD)}
    digests: PromptDigests = {}
    for step in plan.steps:
        if not isinstance(step, PrefillStep):
            continue
        for name, variant in zip(step.agents, step.variants, strict=True):
            if variant in digests.setdefault(name, {}):
                continue
            agent = plan.agents[name]
            chat = chats[agent.backbone]
            prompt = build_prompt(
                system=agent.system,
                prompt=agent.parts(variant),
                record=record,
                chat=chat.template.on(SAMPLE_DAY),
                tokenizer=chat.tokenizer,
                variables=agent.chat_template,
            )
            digests[name][variant] = _digest(prompt)
    return digests


def _digest(prompt: Prompt) -> str:
    parts = [
        " ".join(map(str, item.ids)) if isinstance(item, Tokens) else f"[{item.agent}]"
        for item in prompt.items
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
