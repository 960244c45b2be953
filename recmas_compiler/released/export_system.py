"""From a spec with trained links back to the released form."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from recmas_compiler.backbones.fetching.hub import Fetch
from recmas_compiler.backbones.sources import ADAPTER_CONFIG, model_files, resolve_source
from recmas_compiler.links.files import LinkFileError, link_kind, read_link_header
from recmas_compiler.links.modules import link_widths
from recmas_compiler.released.forms import form_of_kind
from recmas_compiler.released.link_tensors import read_link_file, write_pickled_link
from recmas_compiler.released.styles import (
    INNER_CONFIG,
    OUTER_CONFIG,
    ReleasedAgent,
    ReleasedLink,
    Style,
    check_task,
)
from recmas_compiler.spec.document.places import path_of
from recmas_compiler.spec.schema.sections import WeightsSection
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import fail
from recmas_runtime.core.files import check_free, placed_together
from recmas_runtime.formats.ids import link_name
from recmas_runtime.formats.link_kinds import LinkRole

_FORMAT_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A repository of the export: its links, its config, and the model's files to copy."""

    folder: str
    links: dict[str, dict[str, Tensor]]
    configs: dict[str, dict[str, Any]]
    model: tuple[Path, ...] = ()

    @property
    def files(self) -> list[str]:
        names = [*self.links, *(path.name for path in self.model), *self.configs]
        return [f"{self.folder}/{name}" for name in names]


def export_system(
    spec: Spec, style: Style, *, task: str, out: Path, with_models: bool, force: bool
) -> tuple[Path, ...]:
    """Write a system's links as the released repositories hold them.

    Args:
        spec: Its agents are called as the style's roles, its links have weights of kind
            `ln_residual` or `biased_residual`.
        out: Folder that the repositories become sub-folders of.
        with_models: Copy the models' files too, as released repositories hold them.

    Returns:
        The folders of the repositories, agents first.

    Raises:
        RecmasError: RM209 if the spec has no such form, RM208 for link files that cannot be used,
            RM302 and RM303 if `out` cannot be written.
    """
    check_task(task)
    _check_shape(spec, style)
    parts = [_agent_part(spec, style, agent, task, with_models) for agent in style.agents]
    parts.append(_outer_part(spec, style, task))
    names = [name for part in parts for name in part.files]
    check_free(out, names, force=force)
    with placed_together(out, names) as staging:
        for part in parts:
            folder = staging / part.folder
            for path in part.model:
                shutil.copyfile(path, folder / path.name)
            for name, tensors in part.links.items():
                write_pickled_link(folder / name, tensors)
            for name, config in part.configs.items():
                text = json.dumps(config, indent=2, ensure_ascii=False)
                (folder / name).write_text(f"{text}\n", encoding="utf-8")
    return tuple(out / part.folder for part in parts)


def _check_shape(spec: Spec, style: Style) -> None:
    """Refuse a spec whose agents and links are not those of the style."""
    roles = {agent.role for agent in style.agents}
    links = {(link.source, link.target): link.feedback for link in style.links}
    agents = set(spec.document.agents)
    declared = {ends: section.feedback for ends, section in spec.declared.links.items()}
    if agents != roles:
        why = f"its agents are {_list(agents)}, those of {style.name} are {_list(roles)}"
    elif declared != links:
        why = f"its links are {_list_links(declared)}, those of {style.name} {_list_links(links)}"
    else:
        return
    hint = "Choose the style that the system has, or rename the agents."
    raise fail("RM209", f"{why}.", file=_file(spec), hint=hint)


def _agent_part(
    spec: Spec, style: Style, agent: ReleasedAgent, task: str, with_models: bool
) -> _Part:
    section = spec.document.agents[agent.role]
    source = spec.document.backbones[section.backbone].source
    model = _model_name(source, style, agent)
    link = f"adapter({task}).pt"
    files = _model_files(spec, section.backbone) if with_models else ()
    shared = sorted([ADAPTER_CONFIG, *(path.name for path in files)])
    config = {
        "format_version": _FORMAT_VERSION,
        "paradigm": style.paradigm,
        "role": agent.title,
        "backbone": model,
        "shared_files": shared,
        "tasks": {task: {"adapter.pt": link, **{name: name for name in shared}}},
    }
    form, tensors = _link(spec, section.inner, "inner", f"the inner link of `{agent.role}`")
    return _Part(
        folder=f"{style.prefix}-{agent.title}-{model}",
        links={link: tensors},
        configs={ADAPTER_CONFIG: {"adapter_type": form}, INNER_CONFIG: config},
        model=files,
    )


def _outer_part(spec: Spec, style: Style, task: str) -> _Part:
    links: dict[str, dict[str, Tensor]] = {}
    adapters = []
    for link in style.links:
        section = spec.declared.links[link.source, link.target]
        name = _outer_name(style, link, task)
        what = f"the link `{link_name(link.source, link.target)}`"
        form, links[name] = _link(spec, section, "outer", what)
        in_dim, out_dim = link_widths(links[name])
        adapters.append(
            {
                "legacy_key": link.key,
                "filename": name,
                "source_role": style.agent(link.source).title,
                "target_role": style.agent(link.target).title,
                "adapter_type": form,
                "in_dim": in_dim,
                "out_dim": out_dim,
            }
        )
    config = {
        "format_version": _FORMAT_VERSION,
        "paradigm": style.paradigm,
        "tasks": {task: {"task": task, "adapters": adapters}},
    }
    return _Part(folder=style.outer_repository, links=links, configs={OUTER_CONFIG: config})


def _outer_name(style: Style, link: ReleasedLink, task: str) -> str:
    source, target = style.agent(link.source).title, style.agent(link.target).title
    return f"{source}-{target}-Outerlink({task}).pt"


def _link(
    spec: Spec, section: WeightsSection, role: LinkRole, what: str
) -> tuple[str, dict[str, Tensor]]:
    """Return what the trainer calls a link's kind, and its tensors as its file holds them."""
    if section.weights is None:
        hint = "Train it first: only links with `weights` can be exported."
        raise fail("RM209", f"{what} has no weights", file=_file(spec), hint=hint)
    path = path_of(section.weights, spec.base_dir)
    try:
        kind = link_kind(read_link_header(path), role)
    except LinkFileError as error:
        hint = "Correct its path in the spec, or train the link anew."
        raise fail("RM208", f"{what} cannot be read: {error}", file=str(path), hint=hint) from error
    form = form_of_kind(kind, role)
    if form is None:
        hint = "The released form knows links of kind `ln_residual` and `biased_residual` only."
        raise fail("RM209", f"{what} is of kind `{kind}`", file=str(path), hint=hint)
    return form, read_link_file(path, role, kind)


def _model_name(source: str, style: Style, agent: ReleasedAgent) -> str:
    """Return the end of a repository's name: the model's own name."""
    name = source.removeprefix("hf:").removeprefix("builtin:").partition("@")[0]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).name).strip("-.")
    return name.removeprefix(f"{style.prefix}-{agent.title}-") or "Model"


def _model_files(spec: Spec, backbone: str) -> tuple[Path, ...]:
    source = spec.document.backbones[backbone].source
    place = spec.position("backbones", backbone, "source")
    resolved = resolve_source(source, base_dir=spec.base_dir, position=place, fetch=Fetch())
    if resolved.gguf_file is not None:
        hint = "Leave out --with-models, or use a backbone that is a Hugging Face folder."
        message = f"the model `{source}` is a GGUF file, no Hugging Face folder to copy"
        raise fail("RM209", message, file=_file(spec), hint=hint)
    return model_files(resolved.folder)


def _list(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _list_links(links: dict[tuple[str, str], bool]) -> str:
    return ", ".join(
        f"`{link_name(source, target)}`{' (feedback)' if is_feedback else ''}"
        for (source, target), is_feedback in sorted(links.items())
    )


def _file(spec: Spec) -> str | None:
    return None if spec.path is None else str(spec.path)
