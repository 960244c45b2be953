"""Reading what stands between the marks of a call: JSON, Python, tags, or a name before JSON.

Every reader returns the calls of a text that is theirs; whoever wrote it, a text that cannot be
read becomes a call with a problem, which its result tells the model.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from recmas_runtime.tools.calls import NAMELESS, ToolCall, valid_text

_EXPECTED: Final = 'write {"name": "TOOL", "arguments": {"KEY": "TEXT"}}'

# A mark in the tags of DeepSeek V3.2 and V4.
DSML: Final = "\uff5cDSML\uff5c"

# Keys of calls in JSON, as families name them.
NAME_KEYS: Final = ("name", "tool_name", "function")
ARGUMENT_KEYS: Final = ("arguments", "parameters", "args")

# Names that models were trained to call, and the tools that they mean.
_BUILT_IN: Final = {"brave_search": "search", "web_search": "search", "code_interpreter": "python"}

_QUOTE_BRACKET: Final = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[][(){}\"']", re.DOTALL)
_JSON_BRACKET: Final = re.compile(r"\"(?:[^\"\\]|\\.)*\"|[][{}\"]", re.DOTALL)
_SEPARATORS: Final = re.compile(r"[\s;,]*")
_FENCE: Final = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)

# One word, perhaps within a name space, and what stands between it and its arguments: the marks of
# DeepSeek, Kimi and Mistral, or a line break.
_NAMED: Final = re.compile(
    r"(?:function<\uff5ctool\u2581sep\uff5c>|[\w-]+<\|tool_call:name\|>)?(?P<name>[\w.-]+)(?::\d+)?"
    r"(?:<\uff5ctool\u2581sep\uff5c>|<\|tool_call_argument_begin\|>|<\|tool_call:args\|>|\[CALL_ID\]\w*|\[ARGS\]|\s)*"
    r"(?P<arguments>\{.*\}|```\w*\n.*```)",
    re.DOTALL,
)
_MESSAGE: Final = re.compile(
    r"[^<]*to=(?P<name>[\w.-]+)[^{]*?<\|message\|>(?P<arguments>.*)", re.DOTALL
)
_TAGGED: Final = re.compile(
    r"<(?:function=|(?:function|invoke) name=)[\"']?(?P<name>[^<>\"'\s]*)[\"']?\s*>"
)
_PARAMETER: Final = re.compile(
    r"<param(?:eter)?(?:=|\s+name=)[\"']?(?P<key>[^<>\"'\s]+)[\"']?[^<>]*>\n?(?P<value>.*?)\n?"
    r"</param(?:eter)?>\s*(?=<param|</function>|</invoke>|\Z)",
    re.DOTALL,
)
_KEYED: Final = re.compile(r"(?P<name>[\w.-]+)\s*(?=<arg_key>)")
_KEY: Final = re.compile(
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>\s*", re.DOTALL
)
_CALL: Final = re.compile(r"call:(?P<name>[\w.-]+)\s*\{(?P<fields>.*)\}", re.DOTALL)
_FIELD: Final = re.compile(
    r"\s*(?P<key>\w+)\s*:\s*(?:(?P<mark><escape>|<\|\"\|>)(?P<text>.*?)(?P=mark)\s*"
    r"|(?P<value>.*?))(?:,(?=\s*\w+\s*:)|\Z)",
    re.DOTALL,
)


def value_end(text: str, start: int, *, python: bool = False) -> int | None:
    """Return where the bracketed value that begins at `start` ends; None if it goes on."""
    depth = 0
    for found in (_QUOTE_BRACKET if python else _JSON_BRACKET).finditer(text, start):
        if found[0] in "\"'":  # a string that is not complete
            return None
        if found[0] in "([{":
            depth += 1
        elif found[0] in ")]}":
            depth -= 1
            if depth <= 0:
                return found.end()
    return None


def read_calls(body: str, names: Sequence[str]) -> tuple[ToolCall, ...]:
    """Return the calls of a body, at least one."""
    body = body.strip().replace(DSML, "")
    fenced = _FENCE.match(body)
    inner = fenced[1].strip() if fenced else body
    for beginning, read in _READERS:
        if re.match(beginning, inner) and (calls := read(inner, names)):
            return tuple(calls)
    try:
        return tuple(_json_calls(inner, names))
    except (ValueError, RecursionError) as error:
        return (_broken(body, f"this is not valid JSON ({error}); {_EXPECTED}"),)


def argument_of(name: str, arguments: object) -> str:
    """Return the one text that a tool takes.

    JSON in a string is what it says, once.

    Raises:
        ValueError: There is no such text; its message says why.
    """
    text = arguments.strip() if isinstance(arguments, str) else ""
    if text.startswith("{"):
        try:
            arguments = _loads(text)
        except (ValueError, RecursionError) as error:
            # A program may begin with a brace; with `{"` an object begins.
            if re.match(r'\{\s*"', text):
                raise ValueError(f"`arguments` of `{name}` is not valid JSON ({error})") from error
    if isinstance(arguments, dict) and len(arguments) == 1:
        (value,) = arguments.values()
        arguments = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise ValueError(f"`arguments` of `{name}` is not one value")
    return valid_text(arguments.strip())


def known_name(name: str, names: Sequence[str]) -> str:
    """Return the tool that a model means, or the name as it is."""
    for meant in (name, name.removesuffix(".call"), name.rpartition(".")[2]):
        if meant in names:
            return meant
    built_in = _BUILT_IN.get(name.removesuffix(".call"), "")
    return built_in if built_in in names else valid_text(name)


def _call(name: str, arguments: object, names: Sequence[str], body: str) -> ToolCall:
    name = known_name(name.strip(), names)
    try:
        return ToolCall(name, argument_of(name, arguments))
    except ValueError as error:
        return _broken(body, f"{error}; {_EXPECTED}")


def _broken(body: str, problem: str) -> ToolCall:
    return ToolCall(NAMELESS, valid_text(body), valid_text(problem))


def _loads(text: str) -> Any:
    # Models write line breaks into strings as they are; strict JSON would refuse them.
    return json.loads(text, strict=False)


def _json_calls(body: str, names: Sequence[str]) -> Iterator[ToolCall]:
    """Read one or more values; lists hold calls.

    Raises:
        ValueError, RecursionError: The text is not JSON.
    """
    decoder = json.JSONDecoder(strict=False)
    place = 0
    found: list[object] = []
    while place < len(body) or not found:
        value, place = decoder.raw_decode(body, place)
        found += value if isinstance(value, list) and value else [value]
        separators = _SEPARATORS.match(body, place)
        place = separators.end() if separators else place
    for value in found:
        yield _json_call(value, names, body)


def _json_call(value: object, names: Sequence[str], body: str) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]  # of the OpenAI API
    if isinstance(value, dict):
        name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
        if name is not None:
            arguments = next((value[key] for key in ARGUMENT_KEYS if key in value), None)
            return _call(name, arguments, names, body)
        (name, arguments) = next(iter(value.items())) if len(value) == 1 else (None, None)
        if name in names:  # {"search": {"query": "..."}}
            return _call(str(name), arguments, names, body)
    return _broken(body, f"this names no tool; {_EXPECTED}")


def python_calls(body: str, names: Sequence[str]) -> list[ToolCall]:
    """Read calls as Python writes them, in a list or a line each; none if it is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings that Python does not know
            tree = ast.parse(body)
            found = [_python_call(node) for node in _expressions(tree)]
    # What nests too deeply is refused with one of the last two.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
    return [_call(name, arguments, names, body) for name, arguments in found]


def _expressions(tree: ast.Module) -> Iterator[ast.expr]:
    for statement in tree.body:
        if not isinstance(statement, ast.Expr | ast.Assign):
            raise ValueError("a statement that is no call")
        value = statement.value
        yield from value.elts if isinstance(value, ast.List | ast.Tuple) else (value,)


def _python_call(node: ast.expr) -> tuple[str, object]:
    if not isinstance(node, ast.Call):
        raise ValueError("no call")
    name = ast.unparse(node.func)
    if name == "print" and len(node.args) == 1 and isinstance(node.args[0], ast.Call):
        return _python_call(node.args[0])
    values: dict[str, object] = {
        f"argument {place}": ast.literal_eval(value) for place, value in enumerate(node.args)
    }
    values |= {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    json.dumps(values)  # sets and bytes have no JSON
    return name, values


def _tagged_calls(body: str, names: Sequence[str]) -> list[ToolCall]:
    openings = list(_TAGGED.finditer(body))
    calls = []
    for index, opening in enumerate(openings):
        end = openings[index + 1].start() if index + 1 < len(openings) else len(body)
        inside = re.sub(r"</(?:function|invoke)>\s*\Z", "", body[opening.end() : end].strip())
        arguments: object = {p["key"]: p["value"] for p in _PARAMETER.finditer(inside)}
        if not arguments and inside.strip():
            arguments = inside.strip()
        calls.append(_call(opening["name"], arguments, names, body))
    return calls


def _named_calls(body: str, names: Sequence[str]) -> list[ToolCall]:
    found = _NAMED.fullmatch(body)
    if found is None:
        return []
    fenced = _FENCE.match(found["arguments"])
    try:
        arguments = _loads(fenced[1] if fenced else found["arguments"])
    except (ValueError, RecursionError) as error:
        return [_broken(body, f"`arguments` of `{found['name']}` is not valid JSON ({error})")]
    return [_call(found["name"], arguments, names, body)]


def _message_calls(body: str, names: Sequence[str]) -> list[ToolCall]:
    found = _MESSAGE.match(body)
    return [_call(found["name"], found["arguments"], names, body)] if found else []


def _keyed_calls(body: str, names: Sequence[str]) -> list[ToolCall]:
    found = _KEYED.match(body)
    if found is None or _KEY.sub("", body[found.end() :]).strip():
        return []
    arguments = {p["key"].strip(): p["value"] for p in _KEY.finditer(body, found.end())}
    return [_call(found["name"], arguments, names, body)]


def _gemma_calls(body: str, names: Sequence[str]) -> list[ToolCall]:
    found = _CALL.fullmatch(body)
    if found is None:
        return []
    arguments = {
        p["key"]: p["value"].strip() if p["text"] is None else p["text"]
        for p in _FIELD.finditer(found["fields"])
    }
    return [_call(found["name"], arguments, names, body)]


_Reader = Callable[[str, Sequence[str]], list[ToolCall]]

# How a body begins, and who can read it; one that no reader takes is meant to be JSON.
_READERS: Final[tuple[tuple[str, _Reader], ...]] = (
    (r"<function[ =]|<invoke name=", _tagged_calls),
    (r"call:", _gemma_calls),
    (r"[^{]*to=[^{]*<\|message\|>", _message_calls),
    (r"[\w.-]+\s*<arg_key>", _keyed_calls),
    (r"[\w.<\uff5c]", _named_calls),
    (r"\[?\s*[A-Za-z_]", python_calls),
)
