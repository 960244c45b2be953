"""`recmas/BUNDLE` as a model of Inspect, which finds it through its entry point.

    inspect eval task.py --model recmas/out/sequential -M baseline=null -M rounds=2

Requests that Inspect sends beside each other share engine calls, as they do in a service.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import structs

from recmas_runtime.core.errors import Problem, RecmasError, fail, missing_package
from recmas_runtime.core.text import listed
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.harness.evaluated_system import SystemArguments, changed
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.running.baselines import apply_baseline, with_rounds
from recmas_runtime.serve.conversation import to_record
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.protocol import Ask, Done
from recmas_runtime.serve.service import ServiceError, ServiceLimits

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
except ModuleNotFoundError as error:
    raise missing_package(error, extra="inspect") from error

_MODEL: Final = "system"
# Inspect holds requests back by itself, at `max_connections`.
_MAX_QUEUE: Final = 2**20
# Settings of `GenerateConfig` that answers follow, by their names in `SamplingPlan`.
HONOURED: Final = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "stop_seqs": "stop",
}
# Settings that would change answers, or ask for more than their text, and that a bundle cannot do.
REFUSED: Final = (
    "best_of",
    "effort",
    "extra_body",
    "extra_headers",
    "fallback_models",
    "frequency_penalty",
    "internal_tools",
    "logit_bias",
    "logprobs",
    "modalities",
    "presence_penalty",
    "prompt_logprobs",
    "reasoning_effort",
    "reasoning_mode",
    "reasoning_summary",
    "reasoning_tokens",
    "response_schema",
    "top_logprobs",
    "verbosity",
)
_STOP_REASONS: Final = {"stop": "stop", "length": "max_tokens"}


class RecmasAPI(ModelAPI):  # type: ignore[misc]
    """A bundle as a model: conversations are questions of its system.

    Args:
        model_name: The bundle's folder.
        given: `SystemArguments`: `baseline`, `rounds`, `field`, `device`, `threads`. `shuffled` and
            `mean` are over a whole set, and Inspect asks sample by sample: they are refused.

    Raises:
        RecmasError: RM506 or RM508 for arguments, RM40x for what is no bundle.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008, Inspect's own form
        **given: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self._given = SystemArguments.of({**given, "bundle": model_name})
        refused = {"answer": self._given.answer, "date": self._given.date, "base_url": base_url}
        for name, value in refused.items():
            if value is not None:
                hint = "Leave it out."
                raise fail("RM506", f"the model argument {name!r} has no use here", hint=hint)
        bundle = open_bundle(self._given.bundle, verify_hashes=False)
        plan = bundle.plan
        baseline = apply_baseline(plan, self._given.baseline, bundle.manifest)
        if baseline.control is not None:
            raise fail(
                "RM508",
                f"{self._given.baseline} needs the messages of other samples, and Inspect asks "
                "one by one",
                hint="Take `recmasc eval --baseline` or lm_eval, which have the whole set.",
            )
        if self._given.rounds is not None:
            with_rounds(baseline.plan, self._given.rounds)
        self._serve = changed(plan.conversation, self._given.field)
        self._fields = plan.fields
        self._max_batch = plan.limits.max_batch
        self._starting: asyncio.Task[LocalService] | None = None

    async def generate(
        self, input: Sequence[Any], tools: Sequence[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation, as often as `num_choices` says.

        Raises:
            RecmasError: RM505 for settings that a bundle cannot follow, RM543 for tools and for
                messages that are no text, and what a service says of the question.
        """
        if tools:
            raise fail(
                "RM543",
                f"a bundle calls no tools of its caller, and there are {len(tools)}",
                hint="Take a solver without tools; a system's own are declared in its spec.",
            )
        asks = self._asks(input, config)
        service = await self._service()
        try:
            answers = await asyncio.gather(*(_answer(service, ask) for ask in asks))
        except ServiceError as error:
            if any(each.code == "RM501" for each in error.problems):
                text = "; ".join(f"{each.message}. {each.hint}" for each in error.problems)
                return ModelOutput.from_content(
                    self.model_name, "", stop_reason="model_length", error=text
                )
            raise RecmasError(
                Problem(code=each.code, message=each.message, hint=each.hint)
                for each in error.problems
            ) from error
        return _output(self.model_name, asks, answers)

    def max_connections(self) -> int:
        """Return how many requests share the bundle's engine calls."""
        return self._max_batch

    def connection_key(self) -> str:
        """Return what tells its connections from those of other bundles."""
        return self._given.bundle

    async def aclose(self) -> None:
        """Let the engines go."""
        if self._starting is not None:
            service, self._starting = await self._starting, None
            await service.close(0.0)

    def _asks(self, messages: Sequence[Any], config: GenerateConfig) -> list[Ask]:
        turns = tuple(_turn(message, place) for place, message in enumerate(messages))
        told = (messages[-1].metadata or {}) if messages else {}
        others = self._serve.others(self._fields)
        given = {name: told[name] for name in others if name in told}
        record, earlier = to_record(turns, self._serve, self._fields, given)
        sampling = _sampling(config)
        # A sample that is asked again is asked for another answer.
        seed = sampling.pop("seed", None)
        first = secrets.randbits(32) if seed is None else seed
        ask = Ask(
            id=0,
            model=_MODEL,
            record=record,
            rounds=self._given.rounds,
            baseline=self._given.baseline,
            turns=earlier,
        )
        return [
            structs.replace(ask, sampling={**sampling, "seed": first + number})
            for number in range(config.num_choices or 1)
        ]

    async def _service(self) -> LocalService:
        """Return the loaded bundle; all requests wait for the same one."""
        loop = asyncio.get_running_loop()
        starting = self._starting
        # Programs may run one evaluation after the other, each in an event loop of its own.
        if starting is None or starting.get_loop() is not loop:
            self._starting = starting = loop.create_task(self._started())
        return await asyncio.shield(starting)

    async def _started(self) -> LocalService:
        try:
            return await LocalService.start(
                {_MODEL: self._given.bundle},
                ServiceLimits(max_queue=_MAX_QUEUE),
                device=self._given.device,
                threads=self._given.threads,
            )
        except ServiceError as error:
            raise RecmasError(
                Problem(code=each.code, message=each.message, hint=each.hint)
                for each in error.problems
            ) from error


async def _answer(service: LocalService, ask: Ask) -> Done:
    async for event in service.ask(ask):
        if isinstance(event, Done):
            return event
    raise AssertionError("the last event is Done")


def _turn(message: Any, place: int) -> EarlierTurn:
    """Return a message of Inspect as a turn."""
    role, content = message.role, message.content
    calls = getattr(message, "tool_calls", None)
    kinds = set() if isinstance(content, str) else {part.type for part in content} - {"text"}
    if role == "tool" or calls or kinds:
        what = f"holds {listed(sorted(kinds))}" if kinds else "is about calls of tools"
        raise fail(
            "RM543",
            f"message {place + 1} of the conversation {what}",
            hint="A bundle takes text: system, user and assistant messages.",
        )
    return EarlierTurn(role=role, content=message.text)


def _sampling(config: GenerateConfig) -> dict[str, Any]:
    """Return the sampling that a config asks for, over the bundle's."""
    for name in REFUSED:
        value = getattr(config, name, None)
        if value not in (None, False):
            raise fail(
                "RM505",
                f"{name} is {value!r}, which a bundle cannot follow",
                hint=f"Settings that answers follow are {listed(HONOURED)} and num_choices.",
            )
    wanted = {ours: getattr(config, name) for name, ours in HONOURED.items()}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if "stop" in wanted:
        wanted["stop"] = tuple(wanted["stop"])
    return wanted


def _output(model: str, asks: Sequence[Ask], answers: Sequence[Done]) -> ModelOutput:
    """Return answers as Inspect has them. Text between agents counts as reasoning does."""
    used: list[Mapping[str, int]] = [done.answer["usage"] for done in answers]
    handover = sum(each["handover_tokens"] for each in used)
    written = handover + sum(each["completion_tokens"] for each in used)
    prompt = sum(each["prompt_tokens"] for each in used)
    cached = sum(done.cached_tokens for done in answers)
    return ModelOutput(
        model=model,
        choices=[
            ChatCompletionChoice(
                message=ChatMessageAssistant(
                    content=done.answer["answer"], model=model, source="generate"
                ),
                stop_reason=_STOP_REASONS[done.answer["finish_reason"]],
            )
            for done in answers
        ],
        usage=ModelUsage(
            input_tokens=prompt - cached,
            input_tokens_cache_read=cached,
            output_tokens=written,
            reasoning_tokens=handover,
            total_tokens=prompt + written,
        ),
        metadata={
            "recmas": [
                {
                    "rounds": done.answer["rounds"],
                    "latent_steps": done.answer["usage"]["latent_steps"],
                    "seed": ask.sampling["seed"],
                    "timing_ms": done.answer["timing_ms"],
                }
                for ask, done in zip(asks, answers, strict=True)
            ]
        },
    )


modelapi(name="recmas")(RecmasAPI)
