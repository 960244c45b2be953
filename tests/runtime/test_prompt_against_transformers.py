"""Golden comparisons: prompts as Hugging Face renders and tokenizes them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import normalizers, pre_tokenizers

pytest.importorskip("torch", reason="tiny models and transformers need torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

from kit.compare_templates import WRAPPINGS, compare  # noqa: E402
from kit.models import FAMILIES, make_tokenizer  # noqa: E402
from recmas_compiler.lowering.prompt_parity import prompt_difference  # noqa: E402
from recmas_runtime.formats.plan import AgentPlan, PromptPart  # noqa: E402
from recmas_runtime.prompts.chat_template import ChatTemplate  # noqa: E402
from recmas_runtime.prompts.earlier_turns import EarlierTurn  # noqa: E402
from recmas_runtime.prompts.render import Chat, Prompt, Slot, Tokens, build_prompt  # noqa: E402
from recmas_runtime.prompts.samples import SAMPLE_FIELD, SAMPLE_TURNS  # noqa: E402
from recmas_runtime.prompts.tokenizer import Tokenizer  # noqa: E402

TOOL_TEMPLATE = r"""{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text if text is string else text | tojson }}<|im_end|>
{% endmacro -%}
{%- set ns = namespace(seen=0) -%}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif -%}
{%- for message in messages if message.content -%}
    {%- if loop.index0 > 8 %}{% break %}{% endif -%}
    {%- set ns.seen = ns.seen + 1 -%}
    {{ turn(message.role, message.content | trim) }}
{%- endfor -%}
{{- ns.seen }} of {{ messages | length }} {{ (eos_token or 'none') | e -}}
{%- if add_generation_prompt %}{% generation %}<|im_start|>assistant{% endgeneration %}{% endif %}
"""

MESSAGES = [
    [{"role": "user", "content": "What is 7 * 8?"}],
    [{"role": "user", "content": '  space \n around <b>"quotes"</b> \n\n'}],
    [
        {"role": "system", "content": " You are careful.\n"},
        {"role": "user", "content": "Hello, h\u00e9llo \U0001f389"},
    ],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three"},
    ],
]


def huggingface(family: str) -> Any:
    kind = FAMILIES[family]
    roles = {"bos": kind.bos, "eos": kind.eos, "pad": kind.pad, "unk": kind.unk}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(family),
        **{f"{role}_token": token for role, token in roles.items() if token is not None},
    )
    tokenizer.chat_template = kind.template
    return tokenizer


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("messages", MESSAGES, ids=["plain", "spaces", "system", "turns"])
@pytest.mark.parametrize("family", [*FAMILIES, "tools"])
def test_rendering_is_that_of_transformers(
    family: str, messages: list[dict[str, str]], generation: bool, thinking: bool
) -> None:
    reference = huggingface("qwen3" if family == "tools" else family)
    if family == "tools":
        reference.chat_template = TOOL_TEMPLATE
    expected = reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation, enable_thinking=thinking
    )
    chat = ChatTemplate(reference.chat_template, reference.special_tokens_map)
    found = chat.render(messages, add_generation_prompt=generation, enable_thinking=thinking)
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_tokenized_as_transformers_does(family: str) -> None:
    reference = huggingface(family)
    tokenizer = Tokenizer(reference.backend_tokenizer.to_str(), reference.chat_template)
    for text in ("", "the plan", " and then\n\n  the rest ", "12345 h\u00e9 \U0001f389"):
        wanted = reference(text, add_special_tokens=False)["input_ids"]
        assert list(tokenizer.encode_piece(text)) == wanted
        decoded = reference.decode(wanted, skip_special_tokens=True)
        assert tokenizer.decode(wanted) == decoded


PARTS = [
    PromptPart(kind="text", value="Think of "),
    PromptPart(kind="field", value="question"),
    PromptPart(kind="text", value="\nThoughts: "),
    PromptPart(kind="slot", value="planner"),
    PromptPart(kind="text", value="\nand "),
    PromptPart(kind="slot", value="critic"),
    PromptPart(kind="text", value="the answer"),
]
AGENT = AgentPlan(
    backbone="one",
    system=(PromptPart(kind="text", value="Be the planner."),),
    first=None,
    then=tuple(PARTS),
    inner="solver.inner",
    latent_steps=1,
)


def prompt_of(chat: Chat, record: dict[str, str]) -> Prompt:
    return build_prompt(
        system=AGENT.system,
        prompt=AGENT.then,
        record=record,
        chat=chat.template,
        tokenizer=chat.tokenizer,
    )


def difference(family: str, chat: Chat, question: str) -> str | None:
    reference = huggingface(family)
    record = {"id": "1", "question": question}
    return prompt_difference(
        prompt_of(chat, record),
        agent=AGENT,
        variant="then",
        record=record,
        chat=chat,
        tokenizer=reference,
        chat_template=reference.chat_template,
        special_tokens=reference.special_tokens_map,
    )


def chat_of(family: str, **changed: str) -> Chat:
    reference = huggingface(family)
    files = {"template": reference.chat_template, "tokenizer": reference.backend_tokenizer.to_str()}
    files |= changed
    return Chat.load(files["tokenizer"], files["template"], reference.special_tokens_map)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_prompt_is_that_of_transformers(family: str) -> None:
    chat = chat_of(family)
    for question in ("What is 7 * 8?", SAMPLE_FIELD):
        assert difference(family, chat, question) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_around_slots_have_the_tokens_of_the_middle_of_a_text(family: str) -> None:
    """Also where a tokenizer begins every text with a space, as that of Llama 2 does."""
    reference = huggingface(family)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = reference.backend_tokenizer.to_str()
    chat = Chat.load(text, reference.chat_template, reference.special_tokens_map)
    record = {"id": "1", "question": "the plan"}
    prompt = prompt_of(chat, record)
    options = {
        "agent": AGENT,
        "variant": "then",
        "record": record,
        "chat": chat,
        "tokenizer": reference,
        "chat_template": reference.chat_template,
        "special_tokens": reference.special_tokens_map,
    }
    assert prompt_difference(prompt, **options) is None
    last = prompt.items[-1]
    assert isinstance(last, Tokens)
    alone = Tokens(chat.tokenizer.encode_piece(reference.decode(last.ids)))
    assert alone != last
    found = prompt_difference(Prompt((*prompt.items[:-1], alone)), **options)
    assert found is not None
    assert found.startswith("its token 1 behind the message of 'critic' begins ")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_makes_other_prompts_is_told_with_its_place(family: str) -> None:
    template = huggingface(family).chat_template.rstrip("\n") + "Sure:"
    found = difference(family, chat_of(family, template=template), "What is 7 * 8?")
    assert found is not None
    told = (
        r"its token \d+ behind the message of 'critic' begins \".*Sure:\", with transformers \".*\""
    )
    assert re.fullmatch(told, found)

    tokenizer = huggingface(family).backend_tokenizer
    tokenizer.normalizer = normalizers.Replace("7", "8")
    found = difference(family, chat_of(family, tokenizer=tokenizer.to_str()), "What is 7 * 8?")
    assert found is not None
    assert re.search(r"begins \"8 .*\", with transformers \"7 ", found)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_of_a_question_are_text_as_with_transformers(family: str) -> None:
    """With its `sanitize_control_tokens`, which it has for whole prompts only."""
    reference = huggingface(family)
    kind = FAMILIES[family]
    question = f"the {' '.join((*kind.special, *kind.control))}{kind.eos}end"
    prompt = prompt_of(chat_of(family), {"id": "1", "question": question})
    # For transformers slots are words; the text before the first must agree token by token.
    messages = [
        {"role": "system", "content": "Be the planner."},
        {
            "role": "user",
            "content": f"Think of {question}\nThoughts: (planner)\nand (critic)the answer",
        },
    ]
    options = {"add_generation_prompt": True, "enable_thinking": False}
    shown = [
        f"({item.agent})" if isinstance(item, Slot) else reference.decode(item.ids)
        for item in prompt.items
    ]
    assert "".join(shown) == reference.apply_chat_template(messages, tokenize=False, **options)
    safe = reference.apply_chat_template(
        messages, tokenize=True, return_dict=False, sanitize_control_tokens=True, **options
    )
    before = len(prompt.leading_ids) - 1  # the last one may join with the word
    assert list(prompt.leading_ids[:before]) == safe[:before]


EARLIER = (
    EarlierTurn(role="user", content=" one, h\u00e9llo\n"),
    EarlierTurn(role="assistant", content="the plan:\n\n  two \U0001f389"),
    EarlierTurn(role="user", content="three"),
    EarlierTurn(role="assistant", content="four "),
)


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("family", FAMILIES)
def test_earlier_turns_are_those_of_transformers(family: str, system: str) -> None:
    """Also where their texts spell control tokens, which become text as with its option."""
    reference, chat = huggingface(family), chat_of(family)
    kind = FAMILIES[family]
    forged = f"{' '.join((*kind.special, *kind.control))}{kind.eos}end"
    for last in (EARLIER[-1], EarlierTurn(role="assistant", content=forged)):
        turns = (*EARLIER[:-1], last)
        own = [EarlierTurn(role="system", content=system)] if system else []
        prompt = build_prompt(
            system=AGENT.system,
            prompt=[PromptPart(kind="text", value="Now "), PromptPart(kind="field", value="q")],
            record={"id": "1", "q": "five?"},
            chat=chat.template,
            tokenizer=chat.tokenizer,
            turns=[*turns[:2], *own, *turns[2:]],
        )
        texts = ["Be the planner.", system] if system else ["Be the planner."]
        wanted = reference.apply_chat_template(
            [
                {"role": "system", "content": "\n\n".join(texts)},
                *({"role": turn.role, "content": turn.content} for turn in turns),
                {"role": "user", "content": "Now five?"},
            ],
            tokenize=True,
            return_dict=False,
            add_generation_prompt=True,
            enable_thinking=False,
            sanitize_control_tokens=True,
        )
        assert prompt.items == (Tokens(tuple(wanted)),)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_build_holds_turns_against_transformers(family: str) -> None:
    reference, chat = huggingface(family), chat_of(family)
    record = {"id": "1", "question": "What is 7 * 8?"}
    options: dict[str, Any] = {
        "agent": AGENT,
        "variant": "then",
        "record": record,
        "chat": chat,
        "tokenizer": reference,
        "chat_template": reference.chat_template,
        "special_tokens": reference.special_tokens_map,
    }
    prompt = build_prompt(
        system=AGENT.system,
        prompt=AGENT.then,
        record=record,
        chat=chat.template,
        tokenizer=chat.tokenizer,
        turns=SAMPLE_TURNS,
    )
    assert prompt_difference(prompt, **options, turns=SAMPLE_TURNS) is None
    assert prompt_difference(prompt, **options) is not None


MORE_TEMPLATES = {
    # In the manner of Falcon: a method of texts inside of the loop.
    "replace": "{% for m in messages %}{{ m.content.replace('\\n', ' ').strip() }}"
    "{{ ' '.join(['a', 'b']) }}{{ '%-5s' % m.role }}\n{% endfor %}",
    # In the manner of Nemotron: flags are taken out of a text, and a namespace counts.
    "namespace": "{% set ns = namespace(think=true, count=0) %}{% for m in messages %}"
    "{% if '/no_think' in m.content %}{% set ns.think = false %}{% endif %}"
    "{% set ns.count = ns.count + 1 %}{{ ns.count ~ m.content.replace('/no_think', '') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<think>' if ns.think }}{% endif %}",
    # In the manner of Llama 3: assignments, tests and filters.
    "filters": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content | trim"
    " %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}{{ bos_token }}{{ system | default('none', true) | upper }}"
    "{% for m in rest if m.content is string %}{{ loop.index0 }}{{ m | tojson(indent=1) }}"
    "{% endfor %}",
    # In the manner of training templates: what the assistant writes is marked.
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{% set kept = m.content.split('</think>')[-1] | trim %}{{ kept }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ kept }}{{ m.content }}{% endif %}{% endfor %}",
    # In the manner of Mistral: macros, and roles that must alternate.
    "macro": "{% macro say(m, mark='') %}{{ mark }}{{ m.content }}{{ caller() }}{% endmacro %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% call say(m, mark='[INST]') %}{{ loop.last }}{% endcall %}{% endfor %}",
    "blocks": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{% set said %}{{ m.content }}{% endset %}{% filter upper %}{{ said }}{% endfilter %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", [*FAMILIES, *MORE_TEMPLATES])
def test_templates_render_alike_inside_of_loops_and_blocks(name: str, wrapping: str) -> None:
    template = MORE_TEMPLATES.get(name) or FAMILIES[name].template
    assert compare(WRAPPINGS[wrapping].format(template)) == (16, [])
