"""What a bundle's prompts are in tokens: kept at build, computed again by `recmas verify`.

Another version of the tokenizers library, of Jinja or of this runtime may render or cut a prompt
in another way; a bundle then answers, but not as it was made to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Final, NamedTuple

from recmas_runtime.formats.plan import Plan, PrefillStep, Variant, filled_fields
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.prompts.exerciser import SAMPLES, sample_texts
from recmas_runtime.prompts.render import Chat, Prompt, Tokens, build_prompt
from recmas_runtime.prompts.tokenizer import Tokenizer
from recmas_runtime.prompts.tool_turns import answer_chat

# What stands in every field, and the day of templates that write one.
SAMPLE_FIELD: Final = "\n".join(SAMPLES)
SAMPLE_DAY: Final = date(2025, 1, 1)

# What comes before the answer agent's prompt where a plan shows conversations so.
SAMPLE_TURNS: Final = (
    EarlierTurn(role="user", content="What is 7 * 8?"),
    EarlierTurn(role="assistant", content="The plan:\n\n  it is 56. "),
)

# agent -> `first`, `then`, or one of them with turns -> digest of its prompt's tokens
PromptDigests = dict[str, dict[str, str]]


class SamplePrompt(NamedTuple):
    """A prompt of a plan for a sample record, and what made it."""

    agent: str
    variant: Variant
    chat: Chat
    prompt: Prompt
    turns: tuple[EarlierTurn, ...]

    @property
    def name(self) -> str:
        """What tells it apart from others of its agent."""
        return f"{self.variant} behind turns" if self.turns else self.variant


def sample_record(plan: Plan, text: str = SAMPLE_FIELD) -> dict[str, object]:
    """Return a record with a text in every field that a plan's prompts show."""
    return {"id": "sample", **filled_fields(plan.fields, text)}


def build_samples(
    plan: Plan, chats: Mapping[str, Chat], records: Mapping[str, Mapping[str, object]]
) -> Iterator[SamplePrompt]:
    """Build every prompt that a plan uses once, on one day, with the tools of its answer agent.

    Args:
        chats: By backbone.
        records: By backbone, too.

    Raises:
        RecmasError: RM206 if a chat template cannot render a prompt, RM500 if no ordinary tokens
            spell a text of a record.
    """
    seen = set()
    for step in plan.steps:
        if not isinstance(step, PrefillStep):
            continue
        for name, variant in zip(step.agents, step.variants, strict=True):
            if (name, variant) in seen:
                continue
            seen.add((name, variant))
            agent = plan.agents[name]
            chat = chats[agent.backbone]
            if name == plan.answer_agent:
                chat = answer_chat(chats, agent, plan.tools)
            has_turns = name == plan.answer_agent and plan.conversation.history == "turns"
            for turns in ((), SAMPLE_TURNS) if has_turns else ((),):
                prompt = build_prompt(
                    system=agent.system,
                    prompt=agent.parts(variant),
                    record=records[agent.backbone],
                    chat=chat.template.on(SAMPLE_DAY),
                    tokenizer=chat.tokenizer,
                    variables=agent.chat_template,
                    turns=turns,
                )
                yield SamplePrompt(name, variant, chat, prompt, turns)


def prompt_digests(plan: Plan, chats: Mapping[str, Chat]) -> PromptDigests:
    """Return a digest of the tokens of every prompt that a plan uses, with sample texts in fields.

    Args:
        chats: By backbone.

    Raises:
        RecmasError: RM206 if a chat template cannot render a prompt, RM500 if no ordinary tokens
            spell a sample text.
    """
    digests: PromptDigests = {}
    for sample in build_samples(plan, chats, dict.fromkeys(chats, sample_record(plan))):
        digests.setdefault(sample.agent, {})[sample.name] = _digest(sample.prompt)
    return digests


def token_digest(tokenizer: Tokenizer) -> str:
    """Return a digest of the ids that a tokenizer gives the texts in which tokenizers differ."""
    lines = [" ".join(map(str, tokenizer.encode(t))) for t in sample_texts(tokenizer.added_texts)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(prompt: Prompt) -> str:
    parts = [
        " ".join(map(str, item.ids)) if isinstance(item, Tokens) else f"[{item.agent}]"
        for item in prompt.items
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
