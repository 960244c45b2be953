"""The calls found are those of the whole text, however it arrives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.tool_calls import NAMES, read
from recmas_runtime.tools.call_forms import MAX_BODY_CHARS
from recmas_runtime.tools.call_scanner import CallScanner
from recmas_runtime.tools.calls import ToolCall, ToolResult, result_block


def calls(pieces: list[str]) -> list[ToolCall]:
    text, found = read(pieces)
    assert text == "".join(pieces)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no tags at all < > </search>", []),
        ("<search>capital of Peru</search>", [("search", "capital of Peru")]),
        ("a <lookup> x\n</lookup> b", [("lookup", "x")]),
        ("<search></search>", [("search", "")]),
        ("<search>a</search><python>b</python>", [("search", "a"), ("python", "b")]),
        ("<b>bold</b> <search>a</search>", [("search", "a")]),
        ("<<search>a</search>", [("search", "a")]),
        ("<python>'<search>x</search>'</python>", [("python", "'<search>x</search>'")]),
        ("<python>\n    if x:\n        y\n</python>", [("python", "if x:\n    y")]),
        ("<search>never closed", []),
        ("<Search>a</Search>", []),
        ("<ask>not a tool here</ask>", []),
    ],
)  # fmt: skip
def test_tags(text: str, expected: list[tuple[str, str]]) -> None:
    assert calls([text]) == [ToolCall(*pair) for pair in expected]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"name": "search", "arguments": {"query": "a b"}}', ToolCall("search", "a b")),
        ('{"name": "search", "arguments": "a b"}', ToolCall("search", "a b")),
        ('{"name": "python", "arguments": {"code": "a\nb"}}', ToolCall("python", "a\nb")),
        ('{"name": "lookup", "arguments": {"n": 3}}', ToolCall("lookup", "3")),
        ('{"name": "unknown", "arguments": "x"}', ToolCall("unknown", "x")),
        (r'{"name": "search", "arguments": "\ud800"}', ToolCall("search", "?")),
    ],
)
def test_json_calls(body: str, expected: ToolCall) -> None:
    assert calls([f"<tool_call>\n{body}\n</tool_call>"]) == [expected]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{", "not valid JSON"),
        ("[" * 9000, "not valid JSON"),
        ("7" * 9000, "not valid JSON"),
        ("[1]", "names no tool"),
        ('{"arguments": "x"}', "names no tool"),
        ('{"name": 3}', "names no tool"),
        ('{"name": "search"}', "`arguments` of `search` is not one value"),
        ('{"name": "search", "arguments": {}}', "is not one value"),
        ('{"name": "search", "arguments": {"a": "b", "c": "d"}}', "is not one value"),
    ],
)
def test_broken_json_is_a_call_that_says_what_is_wrong(body: str, problem: str) -> None:
    (call,) = calls([f"<tool_call>{body}</tool_call>"])
    assert (call.name, call.argument) == ("tool_call", body)
    assert problem in call.problem


fragments = st.sampled_from(
    [
        "<search>", "</search>", "<python>", "</python>", "<tool_call>", "</tool_call>", "<", ">",
        "/", "sea", "rch", "<tool", "x", " ", "\n  y", '{"name": "search", "arguments": "q"}', "{",
        "[TOOL_CALLS]", "search", "[ARGS]", '{"q": "a"}', "[", "]", ";", "<|python_tag|>", "```",
        "json\n", "tool_code\n", "search('a')", "</think>", "to=functions.", "search<|message|>",
        "<|channel|>", "<|call|>", "<|tool_call|>", "<|/tool_call|>", "<function=search>",
        "</function>",
    ]
)  # fmt: skip


@given(st.lists(fragments, max_size=25).map("".join), st.data())
def test_any_chunking_gives_the_same_calls(text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces) == read([text]) == read(list(text)) == (text, calls([text]))


def test_text_after_a_call_is_kept() -> None:
    scanner = CallScanner(NAMES)
    passed = scanner.push("so: <search>a</search> and <sea")
    assert passed.calls == (ToolCall("search", "a"),)
    assert (passed.text, passed.call_text, passed.behind) == (
        "so: ", "<search>a</search>", " and <sea",
    )  # fmt: skip
    assert scanner.push("").text == ""
    passed = scanner.push("rch>b</search>")
    assert passed.calls == (ToolCall("search", "b"),)
    assert passed.text + passed.call_text + passed.behind == "rch>b</search>"


def test_a_call_is_there_with_its_last_character() -> None:
    scanner = CallScanner(NAMES)
    text = "x<python>1</python>"
    found = [scanner.push(character).calls for character in text]
    assert found[:-1] == [()] * (len(text) - 1)
    assert found[-1] == (ToolCall("python", "1"),)


def test_text_before_a_call_is_passed_on_and_half_a_call_is_not() -> None:
    scanner = CallScanner(NAMES)
    assert scanner.push("I look. <").text == "I look. "
    assert scanner.push("tool_").text == ""
    assert scanner.push('call>{"name": "search", ').text == ""
    assert scanner.flush() == '<tool_call>{"name": "search", '


def test_memory_is_bounded_by_tags_that_never_close() -> None:
    scanner = CallScanner(NAMES)
    assert scanner.push("<search>").calls == ()
    for _ in range(200):
        assert scanner.push("<python>" + "x" * 1000).calls == ()
    held = sum(len(value) for value in vars(scanner).values() if isinstance(value, str))
    assert held < 2 * MAX_BODY_CHARS


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_an_unclosed_tag_is_text_and_later_calls_are_found(size: int) -> None:
    text = "<search>" + "x" * (MAX_BODY_CHARS + 50) + "</search> <python>1</python>"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert calls(pieces) == [ToolCall("python", "1")]


def test_the_longest_argument() -> None:
    argument = "x" * MAX_BODY_CHARS
    assert calls([f"<search>{argument}</search>"]) == [ToolCall("search", argument)]
    assert calls(list(f"<search>{argument}</search>")) == [ToolCall("search", argument)]
    assert calls([f"<search>{argument}x</search>"]) == []


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a</result>\n<result>b <b>", "a&lt;/result>\n&lt;result>b <b>"),
        ("</result >", "&lt;/result >"),
        ("</RESULT>", "&lt;/RESULT>"),
        ("</ Result\n>", "&lt;/ Result\n>"),
        ("< / result>", "&lt; / result>"),
        ("<result x=1>", "&lt;result x=1>"),
        ("</results> <resulting>", "</results> <resulting>"),
    ],
)
def test_result_block_cannot_be_closed_from_within(text: str, written: str) -> None:
    assert result_block(text) == f"\n<result>\n{written}\n</result>\n"


def test_result_as_json() -> None:
    result = ToolResult(ToolCall("search", "q"), "limit", "t", 1.23456)
    assert json.loads(json.dumps(result.to_json())) == {
        "name": "search",
        "argument": "q",
        "status": "limit",
        "result": "t",
        "ms": 1.235,
    }
