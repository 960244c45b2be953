"""A system as harnesses see it: texts in, answers and log-likelihoods out, in the order asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import msgspec
from msgspec import structs

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.text import counted, listed
from recmas_runtime.formats.codec import StrictStruct
from recmas_runtime.formats.plan import Plan, ServePlan, field_place
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.prompts.render import DEFAULT_VARIABLES
from recmas_runtime.prompts.sampler import SamplingSettings
from recmas_runtime.running.baselines import LATENT
from recmas_runtime.running.controls import NULL
from recmas_runtime.running.records import Record
from recmas_runtime.running.system import System, load
from recmas_runtime.serve.conversation import to_record

# So many of the questions that cannot be asked are told one by one.
_MAX_PROBLEMS: Final = 5
_PROBE: Final = "recmas0context0probe"


class SystemArguments(StrictStruct, frozen=True, kw_only=True):
    """What users say of a system on the command line of a harness.

    Attributes:
        bundle: Its folder.
        baseline: `latent` is the system itself; see `running.baselines`.
        rounds: How many of the built rounds run; None for all.
        field: The field of a record that takes the question; None for what the bundle's `serve`
            says.
        answer: The field of a task's documents that holds the right answer: `shuffled` then takes
            messages of documents with another one.
    """

    bundle: str
    baseline: str = LATENT
    rounds: int | None = None
    field: str | None = None
    answer: str | None = None
    device: str = "auto"
    threads: int | None = None
    date: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return what a harness's command line says.

        Raises:
            RecmasError: RM506 for arguments that there are not, or of another type.
        """
        # Harnesses read numbers wherever something looks like one, and Inspect YAML's null.
        read = {**given, "bundle": str(given.get("bundle", ""))}
        if given.get("baseline", LATENT) is None:
            read["baseline"] = NULL
        try:
            return msgspec.convert(read, cls)
        except msgspec.ValidationError as error:
            raise fail(
                "RM506",
                f"model arguments: {error}",
                hint=f"They are {listed(cls.__struct_fields__)}.",
            ) from None


def changed(plan: ServePlan, field: str | None) -> ServePlan:
    """Return where a conversation goes, its last question into another field if one is named."""
    if field is None:
        return plan
    others = {name: part for name, part in plan.fields.items() if part != "last_user"}
    return structs.replace(plan, fields={**others, field: "last_user"})


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question of a task.

    Attributes:
        id: Names it in errors.
        turns: The conversation that it ends.
        document: What the task has it from. Its fields are those of the record that prompts show
            besides the question.
    """

    id: str
    turns: tuple[EarlierTurn, ...]
    document: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluatedSystem:
    """A loaded system, and how a harness's texts become its records."""

    system: System
    serve: ServePlan
    answer: str | None

    @classmethod
    def load(cls, given: SystemArguments) -> Self:
        """Open a bundle.

        Raises:
            RecmasError: As `running.system.load`; RM506 for rounds that were not built, RM508 for a
                baseline that this system has no use for.
        """
        system = load(given.bundle, device=given.device, threads=given.threads, date=given.date)
        try:
            if given.rounds is not None:
                system = system.with_rounds(given.rounds)
            system = system.baseline(given.baseline)
        except BaseException:
            system.close()
            raise
        serve = changed(system.plan.conversation, given.field)
        return cls(system=system, serve=serve, answer=given.answer)

    @property
    def continues_context(self) -> bool:
        """Whether the answer stands right behind the question, with no mark of a turn between."""
        return ends_with_question(self.system, self.serve)

    def records(self, asked: Sequence[Asked]) -> list[Record]:
        """Return the records of questions, each looked at: none fails later for what it says.

        Raises:
            RecmasError: RM500, RM501 or RM543, the first few of them.
        """
        records: list[Record] = []
        problems: list[Problem] = []
        num_wrong = 0
        for index, one in enumerate(asked):
            try:
                record = self._record(one, index)
                self.system.prompts(record)
                records.append(record)
            except RecmasError as error:
                num_wrong += 1
                problems += error.problems if num_wrong <= _MAX_PROBLEMS else ()
        if num_wrong > _MAX_PROBLEMS:
            message = f"{counted(num_wrong, 'question')} of {len(asked)} cannot be asked"
            problems.append(Problem(code="RM500", message=message, hint="The first are above."))
        if problems:
            raise RecmasError(problems)
        return records

    def over(self, records: Sequence[Record], asked: Sequence[Asked]) -> System:
        """Return the system; `shuffled` and `mean` over all these questions.

        Raises:
            RecmasError: RM500 for a document without the field of the right answer, RM508 for a
                control that these questions are too few or too much alike for.
        """
        answers = None if self.answer is None else [(self._right(one),) for one in asked]
        return self.system.over(records, answers=answers)

    def answers(
        self, asked: Sequence[Asked], settings: SamplingSettings, *, at_once: int
    ) -> Iterator[str]:
        """Answer questions, as many at a time; yields the texts in their order.

        Raises:
            RecmasError: As `records` and `over`; that of a question which fails as it runs.
        """
        records = self.records(asked)
        over = self.over(records, asked)
        for answer in over.answer_all(records, at_once=at_once, **settings):
            if isinstance(answer, RecmasError):
                raise answer
            yield answer.answer

    def likelihoods(
        self, asked: Sequence[Asked], texts: Sequence[Sequence[str]], *, at_once: int
    ) -> Iterator[tuple[int, dict[str, tuple[float, bool]]]]:
        """Score texts behind questions, all of a question's in one run of the other agents.

        Yields the place of each question, long ones first, and by text its log-likelihood in nats
        and whether greedy decoding would write it.

        Args:
            texts: By question. Behind a template's opening of a turn they are read as answers
                begin there; elsewhere character by character.

        Raises:
            RecmasError: As `answers`.
        """
        records = self.records(asked)
        over = self.over(records, asked)
        verbatim = self.continues_context
        # Texts of about the same length run side by side.
        order = sorted(range(len(asked)), key=lambda place: -len(asked[place].turns[-1].content))
        for first in range(0, len(order), at_once):
            places = order[first : first + at_once]
            found = over.score_batch(
                [records[place] for place in places],
                [texts[place] for place in places],
                verbatim=verbatim,
            )
            for place, scores in zip(places, found, strict=True):
                if isinstance(scores, RecmasError):
                    raise scores
                told = zip(scores.candidates, scores.losses, scores.greedy, strict=True)
                yield place, {text: (-loss, greedy) for text, loss, greedy in told}

    def _record(self, asked: Asked, index: int) -> Record:
        plan = self.system.plan
        fields, turns = to_record(
            asked.turns, self.serve, plan.fields, _other_fields(plan, self.serve, asked)
        )
        return Record(id=asked.id, fields={**fields, "id": asked.id}, index=index, turns=turns)

    def _right(self, asked: Asked) -> str:
        assert self.answer is not None
        if self.answer not in asked.document:
            raise fail(
                "RM500",
                f"document {asked.id!r} has no field {self.answer!r}, which the model argument "
                f"answer names; it has {listed(asked.document or ['none'])}",
                hint="Name the field that holds the right answer, or leave the argument out.",
            )
        return str(asked.document[self.answer])


def ends_with_question(system: System, serve: ServePlan) -> bool:
    """Return whether the answer agent's prompt ends with the question and nothing behind it."""
    plan = system.plan
    agent = plan.agents[plan.answer_agent]
    parts = agent.parts(plan.answer_prompt.variants[0])
    last = parts[-1] if parts else None
    if last is None or last.kind != "field" or last.value != serve.field_of("last_user"):
        return False
    chat = system.loaded.chats.get(agent.backbone)
    if chat is None:  # a remote model's, which nobody here sees
        return False
    asked = [{"role": "user", "content": _PROBE}]
    variables = {**DEFAULT_VARIABLES, **agent.chat_template}
    return chat.template.render(asked, add_generation_prompt=True, **variables).endswith(_PROBE)


def _other_fields(plan: Plan, serve: ServePlan, asked: Asked) -> dict[str, Any]:
    """Return the fields that prompts show and no part of a conversation fills."""
    others = serve.others(plan.fields)
    missing = [name for name in others if asked.document.get(name) is None]
    if missing:
        shown = dict.fromkeys(field_place(value).name for value in plan.fields)
        raise fail(
            "RM500",
            f"question {asked.id!r} has no field {missing[0]!r}: the prompts use {listed(shown)}, "
            f"its document has {listed(asked.document or ['none'])}",
            hint="Take a task whose documents have such a field, or name the field that takes the "
            "question with the model argument field.",
        )
    return {name: asked.document[name] for name in others}
