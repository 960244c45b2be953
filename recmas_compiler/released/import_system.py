"""From released repositories to a spec and link files.

The spec is a commented template of the system's paradigm, filled in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Final, get_args

from recmas_compiler.backbones.facts import BackboneFacts, stored_dtype
from recmas_compiler.backbones.sources import describe_backbone, resolve_source
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.links.modules import link_widths, save_link_tensors
from recmas_compiler.released.link_tensors import ReleasedTensors, read_pickled_link
from recmas_compiler.released.repositories import (
    Repositories,
    inner_link_file,
    inner_link_kind,
    outer_link_files,
)
from recmas_compiler.released.styles import Style, check_task
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import check_free, placed_together
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.precisions import Dtype

# What the released systems run with.
ROUNDS: Final = 3
LATENT_STEPS: Final = 80

_LONGEST_PROMPT: Final = 1024
_LONGEST_ANSWER: Final = 1024

# How the answer agent is asked to end, by task; answers of other tasks have no form of their own.
_FINISH: Final[Mapping[str, str]] = {
    "math": "Solve the problem step by step and put the final answer into \\boxed{}.",
    "code": "Write the complete program in a single block of code.",
}
_FINISH_OF_OTHERS: Final = "Think step by step, then give the answer."

_HEADER: Final = """\
# The released system {style}, task "{task}", imported from
{origins}
# Models and links are theirs. The prompts are not: recmas words its own, so figures can differ
# from published ones until you put in the prompts that the links were trained with.
#
# The links are tied to the models where they are now: import again after moving them."""

_LIMITS: Final = """\
  max_new_tokens: {answer}
  temperature: 0.0        # always the likeliest token

build:
  max_prompt_tokens: {prompt} # messages included; longer questions are refused, never cut"""

# A spec may name a model whose layers this version cannot run; another one may.
_LAYERS: Final = "RM203"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import wrote.

    Attributes:
        links: Link files, inner ones first.
        warnings: What `check` and `build` will refuse in it, and why.
    """

    spec: Path
    links: tuple[Path, ...]
    warnings: tuple[Problem, ...]


def link_files(style: Style) -> dict[str, str]:
    """Return the link files of an import, relative to its spec: by role, and by key."""
    inner = {agent.role: f"links/{inner_link_id(agent.role)}.safetensors" for agent in style.agents}
    outer = {link.key: f"links/{link.source}-{link.target}.safetensors" for link in style.links}
    return inner | outer


def import_system(
    style: Style, repositories: Repositories, *, task: str, out: Path, force: bool
) -> Imported:
    """Write a spec at `out` and its links beside it; all of it or nothing.

    Raises:
        RecmasError: RM207 and RM208 for what is missing or cannot be used, RM302 and RM303 if
            `out` cannot be written.
    """
    check_task(task)
    names = link_files(style)
    check_free(out.parent, [*names.values(), out.name], force=force)
    models = {role: _describe(repo.location) for role, repo in repositories.agents.items()}
    links = _read_links(style, repositories, models, task)

    text = partial(_spec_text, style, repositories, models, task=task)
    agents = repositories.agents
    with placed_together(out.parent, [*names.values(), out.name]) as staging:
        for name, (source, target) in _ends(style).items():
            save_link_tensors(
                staging / names[name],
                links[name].tensors,
                kind=links[name].kind,
                source=models[source].identity,
                target=models[target].identity,
            )
        sources = {role: repository.source(out.parent) for role, repository in agents.items()}
        (staging / out.name).write_text(text(sources=sources, links=names), encoding="utf-8")
        staged = {key: str((staging / name).absolute()) for key, name in names.items()}
        locations = {role: repository.location for role, repository in agents.items()}
        warnings = _check(text(sources=locations, links=staged), out)
    return Imported(
        spec=out, links=tuple(out.parent / name for name in names.values()), warnings=warnings
    )


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A backbone of the system; without facts if its layers are unknown."""

    identity: str
    dtype: str
    facts: BackboneFacts | None


def _ends(style: Style) -> dict[str, tuple[str, str]]:
    """Return the roles that every link connects, inner links first."""
    inner = {agent.role: (agent.role, agent.role) for agent in style.agents}
    return inner | {link.key: (link.source, link.target) for link in style.links}


def _describe(location: str) -> _Model:
    resolved = resolve_source(location, base_dir=Path.cwd())
    dtype = stored_dtype(resolved.folder, source=location)
    try:
        facts = describe_backbone(location, base_dir=Path.cwd())
    except RecmasError as error:
        if any(problem.code != _LAYERS for problem in error.problems):
            raise
        facts = None
    return _Model(
        identity=resolved.identity,
        # What a spec cannot say is at most widened by reading it as float32.
        dtype=dtype if dtype is not None and dtype in get_args(Dtype) else "float32",
        facts=facts,
    )


def _read_links(
    style: Style, repositories: Repositories, models: Mapping[str, _Model], task: str
) -> dict[str, ReleasedTensors]:
    """Return the tensors of every link, after checking them against the models' widths."""
    inner = {role: inner_link_file(r.folder, task) for role, r in repositories.agents.items()}
    outer = outer_link_files(repositories.outer.folder, task, style)
    # A model that recmas does not know has the width of its inner link.
    widths = {role: None if m.facts is None else m.facts.width for role, m in models.items()}
    found: dict[str, ReleasedTensors] = {}
    for role, path in inner.items():
        kind = inner_link_kind(repositories.agents[role].folder, task)
        found[role] = read_pickled_link(
            path, "inner", kind=kind, in_dim=widths[role], out_dim=widths[role]
        )
        widths[role] = link_widths(found[role].tensors)[0]
    for link in style.links:
        file, expected = outer[link.key], (widths[link.source], widths[link.target])
        for said, width, key in zip(
            (file.in_dim, file.out_dim), expected, ("in_dim", "out_dim"), strict=True
        ):
            if said not in (None, width):
                raise fail(
                    "RM208",
                    f"the {key} of `{link.key}` is {said}, but the model's width is {width}",
                    file=str(repositories.outer.folder),
                    hint="Give the outer links that were trained with these agents.",
                )
        found[link.key] = read_pickled_link(
            file.path, "outer", kind=file.kind, in_dim=expected[0], out_dim=expected[1]
        )
    return found


def _check(text: str, out: Path) -> tuple[Problem, ...]:
    """Check a spec with all its files, as `recmasc check` will; findings on layers are warnings."""
    spec = parse_spec(text, file=str(out), base_dir=out.parent)
    try:
        build_topology(spec)
    except RecmasError as error:
        if any(problem.code != _LAYERS for problem in error.problems):
            raise
        refused = tuple(
            Problem(
                code=problem.code,
                message=f"check and build will refuse this spec: {problem.message}",
                hint=problem.hint,
                severity="warning",
                file=problem.file,
                line=problem.line,
                column=problem.column,
            )
            for problem in error.problems
        )
        return (*spec.warnings, *refused)
    return spec.warnings


def _spec_text(
    style: Style,
    repositories: Repositories,
    models: Mapping[str, _Model],
    *,
    task: str,
    sources: Mapping[str, str],
    links: Mapping[str, str],
) -> str:
    """Return the YAML of the system with these backbone sources by role, and link files."""
    prompt, answer = _limits(style, models)
    origins = {role: repository.name for role, repository in repositories.agents.items()}
    origins["outer links"] = repositories.outer.name
    width = max(map(len, origins))
    # YAML reads every JSON string as it is meant; nothing in a path can break out of it.
    values = {f"{role}_source": json.dumps(s, ensure_ascii=False) for role, s in sources.items()}
    values |= {f"{role}_dtype": model.dtype for role, model in models.items()}
    values |= {f"{a.role}_inner": json.dumps(links[a.role]) for a in style.agents}
    values |= {link.key: json.dumps(links[link.key]) for link in style.links}
    header = _HEADER.format(
        style=style.name,
        task=task,
        origins="\n".join(f"#   {k:<{width}}  {_one_line(name)}" for k, name in origins.items()),
    )
    template = Path(__file__).parent / "templates" / f"{style.paradigm}.yaml"
    return Template(template.read_text("utf-8")).substitute(
        values,
        header=header,
        name=style.name,
        rounds=ROUNDS,
        latent_steps=LATENT_STEPS,
        finish=_FINISH.get(task, _FINISH_OF_OTHERS),
        limits=_LIMITS.format(prompt=prompt, answer=answer),
    )


def _one_line(name: str) -> str:
    """Return a folder's name so that it cannot leave the comment it stands in."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _limits(style: Style, models: Mapping[str, _Model]) -> tuple[int, int]:
    """Return the longest prompt and answer: small models leave less room than is wanted."""
    positions = {role: m.facts.max_positions for role, m in models.items() if m.facts is not None}
    prompt = min([_LONGEST_PROMPT, *(count // 2 for count in positions.values())])
    room = positions[style.answer] - prompt if style.answer in positions else _LONGEST_ANSWER
    return prompt, min(_LONGEST_ANSWER, room)
