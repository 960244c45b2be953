"""The text system on records: what each agent wrote, the answer, and whether it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recmas_compiler.evaluation.checks.verdict import NO_ANSWER, Check, Verdict
from recmas_compiler.evaluation.data.data_file import Question
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.running.records import Answer, Record
from recmas_runtime.running.run_trace import StepEvent
from recmas_runtime.running.system import System


@dataclass(frozen=True, kw_only=True)
class Written:
    """The run of one record.

    Attributes:
        fields: The record's.
        texts: By agent and round, what it wrote for others.
        answer: None if the record cannot run, for `failure`.
        num_tokens: Read and written.
    """

    fields: Mapping[str, object]
    texts: Mapping[tuple[str, int], str]
    answer: str | None
    verdict: Verdict
    num_tokens: int
    failure: RecmasError | None = None


@dataclass
class _Texts:
    """A trace that keeps hand-over texts, by the record's index."""

    found: dict[int, dict[tuple[str, int], str]] = field(default_factory=dict)

    def add_batch(
        self,
        records: Sequence[Record],
        events: Sequence[StepEvent],
        messages: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep the texts of a batch."""
        for row, record in enumerate(records):
            texts = self.found.setdefault(record.index, {})
            for event in events:
                if event.texts and event.texts[row]:
                    for agent, text in zip(event.agents, event.texts[row], strict=True):
                        texts[agent, event.round] = text


@dataclass(frozen=True, kw_only=True)
class Asker:
    """How records are asked and judged.

    Attributes:
        opening: What the prompt has begun of the answer.
    """

    check: Check
    sampling: SamplingPlan
    opening: str

    def ask(self, system: System, questions: Sequence[Question]) -> list[Written]:
        """Return what came of each record."""
        trace = _Texts()
        results = system.run_batch(
            [question.record for question in questions], sampling=self.sampling, trace=trace
        )
        return [
            self._written(question, result, trace.found.get(question.record.index, {}))
            for question, result in zip(questions, results, strict=True)
        ]

    def _written(
        self,
        question: Question,
        result: Answer | RecmasError,
        texts: Mapping[tuple[str, int], str],
    ) -> Written:
        fields = question.record.fields
        if isinstance(result, RecmasError):
            return Written(
                fields=fields,
                texts=texts,
                answer=None,
                verdict=NO_ANSWER,
                num_tokens=0,
                failure=result,
            )
        usage = result.usage
        return Written(
            fields=fields,
            texts=texts,
            answer=result.answer,
            verdict=self.check(self.opening + result.answer, question),
            num_tokens=usage.prompt_tokens + usage.handover_tokens + usage.completion_tokens,
        )
