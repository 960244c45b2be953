"""`recmas inspect` and `recmas verify`: what is in a bundle, and whether it is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recmas_runtime.core.text import aligned, counted, human_bytes, listed
from recmas_runtime.engines.tensorrt.engine_cache import engines_text
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.manifest import LinkEntry, LossEntry
from recmas_runtime.formats.messages import MessageForm
from recmas_runtime.formats.plan import (
    AskStep,
    DecodeStep,
    Plan,
    PrefillStep,
    SendStep,
    Step,
    ThinkStep,
    WriteStep,
    feedback_links,
    form_of,
)
from recmas_runtime.formats.precisions import PRECISIONS
from recmas_runtime.serve.conversation import in_words

if TYPE_CHECKING:
    from recmas_runtime.checking.verify import VerifyReport


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Return what `inspect --json` prints."""
    manifest, plan = bundle.manifest, bundle.plan
    backbones = {
        name: {
            **{
                key: getattr(entry, key)
                for key in ("source", "model_type", "width", "num_layers", "vocab_size", "dtype")
            },
            "precision": entry.precision,
            "weights_bytes": manifest.files[entry.weights].size_bytes,
        }
        for name, entry in manifest.backbones.items()
    }
    agents = {
        name: {
            "backbone": agent.backbone,
            "latent_steps": agent.latent_steps,
            "answers": name == plan.answer_agent,
        }
        for name, agent in plan.agents.items()
    }
    fed_back = feedback_links(plan)
    return {
        "name": plan.name,
        "fingerprint": manifest.fingerprint,
        "precision": manifest.precision,
        "tools": manifest.tools,
        "rounds": plan.rounds,
        "backbones": backbones,
        "agents": agents,
        "links": {
            name: {**to_json(link), "feedback": name in fed_back}
            for name, link in manifest.links.items()
        },
        "messages": {name: to_json(form_of(link)) for name, link in plan.links.items()},
        "steps": [{**to_json(step), "text": step_text(plan, step)} for step in plan.steps],
        "caches": to_json(plan.caches),
        "cache_bytes_per_sample": sum(c.bytes_per_sample for c in plan.caches.values()),
        "snapshots": to_json(plan.snapshots),
        "snapshot_bytes_per_sample": sum(s.bytes_per_sample for s in plan.snapshots.values()),
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "num_files": len(manifest.files),
        "limits": to_json(plan.limits),
        "sampling": to_json(plan.sampling),
        "speculation": to_json(plan.speculation),
        "fields": list(plan.fields),
        "conversation": to_json(plan.conversation),
        "parity": to_json(manifest.parity),
        "remotes": to_json(manifest.remotes),
        "engines": engines_text(bundle.root),
    }


def bundle_text(bundle: Bundle) -> str:
    """Return what `inspect` prints."""
    manifest, plan = bundle.manifest, bundle.plan
    facts = bundle_facts(bundle)
    lines = [
        f"{plan.name}: {counted(len(plan.agents), 'agent')}, {counted(plan.rounds, 'round')}, "
        f"{counted(len(manifest.files), 'file')}, {human_bytes(facts['size_bytes'])}",
        f"fingerprint {manifest.fingerprint}",
        "",
        "backbones",
    ]
    lines += _indented(
        (
            name,
            b["source"],
            b["model_type"],
            f"{b['num_layers']} layers x {b['width']}",
            b["precision"],
            human_bytes(b["weights_bytes"]),
        )
        for name, b in facts["backbones"].items()
    )
    lines += ["", "remote models"] if manifest.remotes else []
    lines += _indented(
        (name, entry.name, f"key in {entry.api_key_env}" if entry.api_key_env else "no key")
        for name, entry in manifest.remotes.items()
    )
    lines += ["", "agents"]
    lines += _indented(
        (
            name,
            f"on {agent.backbone}",
            counted(agent.latent_steps, "latent step"),
            "answers" if name == plan.answer_agent else "",
        )
        for name, agent in plan.agents.items()
    )
    lines += ["", "links"]
    lines += _indented(
        (
            name,
            f"{link.kind} {link.in_dim} -> {link.out_dim}",
            _link_text(link),
            "feedback" if facts["links"][name]["feedback"] else "",
        )
        for name, link in manifest.links.items()
    )
    if any(link.carries != "thoughts" for link in plan.links.values()):
        lines += ["", "messages"]
        lines += _indented((name, form_text(link)) for name, link in plan.links.items())
    for number in range(1, plan.rounds + 1):
        lines += ["", f"round {number}"]
        lines += [f"  {step_text(plan, step)}" for step in plan.steps if step.round == number]
    lines += [
        "",
        f"limits      {plan.limits.max_prompt_tokens} prompt tokens, batches of "
        f"{plan.limits.max_batch}, answers of {plan.sampling.max_new_tokens} tokens",
        f"caches      {human_bytes(facts['cache_bytes_per_sample'])} per record at the limits",
        *(
            [f"snapshots   {human_bytes(facts['snapshot_bytes_per_sample'])} per record"]
            if plan.snapshots
            else []
        ),
        *(
            [f"drafts      of at most {plan.speculation.max_draft} tokens, by prompt lookup"]
            if plan.speculation
            else []
        ),
        f"fields      {', '.join(plan.fields) or 'none: every question gets the same answer'}",
        f"chat        {in_words(plan.conversation, plan.fields)}",
    ]
    lines += [f"engines     {folder}: {whose}" for folder, whose in facts["engines"].items()]
    for case in manifest.parity:
        precision = manifest.backbones[case.backbone].precision
        lines.append(f"parity      {case.backbone}: {_figures_text(case.figures, precision)}")
        if case.loss is not None:
            lines.append(f"loss        {case.backbone}: {loss_text(case.loss, precision)}")
    return "\n".join(lines)


def form_text(form: MessageForm) -> str:
    """Return in a few words what a link carries."""
    words: list[str] = [form.carries]
    if form.of is not None:
        words.append(f"of {form.of}")
    if form.every > 1:
        words.append(f"every {form.every}")
    if form.pool:
        words.append("pooled")
    if form.rows:
        words.append(f"rows of {listed(form.rows)}")
    if form.layers is not None:
        words.append(f"layers {', '.join(map(str, form.layers))}")
    if form.max_tokens is not None:
        words.append(f"at most {counted(form.max_tokens, 'token')}")
    return ", ".join(words)


def step_text(plan: Plan, step: Step) -> str:
    """Return a step in words."""
    match step:
        case PrefillStep():
            named = zip(step.agents, step.variants, strict=True)
            prompts = ", ".join(f"{agent} ({variant})" for agent, variant in named)
            kept = ", reuse prefix" if step.reuse_prefix else ""
            copied = f", prefix of {step.prefix_from}" if step.prefix_from is not None else ""
            restored = "" if step.restore is None else f", restore {step.restore}"
            saved = f", save {', '.join(step.snapshots)}" if step.snapshots else ""
            return f"prefill {prompts}{kept}{copied}{restored}{saved}"
        case ThinkStep():
            how = "fused" if step.fused else "inner link apart"
            steps = counted(plan.num_latent_steps(step), "step")
            return f"think {' + '.join(step.agents)}, {steps}, {how}"
        case SendStep():
            return f"send {step.source} -> {', '.join(step.targets)}"
        case WriteStep():
            return f"write {' + '.join(step.agents)}"
        case AskStep():
            return f"ask {' + '.join(step.agents)}"
        case DecodeStep():
            return f"decode {step.agent}"


def verify_text(report: VerifyReport) -> str:
    """Return what `verify` prints."""
    lines = [
        f"files   {report.num_files} hashes are right",
        *(f"engines {folder}: {whose}" for folder, whose in report.engines.items()),
        f"probe   {_figures_text({'probe_absolute': report.probe_absolute}, 'float32')}",
    ]
    for case in report.cases:
        greedy = "equal" if case.greedy_tokens_equal else "different"
        lines.append(
            f"parity  {case.backbone}: {_figures_text(case.figures, case.precision)}; "
            f"greedy text {greedy}"
        )
    lines += [f"remote  {name}: is asked at runs, never here" for name in report.remotes]
    verdict = "the bundle is whole and right" if report.ok else "the bundle is not right"
    return "\n".join([*lines, f"{verdict} on {report.device}"])


def loss_text(loss: LossEntry, precision: str) -> str:
    """Return one line on what a precision costs."""
    return (
        f"{precision} over {loss.num_tokens} tokens of {loss.text}: "
        f"hidden cosine {loss.hidden_cosine:.4f}, "
        f"same likeliest token {loss.greedy_agreement:.1%}, "
        f"loss {loss.loss:.3f} instead of {loss.reference_loss:.3f}"
    )


def _figures_text(figures: Mapping[str, float], precision: str) -> str:
    allowed = PRECISIONS[precision].tolerances
    return ", ".join(
        f"{name} {value:.1e} (allowed {allowed[name]:.0e})" for name, value in figures.items()
    )


def _link_text(link: LinkEntry) -> str:
    if link.cosine is None:
        return link.init
    return f"{link.init}, cosine {link.cosine:.3f} to held-out targets"


def _indented(rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in aligned(rows)]
