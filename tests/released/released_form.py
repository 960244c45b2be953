"""Repositories in exactly the released form, with tiny models and random links."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.models import COMMON_DIMS, write_tiny_backbone
from kit.zoo import write_zoo_model
from recmas_compiler.links.modules import make_link, randomize
from recmas_compiler.released.styles import Style
from recmas_runtime.formats.link_kinds import LinkKind

# role -> family and width of the tiny model in its place
MODELS = {
    "planner": ("qwen3", 32),
    "critic": ("llama", 48),
    "solver": ("qwen2", 64),
    "math": ("qwen2", 48),
    "code": ("qwen3", 32),
    "science": ("mistral", 64),
    "summarizer": ("llama", 48),
    "expert": ("gemma3", 64),
    "learner": ("llama", 32),
    "reflector": ("qwen3", 48),
    "toolcaller": ("qwen3", 48),
}

# The two forms that were released: links of every task beside each other, or one for all tasks.
BY_TASK = ("sequential", "distillation")

Links = dict[str, dict[str, Tensor]]
Release = Callable[[str], tuple[Path, Links]]


def write_release(
    root: Path,
    style: Style,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kind: LinkKind = "ln_residual",
    types: Mapping[str, str] | None = None,
) -> Links:
    """Write a style's repositories; returns its links for the task math, by role and by key.

    Args:
        types: Rows of the zoo by role, instead of the usual tiny models.
    """
    widths = {role: width for role, (_, width) in MODELS.items()}
    if types is not None:
        widths |= dict.fromkeys(types, COMMON_DIMS["hidden_size"])
    form = {"ln_residual": "ln_res_adapter", "biased_residual": "res_adapter"}[kind]
    links: Links = {}
    tasks = ("math", "code") if style.paradigm in BY_TASK else ("",)
    for seed, agent in enumerate(style.agents):
        folder = root / style.agent_repository(agent.role)
        width = widths[agent.role]
        if types is None:
            write_tiny_backbone(folder, MODELS[agent.role][0], seed=seed, hidden_size=width)
        else:
            write_zoo_model(folder, types[agent.role], seed=seed)
        narrow_model(folder, dtype)
        write_json(folder / "adapter_config.json", {"adapter_type": form})
        (folder / "README.md").write_text("A released agent.\n")
        for task in reversed(tasks):
            state = random_link("inner", width, width, f"{task}{agent.role}", dtype, kind)
            torch.save(state, folder / (f"adapter({task}).pt" if task else "adapter.pt"))
            links[agent.role] = dict(state)
        if style.paradigm in BY_TASK:
            write_json(folder / "innerlink_config.json", inner_config(style, agent.title, tasks))
    outer = root / style.outer_repository
    outer.mkdir()
    by_task: dict[str, Any] = {}
    for task in reversed(tasks):
        adapters = []
        for link in style.links:
            in_dim, out_dim = widths[link.source], widths[link.target]
            suffix = f"({task})" if task else ""
            source, target = link.source.capitalize(), link.target.capitalize()
            name = f"{source}-{target}-Outerlink{suffix}.pt"
            state = random_link("outer", in_dim, out_dim, f"{task}{link.key}", dtype, kind)
            torch.save(state, outer / name)
            links[link.key] = dict(state)
            adapters.append(
                {
                    "legacy_key": link.key,
                    "filename": name,
                    "source_role": source,
                    "target_role": target,
                    "adapter_type": f"outer_{form}",
                    "in_dim": in_dim,
                    "out_dim": out_dim,
                }
            )
        by_task[task] = {"task": task, "adapters": adapters}
    head = {"format_version": 1, "paradigm": style.paradigm}
    body = {"tasks": by_task} if style.paradigm in BY_TASK else {"adapters": adapters}
    write_json(outer / "outerlink_config.json", head | body)
    return links


def narrow_model(folder: Path, dtype: torch.dtype) -> None:
    """Store a model's weights as released ones are."""
    weights = {name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    edit_json(folder / "config.json", lambda config: config.update(dtype=name))


def inner_config(style: Style, title: str, tasks: tuple[str, ...]) -> dict[str, Any]:
    shared = ["adapter_config.json", "config.json", "model.safetensors", "tokenizer.json"]
    return {
        "format_version": 1,
        "paradigm": style.paradigm,
        "role": title,
        "shared_files": shared,
        "tasks": {
            task: {"adapter.pt": f"adapter({task}).pt", **{name: name for name in shared}}
            for task in tasks
        },
    }


def random_link(
    role: Any, in_dim: int, out_dim: int, link_id: str, dtype: torch.dtype, kind: LinkKind
) -> dict[str, Tensor]:
    """Return a state dict as torch saves it, with the metadata of its modules."""
    link = make_link(kind, role, in_dim, out_dim)
    randomize(link, link_id=link_id)
    return link.to(dtype).state_dict()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def edit_json(path: Path, edit: Any) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    edit(value)
    write_json(path, value)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def copy_tree(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
