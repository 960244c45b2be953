"""The forms in which models write calls, family by family: one table.

The forms are those of the families' published chat templates. A form says by which mark a call
begins and how it ends; what stands between is read by `call_bodies`, whichever family wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from recmas_runtime.tools.call_bodies import (
    ARGUMENT_KEYS,
    DSML,
    NAME_KEYS,
    python_calls,
    read_calls,
    value_end,
)
from recmas_runtime.tools.calls import ToolCall

# A call that does not end within so many characters is plain text. It bounds what a scanner keeps
# of a text that never closes its mark.
MAX_BODY_CHARS: Final = 16_384


class Ends(Enum):
    """How a call ends."""

    MARK = "at its closing mark"
    MESSAGE = "at its closing mark, or where the model ends its turn"
    VALUE = "with its last bracket; calls of the same form may follow, and a closing mark"
    TURN = "as VALUE; a program ends where the model ends its turn"


@dataclass(frozen=True)
class CallForm:
    """One way to mark a call.

    Attributes:
        families: Who writes so.
        opening: Text, often a special token.
        needs_tool: It is a call only if it names a declared tool: the mark alone proves nothing.
        opens_turn: It is one only where nothing but white space and thinking stands before it.
        keeps_opening: The mark belongs to the body.
    """

    families: str
    opening: str
    closing: str = ""
    ends: Ends = Ends.MARK
    needs_tool: bool = False
    opens_turn: bool = False
    keeps_opening: bool = False


FORMS: Final[tuple[CallForm, ...]] = (
    CallForm("Qwen 2.5, 3, 3.5, Coder; Hermes; Granite 4; GLM 4.5", "<tool_call>", "</tool_call>"),
    CallForm(
        "Llama 3.1 (custom), Qwen3-Coder without its outer mark",
        "<function=",
        "</function>",
        needs_tool=True,
        keeps_opening=True,
    ),
    CallForm("Llama 3.1, 3.3 (JSON, built-in tools, code)", "<|python_tag|>", ends=Ends.TURN),
    CallForm("Llama 3.1, 3.2 (JSON)", "{", ends=Ends.VALUE, needs_tool=True, opens_turn=True),
    CallForm("Llama 3.2, 4 (Python)", "[", ends=Ends.VALUE, needs_tool=True, opens_turn=True),
    CallForm("Mistral, both forms", "[TOOL_CALLS]", ends=Ends.VALUE),
    CallForm("Granite 3; Phi-4 mini", "<|tool_call|>", "<|/tool_call|>", ends=Ends.VALUE),
    CallForm("Phi-4 mini", "functools[", ends=Ends.VALUE, needs_tool=True, keeps_opening=True),
    CallForm("Granite 20B", "<function_call>", ends=Ends.VALUE),
    CallForm("Gemma 3 (Python)", "```tool_code", "```", needs_tool=True),
    CallForm("Gemma 3 (JSON)", "```tool_call", "```", needs_tool=True),
    CallForm("Gemma 3 (JSON)", "```json", "```", needs_tool=True, opens_turn=True),
    CallForm("FunctionGemma", "<start_function_call>", "<end_function_call>"),
    CallForm("Gemma 4", "<|tool_call>", "<tool_call|>"),
    CallForm("gpt-oss", "<|channel|>", "<|call|>", ends=Ends.MESSAGE),
    CallForm(
        "gpt-oss (receiver first)",
        "to=functions.",
        "<|call|>",
        ends=Ends.MESSAGE,
        opens_turn=True,
        keeps_opening=True,
    ),
    CallForm(
        "DeepSeek V3, R1, V3.1",
        "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "<\uff5ctool\u2581call\u2581end\uff5c>",
    ),
    CallForm("Command R7B, Command A", "<|START_ACTION|>", "<|END_ACTION|>"),
    CallForm("Command R", "Action: ```json", "```", needs_tool=True),
    CallForm("Command R", "Action:\n```json", "```", needs_tool=True),
    CallForm("DeepSeek V3.2, V4", f"<{DSML}invoke name=", f"</{DSML}invoke>", keeps_opening=True),
    CallForm("MiniCPM 5", "<function name=", "</function>", needs_tool=True, keeps_opening=True),
    CallForm("GigaChat 3", "function call<|role_sep|>", ends=Ends.VALUE),
    CallForm("Apertus", "<|tools_prefix|>", "<|tools_suffix|>"),
    CallForm("Solar Open", "<|tool_call:begin|>", "<|tool_call:end|>"),
    CallForm("Kimi K2", "<|tool_call_begin|>", "<|tool_call_end|>"),
    CallForm("LFM2", "<|tool_call_start|>", "<|tool_call_end|>"),
    CallForm("Nemotron", "<TOOLCALL>", "</TOOLCALL>"),
    CallForm("Jamba, Apriel, Hunyuan", "<tool_calls>", "</tool_calls>"),
    CallForm("OLMo 3", "<function_calls>", "</function_calls>"),
    CallForm("MiniMax M2", "<minimax:tool_call>", "</minimax:tool_call>"),
    CallForm("Seed-OSS", "<seed:tool_call>", "</seed:tool_call>"),
    CallForm("InternLM 2.5", "<|action_start|><|plugin|>", "<|action_end|>"),
)

# Special tokens of calls that are neither opening nor closing marks.
_INNER_MARKS: Final = (
    "<|message|>", "<|constrain|>", "[ARGS]", "[CALL_ID]", "<|tool_call_argument_begin|>",
    "<\uff5ctool\u2581sep\uff5c>", "<escape>", '<|"|>', "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "<|tool_call:name|>", "<|tool_call:args|>", DSML, "<parameter=", "</parameter>",
    "</function>", "<invoke name=", "</invoke>",
)  # fmt: skip
MARKS: Final = (*(m for f in FORMS for m in (f.opening, f.closing) if len(m) > 1), *_INNER_MARKS)

_WAIT: Final = None
_NO: Final = 0
# Where a call ends, with its calls; `_WAIT` while that is not certain, `_NO` if it is no call.
Reading = tuple[int, tuple[ToolCall, ...]] | int | None

_BETWEEN_VALUES: Final = re.compile(r"\s*[;,]?\s*")
_KEY: Final = re.compile(r'[{\[]\s*\{?\s*"(\w*)("?)')
_KEYS: Final = frozenset((*NAME_KEYS, *ARGUMENT_KEYS, "type", "id", "tool_call_id"))
_HEADER: Final = re.compile(r"[\w.-]+\s*(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*")
_HEADER_MARKS: Final = ("[CALL_ID]", "[ARGS]")
_MESSAGE: Final = "<|message|>"
_MAX_HEADER_CHARS: Final = 200


def is_in_marks(token: str, names: Sequence[str]) -> bool:
    """Return whether a special token may be a part of the marks of calls of named tools."""
    own = (mark for name in names for mark in (f"<{name}>", f"</{name}>"))
    return any(token in mark or mark in token for mark in (*MARKS, *own))


def read_form(form: CallForm, text: str, names: Sequence[str], *, ended: bool) -> Reading:
    """Read the call that a text may begin with; `ended` if nothing will follow."""
    match form.ends:
        case Ends.MARK:
            reading = _read_marked(form, text, names)
        case Ends.MESSAGE:
            reading = _read_message(form, text, names, ended=ended)
        case _:
            reading = _read_values(form, text, names, ended=ended)
    if isinstance(reading, tuple) and form.needs_tool:
        return reading if all(call.name in names for call in reading[1]) else _NO
    return reading


def _read_marked(form: CallForm, text: str, names: Sequence[str]) -> Reading:
    if form.opening == "```json" and not _may_be_json_call(text[len(form.opening) :].lstrip()):
        return _NO
    start = len(form.opening)
    limit = start + MAX_BODY_CHARS + len(form.closing)
    end = text.find(form.closing, start, limit)
    if end < 0:
        return _WAIT if len(text) < limit else _NO
    body = text[0 if form.keeps_opening else start : end]
    return end + len(form.closing), read_calls(body, names)


def _read_message(form: CallForm, text: str, names: Sequence[str], *, ended: bool) -> Reading:
    """Read a message that may be meant for a tool: its header says for whom it is."""
    header_end = text.find(_MESSAGE, 0, _MAX_HEADER_CHARS)
    header = text[: header_end if header_end >= 0 else _MAX_HEADER_CHARS]
    if "<|end|>" in header or (header_end < 0 and len(text) >= _MAX_HEADER_CHARS):
        return _NO
    if header_end < 0:
        return _WAIT
    if "to=" not in header:
        return _NO
    start = 0 if form.keeps_opening else len(form.opening)
    limit = header_end + MAX_BODY_CHARS
    end = text.find(form.closing, header_end, limit)
    if end >= 0:
        return end + len(form.closing), read_calls(text[start:end], names)
    if len(text) >= limit:
        return _NO
    if not ended:
        return _WAIT
    calls = read_calls(text[start:], names)
    # One that is cut off has not ended.
    return _NO if any(call.problem for call in calls) else (len(text), calls)


def _read_values(form: CallForm, text: str, names: Sequence[str], *, ended: bool) -> Reading:
    """Read bracketed values one after the other, and an optional closing mark."""
    place = 0 if form.opens_turn else len(form.opening) - form.keeps_opening
    calls: tuple[ToolCall, ...] = ()
    end = 0
    while True:
        value = _one_value(form, text, place, names, ended=ended)
        if value is _WAIT:
            return _WAIT if not ended else (end, calls) if calls else _NO
        if isinstance(value, int):
            break
        end, calls = value[0], (*calls, *value[1])
        place = _BETWEEN_VALUES.match(text, end).end()  # type: ignore[union-attr]
        rest = text[place:]
        if not form.opens_turn and rest and not ended and form.opening.startswith(rest):
            return _WAIT
        if not form.opens_turn and rest.startswith(form.opening):
            place += len(form.opening)
        elif not rest.startswith("{"):
            break
    if not calls:
        return _NO
    rest = text[end:].lstrip()
    if form.closing and rest.startswith(form.closing):
        return len(text) - len(rest) + len(form.closing), calls
    # What stands behind may be more of it: then the next text decides.
    may_follow = not rest or form.closing.startswith(rest) or rest.strip() in (";", ",")
    return _WAIT if may_follow and not ended else (end, calls)


def _one_value(
    form: CallForm, text: str, place: int, names: Sequence[str], *, ended: bool
) -> Reading:
    """Read one value, or a program where the form may hold one."""
    start = place + len(text[place:]) - len(text[place:].lstrip())
    rest = text[start:]
    later = _NO if ended or len(rest) > MAX_BODY_CHARS else _WAIT
    if not rest:
        return later
    if form.opens_turn and not _may_be_call(rest, names):
        return _NO
    is_python = rest[0] not in "{[" or re.match(r"\[\s*[A-Za-z_]", rest) is not None
    if form.ends is Ends.TURN and is_python:
        return _program(text, start, names, ended=ended)
    header = _HEADER.match(rest)
    opening = start + (header.end() if header else 0)
    if any(mark.startswith(text[opening:]) for mark in _HEADER_MARKS):
        return later
    if text[opening] not in ("{" if header else "{["):
        return _NO
    end = value_end(text, opening, python=is_python and header is None)
    if end is None:
        return later
    return (end, read_calls(text[start:end], names)) if end - start <= MAX_BODY_CHARS else _NO


def _program(text: str, start: int, names: Sequence[str], *, ended: bool) -> Reading:
    """Read a built-in tool's call, or code for the interpreter, which ends with the turn."""
    built_in = re.match(r"[\w.]+\.call\s*\(", text[start:])
    if built_in:
        end = value_end(text, start + built_in.end() - 1, python=True)
        if end is None and ended:
            return _NO
        fits = end is not None and end - start <= MAX_BODY_CHARS
        if end is not None and fits and (calls := python_calls(text[start:end], names)):
            return end, tuple(calls)
    if len(text) - start > MAX_BODY_CHARS:
        return _NO
    return (len(text), (ToolCall("python", text[start:].strip()),)) if ended else _WAIT


def _may_be_call(text: str, names: Sequence[str]) -> bool:
    """Return whether a text may yet grow into a call without marks: few texts begin like one."""
    if text[0] == "{":
        return _may_be_json_call(text)
    inside = text[1:].lstrip()
    if not inside or inside[0] == "{":
        return _may_be_json_call(text)
    word = re.match(r"[\w.]*", inside)[0]  # type: ignore[index]
    if len(word) == len(inside):
        return any(name.startswith(word) for name in names)
    return word in names and inside[len(word) :].lstrip()[:1] in ("", "(")


def _may_be_json_call(text: str) -> bool:
    """Return whether an object, or a list of them, may yet have the keys of a call."""
    found = _KEY.match(text)
    if found is None:
        return re.fullmatch(r"[{\[]?\s*\{?\s*", text) is not None
    return found[1] in _KEYS if found[2] else any(key.startswith(found[1]) for key in _KEYS)
