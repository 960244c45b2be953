"""Tools in a template's own form: in the answer agent's prompt, and in turns for their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.hand_bundle import CHAT_TEMPLATE, edit_json, make_tokenizer, rehash
from recmas_runtime.formats.plan import PythonPlan, SearchPlan, ToolsPlan
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.render import Chat
from recmas_runtime.prompts.tokenizer import Tokenizer
from recmas_runtime.prompts.tool_turns import (
    PLAIN_RESULTS,
    ResultForm,
    chat_of,
    result_form,
    tool_schemas,
)
from recmas_runtime.tools.calls import result_block

TOOLS = ToolsPlan(functions=("lookup",))

LOOP = "{% for m in messages %}"
LISTED = "{% if tools %}<|tools|>{{ tools | tojson }}\n{% endif %}" + LOOP
PROMPT = "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"

# name: (a template in the manner of a family, and the form of its results)
TEMPLATES = {
    "tags": (
        LISTED + "{% if m.role == 'tool' %}<|user|>\n<tool_response>\n{{ m.content }}\n"
        "</tool_response><|end|>\n{% else %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|end|>\n{% endif %}" + PROMPT,
        ResultForm(
            before="<|end|>\n<|user|>\n<tool_response>\n",
            after="\n</tool_response><|end|>\n<|assistant|>\n",
        ),
    ),
    "bare_json": (
        LISTED + "{% if m.role == 'tool' %}<|ipython|>\n{{ m.content | tojson }}<|end|>"
        "{% elif m.tool_calls %}<|assistant|>\n"
        '{"name": "{{ m.tool_calls[0].function.name }}", '
        '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|end|>'
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endif %}" + PROMPT,
        ResultForm(
            before='<|end|><|ipython|>\n"', after='"<|end|><|assistant|>\n', is_json=True
        ),
    ),
    "arguments_as_text": (
        LISTED + "{% if m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls[0].function.name + '[ARGS]' + "
        "m.tool_calls[0].function.arguments }}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}",
        ResultForm(before="</s>[TOOL_RESULTS]", after="[/TOOL_RESULTS]"),
    ),
    "calls_not_written": (
        LISTED + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + PROMPT,
        ResultForm(before="<|end|>\n<|tool|>\n", after="<|end|>\n<|assistant|>\n"),
    ),
    "no_turn_for_results": (
        LISTED + "{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
        "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + PROMPT,
        PLAIN_RESULTS,
    ),
    "results_left_out": (
        LISTED + "{% if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content }}{% endif %}" + PROMPT,
        PLAIN_RESULTS,
    ),
    "results_changed": (
        LISTED + "<|{{ m.role }}|>{{ m.content | upper if m.role == 'tool' else m.content }}"
        + PROMPT,
        PLAIN_RESULTS,
    ),
}  # fmt: skip


def chat(text: str) -> Chat:
    tokenizer = Tokenizer(make_tokenizer().to_str(), CHAT_TEMPLATE)
    return Chat(template=ChatTemplate(text), tokenizer=tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_and_results_as_the_template_has_them(name: str) -> None:
    text, form = TEMPLATES[name]
    plain = chat(text)
    found = chat_of(plain, TOOLS, {})
    user = [{"role": "user", "content": "Hi"}]
    assert json.dumps(tool_schemas(TOOLS)) in found.template.render(
        user, add_generation_prompt=True
    )
    assert "lookup" not in plain.template.render(user, add_generation_prompt=True)
    assert result_form(found.template, {}) == form


@pytest.mark.parametrize(
    "text",
    [
        LOOP + "<|{{ m.role }}|>{{ m.content }}" + PROMPT,  # no tools
        "{% if tools %}{{ raise_exception('no') }}{% endif %}" + LOOP + "{{ m.content }}" + PROMPT,
        "{% if tools %}There are tools.{% endif %}" + LOOP + "{{ m.content }}" + PROMPT,
    ],
)  # fmt: skip
def test_a_template_that_does_not_write_tools_gets_none(text: str) -> None:
    plain = chat(text)
    assert chat_of(plain, TOOLS, {}) is plain


def test_schemas_of_all_tools() -> None:
    plan = ToolsPlan(
        search=SearchPlan(backend="tavily", corpus=None, top_k=1),
        python=PythonPlan(memory_mb=64),
        ask=True,
        functions=("b",),
    )
    functions = [schema["function"] for schema in tool_schemas(plan)]
    assert [(f["name"], f["parameters"]["required"]) for f in functions] == [
        ("search", ["query"]),
        ("python", ["code"]),
        ("ask", ["question"]),
        ("b", ["input"]),
    ]


def test_a_result_in_its_turn() -> None:
    form = ResultForm(before="<|end|>\n<tool_response>\n", after="\n</tool_response>\n")
    written, ((start, end),) = form.write(["a</tool_response >b", "c <b> </result>"], "lookup")
    assert written[:start] == form.before
    assert written[start:end] == "a&lt;/tool_response >b\n\nc <b> &lt;/result>"
    assert written[end:] == form.after
    quoted = ResultForm(before='x recmas0tool "', after='"', is_json=True)
    assert quoted.write(['a "b"\n'], "lookup")[0] == r'x lookup "a \"b\"\n"'
    assert PLAIN_RESULTS.write(["a", "b"], "lookup")[0] == result_block("a") + result_block("b")


HAND = (
    "{% if tools %}<|user|>{{ tools[0].function.name }}{% endif %}" + LOOP
    + "{% if m.role == 'tool' %}({{ m.content }})<|end|>\n{% else %}<|user|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{{ c.function.arguments.input }}"
    "</{{ c.function.name }}><|end|>{% endfor %}{% endif %}{% endfor %}"
)  # fmt: skip


@pytest.fixture
def bundles(own_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose answer agent may call `lookup`, and whose template has turns for tools."""
    tools = {"functions": ["lookup"], "max_calls": 2, "timeout_s": 5.0, "max_result_chars": 40}
    edit_json(own_bundle / "plan.json", "tools", tools)
    edit_json(own_bundle / "plan.json", "sampling/max_new_tokens", 32)
    (own_bundle / "backbones/one/chat_template.jinja").write_text(HAND)
    rehash(own_bundle)
    return own_bundle


def test_an_answer_with_a_result_in_its_own_turn(bundles: Path) -> None:
    system = rt.load(bundles, functions={"lookup": lambda _: "14 <|end|> rows"})
    found = system.run("C")
    # The answer shows the result as ever; what the model has read is counted.
    assert found.answer == "<lookup>Q</lookup>" + result_block("14 <|end|> rows") + "z"
    assert found.tool_calls[0].status == "ok"
    # The result cannot end its turn; around it stand two tokens and a line break.
    read = len("(14 &lt;|end|> rows)") + 3
    edit_json(bundles / "plan.json", "tools", None)
    rehash(bundles)
    without = rt.load(bundles).run("C")
    # Round 2 reuses the beginning of round 1's prompt, so the tools were read once.
    assert found.usage.prompt_tokens - without.usage.prompt_tokens == read + len("lookup") + 1
    assert found.usage.completion_tokens == 5


def test_rows_of_a_batch_equal_the_rows_alone(bundles: Path) -> None:
    system = rt.load(bundles, functions={"lookup": lambda _: "14 rows"})
    questions = ["7", "C", "CC", "3"]
    together = system.run(questions)
    alone = [system.run(question) for question in questions]
    assert [a.answer for a in together] == [a.answer for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]
