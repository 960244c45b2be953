"""A loaded system: records in, answers out, in batches that run together."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final, Self, TypedDict, Unpack, overload

from msgspec import structs

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.core.text import counted, listed
from recmas_runtime.engines.interface import FREE_MEMORY, OutOfMemoryError
from recmas_runtime.formats.bundle import Bundle, open_bundle
from recmas_runtime.formats.codec import malformed
from recmas_runtime.formats.links import read_operands
from recmas_runtime.formats.manifest import PLAN_NAME, Manifest
from recmas_runtime.formats.plan import Plan, SamplingPlan, Variant, field_place, parse_day
from recmas_runtime.prompts.chat_template import read_template
from recmas_runtime.prompts.render import DEFAULT_VARIABLES, Chat, Prompt
from recmas_runtime.prompts.sampler import check_sampling
from recmas_runtime.prompts.tool_turns import PLAIN_RESULTS, answer_chat, result_form
from recmas_runtime.running.baselines import apply_baseline
from recmas_runtime.running.batch import AnswerStream, Batch
from recmas_runtime.running.engine_lock import EngineLock
from recmas_runtime.running.executor import Engines, Execution
from recmas_runtime.running.generation import AnswerTools, DecoderSettings
from recmas_runtime.running.open_engines import OpenedEngines, open_engines
from recmas_runtime.running.record_prompts import RecordError, RecordPrompts
from recmas_runtime.running.records import (
    Answer,
    Question,
    Record,
    as_record,
    is_one,
    needed_fields,
)
from recmas_runtime.running.run_trace import Trace, reads_thoughts
from recmas_runtime.tools.toolbox import Toolbox

Function = Callable[[str], str]
# More is a mistake: the command line has the same bound.
MAX_THREADS: Final = 4096


class SamplingSettings(TypedDict, total=False):
    """Settings of `SamplingPlan`, some of them."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    functions: Mapping[str, Function] | None = None,
    ask: Function | None = None,
    date: str | None = None,
) -> System:
    """Open a bundle and its engines.

    Args:
        device: `auto`, `cpu`, `cuda` or `tensorrt`. `auto` takes TensorRT where the bundle has
            engines for this machine, then CUDA; where they are there but cannot be used, the
            system's `problems` say why.
        threads: Threads within an operator; None takes the physical cores.
        functions: Tools of the caller, by the names that the spec declares; each maps the text of
            a call to the text of its result.
        ask: Puts a question of the model to a human and returns the reply; None if nobody is there.
        date: `YYYY-MM-DD` for chat templates that write the date; None for the bundle's, or else
            today, which then stays for this system.

    Raises:
        RecmasError: RM40x for a bundle that is not whole, RM504 for a device that is not there,
            RM506 for a date that is none, threads out of bounds, and tools that nobody can call.
    """
    _check_arguments(threads, functions, ask)
    day = None if date is None else _given_day(date)
    bundle = open_bundle(Path(path), verify_hashes=False)
    tools = bundle.plan.tools
    toolbox = None
    if tools is not None:
        corpus = tools.search.corpus if tools.search is not None else None
        toolbox = Toolbox(
            tools,
            corpus=None if corpus is None else bundle.file(corpus),
            functions=functions,
            ask=ask,
        )
    try:
        opened = open_engines(bundle, device=device, threads=threads)
        return System(bundle.plan, load_parts(bundle, opened, day=day), toolbox)
    except MemoryError:
        raise OutOfMemoryError("the bundle cannot be loaded", FREE_MEMORY) from None


@dataclass(frozen=True, kw_only=True)
class LoadedBundle:
    """What a bundle loads once and every system on it shares; problems say why on which device."""

    manifest: Manifest
    day: datetime.date
    device: str
    problems: list[Problem]
    engines: Engines
    chats: Mapping[str, Chat]
    lock: EngineLock = field(default_factory=EngineLock)


class System:
    """A multi-agent system, ready to answer. One caller at a time runs; others wait.

    It may be used in a `with` statement, which closes it. With `exchange` the answer agent sees the
    messages of another record; see `baseline`.
    """

    def __init__(
        self,
        plan: Plan,
        loaded: LoadedBundle,
        toolbox: Toolbox | None = None,
        *,
        exchange: bool = False,
    ) -> None:
        self.plan = plan
        self.manifest = loaded.manifest
        self.device = loaded.device
        self._open: LoadedBundle | None = loaded
        self._toolbox = toolbox
        self._answer_chat = answer_chat(loaded.chats, plan.agents[plan.answer_agent], plan.tools)
        self._tools = None if toolbox is None else self._answer_tools(toolbox)
        self._exchange = exchange

    @property
    def _loaded(self) -> LoadedBundle:
        if self._open is None:
            raise fail("RM522", "this system was closed", hint="Load the bundle again.")
        return self._open

    def __repr__(self) -> str:
        agents = counted(len(self.plan.agents), "agent")
        rounds = counted(self.plan.rounds, "round")
        state = "closed" if self._open is None else f"on {self.device}"
        return f"<System {self.plan.name!r}: {agents}, {rounds}, {state}>"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that the prompts show."""
        return self.plan.fields

    def close(self) -> None:
        """Let the engines go, with those of other systems on them; then nothing can be asked."""
        self._open = self._tools = self._toolbox = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Warnings about the engines, so far: which of the bundle's are not used, and why."""
        return tuple(self._loaded.problems)

    @property
    def date(self) -> str:
        """The day that chat templates get which write it, as `YYYY-MM-DD`."""
        return self._loaded.day.isoformat()

    def baseline(self, name: str) -> System:
        """Return an alternative to this system on the same engines; `latent` is the system itself.

        It has the same prompts, sampler and token accounting; only what agents hand over differs.
        Names are those of `running.baselines.BASELINES`; `text@N` and `moa@N` end hand-over texts
        after N tokens.

        Raises:
            RecmasError: RM508 for a name that is none, or that this system has no use for.
        """
        baseline = apply_baseline(self.plan, name, self.manifest)
        return System(
            baseline.plan, self._loaded, self._toolbox, exchange=baseline.exchanges_messages
        )

    def with_plan(self, plan: Plan) -> System:
        """Return a system that runs another plan, which fits the manifest, on the same engines."""
        return System(plan, self._loaded, self._toolbox, exchange=self._exchange)

    @overload  # a text is a sequence too, but the first signature comes first
    def run(  # type: ignore[overload-overlap]
        self,
        questions: Question,
        *,
        sampling: SamplingPlan | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> Answer: ...
    @overload
    def run(
        self,
        questions: Sequence[Question],
        *,
        sampling: SamplingPlan | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[Answer]: ...
    def run(
        self,
        questions: Question | Sequence[Question],
        *,
        sampling: SamplingPlan | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> Answer | list[Answer]:
        """Answer one text or record's fields, or a list of them as ragged batches, in input order.

        Args:
            sampling: Instead of the bundle's.
            settings: Over those, by the names in `SamplingPlan`: `run(text, max_new_tokens=8)`.

        Raises:
            RecmasError: The first record that cannot be answered; `run_batch` keeps the others.
        """
        single = is_one(questions)
        asked: Sequence[Question] = [questions] if single else questions  # type: ignore[list-item, assignment]
        answers: list[Answer] = []
        for result in self.run_batch(asked, sampling=sampling, **settings):
            if isinstance(result, RecmasError):
                raise result
            answers.append(result)
        return answers[0] if single else answers

    def run_batch(
        self,
        records: Sequence[Question],
        *,
        sampling: SamplingPlan | None = None,
        trace: Trace | None = None,
        progress: Progress | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[Answer | RecmasError]:
        """Answer texts, fields or records in ragged batches of at most the bundle's `max_batch`.

        Returns for each, in order, its answer or why it has none. For the rest see `run`.

        Raises:
            RecmasError: RM505 for settings that concern all records.
        """
        chosen = self._settings(sampling, settings)
        records = [records] if is_one(records) else list(records)  # type: ignore[list-item]
        results: list[Answer | RecmasError | None] = [None] * len(records)
        ready: list[_Ready] = []
        for index, question in enumerate(records):
            try:
                record = as_record(question, index)
            except RecmasError as error:
                results[index] = error
                continue
            try:
                ready.append(_Ready(index, record, self._prompts_of(question, record)))
            except RecmasError as error:
                results[index] = error
            except MemoryError:
                what = f"record {record.id!r} is too long"
                results[index] = OutOfMemoryError(what, "Shorten the record.")
        with (progress or Silent()).stage("answering", len(records)) as advance:
            advance(len(records) - len(ready))
            for part in self._parts(ready):
                for index, result in self._answer(part, chosen, trace):
                    results[index] = result
                advance(len(part))
        return [result for result in results if result is not None]

    def stream(
        self,
        question: Question,
        *,
        sampling: SamplingPlan | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> AnswerStream:
        """Answer one question, its text piece by piece; for the settings see `run`.

        Raises:
            RecmasError: If the record cannot be answered.
        """
        chosen = self._settings(sampling, settings)
        record = as_record(question, 0)
        (part,) = self._parts([_Ready(0, record, self._prompts_of(question, record))])
        return AnswerStream(self._batch(part, chosen, None), self._loaded.lock)

    def _prompts_of(self, question: Question, record: Record) -> RecordPrompts:
        if isinstance(question, str):
            self.check_question(record)
        return self.prompts(record)

    @property
    def prompt_day(self) -> str | None:
        """The date that prompts show, as YYYY-MM-DD; None if no chat template writes one."""
        hello = [{"role": "user", "content": "Hello"}]
        for agent in self.plan.agents.values():
            template = self._loaded.chats[agent.backbone].template
            try:
                if template.changes_with_the_day(
                    hello, **{**DEFAULT_VARIABLES, **agent.chat_template}
                ):
                    return self.date
            except RecmasError:
                continue  # such a template fails for every record, which is told there
        return None

    def check_question(self, record: Record) -> None:
        """Raise RM500 for a question that no prompt shows: it would be answered unread."""
        fields = self.plan.fields
        names = {field_place(shown).name for shown in fields}
        if "question" in record.given and "question" not in names:
            uses = f"use {listed(fields)}" if fields else "show nothing of a record"
            raise fail(
                "RM500",
                f"record {record.id!r} has a question, and no prompt shows it: the prompts {uses}",
                hint=needed_fields(fields) if fields else "Write {{ question }} in a prompt.",
            )

    def prompts(self, record: Record) -> RecordPrompts:
        """Return every prompt of a record; RM500, RM501 or RM206 if one cannot be built."""
        backbones = self.manifest.backbones
        num_rows = {name: entry.vocab_size for name, entry in backbones.items()}
        return RecordPrompts(
            self.plan,
            self._loaded.chats,
            record,
            num_rows=num_rows,
            answer_chat=self._answer_chat,
        )

    def _answer_tools(self, toolbox: Toolbox) -> AnswerTools:
        """Return the tools of answers; where the template writes them, with its form of results."""
        agent = self.plan.agents[self.plan.answer_agent]
        results = PLAIN_RESULTS
        if self._answer_chat is not self._loaded.chats[agent.backbone]:
            results = result_form(self._answer_chat.template, agent.chat_template)
        return AnswerTools(toolbox=toolbox, lock=self._loaded.lock, results=results)

    def _parts(self, ready: Sequence[_Ready]) -> list[list[_Ready]]:
        """Cut records into batches of about the same size; RM508 if one would run alone."""
        num_parts = -(-len(ready) // self.plan.limits.max_batch)
        bounds = [len(ready) * i // num_parts for i in range(num_parts + 1)] if ready else [0]
        parts = [list(ready[a:b]) for a, b in pairwise(bounds)]
        if self._exchange and any(len(part) == 1 for part in parts):
            raise fail(
                "RM508",
                "shuffled-latents needs the messages of another record of the batch, and there is "
                "only one",
                hint="Ask at least two questions; an odd number needs a build.max_batch of 3.",
            )
        return parts

    def _answer(
        self, part: Sequence[_Ready], settings: SamplingPlan, trace: Trace | None
    ) -> list[tuple[int, Answer | RecmasError]]:
        """Run a batch; a record that fails leaves it, and the others run again.

        Where it is not known whose failure it is, or memory runs out, the batch runs in two halves.
        """
        failure: RecmasError
        # Before the handlers: a run that must not begin is nobody's failure.
        with self._loaded.lock.held():
            try:
                answers = self._batch(part, settings, trace).run()
                return [(ready.index, answer) for ready, answer in zip(part, answers, strict=True)]
            except RecordError as error:
                failure, failed = error, [part[error.record]]
                parts = [[*part[: error.record], *part[error.record + 1 :]]]
            except (RecmasError, MemoryError) as error:
                if isinstance(error, MemoryError | OutOfMemoryError):
                    # An error holds on to all that the batch has allocated.
                    failure = _without_memory(error)
                else:
                    failure = error
                middle = len(part) // 2
                # A record is never alone where messages are exchanged.
                whole = middle < (2 if self._exchange else 1)
                failed = list(part) if whole else []
                parts = [] if whole else [list(part[:middle]), list(part[middle:])]
        if isinstance(failure, OutOfMemoryError):
            self._release_memory()
        results: list[tuple[int, Answer | RecmasError]] = []
        results += ((ready.index, _of_record(failure, ready.record)) for ready in failed)
        for smaller in filter(None, parts):
            results += self._answer(smaller, settings, trace)
        return results

    def _release_memory(self) -> None:
        """Give back what engines keep for later batches."""
        with self._loaded.lock.held():
            for backbone in self._loaded.engines.backbones.values():
                backbone.drop_idle()

    def _batch(self, part: Sequence[_Ready], settings: SamplingPlan, trace: Trace | None) -> Batch:
        def prompt(b: int, agent: str, variant: Variant, texts: Mapping[str, str]) -> Prompt:
            try:
                return part[b].prompts.get(agent, variant, texts)
            except RecmasError as error:
                raise RecordError(b, error) from error

        execution = Execution(
            plan=self.plan,
            engines=self._loaded.engines,
            seeds=[settings.seed + ready.record.index for ready in part],
            sampling=settings,
            prompts=prompt,
            exchange=self._exchange,
            tools=self._tools,
            keeps_thoughts=reads_thoughts(trace),
        )
        return Batch(execution, [ready.record for ready in part], trace)

    def _settings(self, sampling: SamplingPlan | None, over: SamplingSettings) -> SamplingPlan:
        assert self._loaded, "raises where the system was closed"
        settings = self.plan.sampling if sampling is None else sampling
        if not isinstance(settings, SamplingPlan):
            kind = type(settings).__name__
            hint = "Give a SamplingPlan, or single settings by their names."
            raise fail("RM505", f"sampling is of the type {kind}", hint=hint)
        settings = structs.replace(settings, **over)
        check_sampling(settings)
        backbone = self.plan.agents[self.plan.answer_agent].backbone
        room = self.manifest.backbones[backbone].max_positions - self.plan.limits.max_prompt_tokens
        if settings.max_new_tokens > max(room, self.plan.sampling.max_new_tokens):
            raise fail(
                "RM505",
                f"max_new_tokens is {settings.max_new_tokens}",
                hint=f"After the longest prompt, backbone {backbone!r} has room for {room}.",
            )
        return settings


def _without_memory(error: OutOfMemoryError | MemoryError) -> OutOfMemoryError:
    """Return the error of a run whose memory ran out, without what led to it."""
    if isinstance(error, RecmasError):
        return OutOfMemoryError.of(error.problems)
    return OutOfMemoryError("the caches and inputs of a batch do not fit")


def _of_record(failure: RecmasError, record: Record) -> RecmasError:
    """Return an engine's failure as that of a record."""
    if isinstance(failure, RecordError):
        return failure
    named = RecmasError(
        replace(problem, message=f"record {record.id!r}: {problem.message}")
        for problem in failure.problems
    )
    named.__cause__ = failure
    return named


def check_batch(batch: int, plan: Plan) -> None:
    """Raise RM506 for a batch that is more than a bundle takes."""
    if not 1 <= batch <= plan.limits.max_batch:
        raise fail(
            "RM506",
            f"--batch {batch}, the bundle takes 1 to {plan.limits.max_batch}",
            hint="Choose a smaller batch, or build with a larger build.max_batch.",
        )


@dataclass(frozen=True)
class _Ready:
    """A record that can run, and its place in the input."""

    index: int
    record: Record
    prompts: RecordPrompts


def _check_arguments(
    threads: object, functions: Mapping[str, Function] | None, ask: Function | None
) -> None:
    """Refuse arguments of `load` that would fail later, or be passed over."""
    if threads is not None and (
        not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS
    ):
        hint = f"Give a whole number from 1 to {MAX_THREADS}, or None."
        raise fail("RM506", f"threads is {threads!r}", hint=hint)
    if functions is not None and not isinstance(functions, Mapping):
        hint = "Give a mapping of names to functions."
        raise fail("RM506", f"functions is of the type {type(functions).__name__}", hint=hint)
    tools = {f"the function {name!r}": function for name, function in (functions or {}).items()}
    for what, function in {**tools, "ask": ask}.items():
        if function is not None and not callable(function):
            hint = "Give a function from a text to a text."
            kind = type(function).__name__
            raise fail("RM506", f"{what} is of the type {kind}, which cannot be called", hint=hint)


def _given_day(text: str) -> datetime.date:
    try:
        return parse_day(text)
    except ValueError as error:
        hint = "Write it as 2026-01-31."
        raise fail("RM506", f"{text!r} is no day as YYYY-MM-DD", hint=hint) from error


def _day_of(plan: Plan) -> datetime.date | None:
    try:
        return plan.day
    except ValueError as error:
        raise malformed(PLAN_NAME, f"the date is none: {error}") from error


def load_parts(
    bundle: Bundle, opened: OpenedEngines, *, day: datetime.date | None = None
) -> LoadedBundle:
    """Load what systems of a bundle share, around open engines; RM40x for files that are wrong.

    Args:
        day: For chat templates that write the date; None for that of the bundle, or else today.
    """
    manifest = bundle.manifest
    day = day or _day_of(bundle.plan) or datetime.date.today()
    chats, decoder_settings = {}, {}
    for name, entry in manifest.backbones.items():
        template = read_template(bundle.file(entry.chat_template), file=entry.chat_template)
        chats[name] = Chat.load(
            bundle.file(entry.tokenizer), template, entry.special_tokens, day=day
        )
        decoder_settings[name] = DecoderSettings(
            tokenizer=chats[name].tokenizer,
            eos_token_ids=frozenset(entry.eos_token_ids),
            max_positions=entry.max_positions,
            num_rows=entry.vocab_size,
        )
    engines = Engines(
        backbones=opened.backbones,
        link=opened.link,
        operands=read_operands(bundle.file, manifest.links),
        decoder_settings=decoder_settings,
    )
    return LoadedBundle(
        manifest=manifest,
        day=day,
        device=opened.device,
        problems=opened.problems,
        engines=engines,
        chats=chats,
    )
