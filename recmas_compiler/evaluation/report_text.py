"""A report in words and tables, for people."""

from __future__ import annotations

from collections.abc import Sequence

from recmas_compiler.evaluation.report import Report
from recmas_compiler.evaluation.summary import SystemSummary
from recmas_runtime.core.text import markdown_table


def report_markdown(report: Report) -> str:
    """Return the report for people."""
    protocol, data, bundle, made = report.protocol, report.data, report.bundle, report.made
    steps = ", ".join(f"{name} {count}" for name, count in bundle["latent_steps"].items())
    drawn = f"temperature {protocol['temperature']:g}" if protocol["temperature"] else "greedy"
    seeds = ", ".join(map(str, protocol["seeds"]))
    limit = protocol["max_new_tokens"] or "the bundle's limit of"
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
        f"- {drawn}, {limit} new tokens, seeds {seeds}, {protocol['rollouts']} answers each\n"
        f"- {data['num_questions']} of {data['num_records']} records of `{data['file']}`, "
        f"`{data['digest']}`\n"
        f"- bundle `{bundle['fingerprint']}`, prompts `{bundle['prompt_digest']}`\n"
        f"- {bundle['rounds']} rounds, latent steps: {steps}\n"
        f"- {made['date']}, {made['device']}, {made['machine']} with {made['cores']} cores, "
        f"threads {made['threads'] or 'as many as physical cores'}\n"
        f"- recmas {made['recmas']}, onnxruntime {made['onnxruntime']}, "
        f"math-verify {made['math_verify'] or 'not installed'}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def report_table(report: Report) -> str:
    """Return the main table: accuracy, tokens, time."""
    has_degrees = any(abs(s.score - s.accuracy) > 1e-9 for s in report.systems)
    has_seeds = any(s.sd is not None for s in report.systems)
    head = ["system", "right", "accuracy", "95 % interval"]
    head += ["sd over seeds"] if has_seeds else []
    head += ["score"] if has_degrees else []
    passes = list(dict.fromkeys(k for s in report.systems for k in s.pass_at))
    head += [f"pass@{k}" for k in passes]
    head += ["no answer", "cut off", "failed", "prompt tokens", "hand-over tokens"]
    head += ["answer tokens", "latent steps", "rounds", "s/question"]
    rows = []
    for system in report.systems:
        low, high = system.interval.low, system.interval.high
        row = [system.name, f"{system.num_right}/{system.num_answers}"]
        row += [f"{system.accuracy:.1%}", f"{low:.1%} to {high:.1%}"]
        row += [_figure(system.sd, ".1%")] if has_seeds else []
        row += [f"{system.score:.3f}"] if has_degrees else []
        row += [_figure(system.pass_at.get(k), ".1%") for k in passes]
        row += [str(system.num_no_answer), str(system.num_cut_off), str(len(system.failed))]
        names = ("prompt_tokens", "handover_tokens", "completion_tokens", "latent_steps")
        row += [_figure(system.usage.get(name), ".0f") for name in names]
        row += [_figure(system.rounds, ".2g")]
        row += [_figure(system.ms.get("total"), ".3f", scale=1e-3)]
        rows.append(row if system.is_complete else [f"{system.name} (partial)", *row[1:]])
    return markdown_table(head, rows)


def comparison_text(report: Report) -> str:
    """Return a sentence for every pair of systems that is compared."""
    lines = [
        f"- {c.system} against {c.against}, {c.num_questions} questions: only {c.system} right "
        f"{c.num_only_system} times, only {c.against} {c.num_only_against} times "
        f"(McNemar, exact p = {c.p:.3g})"
        for c in report.comparisons
    ]
    for saving in report.savings:
        told = [f"{saving.speed_up:.2f} times as fast"] if saving.speed_up is not None else []
        if saving.written_tokens is not None:
            told.append(f"{saving.written_tokens:+.1%} written tokens")
        if saving.all_tokens is not None:
            told.append(f"{saving.all_tokens:+.1%} tokens in all")
        lines.append(f"- {saving.system} beside {saving.against}: {', '.join(told)}")
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


def _figure(value: float | None, form: str, *, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)
