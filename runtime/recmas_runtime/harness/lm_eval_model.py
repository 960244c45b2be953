"""The model class of lm-evaluation-harness; `recmas_runtime.harness.lm_eval` registers it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec import structs

from recmas_runtime.checking.machine import package_versions
from recmas_runtime.core.errors import fail, missing_package
from recmas_runtime.core.text import listed
from recmas_runtime.harness.evaluated_system import Asked, EvaluatedSystem, SystemArguments
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.prompts.sampler import SamplingSettings

try:
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise missing_package(error, extra="lm-eval") from error

# Stands before a conversation that `apply_chat_template` has written down.
_CHAT: Final = "recmas-conversation:"
_VERSIONS: Final = ("recmas", "onnxruntime", "onnxruntime-gpu", "lm_eval")
# What lm_eval's command gives where nobody names a device: no more than that a GPU would do.
_ANY_DEVICE: Final = (None, "cuda:0")
# What tasks and `--gen_kwargs` may set besides what becomes `max_new_tokens`, `stop` and greedy
# choice. Where they say nothing it is off, whatever the bundle says: lm_eval's tasks count on it.
_OFF: Final[SamplingSettings] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class RecmasLM(LM):  # type: ignore[misc]
    """A bundle as a model: contexts are questions of its system, which answers or scores.

    Args:
        bundle: Its folder.
        baseline: A baseline or control instead of the system itself, such as `shuffled`, which is
            over all contexts of a task.
        rounds: How many of the built rounds run.
        field: The field of a record that takes the context. Without it the bundle decides. Other
            fields that prompts show come from the task's document.
        answer: The field of documents with the right answer, for `shuffled`.
        at_once: Contexts that run at a time; without it `--batch_size` if that is above 1, else
            the bundle's most.
        device: `auto`, `cpu`, `cuda` or `tensorrt`; `cuda:0`, lm_eval's default, is `auto`.

    Raises:
        RecmasError: RM506 for arguments that it does not know or that are out of bounds; RM508 for
            baselines; what keeps the bundle from being loaded.
    """

    def __init__(
        self,
        bundle: str | None = None,
        *,
        at_once: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        if bundle is None:
            hint = "Write --model_args bundle=DIR,baseline=NAME."
            raise fail("RM506", "no bundle is named", hint=hint)
        given["device"] = "auto" if device in _ANY_DEVICE else device
        self._given = SystemArguments.of({**given, "bundle": bundle})
        self.evaluated = EvaluatedSystem.load(self._given)
        most = self.evaluated.system.plan.limits.max_batch
        self._at_once = _at_once(at_once, batch_size, max_batch_size, most)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the system answers to each context."""
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="recmas answers", disable=disable_tqdm) as bar:
            for settings, places in _alike(requests, self._settings):
                asked = [_asked(requests[place]) for place in places]
                texts = self.evaluated.answers(asked, settings, at_once=self._at_once)
                for place, text in zip(places, texts, strict=True):
                    found[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update()
        return [found[place] for place in range(len(requests))]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return for each continuation its log-likelihood, and whether greedy decoding writes it.

        The system runs once for a context, and all its continuations are read behind that.
        """
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="recmas scores", disable=disable_tqdm) as bar:
            for _, places in _alike(requests, lambda _: {}):
                groups: dict[str, list[tuple[int, str]]] = {}
                for place in places:
                    context, continuation = self._split(*requests[place].args[:2])
                    groups.setdefault(context, []).append((place, continuation))
                parts = list(groups.values())
                scored = self.evaluated.likelihoods(
                    [_asked(requests[part[0][0]], context) for context, part in groups.items()],
                    [list(dict.fromkeys(text for _, text in part)) for part in parts],
                    at_once=self._at_once,
                )
                for group, told in scored:
                    for place, text in parts[group]:
                        found[place] = told[text]
                        args = requests[place].args
                        self.cache_hook.add_partial("loglikelihood", args, told[text])
                    bar.update(len(parts[group]))
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Refuse: a system that was told the whole text would know what it is asked to predict."""
        raise fail(
            "RM543",
            "a text without a question has no likelihood under a system of agents, and this task "
            "asks for one (loglikelihood_rolling)",
            hint="Score its answer agent's backbone alone: serve the bundle and take lm_eval's "
            "model local-completions.",
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation down; the bundle's own prompts and template are applied later."""
        return _CHAT + json.dumps(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's cache of requests tells models apart by."""
        return f"recmas-{self.evaluated.system.manifest.fingerprint[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what a file of results says of the model."""
        system = self.evaluated.system
        versions = package_versions(_VERSIONS)
        return {
            "recmas": {
                **structs.asdict(self._given),
                "name": system.plan.name,
                "fingerprint": system.manifest.fingerprint,
                "rounds": system.plan.rounds,
                "device": system.device,
                "at_once": self._at_once,
                "versions": {name: version for name, version in versions.items() if version},
            }
        }

    def _settings(self, request: Any) -> SamplingSettings:
        """Return the sampling of a request, over the bundle's."""
        plan = self.evaluated.system.plan.sampling
        given = dict(request.args[1])
        given = normalize_gen_kwargs(given, default_max_gen_toks=plan.max_new_tokens)
        until, limit = given.pop("until"), given.pop("max_gen_toks")
        given.pop("do_sample")
        unknown = [name for name in given if name not in _OFF]
        if unknown:
            raise fail(
                "RM505",
                f"generation_kwargs has {unknown[0]!r}, which a bundle cannot do",
                hint=f"It takes until, max_gen_toks, do_sample, {listed(_OFF)}.",
            )
        return {
            **_OFF,
            **given,
            "max_new_tokens": limit,
            "stop": tuple(dict.fromkeys((*filter(None, until), *plan.stop))),
        }

    def _split(self, context: str, continuation: str) -> tuple[str, str]:
        """Return both, white space moved to where the tokens of a whole text have it."""
        if context.startswith(_CHAT) or not self.evaluated.continues_context:
            return context, continuation
        bare = context.rstrip()
        return bare, context[len(bare) :] + continuation


def _alike(requests: Sequence[Any], settings: Any) -> Iterator[tuple[SamplingSettings, list[int]]]:
    """Yield the places of requests that run together: of one task, with the same settings."""
    parts: dict[tuple[Any, ...], tuple[SamplingSettings, list[int]]] = {}
    for place, request in enumerate(requests):
        wanted = settings(request)
        key = (request.task_name, *sorted(wanted.items()))
        parts.setdefault(key, (wanted, []))[1].append(place)
    yield from parts.values()


def _asked(request: Any, context: str | None = None) -> Asked:
    text = request.args[0] if context is None else context
    document = request.doc if isinstance(request.doc, Mapping) else {}
    name = f"{request.task_name}/{request.doc_id}"
    return Asked(id=name, turns=_turns(text, name), document=document)


def _turns(context: str, name: str) -> tuple[EarlierTurn, ...]:
    """Return the conversation that a context is."""
    if not context.startswith(_CHAT):
        return (EarlierTurn(role="user", content=context),)
    history, end = json.JSONDecoder().raw_decode(context, len(_CHAT))
    if context[end:].strip() or history[-1]["role"] == "assistant":
        raise fail(
            "RM543",
            f"question {name!r} begins the answer itself (gen_prefix)",
            hint="Leave gen_prefix out of the task: the bundle's prompts say how to answer.",
        )
    return tuple(EarlierTurn(role=turn["role"], content=turn["content"]) for turn in history)


def _at_once(
    given: int | None, batch_size: int | str | None, max_batch_size: int | None, most: int
) -> int:
    """Return how many contexts run at a time; lm_eval's batch size is 1 unless somebody says so."""
    name, wanted = "at_once", given
    if wanted is None and str(batch_size).startswith("auto"):
        name, wanted = "max_batch_size", max_batch_size
    elif wanted is None and batch_size not in (None, 1, "1"):
        name, wanted = "batch_size", int(str(batch_size))
    if wanted is None:
        return most
    if not 1 <= wanted <= most:
        raise fail(
            "RM506",
            f"{name} is {wanted}, the bundle takes 1 to {most}",
            hint="Choose a smaller one, or build with a larger build.max_batch.",
        )
    return wanted
