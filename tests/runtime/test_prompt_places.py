"""Which tokens of a prompt are a field's, and which the generation prompt."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kit.hand_bundle import make_tokenizer
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.render import Prompt, Tokens, build_prompt
from recmas_runtime.prompts.tokenizer import Tokenizer

RAW = make_tokenizer()
# Trims what a user says, and opens the assistant's turn.
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)


def build(
    *parts: PromptPart, record: Mapping[str, object], template: str = TEMPLATE, system: str = ""
) -> Prompt:
    return build_prompt(
        system=[PromptPart(kind="field", value=system)] if system else [],
        prompt=parts,
        record={"id": "r", **record},
        chat=ChatTemplate(template),
        tokenizer=Tokenizer(RAW.to_str(), template),
        placed=True,
    )


def text(value: str) -> PromptPart:
    return PromptPart(kind="text", value=value)


def field(value: str) -> PromptPart:
    return PromptPart(kind="field", value=value)


SLOT = PromptPart(kind="slot", value="a")


def told(prompt: Prompt, positions: list[int], slots: Mapping[str, int]) -> str:
    """Return the text of the tokens at these positions of the prompt."""
    ids: dict[int, int] = {}
    at = 0
    for item in prompt.items:
        if isinstance(item, Tokens):
            ids.update(zip(range(at, at + len(item.ids)), item.ids, strict=True))
            at += len(item.ids)
        else:
            at += slots.get(item.agent, 0)
    return RAW.decode([ids[p] for p in positions], skip_special_tokens=False)


def test_context_is_the_text_without_slots_and_opening() -> None:
    prompt = build(text("Read "), SLOT, text(" and "), field("q"), record={"q": "why"})
    slots = {"a": 3}
    assert told(prompt, prompt.context_positions(None, slots), slots) == (
        "<|user|>Read  and why<|end|>"
    )
    assert prompt.num_closing == len("answer:")
    assert prompt.num_rows("context", slots) == prompt.num_positions(slots) - len("answer:")
    assert prompt.num_rows("prompt", slots) == prompt.num_positions(slots)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("why", "why"),
        ("  why \n\n", "why"),  # the template trims it
        ("a b  c", "a b  c"),
        ("see <|end|> there", "see <|end|> there"),  # spelled with ordinary tokens
        ("recmas0xF0E", "recmas0xF0E"),  # looks like a mark
        ("", ""),
    ],
)
def test_a_field(value: str, wanted: str) -> None:
    for parts in ((field("q"),), (text("Q: "), field("q")), (text("Q: "), SLOT, field("q"))):
        prompt = build(*parts, record={"q": value})
        places = prompt.context_positions("q", {"a": 2})
        assert told(prompt, places, {"a": 2}) == wanted


def test_every_occurrence_counts() -> None:
    parts = (field("q"), text(" or "), SLOT, field("p"), text(", "), field("q"))
    prompt = build(*parts, record={"q": "one", "p": "two"}, system="p")
    assert told(prompt, prompt.context_positions("q", {"a": 5}), {"a": 5}) == "oneone"
    assert told(prompt, prompt.context_positions("p", {"a": 5}), {"a": 5}) == "twotwo"


def test_neighbours_are_told_apart() -> None:
    prompt = build(field("q"), field("p"), record={"q": "one", "p": "two"})
    assert told(prompt, prompt.context_positions("q", {}), {}) == "one"
    assert told(prompt, prompt.context_positions("p", {}), {}) == "two"


def test_a_template_without_opening() -> None:
    prompt = build(field("q"), record={"q": "one"}, template="{{ messages[0].content }}!")
    assert prompt.num_closing == 0
    assert told(prompt, prompt.context_positions(None, {}), {}) == "one!"


def test_a_template_that_changes_fields_is_refused() -> None:
    template = "{{ messages[0].content[:9] }}"
    with pytest.raises(RecmasError) as caught:
        build(field("q"), record={"q": "one two three"}, template=template)
    assert caught.value.problems[0].code == "RM206"
