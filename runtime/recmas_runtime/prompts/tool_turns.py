"""Tools in a template's own form: what an agent may call in its prompt, results in turns of theirs.

A template that writes `tools` gets the declared ones as JSON schemas. Whether it also has turns for
results is found out by rendering a conversation with a call once: the text between the end of the
call and its result, and between that and the next turn, is what stands around results later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.plan import AgentPlan, ToolsPlan
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.render import DEFAULT_VARIABLES, Chat
from recmas_runtime.prompts.tokenizer import Span
from recmas_runtime.tools.call_scanner import CallScanner
from recmas_runtime.tools.calls import ToolCall, result_block

Variables = Mapping[str, bool | int | float | str]

_ARGUMENTS: Final = {
    "search": ("query", "Finds passages about a subject.", "What to search for."),
    "python": (
        "code",
        "Runs a Python program and returns what it prints.",
        "The program; it must print what you want to know.",
    ),
    "ask": ("question", "Asks a person and returns the reply.", "What to ask."),
}
_FUNCTION: Final = ("input", "A function that takes a text and returns a text.", "The text.")

# Words that no template has; between the last two stands what JSON would escape.
_TOOL: Final = "recmas0tool"
_ASKED: Final = "recmas0asked"
_CALLED: Final = "recmas0called"
_ARGUMENT: Final = "recmas0argument"
_OPENS, _CLOSES = "recmas0opens", "recmas0closes"
_INNER: Final = ' "a"\nb '
_CALL_ID: Final = "call00001"  # of nine letters and digits, as Mistral's templates ask


@dataclass(frozen=True, kw_only=True)
class ResultForm:
    """What a model reads after its call.

    Attributes:
        before: Stands before a result, with a word in place of the tool's name. Without it a result
            is plain text within the model's turn.
        is_json: The result stands in a string of JSON.
    """

    before: str = ""
    after: str = ""
    is_json: bool = False

    def write(self, texts: Sequence[str], tool: str) -> tuple[str, tuple[Span, ...]]:
        """Return the results of calls as one text, and which of its characters are theirs.

        Several stand in one turn, that of the first call's `tool`.
        """
        if not self.before:
            written = "".join(map(result_block, texts))
            return written, ((0, len(written)),)
        text = self._closing_marks.sub("&lt;", "\n\n".join(texts))
        text = json.dumps(text, ensure_ascii=False)[1:-1] if self.is_json else text
        before, after = (part.replace(_TOOL, tool) for part in (self.before, self.after))
        return f"{before}{text}{after}", ((len(before), len(before) + len(text)),)

    @property
    def _closing_marks(self) -> re.Pattern[str]:
        """What a result could end its turn with, in any case and with white space."""
        names = re.findall(r"<[/|]?([\w:.-]+)\|?>", f"{self.before[-60:]}{self.after[:60]}")
        words = "|".join(map(re.escape, dict.fromkeys(("result", *names))))
        return re.compile(rf"<(?=\s*[/|]?\s*(?:{words})\b)", re.IGNORECASE)


PLAIN_RESULTS: Final = ResultForm()


def tool_schemas(tools: ToolsPlan) -> list[dict[str, Any]]:
    """Return the declared tools as JSON schemas, each with one argument, a text."""
    names = [name for name in ("search", "python") if getattr(tools, name) is not None]
    names += ["ask"] if tools.ask else []
    return [_schema(name, *_ARGUMENTS[name]) for name in names] + [
        _schema(name, *_FUNCTION) for name in tools.functions
    ]


def _schema(name: str, argument: str, description: str, meaning: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string", "description": meaning}},
        "required": [argument],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def chat_of(chat: Chat, tools: ToolsPlan | None, variables: Variables) -> Chat:
    """Return a chat whose template writes the tools, or the same one if it does not write any."""
    template = template_of(chat.template, tools, variables)
    return chat if template is chat.template else replace(chat, template=template)


def template_of(
    template: ChatTemplate, tools: ToolsPlan | None, variables: Variables
) -> ChatTemplate:
    """Return a template that writes the tools, or the same one if it does not write any."""
    if tools is None or not template.names_variable("tools"):
        return template
    schemas = tool_schemas(tools)
    with_tools = template.with_tools(schemas)
    try:
        rendered = with_tools.render(
            [_user()], add_generation_prompt=True, **{**DEFAULT_VARIABLES, **variables}
        )
    except RecmasError:
        return template
    is_written = all(schema["function"]["name"] in rendered for schema in schemas)
    return with_tools if is_written and _ASKED in rendered else template


def answer_chat(chats: Mapping[str, Chat], agent: AgentPlan, tools: ToolsPlan | None) -> Chat:
    """Return the chat of a system's answer agent, with its tools."""
    return chat_of(chats[agent.backbone], tools, agent.chat_template)


def result_form(template: ChatTemplate, variables: Variables) -> ResultForm:
    """Return the form in which a template that writes tools has their results."""
    schema = _schema(_TOOL, *_FUNCTION)
    forms = _result_forms(template.with_tools([schema]), {**DEFAULT_VARIABLES, **variables})
    return next(forms, PLAIN_RESULTS)


def _result_forms(template: ChatTemplate, variables: Variables) -> Iterator[ResultForm]:
    value = {_FUNCTION[0]: _ARGUMENT}
    for assistant in (
        # Some templates want arguments as values, others as JSON text, and some write no calls.
        {"content": "", "tool_calls": [_call(value)]},
        {"content": "", "tool_calls": [_call(json.dumps(value))]},
        {"content": _CALLED},
    ):
        turns: list[dict[str, Any]] = [
            _user(),
            {"role": "assistant", **assistant},
            {
                "role": "tool",
                "name": _TOOL,
                "tool_call_id": _CALL_ID,
                "content": f"{_OPENS}{_INNER}{_CLOSES}",
            },
        ]
        try:
            opening = template.render(turns[:1], add_generation_prompt=True, **variables)
            rendered = template.render(turns, add_generation_prompt=True, **variables)
        except RecmasError:
            continue
        if form := _around_result(rendered, opening):
            yield form


def _call(arguments: object) -> dict[str, Any]:
    called = {"name": _TOOL, "arguments": arguments}
    return {"id": _CALL_ID, "type": "function", "function": called}


def _around_result(rendered: str, opening: str) -> ResultForm | None:
    """Return what stands around the result of a call; None if either cannot be found."""
    first, last = rendered.find(_OPENS), rendered.find(_CLOSES)
    called = rendered.rfind(_ASKED)
    if not 0 <= called < first < last or rendered.count(_OPENS) != 1:
        return None
    inner = rendered[first + len(_OPENS) : last]
    is_json = inner == json.dumps(_INNER)[1:-1]
    start = len(opening) if rendered.startswith(opening) else called + len(_ASKED)
    end = _end_of_call(rendered, start, first)
    if end is None or not (is_json or inner == _INNER):
        return None
    before, after = rendered[end:first], rendered[last + len(_CLOSES) :]
    return ResultForm(before=before, after=after, is_json=is_json) if before and after else None


def _end_of_call(rendered: str, start: int, limit: int) -> int | None:
    """Return where the assistant's call ends, between two places of a rendered conversation."""
    written = rendered.find(_CALLED, start, limit)
    if written >= 0:
        return written + len(_CALLED)
    passed = CallScanner([_TOOL]).push(rendered[start:limit], ended=True)
    if passed.calls != (ToolCall(_TOOL, _ARGUMENT),):
        return None
    return start + len(passed.text) + len(passed.call_text)


def _user() -> dict[str, str]:
    return {"role": "user", "content": _ASKED}
