from __future__ import annotations

from pathlib import Path

import pytest

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.prompts import chat_template
from recmas_runtime.prompts.chat_template import ChatTemplate, read_template

USER = [{"role": "user", "content": "<b>Hi & 'you'"}]


def render(text: str, **variables: bool | int | float | str) -> str:
    return ChatTemplate(text).render(USER, add_generation_prompt=True, **variables)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% if true %}\nx\n{% endif %}\ny", "x\ny"),  # trim_blocks
        ("a\n   {% if true %}b{% endif %}", "a\nb"),  # lstrip_blocks
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<b>Hi & \'you\'"}'),
        ("{{ {'b': 1, 'a': '\u00e9'} | tojson(indent=1) }}", '{\n "b": 1,\n "a": "\u00e9"\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}\nx{% endgeneration %}y", "xy"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}", "2"),
        ("{{ dict(a=1) }}{{ dict.fromkeys(['x']) }}", "{'a': 1}{'x': None}"),
        ("{{ '%Y' | length }}{{ strftime_now('%%') }}", "2%"),
        ("{{ missing_variable }}", ""),
        ("{{ flag }}", "7"),
    ],
)
def test_templates_get_what_transformers_gives_them(text: str, expected: str) -> None:
    assert render(text, flag=7) == expected


def test_special_tokens_are_variables_that_settings_override() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ eos_token }}", {"bos_token": "<s>", "eos_token": "</s>"}
    )
    assert template.render(USER, add_generation_prompt=False) == "<s></s>"
    assert template.render(USER, add_generation_prompt=False, eos_token="!") == "<s>!"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ dict.update(messages[0], role='x') }}", "update"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "'_x'"),
        ("{{ namespace(__class__=1) }}", "'__class__'"),
        ("{{ 'a' * 100000000 }}", "'*' makes it more than 64000000 characters"),
        ("{{ 100000000 * [1] }}", "'*' makes it more than 64000000 characters"),
        ("{{ 10 ** 100000000 }}", "power of 100000000"),
        ("{{ range(100001) }}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "turns"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.missing.deeper }}", "no attribute"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_templates_that_fail_or_run_away_are_told_about(text: str, reason: str) -> None:
    with pytest.raises(RecmasError, match="RM206") as caught:
        render(text)
    assert reason in str(caught.value)


def test_a_long_conversation_has_room() -> None:
    text = (
        "{%- for m in messages %}{%- if m.content is string and '</think>' in m.content %}"
        "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}{% else %}"
        "{%- set content = m.content | trim %}{% endif %}"
        "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x" * 40_000}] * 100
    assert len(ChatTemplate(text).render(messages, add_generation_prompt=True)) > 4_000_000


def test_a_long_conversation_may_be_cleaned_turn_by_turn() -> None:
    tags = "".join(f".replace('<|reserved_special_token_{i}|>', '')" for i in range(9))
    text = (
        r"{% for m in messages %}{% set content = m.content.replace('\r\n', '\n')"
        + tags
        + r" %}{{ m.role + ': ' + content.replace('\n\n', '\n').strip() ~ '\n' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "one\r\n\r\ntwo\r\n" * 100}] * 2000
    expected = ("user: " + ("one\ntwo\n" * 100).strip() + "\n") * 2000
    assert ChatTemplate(text).render(messages, add_generation_prompt=False) == expected


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_OUTPUT_CHARS", 1000)
    with pytest.raises(RecmasError, match="more than 1000 characters"):
        render("{% for i in range(99) %}{{ 'a' * 99 }}{% endfor %}")


def test_the_loop_budget_is_per_rendering() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}")
    for _ in range(20):
        template.render(USER, add_generation_prompt=False)


@pytest.mark.parametrize(
    "text",
    [
        *("{% if %}", "{{ x", "{% for %}", "{% unknown %}", "{{ x | urlize }}", "{{ x[1:2, 3] }}"),
        "{% for x in y %}" * 30 + "{% endfor %}" * 30,
    ],
)
def test_invalid_templates_are_refused(text: str) -> None:
    with pytest.raises(RecmasError, match="RM206"):
        ChatTemplate(text)


def test_literals_are_what_the_template_itself_writes() -> None:
    text = "{# <|no|> #}<|a|>{% if x == '<|b|>' %}{{ '<|c|>' + y }}{% endif %}"
    assert set(ChatTemplate(text).literals) == {"<|a|>", "<|b|>", "<|c|>"}


def test_a_template_longer_than_any_is_refused_unread(tmp_path: Path) -> None:
    text = "x" * (chat_template.MAX_TEMPLATE_CHARS + 1)
    with pytest.raises(RecmasError, match=r"RM206.*at most 65536"):
        ChatTemplate(text)
    path = tmp_path / "chat_template.jinja"
    for content in (text.encode(), b"\xff" * (5 * chat_template.MAX_TEMPLATE_CHARS)):
        path.write_bytes(content)
        with pytest.raises(RecmasError, match="RM404"):
            read_template(path, file="chat_template.jinja")


def test_a_file_that_is_no_utf_8_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"{{ bos }}\xff")
    with pytest.raises(RecmasError, match=r"chat_template.jinja: error\[RM404\].*byte 9 is 0xff"):
        read_template(path, file="chat_template.jinja")
    path.write_bytes("{{ bos }}\r\n\u00e9".encode())
    assert read_template(path, file="chat_template.jinja") == "{{ bos }}\n\u00e9"


@pytest.mark.parametrize("text", [r"{{ '\ud800' }}", r"{{ ['\udfff'] | first }}"])
def test_half_a_surrogate_pair_is_no_text(text: str) -> None:
    with pytest.raises(RecmasError, match=r"RM206.*surrogates not allowed"):
        render(text)


def test_what_a_template_raises_is_printable() -> None:
    with pytest.raises(RecmasError) as caught:
        render(r"{{ raise_exception('\ud800') }}")
    assert "\\ud800" in str(caught.value)
    str(caught.value).encode()
