"""A prompt with the assistant's text behind it: the whole text, whatever the template does."""

from __future__ import annotations

import pytest

from kit.hand_bundle import make_tokenizer
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.render import Slot, Tokens
from recmas_runtime.prompts.tokenizer import Tokenizer
from recmas_runtime.prompts.turn import Turn, build_turn

RAW = make_tokenizer()

# In the manner of QwQ and R1: the prompt opens a block that past turns do not have.
OPENS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<assistant><think>
{% endif %}"""
# In the manner of MiniMax: past turns have the text after the last block only.
DROPS = """{% for m in messages %}<{{ m.role }}>\
{{ m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content }}<|end|>\
{% endfor %}{% if add_generation_prompt %}<assistant><think>
{% endif %}"""
# In the manner of Apriel: another wording in front of what is written now.
WORDS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<assistant>Here is what I think:
{% endif %}"""
# In the manner of Command: other marks around a finished answer.
RESPONSE = """{% for m in messages %}<{{ m.role }}>\
{% if m.role == 'assistant' %}[RESPONSE]{{ m.content }}[/RESPONSE]{% else %}{{ m.content }}\
{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>[THINKING]{% endif %}"""
# In the manner of Qwen 3: an empty block in front of the last answer.
WRITES_BACK = """{% for m in messages %}<{{ m.role }}>\
{% if m.role == 'assistant' %}<think>

</think>

{{ m.content.strip() }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""
STRIPS = """{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""


def turn(template: str, target: str, *, system: str = "") -> Turn:
    return build_turn(
        system=[PromptPart(kind="text", value=system)] if system else [],
        prompt=[
            PromptPart(kind="text", value="Q "),
            PromptPart(kind="slot", value="a"),
            PromptPart(kind="field", value="q"),
        ],
        target=target,
        record={"id": "r1", "q": "seven?"},
        chat=ChatTemplate(template),
        tokenizer=Tokenizer(RAW.to_str(), template),
    )


def shown(found: Turn) -> tuple[str, str]:
    """Return the text that is given and the text that is learned."""
    ids: list[int] = []
    for item in found.prompt.items:
        ids += item.ids if isinstance(item, Tokens) else []
    assert sum(isinstance(item, Slot) for item in found.prompt.items) == 1
    cut = len(ids) - found.num_target_tokens
    given, learned = (
        RAW.decode(part, skip_special_tokens=False) for part in (ids[:cut], ids[cut:])
    )
    return given, learned


@pytest.mark.parametrize(
    ("template", "target", "given", "learned"),
    [
        (OPENS, "7", "<assistant><think>\n", "7<|end|>"),
        (OPENS, "It is 7.\n</think>\n7", "<assistant><think>\n", "It is 7.\n</think>\n7<|end|>"),
        (OPENS, "<think>\nIt is 7.", "<assistant><think>\n", "It is 7.<|end|>"),
        (DROPS, "It is 7.\n</think>\n7", "<assistant><think>\n", "It is 7.\n</think>\n7<|end|>"),
        (WORDS, "7", "<assistant>Here is what I think:\n", "7<|end|>"),
        (RESPONSE, "7", "<assistant>[THINKING]", "7[/RESPONSE]<|end|>"),
        (WRITES_BACK, "7", "<assistant>", "<think>\n\n</think>\n\n7<|end|>"),
        (WRITES_BACK, "7 \n", "<assistant>", "<think>\n\n</think>\n\n7 \n<|end|>"),
        (STRIPS, " 7\n", "<assistant>", " 7\n<|end|>"),
    ],
    ids=["opens", "closes", "begins", "drops", "words", "response", "back", "back-space", "strips"],
)
def test_the_whole_target_follows_the_prompt(
    template: str, target: str, given: str, learned: str
) -> None:
    assert shown(turn(template, target)) == (f"<user>Q seven?<|end|>{given}", learned)


@pytest.mark.parametrize(
    ("template", "target", "is_as_written"),
    [
        (OPENS, "7", True),
        (OPENS, "<think>\nIt is 7.", True),
        (DROPS, "7", True),
        (DROPS, "It is 7.\n</think>\n7", False),
        (STRIPS, "7", True),
        (STRIPS, "7\n", False),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "0123456789", False),
    ],
)
def test_what_the_template_would_shorten_is_known(
    template: str, target: str, is_as_written: bool
) -> None:
    if "[:9]" in template:
        with pytest.raises(RecmasError, match="RM206"):
            turn(template, target)
    else:
        assert turn(template, target).is_as_written is is_as_written


@pytest.mark.parametrize(
    "template",
    [
        # The system text goes to the last message, as Mistral's do.
        "{% for m in messages %}{% if loop.last %}{{ messages[0].content }}{% endif %}"
        "{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
        # The turn before is left out.
        "{% if add_generation_prompt %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% endfor %}<assistant>{% else %}{{ messages[-1].content }}{% endif %}",
    ],
)
def test_a_conversation_that_changes_is_refused(template: str) -> None:
    with pytest.raises(RecmasError, match="writes the conversation in another way"):
        turn(template, "7", system="Be brief.")


def test_a_target_spells_no_control_token() -> None:
    found = turn(OPENS, "a<|end|>b")
    assert shown(found)[1] == "a<|end|>b<|end|>"
    ids = [i for item in found.prompt.items if isinstance(item, Tokens) for i in item.ids]
    assert ids.count(RAW.token_to_id("<|end|>")) == 2  # the user's and the assistant's turn
