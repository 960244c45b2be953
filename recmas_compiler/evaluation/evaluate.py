"""An evaluation: a data set, a protocol, a bundle and what to compare it with."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Final, Self

from recmas_compiler.evaluation.candidates import candidates_of
from recmas_compiler.evaluation.checks import make_check
from recmas_compiler.evaluation.checks.verdict import Check, opened_thinking
from recmas_compiler.evaluation.data.data_file import (
    MAX_PROBLEMS,
    DataSet,
    Question,
    left_out_warnings,
    load_data,
)
from recmas_compiler.evaluation.data.protocol import Protocol, load_protocol
from recmas_compiler.evaluation.identity import (
    Identity,
    claim_folder,
    made_folder,
    prompt_digest,
    refuse_taken,
)
from recmas_compiler.evaluation.report import Report, asked_text, make_report, write_report
from recmas_compiler.evaluation.runner import run_systems
from recmas_compiler.evaluation.tracked import (
    evaluation_results,
    evaluation_run,
    tell_answers,
)
from recmas_compiler.trackers.tracking import chosen_trackers, tracked_run
from recmas_runtime.checking.machine import package_versions
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import exclusive
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.core.text import counted, listed
from recmas_runtime.formats.bundle import Bundle, keep_out, open_bundle
from recmas_runtime.formats.plan import AgentPlan, field_place
from recmas_runtime.prompts.chat_template import ChatTemplate, read_template
from recmas_runtime.prompts.render import DEFAULT_VARIABLES, messages_of
from recmas_runtime.running.baselines import LATENT, apply_baseline, baseline_name
from recmas_runtime.running.batch import check_batch
from recmas_runtime.running.open_engines import choose_device
from recmas_runtime.running.system import System, load

UNTRAINED: Final = "untrained-links"
OLD_UNTRAINED: Final = "frozen-links"  # its name in version 0.1


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, and how.

    Attributes:
        baselines: Systems to run, in this order; none means the latent system alone.
        untrained_bundle: The same system with untrained links.
        overrides: `KEY=VALUE` of the protocol.
        batch: Records per batch; None for the most that the bundle takes.
        out: Folder for answers and report; None for one named after bundle and protocol.
        device: `auto`, `cpu`, `cuda` or `tensorrt`.
        threads: None for the physical cores.
        skip_broken: Leave records out whose own solution fails their tests, with a warning.
        trackers: Receive figures, settings and results, as `NAME` or `NAME=PLACE`.
    """

    bundle: Path
    data: Path
    protocol: str
    baselines: tuple[str, ...]
    untrained_bundle: Path | None
    overrides: tuple[str, ...]
    batch: int | None
    out: Path | None
    resume: bool
    device: str
    threads: int | None
    skip_broken: bool = False
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OtherSystem:
    """A system over the bundle's engines that is made for an evaluation and is no baseline.

    Attributes:
        digest: Of what it is beside the bundle, such as its prompts: answers of another one are not
            mixed with its own.
        of: Makes it from the loaded bundle.
    """

    digest: str
    of: Callable[[System], System]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation gave, and what a reader of its figures should know."""

    report: Report
    written: tuple[Path, ...]
    warnings: tuple[Problem, ...]
    interrupted: bool


def evaluate(
    options: EvalOptions,
    *,
    progress: Progress,
    others: Mapping[str, Callable[[], OtherSystem]] | None = None,
) -> Evaluated:
    """Run an evaluation; whatever can be refused is refused before a system is loaded.

    Args:
        others: By the names that `options.baselines` have for them. They are made once all else
            has been checked, which may take hours.

    Raises:
        RecmasError: What concerns the whole run; single records that fail are in the report.
    """
    trackers = chosen_trackers(options.trackers)
    protocol = load_protocol(options.protocol, overrides=options.overrides)
    bundle = open_bundle(options.bundle, verify_hashes=False)
    asked = (
        UNTRAINED if name == OLD_UNTRAINED else baseline_name(name) for name in options.baselines
    )
    names = tuple(dict.fromkeys(asked)) or (LATENT,)
    makers = dict(others or {})
    for name in names:
        if name != UNTRAINED and name not in makers:
            apply_baseline(bundle.plan, name, bundle.manifest)
    untrained = _untrained_bundle(options, names, bundle)
    batch_size = bundle.plan.limits.max_batch if options.batch is None else options.batch
    check_batch(batch_size, bundle.plan)
    warnings: list[Problem] = []
    device = choose_device(bundle, options.device, warnings)
    data = load_data(options.data, protocol, shown=bundle.plan.fields)
    _check_fields(bundle, data)
    folder = output_folder(options)
    keep_out(bundle.root, {"--out": folder})
    refuse_taken(folder, resume=options.resume)
    with make_check(protocol.check) as check:
        broken = check_records(check, data.questions, protocol, progress=progress)
        if broken and not options.skip_broken:
            raise RecmasError([problem for _, problem in broken[:MAX_PROBLEMS]])
        skipped = {question.record.id for question, _ in broken}
        questions = tuple(one for one in data.questions if one.record.id not in skipped)
        if not questions:
            raise RecmasError([problem for _, problem in broken[:MAX_PROBLEMS]])
        opening = AnswerOpening.of(bundle)
        _check_scored(protocol, opening, questions)
        made = {name: make() for name, make in makers.items()}
        identity = Identity(
            protocol=protocol.digest(),
            data=data.digest,
            bundle=bundle.manifest.fingerprint,
            prompts=prompt_digest(bundle.plan),
            untrained_bundle=untrained.manifest.fingerprint if untrained else None,
            batch_size=batch_size,
            sampling=_sampling_text(protocol, bundle),
            date=opening.date,
            judge=_judge_text(protocol),
            left_out=", ".join(sorted(map(str, skipped))) or None,
            others=", ".join(f"{name} {other.digest}" for name, other in made.items()) or None,
        )
        made_folder(folder)
        with exclusive(folder, code="RM503", what="evaluation"), ExitStack() as stack:
            resumed = claim_folder(folder, identity, resume=options.resume)
            tracking = stack.enter_context(
                tracked_run(
                    trackers,
                    evaluation_run(identity, protocol, bundle, options.data, names),
                    folder=folder,
                    resume=resumed,
                )
            )
            evaluation = run_systems(
                _systems(names, options, made),
                questions,
                protocol=protocol,
                check=check,
                batch_size=batch_size,
                folder=folder,
                resume=resumed,
                opening=opening.thinking,
                title=f"{protocol.name}, {asked_text(protocol.model_dump(), bundle.plan)}",
                progress=progress,
                on_answers=partial(tell_answers, tracking),
            )
            report = make_report(
                evaluation,
                protocol=protocol,
                data=replace(data, questions=questions),
                data_file=options.data,
                bundle=bundle,
                prompt_digest=identity.prompts,
                device=device,
                threads=options.threads,
            )
            written = tuple(write_report(report, folder))
            tracking.ended(evaluation_results(report), interrupted=evaluation.interrupted)
    return Evaluated(
        report=report,
        written=written,
        warnings=(
            *left_out_warnings(data.left_out, file=str(options.data)),
            *_warnings(protocol, identity, broken),
            *warnings,
            *tracking.problems,
        ),
        interrupted=evaluation.interrupted,
    )


def output_folder(options: EvalOptions) -> Path:
    """Return where an evaluation writes."""
    if options.out is not None:
        return options.out
    name = load_protocol(options.protocol, overrides=options.overrides).name
    return Path("out") / f"{open_bundle(options.bundle, verify_hashes=False).plan.name}-{name}"


def check_records(
    check: Check, questions: Sequence[Question], protocol: Protocol, *, progress: Progress
) -> list[tuple[Question, Problem]]:
    """Return the records that no answer could be judged by, with what is wrong with each.

    Raises:
        RecmasError: RM602 if what the records need is not installed.
    """
    shown = progress if protocol.check.kind == "code" else Silent()

    def problem(question: Question) -> Problem | None:
        try:
            check.check_record(question)
        except RecmasError as error:
            if error.problems[0].code == "RM602":
                raise
            return error.problems[0]
        return None

    with (
        shown.stage("trying the records' own solutions", len(questions)) as advance,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        found = []
        for question, wrong in zip(questions, pool.map(problem, questions), strict=True):
            # A busy machine may have taken the time.
            again = problem(question) if wrong is not None else None
            found += [] if again is None else [(question, again)]
            advance()
    return found


@dataclass(frozen=True, kw_only=True)
class AnswerOpening:
    """What a bundle's prompts have begun of an answer, and whether they change from day to day.

    Attributes:
        thinking: The mark that opens thinking, if the answer agent's prompt ends with one.
        date: The day that a chat template writes; None if none does.
    """

    thinking: str
    date: str | None

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """Render every agent's prompt once, without the texts of a record."""
        plan = bundle.plan
        day = plan.day or datetime.date.today()
        answering = plan.answer_agent
        thinking, has_date = "", False
        for name, agent in plan.agents.items():
            if agent.backbone in bundle.manifest.remotes:
                continue  # its service renders its prompts
            entry = bundle.manifest.backbones[agent.backbone]
            text = read_template(bundle.file(entry.chat_template), file=entry.chat_template)
            template = ChatTemplate(text, entry.special_tokens, day=day)
            rendered = _rendered(agent, template)
            has_date |= rendered != _rendered(agent, template.on(_ANOTHER_DAY))
            if name == answering:
                thinking = opened_thinking(rendered)
        return cls(thinking=thinking, date=day.isoformat() if has_date else None)


_ANOTHER_DAY: Final = datetime.date(2001, 2, 3)


def _rendered(agent: AgentPlan, template: ChatTemplate) -> str:
    system, prompt = (
        "".join(part.value if part.kind == "text" else "x" for part in parts)
        for parts in (agent.system, agent.then)
    )
    variables = {**DEFAULT_VARIABLES, **agent.chat_template}
    messages = messages_of(system, prompt, template)
    return template.render(messages, add_generation_prompt=True, **variables)


def _sampling_text(protocol: Protocol, bundle: Bundle) -> str:
    limit = protocol.max_new_tokens or bundle.plan.sampling.max_new_tokens
    return (
        f"{limit} new tokens, temperature {protocol.temperature:g}, top_p {protocol.top_p:g}, "
        f"top_k {protocol.top_k}, stop {list(bundle.plan.sampling.stop)}"
    )


def _judge_text(protocol: Protocol) -> str:
    names = ["recmas", *(["math-verify"] if protocol.check.kind == "math" else [])]
    versions = package_versions(tuple(names))
    return ", ".join(f"{name} {versions[name] or 'not installed'}" for name in names)


def option_overrides(
    limit: int | None, seeds: str | None, score: str | None = None
) -> tuple[str, ...]:
    """Return `--limit`, `--seeds` and `--score` as overrides of the protocol."""
    found = [f"n={limit}"] if limit is not None else []
    found += [f"score.by={score}"] if score is not None else []
    found += [f"seeds=[{seeds}]"] if seeds is not None else []
    return tuple(found)


def _systems(
    names: Sequence[str], options: EvalOptions, others: Mapping[str, OtherSystem]
) -> Mapping[str, Callable[[], System]]:
    """Return how to make each system; all but the untrained one share one set of engines."""
    opened = partial(load, device=options.device, threads=options.threads)
    base = cache(partial(opened, options.bundle))

    def make(name: str) -> System:
        if name in others:
            return others[name].of(base())
        if name != UNTRAINED:
            return base().baseline(name)
        assert options.untrained_bundle is not None
        return opened(options.untrained_bundle)

    return {name: partial(make, name) for name in names}


def _untrained_bundle(options: EvalOptions, names: Sequence[str], bundle: Bundle) -> Bundle | None:
    """Return the bundle with untrained links, if it is asked for."""
    if UNTRAINED not in names:
        if options.untrained_bundle is not None:
            hint = f"Add --baseline {UNTRAINED}."
            raise fail("RM506", f"--untrained-bundle without --baseline {UNTRAINED}", hint=hint)
        return None
    if options.untrained_bundle is None:
        raise fail(
            "RM506",
            f"--baseline {UNTRAINED} without --untrained-bundle",
            hint="Build the spec with untrained links into a folder and name it.",
        )
    untrained = open_bundle(options.untrained_bundle, verify_hashes=False)
    if (untrained.plan.agents, untrained.plan.steps) != (bundle.plan.agents, bundle.plan.steps):
        raise fail(
            "RM506",
            f"{options.untrained_bundle} has other prompts or steps than {options.bundle}",
            hint="Build both from the same spec; only the links may differ.",
        )
    return untrained


def _check_scored(
    protocol: Protocol, opening: AnswerOpening, questions: Sequence[Question]
) -> None:
    """Refuse to score texts where that would say nothing, before a system is loaded."""
    if protocol.score.by == "text":
        return
    if opening.thinking:
        raise fail(
            "RM506",
            f"the answer agent's prompt ends with {opening.thinking!r}, so that a right answer's "
            f"likelihood would be that of its thoughts (score.by is {protocol.score.by})",
            hint="Build with `chat_template: {enable_thinking: false}`, or score by text.",
        )
    candidates_of(questions, protocol.score)


def _check_fields(bundle: Bundle, data: DataSet) -> None:
    """Refuse data that lacks what every prompt shows; single records may still fail."""
    there = {"id"}.union(*(question.record.fields for question in data.questions))
    missing = sorted({field_place(shown).name for shown in bundle.plan.fields} - there)
    if missing:
        raise fail(
            "RM601",
            f"the bundle's prompts show {', '.join(missing)}, which no record of this protocol has",
            hint="Evaluate with a protocol that has such a field, or build with other prompts.",
        )


def _warnings(
    protocol: Protocol, identity: Identity, broken: Sequence[tuple[Question, Problem]]
) -> tuple[Problem, ...]:
    warnings = []
    if broken:
        shown = listed(question.record.id for question, _ in broken[:MAX_PROBLEMS])
        more = f" and {len(broken) - MAX_PROBLEMS} more" if len(broken) > MAX_PROBLEMS else ""
        warnings.append(
            Problem(
                code="RM651",
                severity="warning",
                message=f"{counted(len(broken), 'record')} left out, which no answer could be "
                f"judged by: {shown}{more}",
                hint=f"The first: {broken[0][1].message}",
            )
        )
    if protocol.prompt_digest not in (None, identity.prompts):
        warnings.append(
            Problem(
                code="RM650",
                severity="warning",
                message=f"the protocol's prompts are {str(protocol.prompt_digest)[:12]}, the "
                f"bundle's {identity.prompts[:12]}",
                hint="Do not set these figures beside ones that were made with other prompts.",
            )
        )
    return tuple(warnings)
