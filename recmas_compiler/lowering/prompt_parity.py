"""The prompts of a bundle as its own files make them, held against transformers' own code.

Both get the same conversations. Where a prompt has a slot the two part: a message has no text, so
what a bundle tokenizes are the pieces around it, each as it stands in the middle of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, time, tzinfo
from pathlib import Path
from typing import Any, Final, Protocol, Self

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from recmas_compiler.spec.document.problems import show
from recmas_runtime.formats.plan import AgentPlan, Plan, PromptPart, Variant
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.prompts.exerciser import SAMPLES
from recmas_runtime.prompts.marks import Marks, unused_salt
from recmas_runtime.prompts.render import (
    DEFAULT_VARIABLES,
    Chat,
    Prompt,
    Tokens,
    field_text,
    joined,
)
from recmas_runtime.prompts.samples import SAMPLE_DAY, build_samples, sample_record

_SHOWN_TOKENS: Final = 8
_QUESTION: Final = "What is 7 * 8?"

# Texts to stand before a piece that continues one; the first that joins with none of it is taken.
_BEFORE: Final = ("\n", "\t", ".", "x", "0", "|", "\u00e9")


class WithTokenizer(Protocol):
    """What transformers makes prompts with: a loaded backbone has it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers."""

    @property
    def chat_template(self) -> str:
        """The text of the template."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """What the template may name."""


def tokenizer_again(file: Path, tokens: Mapping[str, str]) -> Any:
    """Return a tokenizer of transformers as one that was loaded before; torch is not imported.

    Args:
        file: What its `backend_tokenizer` writes as tokenizer.json.
        tokens: Its `special_tokens_map`.
    """
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **tokens)


@dataclass(frozen=True)
class TokenizerAgain:
    """A tokenizer of transformers made again, and what its prompts are made with."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str
    special_tokens: Mapping[str, str]

    @classmethod
    def read(
        cls,
        file: Path,
        tokens: Mapping[str, str],
        *,
        chat_template: str,
        special_tokens: Mapping[str, str],
    ) -> Self:
        """Make it again of its tokenizer.json; see `tokenizer_again`."""
        return cls(tokenizer_again(file, tokens), chat_template, special_tokens)


def other_prompts(
    plan: Plan, chats: Mapping[str, Chat], backbones: Mapping[str, WithTokenizer]
) -> Iterator[str]:
    """Yield a sentence for each prompt of a plan that transformers makes other tokens of.

    Args:
        chats: By backbone, of the bundle's own files.
        backbones: What transformers loaded, by the same names.

    Raises:
        RecmasError: RM206 if a chat template cannot render a prompt.
    """
    told = set()
    for text in (SAMPLES, (_QUESTION,)):
        # What spells a control token is plain text in a prompt, which transformers does not do.
        plain = {
            name: "\n".join(s for s in text if not chat.tokenizer.control_spans(s))
            for name, chat in chats.items()
        }
        records = {name: sample_record(plan, words) for name, words in plain.items()}
        for sample in build_samples(plan, chats, records):
            agent = plan.agents[sample.agent]
            backbone = backbones[agent.backbone]
            found = prompt_difference(
                sample.prompt,
                agent=agent,
                variant=sample.variant,
                record=records[agent.backbone],
                chat=sample.chat,
                tokenizer=backbone.tokenizer,
                chat_template=backbone.chat_template,
                special_tokens=backbone.special_tokens,
                turns=sample.turns,
            )
            if found is not None and (sample.agent, sample.name) not in told:
                told.add((sample.agent, sample.name))
                yield f"prompt `{sample.name}` of agent {sample.agent!r}: {found}"


def prompt_difference(
    prompt: Prompt,
    *,
    agent: AgentPlan,
    variant: Variant,
    record: Mapping[str, object],
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    special_tokens: Mapping[str, str],
    turns: Sequence[EarlierTurn] = (),
) -> str | None:
    """Return where a prompt's tokens part from those of transformers, None if they do not.

    Args:
        record: Spells no control tokens.
        chat: What made the prompt; its tools are what transformers gets too.
        special_tokens: What the template may name.
        turns: Come before it; neither of the system nor with control tokens.
    """
    written = joined([*agent.system, *agent.parts(variant)], record)
    earlier = [{"role": turn.role, "content": turn.content} for turn in turns]
    spoken = "".join(turn["content"] for turn in earlier)
    marks = Marks(unused_salt(f"{written}{spoken}", chat.template.literals))
    system, user = (
        "".join(_shown(part, record, marks) for part in parts)
        for parts in (agent.system, agent.parts(variant))
    )
    with _on_sample_day():
        rendered: Any = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}] * bool(system)
            + earlier
            + [{"role": "user", "content": user}],
            tools=chat.template.tools,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
            **{
                **dict.fromkeys(tokenizer.special_tokens_map, ""),
                **special_tokens,
                **DEFAULT_VARIABLES,
                **agent.chat_template,
            },
        )
    # Splitting at a pattern with one group gives text, slot, text, slot, ..., text.
    texts = marks.slot_pattern.split(rendered)[::2]
    wanted = [_ids(tokenizer, text, continues=i > 0) for i, text in enumerate(texts)]
    return _first_difference(_between_slots(prompt), wanted, marks.slots, tokenizer)


class _SampleDay(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls.combine(SAMPLE_DAY, time.min, tz)


@contextmanager
def _on_sample_day() -> Iterator[None]:
    """Let templates of transformers write the sample day: a function of one's own they get not."""
    usual = vars(chat_template_utils)["datetime"]
    vars(chat_template_utils)["datetime"] = _SampleDay
    try:
        yield
    finally:
        vars(chat_template_utils)["datetime"] = usual


def _shown(part: PromptPart, record: Mapping[str, object], marks: Marks) -> str:
    match part.kind:
        case "text":
            return part.value
        case "slot":
            return marks.for_slot(part.value)
        case "field":
            return field_text(part.value, record)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, continues: bool) -> list[int]:
    """Return the ids of a text; where it continues another one, those that it has behind that."""

    def encoded(whole: str) -> Any:
        return tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )

    alone: list[int] = encoded(text)["input_ids"]
    if not continues or not _begins_words(tokenizer):
        return alone
    for before in _BEFORE:
        first: list[int] = encoded(before)["input_ids"]
        both = encoded(before + text)
        ids: list[int] = both["input_ids"]
        begins = [begin for begin, _ in both["offset_mapping"][len(first) :]]
        if ids[: len(first)] == first and min(begins, default=len(before)) >= len(before):
            return ids[len(first) :]
    return alone


def _begins_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a text has other tokens in the middle of another one, without a space before."""
    alone, behind = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("x", "\nx"))
    return bool(behind[-len(alone) :] != alone)


def _between_slots(prompt: Prompt) -> list[list[int]]:
    """Return the ids before, between and behind the slots of a prompt."""
    pieces: list[list[int]] = [[]]
    for item in prompt.items:
        if isinstance(item, Tokens):
            pieces[-1] += item.ids
        else:
            pieces.append([])
    return pieces


def _first_difference(
    found: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    slots: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    """Return in words where pieces between slots part first."""
    if len(found) != len(wanted):
        return f"it has {len(found) - 1} slots, with transformers {len(wanted) - 1}"
    for piece, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if list(ours) == list(theirs):
            continue
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        first = same.index(False) if False in same else len(same)
        shown = [
            show(str(tokenizer.decode(ids[first : first + _SHOWN_TOKENS])))
            for ids in (ours, theirs)
        ]
        place = f" behind the message of {slots[piece - 1]!r}" if piece else ""
        return f"its token {first + 1}{place} begins {shown[0]}, with transformers {shown[1]}"
    return None
