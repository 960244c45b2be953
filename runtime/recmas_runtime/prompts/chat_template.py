"""Chat templates: Jinja text from a model's authors, rendered the way transformers renders it.

A template is foreign code: it runs in `template_sandbox`, which bounds what it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import jinja2
from jinja2 import nodes

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.prompts.template_sandbox import TemplateEnvironment, rendering_budget

Message = Mapping[str, str]

# Far beyond any prompt that fits a bundle, far below what hurts.
MAX_OUTPUT_CHARS: Final = 16_000_000


class ChatTemplate:
    """A compiled chat template.

    Raises:
        RecmasError: RM206 if it is not valid Jinja.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.text = text
        self.special_tokens = dict(special_tokens or {})
        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(text)
            self._tree = self._environment.parse(text)
        # Some mistakes are found only by Python, in the code that Jinja has made.
        except (jinja2.TemplateSyntaxError, SyntaxError, RecursionError) as error:
            raise _cannot_render(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        **variables: bool | int | float | str,
    ) -> str:
        """Return the conversation as the text that the model was trained on.

        With a generation prompt it ends with the opening of the assistant's turn.

        Raises:
            RecmasError: RM206 if the template refuses these messages, fails or does not end.
        """
        values: dict[str, Any] = {
            **self.special_tokens,
            **variables,
            "messages": [dict(message) for message in messages],
            "tools": None,
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
        # Foreign code may raise anything: what `raise_exception` says, undefined variables, ...
        except Exception as error:
            raise _cannot_render(f"the chat template failed: {error}") from error
        return "".join(pieces)

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


def _cannot_render(message: str) -> RecmasError:
    return fail(
        "RM206",
        message,
        hint="Change the agent's system text or `chat_template` settings, or use another backbone.",
    )
