"""Calls in the forms of the families of models: each runs, each in any pieces, few texts do."""

from __future__ import annotations

import random

import pytest

from kit.tool_calls import NAMES, read
from recmas_runtime.tools import call_forms
from recmas_runtime.tools.call_forms import MARKS, MAX_BODY_CHARS
from recmas_runtime.tools.call_scanner import CallScanner
from recmas_runtime.tools.calls import ToolCall


def deepseek(text: str) -> str:
    """Put in the characters that DeepSeek's marks are written with."""
    return text.replace("<|", "<\uff5c").replace("|>", "\uff5c>").replace("~", "\u2581")


ASKED = "order 17"
OBJECT = '{"name": "lookup", "arguments": {"key": "order 17"}}'
LLAMA = '{"name": "lookup", "parameters": {"key": "order 17"}}'

# family: its texts, each of which calls `lookup` with "order 17" and nothing else
FAMILIES: dict[str, tuple[str, ...]] = {
    "recmas": ("<lookup>order 17</lookup>",),
    "llama-3.1": (
        LLAMA,
        f"<|python_tag|>{LLAMA}",
        '{"type": "function", "name": "lookup", "parameters": {"key": "order 17"}}',
        '<function=lookup>{"key": "order 17"}</function>',
        '<|python_tag|>lookup.call(key="order 17")',
    ),
    "llama-3.2": (
        f"\n\n{LLAMA}",
        '[lookup(key="order 17")]',
        "[lookup(key='order 17')]",
        '{"name":"lookup","parameters":{"key":"order 17"}}\n',
    ),
    "qwen-2.5": (f"<tool_call>\n{OBJECT}\n</tool_call>",),
    "qwen-3": (f"<think>\nIt is there.\n</think>\n\n<tool_call>\n{OBJECT}\n</tool_call>",),
    "qwen-3.5": (
        "<tool_call>\n<function=lookup>\n<parameter=key>\norder 17\n</parameter>\n</function>\n"
        "</tool_call>",
        "<tool_call><function=lookup><parameter=key>order 17</parameter></function></tool_call>",
    ),
    "qwen-3-coder": (
        "<function=lookup>\n<parameter=key>\norder 17\n</parameter>\n</function>\n</tool_call>",
    ),
    "mistral": (
        f"[TOOL_CALLS][{OBJECT}]",
        f'[TOOL_CALLS] [{OBJECT[:-1]}, "id": "Xy3kP09aB"}}]',
        '[TOOL_CALLS]lookup[ARGS]{"key": "order 17"}',
        '[TOOL_CALLS]lookup[CALL_ID]Xy3kP09aB[ARGS]{"key": "order 17"}',
        '[TOOL_CALLS]lookup{"key": "order 17"}',
    ),
    "granite": (
        f"<|tool_call|>[{OBJECT}]",
        f"<|tool_call|> {OBJECT}",
        f"<tool_call>\n{OBJECT}\n</tool_call>",
        f"<function_call> {OBJECT}",
    ),
    "gemma-3": (
        '```tool_code\nlookup(key="order 17")\n```',
        '```tool_code\nprint(lookup("order 17"))\n```',
        "```tool_code\nresult = lookup(key='order 17')\n```",
        f"```json\n{LLAMA}\n```",
        LLAMA,
    ),
    "function-gemma": (
        "<start_function_call>call:lookup{key:<escape>order 17<escape>}<end_function_call>",
    ),
    "gemma-4": ('<|tool_call>call:lookup{key:<|"|>order 17<|"|>}<tool_call|>',),
    "gpt-oss": (
        "<|channel|>analysis<|message|>I need it.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.lookup <|constrain|>json<|message|>{"key": "order 17"}<|call|>',
        ' to=functions.lookup<|channel|>commentary json<|message|>{"key": "order 17"}<|call|>',
    ),
    "deepseek": (
        deepseek(
            "<|tool~calls~begin|><|tool~call~begin|>function<|tool~sep|>lookup\n```json\n"
            '{"key": "order 17"}\n```<|tool~call~end|><|tool~calls~end|>'
        ),
        deepseek(
            "<|tool~calls~begin|><|tool~call~begin|>lookup<|tool~sep|>"
            '{"key": "order 17"}<|tool~call~end|><|tool~calls~end|>'
        ),
    ),
    "phi-4": (
        f"<|tool_call|>[{OBJECT}]<|/tool_call|>",
        f"<|tool_call|>{OBJECT}<|/tool_call|>",
        f"functools[{OBJECT}]",
    ),
    "command-r": (
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "lookup", '
        '"parameters": {"key": "order 17"}}\n]<|END_ACTION|>',
        'Action: ```json\n[\n    {\n        "tool_name": "lookup",\n        "parameters": '
        '{"key": "order 17"}\n    }\n]\n```',
        'Action:\n```json\n[{"tool_name": "lookup", "parameters": {"key": "order 17"}}]```',
    ),
    "kimi-k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.lookup:0"
        '<|tool_call_argument_begin|>{"key": "order 17"}<|tool_call_end|>'
        "<|tool_calls_section_end|>",
    ),
    "glm-4.5": (
        "<tool_call>lookup\n<arg_key>key</arg_key>\n<arg_value>order 17</arg_value>\n</tool_call>",
    ),
    "minimax-m2": (
        '<minimax:tool_call>\n<invoke name="lookup">\n<parameter name="key">order 17</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
    ),
    "nemotron": (f"<TOOLCALL>[{OBJECT}]</TOOLCALL>",),
    "lfm-2": ('<|tool_call_start|>[lookup(key="order 17")]<|tool_call_end|>',),
    "jamba": (f"<tool_calls>[{OBJECT}]</tool_calls>",),
    "olmo-3": ('<function_calls>\nlookup(key="order 17")\n</function_calls>',),
    "seed-oss": (
        "<seed:tool_call>\n<function=lookup>\n<parameter=key>order 17</parameter>\n</function>\n"
        "</seed:tool_call>",
    ),
    "internlm": (f"<|action_start|><|plugin|>\n{LLAMA}<|action_end|>",),
    "apertus": (f'<|tools_prefix|>[{{"lookup": {{"key": "{ASKED}"}}}}]<|tools_suffix|>',),
    "deepseek-v4": (
        deepseek(
            '<|DSML|tool_calls>\n<|DSML|invoke name="lookup">\n<|DSML|parameter name="key" '
            'string="true">order 17</|DSML|parameter>\n</|DSML|invoke>\n</|DSML|tool_calls>'
        ).replace("|", "\uff5c"),
    ),
    "minicpm-5": ('<function name="lookup"><param name="key">order 17</param></function>',),
    "gigachat-3": (f"<|message_sep|>\n\nfunction call<|role_sep|>\n{OBJECT}",),
    "solar": (
        "<|tool_calls|><|tool_call:begin|>c0001<|tool_call:name|>lookup<|tool_call:args|>"
        '{"key": "order 17"}<|tool_call:end|>',
    ),
}
TEXTS = [(family, text) for family, texts in FAMILIES.items() for text in texts]


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_a_family_s_call(family: str, text: str) -> None:
    assert read([text]) == (text, [ToolCall("lookup", ASKED)])


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_in_any_pieces_and_with_text_around(family: str, text: str) -> None:
    chance = random.Random(17)
    for whole in (text, text + "\nThen more.", f"<think>Look.</think>{text} ok"):
        expected = (whole, [ToolCall("lookup", ASKED)])
        assert read(list(whole)) == expected
        for _ in range(10):
            cuts = sorted(chance.choices(range(len(whole) + 1), k=5))
            pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
            assert read(pieces) == expected, cuts


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_half_a_call_is_not_shown_and_one_that_never_ends_is_text(family: str, text: str) -> None:
    half = text[: text.index(ASKED) + 3]
    scanner = CallScanner(NAMES)
    shown = "".join(scanner.push(character).text for character in half)
    assert ASKED[:3] not in shown
    assert half.startswith(shown)
    assert read([half]) == (half, [])


SEVERAL = [
    (f"[TOOL_CALLS][{OBJECT}, {OBJECT}]", 2),
    ('[TOOL_CALLS]lookup[ARGS]{"key": "order 17"}[TOOL_CALLS]lookup[ARGS]{"key": "order 17"}', 2),
    (f"<|tool_call|>[{OBJECT}, {OBJECT}, {OBJECT}]", 3),
    (f"<|python_tag|>{LLAMA}; {LLAMA}", 2),
    (f"{LLAMA}\n{LLAMA}", 2),
    ('[lookup(key="order 17"), lookup("order 17")]', 2),
    (f"<tool_call>{OBJECT}</tool_call>\n<tool_call>{OBJECT}</tool_call>", 2),
    (f"<tool_call>[{OBJECT}, {OBJECT}]</tool_call>", 2),
]


@pytest.mark.parametrize(("text", "count"), SEVERAL)
def test_several_calls_of_one_turn(text: str, count: int) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces) == (text, [ToolCall("lookup", ASKED)] * count)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('<|python_tag|>brave_search.call(query="Peru")', ToolCall("search", "Peru")),
        ("<|python_tag|>x = 17 * 23\nprint(x)", ToolCall("python", "x = 17 * 23\nprint(x)")),
        ("<|channel|>analysis to=python<|message|>print(1)<|call|>",
         ToolCall("python", "print(1)")),
        (  # whose closing mark ends the turn, and may be left out
            '<|channel|>commentary to=functions.lookup<|message|>{"key": "order 17"}',
            ToolCall("lookup", ASKED),
        ),
        (
            '<|channel|>commentary to=browser.search<|message|>{"query": "Peru"}<|call|>',
            ToolCall("search", "Peru"),
        ),
        (
            "<tool_call><function=python><parameter=code>\nif 1:\n    print('</p>')\n</parameter>"
            "</function></tool_call>",
            ToolCall("python", "if 1:\n    print('</p>')"),
        ),
        (
            '[TOOL_CALLS][{"name": "python", "arguments": {"code": "print(\\"}]\\")"}}]',
            ToolCall("python", 'print("}]")'),
        ),
        ('{"name": "lookup", "parameters": {"n": 3}}', ToolCall("lookup", "3")),
        ("[lookup(n=[1, 2])]", ToolCall("lookup", "[1, 2]")),
    ],
)  # fmt: skip
def test_built_in_tools_and_arguments(text: str, call: ToolCall) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces) == (text, [call])


# A mark alone proves nothing where other texts have it too.
PLAIN = [
    '{"answer": 5}',
    '{"name": "nobody", "parameters": {"key": "x"}}',
    '{"name": "lookup"',
    'Write {"name": "lookup", "parameters": {"key": "x"}} to call it.',
    f"Like this:\n{LLAMA}",
    "[1, 2]",
    "[nobody(key=1)]",
    "[lookup] is a tool",
    "```tool_code\nprint(5)\n```",
    '```json\n{"a": 5}\n```',
    "```python\nprint(5)\n```",
    "<function=nobody><parameter=a>b</parameter></function>",
    "functools[1]",
    'Action: ```json\n[{"tool_name": "directly-answer", "parameters": {}}]\n```',
    "<|channel|>final<|message|>It is 56.",
    "to=functions.lookup without a message",
    "[TOOL_CALLS] of Mistral",
    "<|tool_call|> is a mark",
    "<|python_tag|>",
    "a < b and <b>bold</b> [1] {x} ```",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text(text: str) -> None:
    assert read([text]) == (text, [])
    assert read(list(text)) == (text, [])


@pytest.mark.parametrize("text", ["{1, 2}", '{ "answer": 5}', "[3, 4]", "```python\n", "to=x"])
def test_text_that_cannot_become_a_call_is_not_held_back(text: str) -> None:
    scanner = CallScanner(NAMES)
    shown = "".join(scanner.push(character).text for character in text + " ... ")
    assert shown.startswith(text[:-1])


BROKEN = [
    ("<tool_call>{</tool_call>", "not valid JSON"),
    ("<tool_call></tool_call>", "not valid JSON"),
    ("<tool_call>lookup('a', 'b')</tool_call>", "`arguments` of `lookup` is not one value"),
    ("<tool_call><function=lookup></function></tool_call>", "is not one value"),
    ('<tool_call>{"name": "lookup", "arguments": "{\\"key\\": "}</tool_call>', "not valid JSON"),
    ('<tool_call>{"name": "lookup", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>',
     "is not one value"),
    ("[TOOL_CALLS][{name: lookup}]", "not valid JSON"),
    ("[TOOL_CALLS]lookup[ARGS]{key}", "`arguments` of `lookup` is not valid JSON"),
    ("<|tool_call|>[1, 2]", "names no tool"),
    ("<start_function_call>lookup(x)<end_function_call>", "not valid JSON"),
    ("<|START_ACTION|>[]<|END_ACTION|>", "names no tool"),
    (deepseek("<|tool~call~begin|>what<|tool~call~end|>"), "not valid JSON"),
    ("<tool_call>" + "[" * 9000 + "</tool_call>", "not valid JSON"),
    ("<tool_call>[x" + "(" * 9000 + "</tool_call>", "not valid JSON"),
    ("<tool_call>f(" + "-" * 9000 + "1)</tool_call>", "not valid JSON"),
    ("<tool_call>a" + " " * 9000 + "</tool_call>", "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), BROKEN)
def test_a_broken_call_says_what_is_wrong(text: str, problem: str) -> None:
    _, found = read([text])
    assert [call.name for call in found] == ["tool_call"] * len(found) != []
    assert all(problem in call.problem for call in found)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (r'"{\"key\": \"order 17\"}"', "order 17"),
        (r'"{\"key\": 17}"', "17"),
        (r'" {\"code\": \"print(1)\\nprint(2)\"} "', "print(1)\nprint(2)"),
        (r'"{\"key\": \"{\\\"key\\\": 1}\"}"', '{"key": 1}'),
        (r'"{1, 2}"', "{1, 2}"),
        (r'"\"order 17\""', '"order 17"'),
        (r'"[1]"', "[1]"),
    ],
)
def test_arguments_as_json_text(arguments: str, argument: str) -> None:
    text = f'<tool_call>{{"name": "lookup", "arguments": {arguments}}}</tool_call>'
    assert read([text])[1] == [ToolCall("lookup", argument)]


@pytest.mark.parametrize("opening", ["[TOOL_CALLS]{", "<|python_tag|>x", '{"name": "', "[lookup("])
def test_what_is_held_back_is_bounded(opening: str) -> None:
    scanner = CallScanner(NAMES)
    passed = scanner.push(opening).text
    for _ in range(200):
        passed += scanner.push("x" * 1000).text
    held = sum(len(value) for value in vars(scanner).values() if isinstance(value, str))
    assert held < 2 * MAX_BODY_CHARS
    assert passed.startswith(opening)


FRAGMENTS = [
    *MARKS, *NAMES, *'{}[]()"\':,;\n= x', "</think>", "name", "arguments", "```", "call:", "\\",
    OBJECT, '{"a": "b"}', "lookup(a='b')", "\u00e9", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("bound", [40, MAX_BODY_CHARS])
@pytest.mark.parametrize("seed", range(3))
def test_spoilt_calls_are_the_same_in_any_pieces(
    seed: int, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_forms, "MAX_BODY_CHARS", bound)
    chance = random.Random(seed)
    whole = [text for _, text in TEXTS] + PLAIN + [text for text, _ in BROKEN if len(text) < 500]
    num_calls = 0
    for _ in range(300):
        text = "".join(chance.choices(FRAGMENTS, k=chance.randrange(12)))
        if chance.random() < 0.6:
            called = chance.choice(whole)
            place = chance.randrange(len(called))
            text = called[:place] + text[:9] + called[place + chance.randrange(4) :]
        cuts = sorted(chance.choices(range(len(text) + 1), k=5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        passed, found = read([text])
        assert passed == text
        assert read(pieces) == read(list(text)) == (text, found), (text, cuts)
        num_calls += len(found)
    assert num_calls > 5
