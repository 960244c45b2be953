"""A report of an evaluation: what was asked, how, and what came of it."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Final, Literal

from recmas_compiler.analysis.plots import COLOURS, save_figure
from recmas_compiler.evaluation.data.data_file import DataSet
from recmas_compiler.evaluation.data.protocol import Protocol
from recmas_compiler.evaluation.intervals import Interval
from recmas_compiler.evaluation.runner import Evaluation
from recmas_compiler.evaluation.summary import (
    Comparison,
    Difference,
    Saving,
    SystemSummary,
    compare,
    savings,
    summarize,
)
from recmas_runtime.checking.machine import package_versions
from recmas_runtime.core.errors import fail
from recmas_runtime.core.files import write_whole
from recmas_runtime.core.text import counted, markdown_table
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.formats.plan import Plan

REPORT_VERSION = 1
# An answer of so many tokens has no room to work anything out.
MOST_ANSWER_ONLY_TOKENS: Final = 32

Receiver = Literal["answer-only", "free-writing"]
MAX_COLUMNS: Final = 100  # of a terminal


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that an evaluation found out.

    Attributes:
        is_complete: Whether every system answered everything.
        receiver: Whether the answer agent could do more than say the answer.
        protocol: The protocol, overrides included, and its digest.
        made: When, where, with what.
        comparisons: Every other system against the first.
        savings: Every other system against the text system.
    """

    version: int = REPORT_VERSION
    is_complete: bool
    receiver: Receiver
    protocol: dict[str, Any]
    data: dict[str, Any]
    bundle: dict[str, Any]
    made: dict[str, Any]
    systems: tuple[SystemSummary, ...]
    comparisons: tuple[Comparison, ...]
    savings: tuple[Saving, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the form of `report.json`."""
        # Tuples become lists, as they are in the file.
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def make_report(
    evaluation: Evaluation,
    *,
    protocol: Protocol,
    data: DataSet,
    data_file: Path,
    bundle: Bundle,
    prompt_digest: str,
    device: str,
    threads: int | None,
) -> Report:
    """Return the report of an evaluation that ran on a device with so many threads."""
    answered = [system for system in evaluation.systems if system.scored]
    summaries = tuple(summarize(system) for system in answered)
    versions = package_versions(("recmas", "onnxruntime", "onnxruntime-gpu", "math-verify"))
    return Report(
        is_complete=not evaluation.interrupted and all(s.is_complete for s in summaries),
        receiver=receiver_of(protocol, bundle.plan),
        protocol={**protocol.model_dump(mode="json"), "digest": protocol.digest()},
        data={
            "file": str(data_file),
            "digest": data.digest,
            "num_records": data.num_records,
            "num_questions": len(data.questions),
            "left_out": dict(data.left_out),
        },
        bundle={
            "path": str(bundle.root),
            "name": bundle.plan.name,
            "fingerprint": bundle.manifest.fingerprint,
            "prompt_digest": prompt_digest,
            "rounds": bundle.plan.rounds,
            "max_new_tokens": bundle.plan.sampling.max_new_tokens,
            "latent_steps": {n: agent.latent_steps for n, agent in bundle.plan.agents.items()},
        },
        made={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device,
            "threads": threads,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "recmas": versions["recmas"],
            "onnxruntime": versions["onnxruntime"] or versions["onnxruntime-gpu"],
            "math_verify": versions["math-verify"],
        },
        systems=summaries,
        comparisons=compare(answered),
        savings=savings(summaries),
    )


def receiver_of(protocol: Protocol, plan: Plan) -> Receiver:
    """Return whether the answer agent says the answer only, or writes freely.

    One that writes at length can work out again what it was not sent, and a message then seems to
    be worth less than it is.
    """
    most = protocol.max_new_tokens or plan.sampling.max_new_tokens
    is_short = protocol.score.by != "text" or most <= MOST_ANSWER_ONLY_TOKENS
    return "answer-only" if is_short else "free-writing"


def asked_text(protocol: Mapping[str, Any], plan: Plan) -> str:
    """Return what was asked for: texts, and whose limit they have, or what is scored."""
    return _asked(protocol, plan.sampling.max_new_tokens)


def report_limit(report: Report) -> str:
    """Return the same of a report."""
    return _asked(report.protocol, report.bundle["max_new_tokens"])


def _asked(protocol: Mapping[str, Any], bundle: int) -> str:
    score = protocol["score"]
    match score["by"]:
        case "candidates":
            return f"ranked among at most {score['candidates']} candidates, or the choices"
        case "likelihood":
            return "the right answer's likelihood"
    return _limit(protocol["max_new_tokens"], bundle)


def _limit(protocol: int | None, bundle: int) -> str:
    if protocol is None or protocol == bundle:
        return f"at most {bundle} new tokens"
    return f"at most {protocol} new tokens (the protocol's; the bundle's own limit is {bundle})"


def report_head(report: Report) -> str:
    """Return the line that says what was asked of what."""
    return (
        f"{report.bundle['name']} on {report.protocol['name']}: "
        f"{counted(report.data['num_questions'], 'question')}, {report_limit(report)}, "
        f"{report.receiver} receiver"
    )


def report_markdown(report: Report) -> str:
    """Return the report for people."""
    protocol, data, bundle, made = report.protocol, report.data, report.bundle, report.made
    steps = ", ".join(f"{name} {count}" for name, count in bundle["latent_steps"].items())
    drawn = f"temperature {protocol['temperature']:g}" if protocol["temperature"] else "greedy"
    seeds = ", ".join(map(str, protocol["seeds"]))
    left_out = "".join(f"; {number} left out: {why}" for why, number in data["left_out"].items())
    parts = [
        f"# {bundle['name']} on {protocol['name']}",
        "" if report.is_complete else "**Partial: the run was interrupted.**",
        report_table(report),
        comparison_text(report),
        "## Time per question, by phase",
        _phases(report.systems),
        *_failures(report.systems),
        "## How",
        f"- protocol {protocol['name']} version {protocol['version']}, `{protocol['digest']}`\n"
        f"- {drawn}, {report_limit(report)}, seeds {seeds}, {protocol['rollouts']} answers each\n"
        f"- {_RECEIVERS[report.receiver]}\n"
        f"- {data['num_questions']} of {data['num_records']} records of `{data['file']}`, "
        f"`{data['digest']}`{left_out}\n"
        f"- bundle `{bundle['fingerprint']}`, prompts `{bundle['prompt_digest']}`\n"
        f"- {bundle['rounds']} rounds, latent steps: {steps}\n"
        f"- {made['date']}, {made['device']}, {made['machine']} with {made['cores']} cores, "
        f"threads {made['threads'] or 'as many as physical cores'}\n"
        f"- recmas {made['recmas']}, onnxruntime {made['onnxruntime']}, "
        f"math-verify {made['math_verify'] or 'not installed'}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_RECEIVERS: Final[dict[Receiver, str]] = {
    "answer-only": "answer-only receiver: the answer agent has no room to work anything out",
    "free-writing": "free-writing receiver: the answer agent may work out again what it was not "
    "sent, so messages can be worth more than is seen here",
}


def report_table(report: Report) -> str:
    """Return the main tables: how often each system is right, and what that took."""
    by = report.protocol["score"]["by"]
    has_degrees = any(abs(s.score - s.accuracy) > 1e-9 for s in report.systems)
    has_seeds = any(s.sd is not None for s in report.systems)
    is_ranked, has_loss = by == "candidates", by != "text"
    head = ["system"] if by == "likelihood" else ["system", "right", "accuracy", "95 % interval"]
    head += ["by chance"] if is_ranked else []
    head += ["nats/token", "95 % interval of it"] if has_loss else []
    head += ["sd over seeds"] if has_seeds else []
    head += ["score"] if has_degrees else []
    passes = list(dict.fromkeys(k for s in report.systems for k in s.pass_at))
    head += [f"pass@{k}" for k in passes]
    head += ["failed"] if has_loss else ["no answer", "cut off", "failed"]
    costs = ["system", "prompt tokens", "hand-over tokens", "answer tokens", "latent steps"]
    costs += ["rounds", "s/question"]
    rows, cost_rows = [], []
    for system in report.systems:
        low, high = system.interval.low, system.interval.high
        name = system.name if system.is_complete else f"{system.name} (partial)"
        row = [name]
        if by != "likelihood":
            row += [f"{system.num_right}/{system.num_answers}"]
            row += [f"{system.accuracy:.1%}", f"{low:.1%} to {high:.1%}"]
        row += [_figure(system.chance, ".1%")] if is_ranked else []
        row += [_figure(system.loss, ".3f"), _between(system.loss_interval)] if has_loss else []
        row += [_figure(system.sd, ".1%")] if has_seeds else []
        row += [f"{system.score:.3f}"] if has_degrees else []
        row += [_figure(system.pass_at.get(k), ".1%") for k in passes]
        row += [] if has_loss else [str(system.num_no_answer), str(system.num_cut_off)]
        row += [str(len(system.failed))]
        rows.append(row)
        names = ("prompt_tokens", "handover_tokens", "completion_tokens", "latent_steps")
        cost = [_figure(system.usage.get(key), ".0f") for key in names]
        cost += [_figure(system.rounds, ".2g"), _figure(system.ms.get("total"), ".3f", scale=1e-3)]
        cost_rows.append([name, *cost])
    tables = f"{fitted_tables(head, rows)}\n\n{fitted_tables(costs, cost_rows)}"
    return "\n\n".join((tables, *_remote_lines(report)))


def _remote_lines(report: Report) -> Iterator[str]:
    """Yield what remote models took, over all answers of a system; nothing where none was asked."""
    for system in report.systems:
        for model, took in system.remote.items():
            cost = "" if took["cost"] is None else f", cost {took['cost']:.4g}"
            left = took["uncounted_calls"]
            more = f"; {left} calls the endpoint did not count" if left else ""
            yield (
                f"- {system.name}: {took['calls']} calls of remote model {model}, "
                f"{took['prompt_tokens']} prompt tokens, {took['completion_tokens']} written"
                f"{cost}{more}"
            )


def fitted_tables(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as several below each other where it is wider than a terminal is."""
    widths = [max(map(len, column)) + len(" | ") for column in zip(head, *rows, strict=True)]
    parts: list[list[int]] = [[0]]
    for column in range(1, len(head)):
        if sum(widths[i] for i in (*parts[-1], column)) + 1 > MAX_COLUMNS:
            parts.append([0])
        parts[-1].append(column)
    return "\n\n".join(
        markdown_table([head[i] for i in part], [[row[i] for i in part] for row in rows])
        for part in parts
    )


def comparison_text(report: Report) -> str:
    """Return sentences for every pair of systems that is compared."""
    lines = []
    by = report.protocol["score"]["by"]
    for c in report.comparisons:
        head = f"- {c.system} against {c.against}, {c.num_questions} questions: "
        parts = []
        if by != "likelihood":
            parts.append(
                f"only {c.system} right {c.num_only_system} times, only {c.against} "
                f"{c.num_only_against} times (McNemar, exact p = {c.p:.3g}), "
                f"{_difference(c.accuracy, '+.1%')} right"
            )
        parts += [f"{_difference(c.score, '+.3f')} score"] if c.score is not None else []
        parts += [f"{_difference(c.loss, '+.3f')} nats/token"] if c.loss is not None else []
        lines.append(head + "; ".join(parts))
    for system in report.systems:
        if system.num_repeated:
            lines.append(
                f"- {system.name}: {counted(system.num_repeated, 'question')} with the messages of "
                "a record that sends to another one too: most records have one answer"
            )
        if system.num_same_input:
            lines.append(
                f"- {system.name}: {counted(system.num_same_input, 'question')} with the messages "
                "of a record that showed an agent the same text"
            )
    other = max((s.num_other_kind for s in report.systems), default=0)
    if other:
        lines.append(f"- {counted(other, 'candidate')} of another kind than the right answer")
    for saving in report.savings:
        parts = [f"{saving.speed_up:.2f} times as fast"] if saving.speed_up is not None else []
        if saving.written_tokens is not None:
            parts.append(f"{saving.written_tokens:+.1%} written tokens")
        if saving.all_tokens is not None:
            parts.append(f"{saving.all_tokens:+.1%} tokens in all")
        lines.append(f"- {saving.system} beside {saving.against}: {', '.join(parts)}")
    return "\n".join(lines)


def _phases(systems: Sequence[SystemSummary]) -> str:
    phases = list(dict.fromkeys(phase for system in systems for phase in system.ms))
    rows = [
        [system.name, *(_figure(system.ms.get(phase), ".1f") for phase in phases)]
        for system in systems
    ]
    return markdown_table(["ms", *phases], rows) if phases else "No question was answered."


def _failures(systems: Sequence[SystemSummary]) -> list[str]:
    lines = [
        f"- {system.name}: {failed['id']}: {failed['reason']}"
        for system in systems
        for failed in system.failed
    ]
    return ["## Records that could not be run", "\n".join(lines)] if lines else []


def _difference(difference: Difference, form: str) -> str:
    """Return a difference with its interval."""
    low, high = (format(end, form) for end in (difference.interval.low, difference.interval.high))
    return f"{format(difference.mean, form)} ({low} to {high})"


def _between(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}"


def _figure(value: float | None, form: str, *, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json`, `report.md` and, where matplotlib is installed, `report.png`.

    Raises:
        RecmasError: RM503 if the folder cannot be written.
    """
    texts = {
        folder / "report.json": json.dumps(report.to_json(), indent=2) + "\n",
        folder / "report.md": report_markdown(report),
    }
    picture = folder / "report.png"
    try:
        for path, text in texts.items():
            write_whole(path, text)
        return [*texts, *([picture] if draw_report(report, picture) else [])]
    except OSError as error:
        raise fail(
            "RM503",
            f"cannot write to {folder}: {error.strerror}",
            hint="Choose another --out, or make room.",
        ) from error


_MARKS: Final = "osD^vPX*"


def draw_report(report: Report, path: Path) -> bool:
    """Draw accuracy with its interval against time, and the tokens that were written.

    Returns:
        Whether there is a picture: not without matplotlib, answers, and something right or wrong.
    """
    systems = [system for system in report.systems if system.ms]
    if not systems or report.protocol["score"]["by"] == "likelihood":
        return False
    interrupted = "" if report.is_complete else ", partial"
    return save_figure(
        path,
        [partial(_accuracy_against_time, systems), partial(_written_tokens, systems)],
        panel_size=(5, 4.4),
        title=f"{report.bundle['name']} on {report.protocol['name']}, "
        f"{systems[0].num_questions} questions{interrupted}",
    )


def _accuracy_against_time(systems: list[SystemSummary], axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    seconds = [system.ms["total"] / 1e3 for system in systems]
    for system, x, (colour, mark) in zip(systems, seconds, _looks(), strict=False):
        y, interval = 100 * system.accuracy, system.interval
        axes.errorbar(
            [x],
            [y],
            yerr=[[y - 100 * interval.low], [100 * interval.high - y]],
            fmt=mark,
            color=colour,
            markersize=7,
            capsize=3,
            label=system.name,
        )
    # Systems that pass text can be many times slower.
    if max(seconds) > 8 * min(seconds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0, right=1.08 * max(seconds))
    axes.set_xlabel("seconds per question")
    axes.set_ylabel("accuracy, 95 % interval [%]")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(axis="y", alpha=0.3)


def _written_tokens(systems: list[SystemSummary], axes: Any) -> None:
    names = [system.name for system in systems]
    answers = [system.usage["completion_tokens"] for system in systems]
    handovers = [system.usage["handover_tokens"] for system in systems]
    colours = [colour for _, (colour, _) in zip(systems, _looks(), strict=False)]
    axes.barh(names, answers, color=colours, height=0.6)
    axes.barh(names, handovers, left=answers, color=colours, height=0.6, alpha=0.45)
    for row, (answer, handover) in enumerate(zip(answers, handovers, strict=True)):
        axes.annotate(
            f"{answer + handover:.0f}", (answer + handover, row), (4, 0), va="center",
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("tokens written per question (lighter: hand-overs)")


def _looks() -> Iterator[tuple[str, str]]:
    return cycle(zip(COLOURS, _MARKS, strict=True))
