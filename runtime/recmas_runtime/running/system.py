"""A loaded system: records in, answers out, in batches that run together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, Unpack, overload

from recmas_runtime.cache.settings import user_store
from recmas_runtime.core.errors import Problem, RecmasError, RecordError, fail
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.core.text import counted
from recmas_runtime.engines.interface import FREE_MEMORY, Floats, OutOfMemoryError
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.plan import Plan, SamplingPlan, Variant
from recmas_runtime.prompts.render import Chat, Prompt, PromptSource
from recmas_runtime.prompts.sampler import SamplingSettings, chosen_sampling
from recmas_runtime.prompts.tool_turns import PLAIN_RESULTS, answer_chat, result_form
from recmas_runtime.running.baselines import apply_baseline, with_rounds
from recmas_runtime.running.batch import AnswerStream, Batch, Ready, records_of, run_or_split
from recmas_runtime.running.controls import (
    MEAN,
    SEED,
    SHUFFLED,
    ControlledSet,
    MeanMessages,
    exchange,
    sender_inputs,
)
from recmas_runtime.running.executor import Execution, StepListener
from recmas_runtime.running.generation import AnswerTools
from recmas_runtime.running.many import Run, run_many
from recmas_runtime.running.open_engines import (
    Function,
    LoadedBundle,
    check_arguments,
    given_day,
    load_bundle,
    open_remotes,
    open_toolbox,
)
from recmas_runtime.running.record_prompts import RecordPrompts, named_failure
from recmas_runtime.running.records import (
    Answer,
    Question,
    Record,
    as_record,
    check_question,
    is_one,
)
from recmas_runtime.running.run_trace import Trace, reads_thoughts
from recmas_runtime.running.scoring import CandidateReader, ReadToken, Scores, read_text
from recmas_runtime.scheduling.limits import CHUNK, KEPT_BYTES
from recmas_runtime.scheduling.scheduler import Scheduler, current_task

if TYPE_CHECKING:
    from recmas_runtime.tools.toolbox import Toolbox

Result = TypeVar("Result")


def load(
    path: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    functions: Mapping[str, Function] | None = None,
    ask: Function | None = None,
    date: str | None = None,
    cache: bool = True,
) -> System:
    """Open a bundle and its engines.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `tensorrt`; or `BACKBONE=DEVICE`, or several with
            commas between. `auto` takes what the bundle says of a backbone, else TensorRT where the
            bundle has engines for this machine, then CUDA; `problems` say why it takes another.
        threads: Threads within an operator; None takes the physical cores.
        functions: Tools of the caller, by the names that the spec declares; each maps the text of
            a call to the text of its result.
        ask: Puts a question of the model to a human and returns the reply; None if nobody is there.
        date: `YYYY-MM-DD` for chat templates that write the date; None for the bundle's, or else
            today, which then stays for this system.
        cache: Keep packed weights in the user's cache, and take them from there.

    Raises:
        RecmasError: RM305 for a cache that cannot be one, RM40x for a bundle that is not whole,
            RM504 for a device that is not there, RM506 for a date that is none, threads out of
            bounds, and tools that nobody can call; RM560 where the key of a remote model is not in
            its environment variable.
    """
    check_arguments(threads, functions, ask)
    day = None if date is None else given_day(date)
    bundle = open_bundle(Path(path), verify_hashes=False)
    toolbox = open_toolbox(bundle, functions, ask)
    try:
        models = open_remotes(bundle)  # before anything takes long
        loaded = load_bundle(
            bundle,
            device=device,
            threads=threads,
            models=models,
            day=day,
            store=user_store() if cache else None,
        )
        return System(bundle.plan, loaded, toolbox)
    except MemoryError:
        raise OutOfMemoryError("the bundle cannot be loaded", FREE_MEMORY) from None


class System:
    """A multi-agent system, ready to answer. One caller at a time runs; others wait.

    It may be used in a `with` statement, which closes it. With a `control` the answer agent sees
    messages that are not the record's own; see `baseline` and `over`, whose set is `covered`.
    """

    def __init__(
        self,
        plan: Plan,
        loaded: LoadedBundle,
        toolbox: Toolbox | None = None,
        *,
        control: str | None = None,
        covered: ControlledSet | None = None,
    ) -> None:
        self.plan = plan
        self.manifest = loaded.manifest
        self.device = loaded.device
        self._open: LoadedBundle | None = loaded
        self._toolbox = toolbox
        agent = plan.agents[plan.answer_agent]
        is_local = agent.backbone in loaded.chats
        self._chat = answer_chat(loaded.chats, agent, plan.tools) if is_local else None
        self._tools = None if toolbox is None else self._answer_tools(toolbox)
        self._control = control
        self.covered = covered

    @property
    def loaded(self) -> LoadedBundle:
        """What this system shares with others on its engines; RM522 if it was closed."""
        if self._open is None:
            raise fail("RM522", "this system was closed", hint="Load the bundle again.")
        return self._open

    def __repr__(self) -> str:
        agents = counted(len(self.plan.agents), "agent")
        rounds = counted(self.plan.rounds, "round")
        state = "closed" if self._open is None else f"on {self.device}"
        return f"<System {self.plan.name!r}: {agents}, {rounds}, {state}>"

    @property
    def _answer_chat(self) -> Chat:
        if self._chat is None:
            raise self.loaded.no_weights(self.plan.answer_agent, self.plan)
        return self._chat

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
        """Warnings about the engines so far: those of the bundle's that are not used, and why."""
        return tuple(self.loaded.problems)

    @property
    def date(self) -> str:
        """The day that chat templates get which write it, as `YYYY-MM-DD`."""
        return self.loaded.day.isoformat()

    def baseline(self, name: str) -> System:
        """Return an alternative to this system on the same engines; `latent` is the system itself.

        It has the same prompts, sampler and token accounting; only what agents hand over differs.
        Names are those of `running.baselines.BASELINES`; `text@N` and `moa@N` end hand-over texts
        after N tokens.

        Raises:
            RecmasError: RM508 for a name that is none, or that this system has no use for.
        """
        baseline = apply_baseline(self.plan, name, self.manifest)
        return System(baseline.plan, self.loaded, self._toolbox, control=baseline.control)

    def with_rounds(self, rounds: int) -> System:
        """Return a system that runs fewer rounds on the same engines.

        Raises:
            RecmasError: RM506 for more rounds than were built, or less than one.
        """
        return self.with_plan(with_rounds(self.plan, rounds))

    def over(
        self,
        records: Sequence[Question],
        *,
        answers: Sequence[Collection[str]] | None = None,
        seed: int = SEED,
    ) -> System:
        """Return the baseline `shuffled` or `mean` over a whole set; other systems as they are.

        Without it, a set is what one call of `run` or `run_batch` is given. Records that cannot run
        are no part of it. For `mean` the other agents run once for every record.

        Args:
            answers: By record the texts that count as right, to shuffle between other answers.
            seed: Of the permutation.

        Raises:
            RecmasError: RM508 if there are no two records with different answers.
        """
        if self._control is None:
            return self
        places, ready = [], []
        for place, question in enumerate(records):
            try:
                record = as_record(question, place)
                ready.append(Ready(place, record, self.prompts(record)))
            except (RecmasError, MemoryError):
                continue
            places.append(place)
        chosen = records_of(ready)
        is_mean = self._control == MEAN
        found = exchange(
            [() if answers is None or is_mean else answers[place] for place in places],
            [sender_inputs(self.plan, record.fields) for record in chosen],
            seed=seed,
        )
        mean = self._mean_of(ready) if is_mean else None
        return System(
            self.plan,
            self.loaded,
            self._toolbox,
            control=self._control,
            covered=ControlledSet.of(chosen, found, mean),
        )

    def _mean_of(self, ready: Sequence[Ready]) -> MeanMessages:
        """Run the other agents for all records; returns the sums of what they send."""
        mean = MeanMessages()

        def received(part: Sequence[Ready]) -> list[dict[str, Floats]]:
            execution = self._execution(part, self.plan.sampling)
            execution.run_rounds()
            return execution.received()

        for part in self._parts(ready):
            for _, messages in self._run(part, received):
                if not isinstance(messages, RecmasError):
                    mean.add(messages)
        return mean

    def with_plan(self, plan: Plan) -> System:
        """Return a system that runs another plan, which fits the manifest, on the same engines."""
        return System(plan, self.loaded, self._toolbox, control=self._control)

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
        if self._control is not None and self.covered is None:
            system = self.over(records)
            return system.run_batch(records, sampling=chosen, trace=trace, progress=progress)

        def answers(part: Sequence[Ready]) -> list[Answer]:
            return Batch(self._execution(part, chosen, trace), records_of(part), trace).run()

        return self._run_all([(record, None) for record in records], answers, "answering", progress)

    def answer_all(
        self,
        records: Iterable[Question],
        *,
        at_once: int | None = None,
        sampling: SamplingPlan | None = None,
        trace: Trace | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> Iterator[Answer | RecmasError]:
        """Answer records as there is room for them; yields for each, in order, what came of it.

        On the CPU every record runs by itself and shares engine calls with the others, so that none
        waits for a longer one. Its times are its share of theirs, and its batch is 1. On other
        devices records run in batches as they come, see `run_batch`.

        Args:
            records: Are taken one by one.
            at_once: How many may run at a time; None for the bundle's `max_batch`.

        Raises:
            RecmasError: RM505 for settings that concern all records.
        """
        chosen = self._settings(sampling, settings)
        most = self.plan.limits.max_batch if at_once is None else at_once
        if self._control is not None and self.covered is None:
            records = list(records)
            yield from self.over(records).answer_all(
                records, at_once=at_once, sampling=chosen, trace=trace
            )
        elif not self.loaded.can_share:
            left = enumerate(records)
            while part := [as_record(question, index) for index, question in islice(left, most)]:
                yield from self.run_batch(part, sampling=chosen, trace=trace)
        else:
            scheduler = Scheduler()
            shared = self.shared(scheduler)
            runs = (shared.run_of(question, i, chosen, trace) for i, question in enumerate(records))
            yield from run_many(
                runs,
                scheduler,
                lock=self.loaded.lock,
                at_once=most,
                free_memory=self._release_memory,
            )

    def shared(
        self, scheduler: Scheduler, *, chunk: int = CHUNK, kept_bytes: int = KEPT_BYTES
    ) -> System:
        """Return this system for the runs of a scheduler; see `LoadedBundle.shared`."""
        loaded = self.loaded.shared(scheduler, chunk=chunk, kept_bytes=kept_bytes)
        return System(self.plan, loaded, self._toolbox, control=self._control, covered=self.covered)

    def run_of(
        self, question: Question, index: int, sampling: SamplingPlan, trace: Trace | None
    ) -> Run | RecmasError:
        """Return what answers one record, or why it cannot be."""
        try:
            ready = self._ready(question, index)
        except RecmasError as error:
            return error

        def run() -> Answer:
            execution = self._execution([ready], sampling, trace)
            task = current_task()
            if task is not None:
                execution.clock = task.clock
            try:
                (answer,) = Batch(execution, [ready.record], trace).run()
            except RecmasError as error:
                raise named_failure(error, ready.record) from error
            return answer

        return run

    def _ready(self, question: Question, index: int) -> Ready:
        """Return a record that can run, with its prompts; its error if it cannot."""
        record = as_record(question, index)
        try:
            return Ready(index, record, self._prompts_of(question, record), self._sender(record))
        except MemoryError:
            what = f"record {record.id!r} is too long"
            raise OutOfMemoryError(what, "Shorten the record.") from None

    def score_batch(
        self,
        records: Sequence[Question],
        candidates: Sequence[Sequence[str]],
        *,
        verbatim: bool = False,
        progress: Progress | None = None,
    ) -> list[Scores | RecmasError]:
        """Return for each record how likely its candidates are as answers, or why that is unknown.

        The other agents run once for a record, and every candidate is read behind the answer
        agent's prompt. Batches and controls are those of `run_batch`.

        Args:
            candidates: By record, texts that could be the answer.
            verbatim: Leave the white space around them as it is; without it they are read as the
                answer agent would begin its answer, see `scoring.read_candidates`.
        """
        if self._control is not None and self.covered is None:
            over = self.over(records)
            return over.score_batch(records, candidates, verbatim=verbatim, progress=progress)

        def scores(part: Sequence[Ready]) -> list[Scores]:
            batch = Batch(self._execution(part, self.plan.sampling), records_of(part), None)
            return batch.score([ready.candidates for ready in part])

        asked: list[tuple[Question, Sequence[str] | None]] = [
            *zip(records, candidates, strict=True)
        ]
        return self._run_all(asked, scores, "scoring", progress, verbatim=verbatim)

    def read_text(self, text: str | Sequence[int], *, top: int = 0) -> list[ReadToken]:
        """Have the answer agent's backbone alone read a text; for the rest see `scoring`."""
        agent = self.plan.agents[self.plan.answer_agent]
        with self.loaded.lock.held():
            return read_text(self.loaded.engines, agent, self._answer_chat.tokenizer, text, top=top)

    def _run_all(
        self,
        asked: Sequence[tuple[Question, Sequence[str] | None]],
        run: Callable[[Sequence[Ready]], list[Result]],
        title: str,
        progress: Progress | None,
        *,
        verbatim: bool = False,
    ) -> list[Result | RecmasError]:
        """Run records, each with its candidates, in batches; those that cannot run say why."""
        results: list[Result | RecmasError | None] = [None] * len(asked)
        ready: list[Ready] = []
        for index, (question, candidates) in enumerate(asked):
            try:
                one = self._ready(question, index)
                if candidates is not None:
                    tokenizer = self._answer_chat.tokenizer
                    read = CandidateReader(self.plan, self.manifest, tokenizer, verbatim)
                    one = replace(one, candidates=read(candidates, one.prompts, one.record))
                ready.append(one)
            except RecmasError as error:
                results[index] = error
        with (progress or Silent()).stage(title, len(asked)) as advance:
            advance(len(asked) - len(ready))
            for part in self._parts(ready):
                for index, result in self._run(part, run):
                    results[index] = result
                advance(len(part))
        return [result for result in results if result is not None]

    def _sender(self, record: Record) -> RecordPrompts | None:
        """Return the prompts of the record whose messages this one gets; None for its own."""
        if self._control is None:
            return None
        assert self.covered is not None, "a control is over a set"
        sender = self.covered.sender(record)
        return self.prompts(sender) if self._control == SHUFFLED else None

    def stream(
        self,
        question: Question,
        *,
        sampling: SamplingPlan | None = None,
        trace: Trace | None = None,
        on_step: StepListener | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> AnswerStream:
        """Answer one question, its text piece by piece; for the settings see `run`.

        Args:
            on_step: Is called before each step of the plan; what it raises ends the run.

        Raises:
            RecmasError: If the record cannot be answered.
        """
        chosen = self._settings(sampling, settings)
        record = as_record(question, 0)
        if self._control is not None and self.covered is None:
            over = self.over([record])
            return over.stream(question, sampling=chosen, trace=trace, on_step=on_step)
        ready = self._ready(question, 0)
        execution = self._execution([ready], chosen, trace)
        execution.on_step = on_step
        return AnswerStream(Batch(execution, [record], trace), self.loaded.lock)

    def _prompts_of(self, question: Question, record: Record) -> RecordPrompts:
        if isinstance(question, str):
            self.check_question(record)
        return self.prompts(record)

    @property
    def prompt_day(self) -> str | None:
        """The date that prompts show, as YYYY-MM-DD; None if no chat template writes one."""
        return self.loaded.prompt_day(self.plan)

    def check_question(self, record: Record) -> None:
        """Raise RM500 for a question that no prompt shows: it would be answered unread."""
        check_question(record, self.plan.fields)

    def prompts(self, record: Record) -> RecordPrompts:
        """Return every prompt of a record; RM500, RM501 or RM206 if one cannot be built."""
        return RecordPrompts(
            self.plan,
            self.loaded.chats,
            record,
            num_rows=self.manifest.num_rows,
            answer_chat=self._chat,
        )

    def _answer_tools(self, toolbox: Toolbox) -> AnswerTools:
        """Return the tools of answers; where the template writes them, with its form of results."""
        agent = self.plan.agents[self.plan.answer_agent]
        results = PLAIN_RESULTS
        if self._answer_chat is not self.loaded.chats[agent.backbone]:
            results = result_form(self._answer_chat.template, agent.chat_template)
        return AnswerTools(toolbox=toolbox, lock=self.loaded.lock, results=results)

    def _parts(self, ready: Sequence[Ready]) -> list[list[Ready]]:
        """Cut records into batches of about the same size."""
        num_parts = -(-len(ready) // self.plan.limits.max_batch)
        bounds = [len(ready) * i // num_parts for i in range(num_parts + 1)] if ready else [0]
        return [list(ready[a:b]) for a, b in pairwise(bounds)]

    def _run(
        self, part: Sequence[Ready], run: Callable[[Sequence[Ready]], list[Result]]
    ) -> list[tuple[int, Result | RecmasError]]:
        return run_or_split(part, run, lock=self.loaded.lock, free_memory=self._release_memory)

    def _release_memory(self) -> None:
        """Give back what engines keep for later batches."""
        with self.loaded.lock.held():
            for backbone in self.loaded.engines.backbones.values():
                backbone.drop_idle()

    def _execution(
        self, part: Sequence[Ready], settings: SamplingPlan, trace: Trace | None = None
    ) -> Execution:
        def prompts(of: Callable[[Ready], RecordPrompts]) -> PromptSource:
            def prompt(b: int, agent: str, variant: Variant, texts: Mapping[str, str]) -> Prompt:
                try:
                    return of(part[b]).get(agent, variant, texts)
                except RecmasError as error:
                    raise RecordError(b, error) from error

            return prompt

        return Execution(
            plan=self.plan,
            engines=self.loaded.engines,
            seeds=[settings.seed + ready.record.index for ready in part],
            sampling=settings,
            prompts=prompts(lambda ready: ready.sender or ready.prompts),
            answer_prompts=prompts(lambda ready: ready.prompts),
            mean=None if self.covered is None else self.covered.mean,
            tools=self._tools,
            keeps_thoughts=reads_thoughts(trace),
            replies=[ready.replies for ready in part],
        )

    def _settings(self, sampling: SamplingPlan | None, over: SamplingSettings) -> SamplingPlan:
        model = self.plan.agents[self.plan.answer_agent].backbone
        most = self.loaded.manifest.max_positions_of(model)
        return chosen_sampling(self.plan, most, sampling, over)
