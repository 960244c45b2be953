"""Every prompt of a system rendered once with its backbones' templates, before any build."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress

from recmas_compiler.backbones.chat_files import own_template_text, read_chat_template
from recmas_compiler.backbones.sources import files_of, is_config_alone
from recmas_compiler.ir.ops import System
from recmas_compiler.lowering.plan import agent_plan
from recmas_compiler.spec.document.places import Loc
from recmas_compiler.spec.document.problems import in_reading_order, problem_at
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.trial import PromptFinding, render_once


def try_prompts(spec: Spec, system: System) -> tuple[Problem, ...]:
    """Render every prompt with the templates that are at hand; return warnings.

    Raises:
        RecmasError: RM200 to RM206 for every backbone without a usable tokenizer or template, and
            for every prompt that its template does not write as it is.
    """
    problems: list[Problem] = []
    templates: dict[str, ChatTemplate] = {}
    for name, backbone in system.backbones.items():
        try:
            source = files_of(backbone.facts)
            given = backbone.template is not None
            template = read_chat_template(
                source,
                template=backbone.template,
                num_rows=backbone.facts.vocab_size,
                position=spec.position("backbones", name, "template" if given else "source"),
                is_complete=not backbone.facts.source.startswith("hf:")
                and not is_config_alone(source),
            )
        except RecmasError as error:
            problems += error.problems
        else:
            if template is not None:
                templates[name] = template
    problems += check_prompts(spec, system, templates)
    if any(problem.severity == "error" for problem in problems):
        raise RecmasError(in_reading_order(problems))
    return tuple(in_reading_order(problems))


def template_digests(system: System) -> dict[str, str]:
    """Return the sha256 of each backbone's chat template that is at hand, by backbone."""
    found = {}
    for name, backbone in system.backbones.items():
        with suppress(RecmasError):  # said where prompts are tried
            text = backbone.template or own_template_text(files_of(backbone.facts))
            if text is not None:
                content = text.encode("utf-8", "backslashreplace")
                found[name] = hashlib.sha256(content).hexdigest()
    return found


def check_prompts(
    spec: Spec, system: System, templates: Mapping[str, ChatTemplate]
) -> list[Problem]:
    """Return what is wrong with prompts under templates by shared backbone, with their places."""
    train = spec.document.train
    findings = render_once(
        {name: agent_plan(system, name) for name in system.agents},
        templates,
        has_date=system.date is not None,
        targets=() if train is None else train.targets,
        answer_agent=system.answer_agent,
        tools=system.tools,
        has_turns=system.serve is not None and system.serve.history == "turns",
    )
    return [_placed(spec, finding) for finding in findings]


def _placed(spec: Spec, finding: PromptFinding) -> Problem:
    agent, problem = finding.agent, finding.problem
    loc: Loc = ("agents", agent, "prompt")
    message = f"agent `{agent}`: {problem.message}."
    if finding.place == "backbone":
        loc, message = ("backbones", spec.document.agents[agent].backbone), f"{problem.message}."
    elif finding.place == "history":
        loc = ("serve", "history")
    elif finding.place == "system":
        loc = ("agents", agent, "system")
    elif (*loc, finding.place) in spec.places.values:
        loc = (*loc, finding.place)
    place = spec.places.key(loc)
    return problem_at(place, problem.code, message, hint=problem.hint, severity=problem.severity)
