"""Chat templates: Jinja text from a model's authors, rendered the way transformers renders it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import jinja2
from jinja2 import nodes

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import open_regular
from recmas_runtime.formats.codec import malformed
from recmas_runtime.prompts.template_sandbox import (
    MAX_OUTPUT_CHARS,
    TemplateEnvironment,
    rendering_budget,
    strftime_on,
)

# The longest templates of public models have about 20,000 characters, and compiling takes time.
MAX_TEMPLATE_CHARS: Final = 2**16

# A template whose text depends on the day differs between these two in every part of a date.
_DAYS: Final = (date(2001, 2, 3), date(2012, 11, 25))

_HINT: Final = (
    "Change the agent's system text or `chat_template` settings, or give the backbone a `template` "
    "of your own."
)


class ChatTemplate:
    """A compiled chat template.

    Args:
        special_tokens: What the template may name: `bos_token`, `eos_token`, ...
        day: What a template gets that writes the date; None for today, which then stays.

    Raises:
        RecmasError: RM206 if it is not valid Jinja, or longer than any template.
    """

    def __init__(
        self,
        text: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        day: date | None = None,
    ) -> None:
        self.text = text
        self.special_tokens = dict(special_tokens or {})
        self.day = day or date.today()
        self.tools: Sequence[Mapping[str, Any]] | None = None  # that it gets, as JSON schemas
        if len(text) > MAX_TEMPLATE_CHARS:
            raise _cannot_render(
                f"the chat template has {len(text)} characters, at most {MAX_TEMPLATE_CHARS} are "
                "taken"
            )
        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(text)
        # Some mistakes are found only by Python, in the code that Jinja has made.
        except (jinja2.TemplateSyntaxError, SyntaxError, RecursionError, ValueError) as error:
            raise _cannot_render(f"the chat template is not valid Jinja: {error}") from error

    def on(self, day: date) -> Self:
        """Return the same template on another day."""
        other = copy.copy(self)
        other.day = day
        return other

    def with_tools(self, schemas: Sequence[Mapping[str, Any]]) -> Self:
        """Return the same template, which gets these tools as JSON schemas."""
        other = copy.copy(self)
        other.tools = schemas
        return other

    def names_variable(self, name: str) -> bool:
        """Return whether the template reads a variable of that name."""
        return any(found.name == name for found in self._tree.find_all(nodes.Name))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        **variables: bool | int | float | str,
    ) -> str:
        """Return the conversation as the text that the model was trained on.

        With a generation prompt it ends with the opening of the assistant's turn.

        Raises:
            RecmasError: RM206 if the template refuses these messages, fails, does not end, or
                writes what is no text.
        """
        values: dict[str, Any] = {
            "strftime_now": strftime_on(self.day),
            **self.special_tokens,
            **variables,
            "messages": [dict(message) for message in messages],
            "tools": copy.deepcopy(self.tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        num_chars = 0
        try:
            with rendering_budget():
                for piece in self._template.generate(values):
                    num_chars += len(piece)
                    if num_chars > MAX_OUTPUT_CHARS:
                        raise OverflowError(f"more than {MAX_OUTPUT_CHARS} characters of output")
                    pieces.append(piece)
            rendered = "".join(pieces)
            rendered.encode()  # an escape in a template may write half of a surrogate pair
        # Foreign code may raise anything: what `raise_exception` says, undefined variables, ...
        except Exception as error:
            raise _cannot_render(f"the chat template failed: {error}") from error
        return rendered

    @cached_property
    def _tree(self) -> nodes.Template:
        return self._environment.parse(self.text)

    @cached_property
    def literals(self) -> tuple[str, ...]:
        """Every piece of text that the template itself can write."""
        texts = [node.data for node in self._tree.find_all(nodes.TemplateData)]
        constants = [node.value for node in self._tree.find_all(nodes.Const)]
        return tuple(texts + [value for value in constants if isinstance(value, str)])

    @cached_property
    def writes_system_text(self) -> bool:
        """Whether a system message shows in the rendered text; some templates leave it out."""
        probe = "recmas0system0probe"
        messages = [{"role": "system", "content": probe}, {"role": "user", "content": "Hello"}]
        return probe in self.render(messages, add_generation_prompt=True)

    @cached_property
    def writes_turns(self) -> bool:
        """Whether earlier turns of a conversation show in the rendered text, in their order."""
        probes = [f"recmas0turn{place}probe" for place in range(3)]
        roles = ("user", "assistant", "user")
        turns = [{"role": r, "content": p} for r, p in zip(roles, probes, strict=True)]
        try:
            rendered = self.render(turns, add_generation_prompt=True)
        except RecmasError:
            return False
        found = [rendered.find(probe) for probe in probes]
        return -1 not in found and found == sorted(found)

    @property
    def date_variables(self) -> tuple[str, ...]:
        """Variables that the template sets to the date, where they are not given to it."""
        return tuple(dict.fromkeys(self._date_variables()))

    def _date_variables(self) -> Iterator[str]:
        for assignment in self._tree.find_all(nodes.Assign):
            names = {name.name for name in assignment.node.find_all(nodes.Name)}
            if "strftime_now" in names and isinstance(assignment.target, nodes.Name):
                yield assignment.target.name

    def changes_with_the_day(
        self, messages: Sequence[Mapping[str, str]], **variables: bool | int | float | str
    ) -> bool:
        """Tell whether the day shows in a rendered conversation."""
        if not self.names_variable("strftime_now"):
            return False
        first, second = (
            self.on(day).render(messages, add_generation_prompt=True, **variables) for day in _DAYS
        )
        return first != second


def read_template(path: Path, *, file: str) -> str:
    """Return the text of a template's file, which messages name `file`.

    Raises:
        RecmasError: RM401 if it cannot be read, RM404 if it is too long or not UTF-8.
    """
    with open_regular(path, file=file) as stream:
        raw = stream.read(4 * MAX_TEMPLATE_CHARS + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(raw) > 4 * MAX_TEMPLATE_CHARS:
            raise malformed(file, "the chat template is too long") from None
        raise malformed(
            file, f"the chat template is not UTF-8: byte {error.start} is {raw[error.start]:#04x}"
        ) from None
    if len(text) > MAX_TEMPLATE_CHARS:
        raise malformed(file, f"the chat template has more than {MAX_TEMPLATE_CHARS} characters")
    # As Python reads text: a template is the same with any line ends.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cannot_render(message: str) -> RecmasError:
    # What a template raises may hold anything, too.
    return fail("RM206", message.encode(errors="backslashreplace").decode(), hint=_HINT)
