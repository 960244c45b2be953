"""What writes losses, gradients and new texts: a backbone in this process, or an endpoint.

Imports `textgrad`; see `package.import_textgrad`.
"""

from __future__ import annotations

from typing import Any, Final

import openai
from msgspec import structs
from textgrad import EngineLM

from recmas_compiler.text_gradients.settings import TextGradSettings
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.running.baselines import apply_baseline
from recmas_runtime.running.records import Answer
from recmas_runtime.running.system import System

# The endpoint's key where none is wanted; clients of this form cannot do without.
_NO_KEY: Final = "none"


class CountingEngine(EngineLM):
    """An engine of textgrad's that counts its calls and the tokens that it reads and writes.

    Attributes:
        num_untold: Calls whose tokens nobody told.
        last_reply: The last text, as it came.
    """

    def __init__(self, name: str) -> None:
        self.model_string = name
        self.num_calls = 0
        self.num_tokens = 0
        self.num_untold = 0
        self.last_reply = ""

    def generate(self, prompt: str, system_prompt: str | None = None, **_: Any) -> str:
        """Return the reply to a prompt.

        Raises:
            RecmasError: RM501 for a prompt that the engine cannot read, RM507 if it fails.
        """
        text, tokens = self.reply(prompt, system_prompt or self.system_prompt)
        self.num_calls += 1
        self.num_tokens += tokens or 0
        self.num_untold += tokens is None
        self.last_reply = text
        return text

    def __call__(self, prompt: str, **kwargs: Any) -> str:
        """Return what `generate` returns."""
        return self.generate(prompt, **kwargs)

    def reply(self, prompt: str, system: str) -> tuple[str, int | None]:
        """Return the reply, and the tokens that were read and written; None if nobody tells."""
        raise NotImplementedError


class BackboneEngine(CountingEngine):
    """The answer agent's backbone, on the engines of a loaded system."""

    def __init__(self, base: System, *, reply_tokens: int) -> None:
        agent = base.plan.agents[base.plan.answer_agent]
        super().__init__(agent.backbone)
        positions = base.manifest.backbones[agent.backbone].max_positions
        system: tuple[PromptPart, ...] = (PromptPart(kind="field", value="system"),)
        content: tuple[PromptPart, ...] = (PromptPart(kind="field", value="content"),)
        template = base.loaded.chats[agent.backbone].template
        if not template.writes_system_text:
            between = PromptPart(kind="text", value="\n\n")
            system, content = (), (*system, between, *content)
        alone = structs.replace(agent, system=system, first=None, then=content)
        plan = apply_baseline(base.plan, "single", base.manifest).plan
        plan = structs.replace(
            plan,
            agents={plan.answer_agent: alone},
            fields=("system", "content"),
            limits=structs.replace(plan.limits, max_prompt_tokens=max(1, positions - reply_tokens)),
            tools=None,
        )
        self._sampling = structs.replace(
            plan.sampling,
            max_new_tokens=min(reply_tokens, positions - 1),
            temperature=0.0,
            repetition_penalty=1.0,
            stop=(),
        )
        self._system = System(plan, base.loaded)

    def reply(self, prompt: str, system: str) -> tuple[str, int]:
        """Return the greedy reply."""
        (found,) = self._system.run_batch(
            [{"system": system, "content": prompt}], sampling=self._sampling
        )
        if isinstance(found, RecmasError):
            raise found
        assert isinstance(found, Answer)
        return found.answer, found.usage.prompt_tokens + found.usage.completion_tokens


class EndpointEngine(CountingEngine):
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, settings: TextGradSettings) -> None:
        assert settings.url is not None
        assert settings.model is not None
        super().__init__(settings.model)
        self._url = settings.url
        self._reply_tokens = settings.reply_tokens
        self._client = openai.OpenAI(
            base_url=settings.url,
            api_key=settings.key or _NO_KEY,
            timeout=settings.timeout_s,
            max_retries=settings.retries,
        )

    def reply(self, prompt: str, system: str) -> tuple[str, int | None]:
        """Return the greedy reply."""
        try:
            found = self._client.chat.completions.create(
                model=self.model_string,
                messages=[
                    {"role": "system", "content": system},
                    {"role": "user", "content": prompt},
                ],
                max_tokens=self._reply_tokens,
                temperature=0.0,
            )
        except openai.BadRequestError as error:
            raise fail(
                "RM501",
                f"{self._url} refuses a prompt of the backward engine: {error.message}",
                hint="Lower --textgrad batch or reply_tokens, or name a model that reads more.",
            ) from error
        except openai.OpenAIError as error:
            raise fail(
                "RM507",
                f"{self._url} does not answer: {error}",
                hint="See that it runs; --resume goes on from the last whole step.",
            ) from error
        text = found.choices[0].message.content or ""
        return text, None if found.usage is None else found.usage.total_tokens


def open_engine(settings: TextGradSettings, base: System) -> CountingEngine:
    """Return the engine that settings ask for."""
    if settings.url is None:
        return BackboneEngine(base, reply_tokens=settings.reply_tokens)
    return EndpointEngine(settings)
