"""Textual gradient descent over the prompts of a text system."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recmas_compiler.evaluation.checks import make_check
from recmas_compiler.evaluation.data.data_file import Question, load_data
from recmas_compiler.evaluation.data.protocol import load_protocol
from recmas_compiler.evaluation.evaluate import AnswerOpening
from recmas_compiler.evaluation.identity import made_folder, prompt_digest
from recmas_compiler.evaluation.runner import Job, sampling_of
from recmas_compiler.spec.spec import parse_spec
from recmas_compiler.text_gradients.forward import Asker, Written
from recmas_compiler.text_gradients.package import import_textgrad
from recmas_compiler.text_gradients.prompts import (
    Parameter,
    has_relative_paths,
    keeps_marks,
    marks_text,
    parameters_of,
    spec_with_texts,
    with_texts,
)
from recmas_compiler.text_gradients.result import (
    LinkCost,
    Proposal,
    Spent,
    StepReport,
    TextGradients,
)
from recmas_compiler.text_gradients.settings import BASELINE, TextGradSettings
from recmas_compiler.text_gradients.state import State, load_state, save_state
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import exclusive, write_whole
from recmas_runtime.core.progress import Progress
from recmas_runtime.core.text import counted
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.manifest import SPEC_NAME
from recmas_runtime.running.baselines import apply_baseline
from recmas_runtime.running.system import System, load

if TYPE_CHECKING:
    from recmas_compiler.text_gradients.engines import CountingEngine

# What the optimiser is held to, in each request for a new text.
_CONSTRAINTS: Final = {
    "instructions": "The text has no curly braces; the question and what other agents wrote are "
    "put before or after it.",
    "prompt": "The text has each of these places once, letter for letter, for a program fills "
    "them: {marks}.",
}
_WRONG: Final = (
    "Here is an answer that a team of agents gave to a question. The question was:\n{question}\n\n"
    "The right answer is: {target}. The answer below was judged wrong{because}. Say briefly what "
    "is wrong with it, and what would have led to the right answer."
)


@dataclass(frozen=True, kw_only=True)
class OptimiseOptions:
    """What to optimise, and how.

    Attributes:
        bundle: The latent system; its `text` baseline is what learns.
        protocol: How records are asked and judged.
        overrides: `KEY=VALUE` of the protocol.
        test_data: Records that will be asked afterwards, of which none may be learned from.
        folder: Gets `state.json`, `spec.yaml` and nothing else.
        device: `auto`, `cpu`, `cuda` or `tensorrt`.
        threads: None for the physical cores.
    """

    bundle: Path
    protocol: str
    settings: TextGradSettings
    folder: Path
    test_data: Path | None = None
    overrides: tuple[str, ...] = ()
    resume: bool = False
    device: str = "auto"
    threads: int | None = None


def optimise(options: OptimiseOptions, *, progress: Progress) -> TextGradients:
    """Optimise the prompts of a bundle's text system by textual gradients.

    Each step asks the text system `batch` training records. Every wrong answer gets a textual loss,
    which goes back through the texts of all agents to their prompts; then the optimiser writes a
    new text for each prompt. A text that breaks its prompt is rejected, and a step after which
    fewer validation records are right is taken back; both are counted. The state is written after
    each step. An interrupt ends the run with what the whole steps gave.

    Raises:
        RecmasError: RM201 without the package, RM302 and RM603 for a folder with another run, RM507
            and RM501 for an engine that fails, and what bundles, protocols and data raise.
    """
    import_textgrad()
    settings = options.settings
    bundle = open_bundle(options.bundle, verify_hashes=False)
    baseline = settings.text_baseline
    apply_baseline(bundle.plan, baseline, bundle.manifest)
    parameters = parameters_of(bundle.plan, rewrites=settings.rewrites)
    number = None if settings.records is None else settings.records + settings.validation
    protocol = load_protocol(
        options.protocol,
        overrides=(*options.overrides, f"n={'null' if number is None else number}"),
    )
    data = load_data(settings.data, protocol, shown=bundle.plan.fields)
    num_training = len(data.questions) - settings.validation
    if num_training < (settings.records or 1):
        raise fail(
            "RM506",
            f"--textgrad records and validation ask for {number or settings.validation + 1} "
            f"records, there are {len(data.questions)}",
            file=str(settings.data),
            hint="Lower one of them, or give more data.",
        )
    if options.test_data is not None:
        tested = load_protocol(options.protocol, overrides=options.overrides)
        test = load_data(options.test_data, tested, shown=bundle.plan.fields)
        _refuse_shared(data.questions, test.questions, settings.data)
    identity = {
        **settings.identity(),
        "protocol": protocol.digest(),
        "data": data.digest,
        "bundle": bundle.manifest.fingerprint,
        "prompts": prompt_digest(bundle.plan),
        "package": f"{BASELINE} {version(BASELINE)}",
    }
    links = {} if settings.training is None else _link_costs(settings.training)
    made_folder(options.folder)
    with (
        make_check(protocol.check) as check,
        exclusive(options.folder, code="RM503", what="run of textgrad"),
        load(options.bundle, device=options.device, threads=options.threads) as base,
    ):
        found = load_state(options.folder, identity, resume=options.resume)
        start = {one.name: one.text for one in parameters}
        run = _Run(
            options=options,
            base=base,
            parameters=parameters,
            asker=Asker(
                check=check,
                sampling=sampling_of(
                    Job(number=0, seed=protocol.seeds[0], rollout=0, questions=()),
                    protocol,
                    bundle.plan.sampling,
                ),
                opening=AnswerOpening.of(bundle).thinking,
            ),
            training=data.questions[:num_training],
            validation=data.questions[num_training:],
            spec_yaml=bundle.file(SPEC_NAME).read_text(encoding="utf-8"),
            identity=identity,
            state=found or State(texts=start),
        )
        stopped = run.go(progress)
        state = run.state
        spec_file = options.folder / SPEC_NAME if state.steps else None
        return TextGradients(
            start=start,
            texts=state.texts,
            baseline=baseline,
            rewrites=settings.rewrites,
            start_validation=state.start_validation,
            validation=state.validation,
            num_records=num_training,
            num_validation=settings.validation,
            steps=state.steps,
            spent=state.spent,
            engine=f"the backbone {run.engine.model_string!r}"
            if settings.url is None
            else f"{settings.model} at {settings.url}",
            stopped=stopped,
            spec_file=spec_file,
            has_relative_paths=run.has_relative_paths,
            links=links,
        )


def _link_costs(folder: Path) -> dict[str, LinkCost]:
    """Return what the loops of a training took, by their folders' names.

    Raises:
        RecmasError: RM506 if there is none.
    """
    from recmas_compiler.training.loop.metrics import COST_NAME, read_cost  # imports torch

    try:
        found = {
            str(path.parent.relative_to(folder)): read_cost(path.parent)
            for path in sorted(folder.glob(f"**/{COST_NAME}"))
        }
    except (OSError, ValueError, TypeError) as error:
        raise _no_training(folder) from error
    if not found:
        raise _no_training(folder)
    return {
        name: LinkCost(
            trainable_parameters=cost.trainable_parameters,
            steps=cost.steps,
            seconds=cost.total_seconds,
            tokens=cost.tokens_per_step * cost.steps,
        )
        for name, cost in found.items()
    }


def _no_training(folder: Path) -> RecmasError:
    return fail(
        "RM506",
        "--textgrad training names no folder of a training: there is no cost that can be read",
        file=str(folder),
        hint="Give the --out of `recmasc train`.",
    )


def _refuse_shared(learned: Sequence[Question], tested: Sequence[Question], file: Path) -> None:
    """Refuse to learn from what is tested on: prompts could hold its answers."""
    asked = {_asked(question) for question in tested}
    shared = next((one for one in learned if _asked(one) in asked), None)
    if shared is not None:
        raise fail(
            "RM506",
            f"--textgrad data has record {shared.record.id!r}, which is tested on",
            file=str(file),
            line=shared.line,
            hint="Give records that --data does not ask, such as the training part of the set.",
        )


def _asked(question: Question) -> str:
    """Return what a record shows, to be compared."""
    fields = {name: value for name, value in question.record.fields.items() if name != "id"}
    return json.dumps(fields, sort_keys=True, default=str)


class _Run:
    """A run under way."""

    def __init__(
        self,
        *,
        options: OptimiseOptions,
        base: System,
        parameters: Sequence[Parameter],
        asker: Asker,
        training: Sequence[Question],
        validation: Sequence[Question],
        spec_yaml: str,
        identity: dict[str, Any],
        state: State,
    ) -> None:
        from recmas_compiler.text_gradients.engines import open_engine

        self.state = state
        self.engine: CountingEngine = open_engine(options.settings, base)
        self._options = options
        self._settings = options.settings
        self._base = base
        self._parameters = parameters
        self._asker = asker
        self._training = training
        self._validation = validation
        self._spec_yaml = spec_yaml
        self._identity = identity

    @property
    def has_relative_paths(self) -> bool:
        """Whether the spec names files from where it stands."""
        return has_relative_paths(self._spec_yaml)

    def go(self, progress: Progress) -> str:
        """Make the steps that are left; returns why it stopped."""
        settings = self._settings
        done = len(self.state.steps)
        try:
            with progress.stage("textual gradients", settings.steps, done=done) as advance:
                if self._validation and self.state.start_validation is None:
                    self._measure_start()
                while len(self.state.steps) < settings.steps:
                    spent = self.state.spent
                    if spent.tokens >= settings.max_tokens:
                        return "tokens"
                    if spent.seconds >= settings.max_seconds:
                        return "seconds"
                    self._step(len(self.state.steps))
                    advance(1, note=self._note())
                return "steps"
        except KeyboardInterrupt:
            return "interrupted"

    def _note(self) -> str:
        step = self.state.steps[-1]
        kept = sum(one.fate == "kept" for one in step.proposals)
        return f"{step.num_wrong} of {len(step.records)} wrong, {counted(kept, 'new text')}"

    def _measure_start(self) -> None:
        began = time.perf_counter()
        share, tokens = self._share_right(self.state.texts)
        self.state = replace(
            self.state,
            start_validation=share,
            validation=share,
            other_spent=Spent(forward_tokens=tokens, seconds=time.perf_counter() - began),
        )
        save_state(self._options.folder, self.state, self._identity)

    def _step(self, number: int) -> None:
        """Make one step and write the state behind it."""
        began = time.perf_counter()
        engine = self.engine
        calls, backward, untold = engine.num_calls, engine.num_tokens, engine.num_untold
        questions = self._batch(number)
        texts = dict(self.state.texts)
        runs = self._asker.ask(self._system(texts), questions)
        forward = sum(run.num_tokens for run in runs)
        wrong = [
            (question, run)
            for question, run in zip(questions, runs, strict=True)
            if run.answer is not None and not run.verdict.correct
        ]
        num_cut, proposals = self._proposals(wrong, texts) if wrong else (0, [])
        share, validation = None, self.state.validation
        if any(one.fate == "kept" for one in proposals):
            for one in proposals:
                if one.fate == "kept":
                    texts[one.parameter] = one.text
            if self._validation:
                share, tokens = self._share_right(texts)
                forward += tokens
                if validation is not None and share < validation:
                    proposals = [
                        replace(one, fate="taken back") if one.fate == "kept" else one
                        for one in proposals
                    ]
                    texts = dict(self.state.texts)
                else:
                    validation = share
        report = StepReport(
            number=number + 1,
            records=tuple(str(question.record.id) for question in questions),
            num_wrong=len(wrong),
            num_failed=sum(run.answer is None for run in runs),
            num_cut=num_cut,
            proposals=tuple(proposals),
            validation=share,
            spent=Spent(
                forward_tokens=forward,
                backward_tokens=engine.num_tokens - backward,
                calls=engine.num_calls - calls,
                untold_calls=engine.num_untold - untold,
                seconds=time.perf_counter() - began,
            ),
        )
        state = replace(
            self.state, texts=texts, steps=(*self.state.steps, report), validation=validation
        )
        self._write_spec(texts)
        save_state(self._options.folder, state, self._identity)
        self.state = state

    def _batch(self, number: int) -> list[Question]:
        """Return the records of a step: the training part in its order, again and again."""
        size = self._settings.batch
        count = len(self._training)
        return [self._training[i % count] for i in range(number * size, number * size + size)]

    def _system(self, texts: dict[str, str]) -> System:
        plan = with_texts(self._base.plan, texts, rewrites=self._settings.rewrites)
        return self._base.with_plan(plan).baseline(self._settings.text_baseline)

    def _share_right(self, texts: Any) -> tuple[float, int]:
        """Return the share of validation records that are right, and the tokens it took."""
        runs = self._asker.ask(self._system(dict(texts)), self._validation)
        right = sum(run.verdict.correct for run in runs)
        return right / len(runs), sum(run.num_tokens for run in runs)

    def _proposals(
        self, wrong: Sequence[tuple[Question, Written]], texts: dict[str, str]
    ) -> tuple[int, list[Proposal]]:
        """Return what the optimiser wrote for every parameter that has gradients.

        The first number is that of the records whose gradients the engine could not all write.
        """
        from textgrad import TextLoss

        from recmas_compiler.text_gradients.graph import parameter_variables, record_graph

        plan = self._system(texts).plan
        parameters = [replace(one, text=texts[one.name]) for one in self._parameters]
        variables = parameter_variables(parameters, plan)
        num_cut = 0
        for question, run in wrong:
            answer = record_graph(
                plan, run, engine=self.engine, parameters=parameters, variables=variables
            )
            loss = TextLoss(_loss_prompt(question, run), engine=self.engine)
            try:
                loss(answer).backward(engine=self.engine)
            except RecmasError as error:
                if error.problems[0].code != "RM501":
                    raise
                num_cut += 1  # what of its graph has been gone through keeps its gradients
        proposals = []
        together = dict(texts)  # prompts that fit one by one may be too long together
        for parameter in parameters:
            if variables[parameter.name].gradients:
                proposal = self._proposal(parameter, variables[parameter.name], together)
                proposals.append(proposal)
                if proposal.fate == "kept":
                    together[parameter.name] = proposal.text
        return num_cut, proposals

    def _proposal(self, parameter: Parameter, variable: Any, texts: dict[str, str]) -> Proposal:
        """Have a new text written for a parameter and look at it; `kept` is yet to be measured.

        Args:
            texts: Of all parameters, those that this step has replaced before included.
        """
        from textgrad import TextualGradientDescent

        optimiser = TextualGradientDescent(
            parameters=[variable], engine=self.engine, constraints=[self._constraint(parameter)]
        )
        try:
            optimiser.step()
            text, has_tags = variable.value.strip(), True
        except IndexError:  # textgrad's own sign of a reply without tags
            text, has_tags = self.engine.last_reply.strip(), False
        except RecmasError as error:
            if error.problems[0].code != "RM501":
                raise
            why = error.problems[0].message
            return Proposal(parameter=parameter.name, fate="engine", text="", why=why)
        proposed = Proposal(parameter=parameter.name, fate="kept", text=text, has_tags=has_tags)
        if not has_tags and self._settings.untagged == "reject":
            return replace(proposed, fate="no tags")
        if not text:
            return replace(proposed, fate="empty")
        if text == parameter.text:
            return replace(proposed, fate="unchanged")
        if not keeps_marks(parameter.text, text):
            return replace(proposed, fate="fields")
        return self._tried({**texts, parameter.name: text}, proposed)

    def _tried(self, texts: dict[str, str], proposed: Proposal) -> Proposal:
        """Check the spec with a text, and all records' prompts."""
        try:
            parse_spec(self._spec_text(texts))
        except RecmasError as error:
            return replace(proposed, fate="spec", why=error.problems[0].message)
        plan = with_texts(self._base.plan, texts, rewrites=self._settings.rewrites)
        latent = self._base.with_plan(plan)
        for question in (*self._training, *self._validation):
            try:
                latent.prompts(question.record)
            except RecmasError as error:
                if self._fits(question):
                    return replace(proposed, fate="too long", why=error.problems[0].message)
        return proposed

    def _fits(self, question: Question) -> bool:
        """Tell whether a record could be asked with the prompts that the bundle was built with."""
        try:
            self._base.prompts(question.record)
        except RecmasError:
            return False
        return True

    def _constraint(self, parameter: Parameter) -> str:
        return _CONSTRAINTS[self._settings.rewrites].format(marks=marks_text(parameter.text))

    def _spec_text(self, texts: dict[str, str]) -> str:
        return spec_with_texts(
            self._spec_yaml, self._base.plan, texts, rewrites=self._settings.rewrites
        )

    def _write_spec(self, texts: dict[str, str]) -> None:
        path = self._options.folder / SPEC_NAME
        try:
            write_whole(path, self._spec_text(texts))
        except OSError as error:
            raise fail(
                "RM503",
                f"the spec cannot be written: {error.strerror}",
                file=str(path),
                hint="Make room or choose another --out.",
            ) from error


def _loss_prompt(question: Question, run: Written) -> str:
    """Return what the loss of a wrong answer asks for."""
    target = question.gold.get("answer")
    taken = run.verdict.extracted
    return _WRONG.format(
        question=question.record.fields.get("question"),
        target="one that passes its tests" if target is None else target,
        because="" if taken is None else f": it was read as {taken!r}",
    )
