"""Everything that can be wrong with a released system: named by code and file, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.commands import run_recmasc
from recmas_compiler.links.modules import make_link, save_link
from recmas_runtime.core.errors import CODES
from released_form import Release, edit_json, files_in, write_json

PLANNER = "Sequential-Light-Planner-Qwen3-1.7B"
CRITIC = "Sequential-Light-Critic-Llama3.2-1B"
SOLVER = "Sequential-Light-Solver-Qwen2.5-Math-1.5B"
OUTER = "Sequential-Light-Outerlinks"
INNER_LINK = f"{PLANNER}/adapter(math).pt"
OUTER_LINK = f"{OUTER}/Planner-Critic-Outerlink(math).pt"


class Touch:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a `.pt` file."""
    state = load(path)
    edit(state)
    torch.save(state, path)


def outer_entry(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the entry of the planner's link to the critic."""
    edit_json(
        root / OUTER / "outerlink_config.json", lambda c: edit(c["tasks"]["math"]["adapters"][0])
    )


def with_nan(state: dict[str, Any]) -> None:
    state["proj1.weight"][0, 0] = float("nan")


def pack(path: Path) -> None:
    """Compress a `.pt` file's entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def copy(root: Path, source: str, target: str) -> None:
    shutil.copytree(root / source, root / target)


def replace(path: Path, value: object) -> None:
    torch.save(value, path)


@dataclass(frozen=True)
class Case:
    """A way to spoil sequential_light, and what is said about it."""

    code: str
    names: str
    says: str
    spoil: Callable[[Path], object] = lambda root: None
    options: tuple[str, ...] = ()
    style: str = "sequential_light"


CASES = {
    "unknown_style": Case(
        "RM506", "", "Did you mean `sequential_light`?", style="sequential-light"
    ),
    "missing_repository": Case(
        "RM207",
        "light",
        f"no repository of the critic (released as `{CRITIC}`). It holds `{OUTER}`, `{PLANNER}`",
        lambda root: shutil.rmtree(root / CRITIC),
    ),
    "missing_outer_links": Case(
        "RM207", "light", "of the outer links", lambda root: shutil.rmtree(root / OUTER)
    ),
    "another_style": Case(
        "RM207",
        "light",
        "no repository of the expert (released as `Distillation-Expert-Qwen3.5-9B`)",
        style="distillation",
    ),
    "ambiguous_repository": Case(
        "RM207",
        "light",
        f"several repositories that could be the critic: `{CRITIC}`, `{CRITIC}-v2`",
        lambda root: copy(root, CRITIC, f"{CRITIC}-v2"),
    ),
    "no_such_folder": Case("RM207", "light", "no such folder", shutil.rmtree),
    "no_config": Case(
        "RM207", PLANNER, "no config.json", lambda root: (root / PLANNER / "config.json").unlink()
    ),
    "no_outer_config": Case(
        "RM207",
        OUTER,
        "no outerlink_config.json",
        lambda root: (root / OUTER / "outerlink_config.json").unlink(),
    ),
    "missing_inner_link": Case(
        "RM207",
        PLANNER,
        'no file "adapter(math).pt", which innerlink_config.json names',
        lambda root: (root / INNER_LINK).unlink(),
    ),
    "missing_outer_link": Case(
        "RM207",
        OUTER,
        'no file "Planner-Critic-Outerlink(math).pt"',
        lambda root: (root / OUTER_LINK).unlink(),
    ),
    "unknown_task": Case(
        "RM207",
        PLANNER,
        "no inner link for the task `chemistry`. Choose another --task. Known here: `code`, `math`",
        options=("--task", "chemistry"),
    ),
    "task_that_is_a_path": Case(
        "RM506", "", "no name of a task", options=("--task", "../../etc/passwd")
    ),
    "task_that_breaks_out_of_its_comment": Case(
        "RM506", "", "no name of a task", options=("--task", "math\nname: x")
    ),
    "outer_task_missing": Case(
        "RM207",
        "outerlink_config.json",
        "no outer links for the task `math`",
        lambda root: edit_json(
            root / OUTER / "outerlink_config.json", lambda c: c["tasks"].pop("math")
        ),
    ),
    "inner_config_not_json": Case(
        "RM208",
        "innerlink_config.json",
        "it is not JSON",
        lambda root: (root / PLANNER / "innerlink_config.json").write_text("{"),
    ),
    "inner_config_not_text": Case(
        "RM208",
        "innerlink_config.json",
        "it is not JSON",
        lambda root: (root / PLANNER / "innerlink_config.json").write_bytes(b"\xff\xfe\x00"),
    ),
    "inner_config_a_list": Case(
        "RM208",
        "innerlink_config.json",
        "it is not a JSON object",
        lambda root: (root / PLANNER / "innerlink_config.json").write_text("[]"),
    ),
    "inner_config_endless": Case(
        "RM208",
        "innerlink_config.json",
        "larger than",
        lambda root: (root / PLANNER / "innerlink_config.json").write_text("[" * (2 << 20)),
    ),
    "outer_config_not_json": Case(
        "RM208",
        "outerlink_config.json",
        "it is not JSON",
        lambda root: (root / OUTER / "outerlink_config.json").write_text("adapters:"),
    ),
    "outer_config_without_links": Case(
        "RM208",
        "outerlink_config.json",
        "`adapters` is not a list",
        lambda root: (root / OUTER / "outerlink_config.json").write_text("{}"),
    ),
    "inner_path_escapes": Case(
        "RM208",
        "innerlink_config.json",
        '..." is not the name of a file beside it',
        lambda root: edit_json(
            root / PLANNER / "innerlink_config.json",
            lambda c: c["tasks"]["math"].update({"adapter.pt": f"../{CRITIC}/adapter(math).pt"}),
        ),
    ),
    "outer_path_escapes": Case(
        "RM208",
        "outerlink_config.json",
        "is not the name of a file beside it",
        lambda root: outer_entry(root, lambda e: e.update(filename=f"..\\{e['filename']}")),
    ),
    "outer_path_absolute": Case(
        "RM208",
        "outerlink_config.json",
        "is not the name of a file beside it",
        lambda root: outer_entry(root, lambda e: e.update(filename=str(root / OUTER_LINK))),
    ),
    "outer_path_not_text": Case(
        "RM208",
        "outerlink_config.json",
        "is not the name of a file beside it",
        lambda root: outer_entry(root, lambda e: e.update(filename=["x.pt"])),
    ),
    "unknown_key": Case(
        "RM208",
        "outerlink_config.json",
        'sequential_light has no link "outer_13". Did you mean `outer_31`?',
        lambda root: outer_entry(root, lambda e: e.update(legacy_key="outer_13")),
    ),
    "key_twice": Case(
        "RM208",
        "outerlink_config.json",
        "it names `outer_23` twice",
        lambda root: outer_entry(root, lambda e: e.update(legacy_key="outer_23")),
    ),
    "key_missing": Case(
        "RM207",
        "outerlink_config.json",
        "it names no file for `outer_12` (planner to critic)",
        lambda root: edit_json(
            root / OUTER / "outerlink_config.json", lambda c: c["tasks"]["math"]["adapters"].pop(0)
        ),
    ),
    "unknown_form": Case(
        "RM208",
        "outerlink_config.json",
        '`outer_12` is of the form "lora", not `outer_ln_res_adapter` or `outer_res_adapter`',
        lambda root: outer_entry(root, lambda e: e.update(adapter_type="lora")),
    ),
    "form_without_a_kind": Case(
        "RM208",
        "adapter_config.json",
        'the inner link is of the form "linear_res_adapter", not `ln_res_adapter` or `res_adapter`',
        lambda root: write_json(
            root / PLANNER / "adapter_config.json", {"adapter_type": "linear_res_adapter"}
        ),
    ),
    "form_of_another_link": Case(
        "RM208",
        "adapter(math).pt",
        "it has a tensor `pre_ln.weight`, which biased_residual inner links do not have",
        lambda root: write_json(
            root / PLANNER / "adapter_config.json", {"adapter_type": "res_adapter"}
        ),
    ),
    "width_of_another_model": Case(
        "RM208",
        OUTER,
        "the in_dim of `outer_12` is 128, but the model's width is 32",
        lambda root: outer_entry(root, lambda e: e.update(in_dim=128)),
    ),
    "width_not_a_number": Case(
        "RM208",
        "outerlink_config.json",
        "`in_dim` is true",
        lambda root: outer_entry(root, lambda e: e.update(in_dim=True)),
    ),
    "not_a_pickle": Case(
        "RM208",
        INNER_LINK,
        "it is not a file of torch.save",
        lambda root: (root / INNER_LINK).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
    ),
    "empty_file": Case(
        "RM208",
        INNER_LINK,
        "it is not a file of torch.save",
        lambda root: (root / INNER_LINK).write_bytes(b""),
    ),
    "cut_off": Case(
        "RM208",
        OUTER_LINK,
        "cannot be used",
        lambda root: (root / OUTER_LINK).write_bytes((root / OUTER_LINK).read_bytes()[:5000]),
    ),
    "packed": Case("RM208", INNER_LINK, "it is packed", lambda root: pack(root / INNER_LINK)),
    "pickle_with_code": Case(
        "RM208",
        INNER_LINK,
        "it is not a plain state dict",
        lambda root: replace(root / INNER_LINK, Touch(root.parent / "ran")),
    ),
    "code_among_tensors": Case(
        "RM208",
        OUTER_LINK,
        "it is not a plain state dict",
        lambda root: replace(
            root / OUTER_LINK, load(root / OUTER_LINK) | {"more": Touch(root.parent / "ran")}
        ),
    ),
    "bare_pickle_with_code": Case(
        "RM208",
        INNER_LINK,
        "it is not a file of torch.save",
        lambda root: (root / INNER_LINK).write_bytes(pickle.dumps(Touch(root.parent / "ran"))),
    ),
    "a_whole_module": Case(
        "RM208",
        INNER_LINK,
        "it is not a plain state dict",
        lambda root: replace(root / INNER_LINK, torch.nn.Linear(2, 2)),
    ),
    "nested": Case(
        "RM208",
        INNER_LINK,
        "`state_dict` is a dict, not a tensor",
        lambda root: replace(root / INNER_LINK, {"state_dict": load(root / INNER_LINK)}),
    ),
    "a_list": Case(
        "RM208",
        INNER_LINK,
        "not a plain state dict but a list",
        lambda root: replace(root / INNER_LINK, [torch.zeros(2)]),
    ),
    "keys_not_text": Case(
        "RM208",
        INNER_LINK,
        "it has a key 0",
        lambda root: replace(root / INNER_LINK, {0: torch.zeros(2)}),
    ),
    "empty_dict": Case(
        "RM208",
        INNER_LINK,
        "it has no matrix `proj1.weight`",
        lambda root: replace(root / INNER_LINK, OrderedDict()),
    ),
    "tensor_missing": Case(
        "RM208",
        INNER_LINK,
        "it has no tensor `post_ln.bias`",
        lambda root: change(root / INNER_LINK, lambda s: s.pop("post_ln.bias")),
    ),
    "tensor_renamed": Case(
        "RM208",
        INNER_LINK,
        "it has no tensor `pre_ln.weight`",
        lambda root: change(
            root / INNER_LINK, lambda s: s.update({"norm.weight": s.pop("pre_ln.weight")})
        ),
    ),
    "tensor_too_many": Case(
        "RM208",
        OUTER_LINK,
        "it has a tensor `proj3.weight`",
        lambda root: change(
            root / OUTER_LINK, lambda s: s.update({"proj3.weight": torch.zeros(2)})
        ),
    ),
    "wrong_shape": Case(
        "RM208",
        INNER_LINK,
        "`proj2.bias` is [7], but [32] is needed",
        lambda root: change(root / INNER_LINK, lambda s: s.update({"proj2.bias": torch.zeros(7)})),
    ),
    "link_of_another_agent": Case(
        "RM208",
        INNER_LINK,
        "is needed",
        lambda root: shutil.copy(root / CRITIC / "adapter(math).pt", root / INNER_LINK),
    ),
    "whole_numbers": Case(
        "RM208",
        INNER_LINK,
        "`proj2.bias` is stored as int64",
        lambda root: change(
            root / INNER_LINK, lambda s: s.update({"proj2.bias": torch.zeros(32, dtype=torch.long)})
        ),
    ),
    "sparse": Case(
        "RM208",
        INNER_LINK,
        "no plain tensor",
        lambda root: change(
            root / INNER_LINK,
            lambda s: s.update({"proj2.weight": torch.eye(32).to_sparse()}),
        ),
    ),
    "without_data": Case(
        "RM208",
        INNER_LINK,
        "no plain tensor",
        lambda root: change(
            root / INNER_LINK,
            lambda s: s.update({"proj2.weight": torch.empty(32, 32, device="meta")}),
        ),
    ),
    "one_number_for_all": Case(
        "RM208",
        INNER_LINK,
        "its size is not that of its tensors",
        lambda root: replace(
            root / INNER_LINK,
            {k: torch.zeros(1).expand(t.shape) for k, t in load(root / INNER_LINK).items()},
        ),
    ),
    "huge_baggage": Case(
        "RM208",
        INNER_LINK,
        "its size is not that of its tensors",
        lambda root: change(
            root / INNER_LINK,
            lambda s: s.update({"proj2.bias": torch.zeros(1 << 20)[:32]}),
        ),
    ),
    "not_a_number": Case(
        "RM208",
        OUTER_LINK,
        "`proj1.weight` holds NaN or infinity",
        lambda root: change(root / OUTER_LINK, with_nan),
    ),
    "unknown_role": Case("RM506", "", "no agent `judge`", options=("--agent", "judge=somewhere")),
    "agent_without_folder": Case("RM506", "", "names no folder", options=("--agent", "planner")),
    "agent_twice": Case(
        "RM506", "", "given twice", options=("--agent", "planner=a", "--agent", "planner=b")
    ),
    "agent_in_no_folder": Case(
        "RM207", "nowhere", "no such folder", options=("--agent", "planner=nowhere")
    ),
    "outer_in_no_folder": Case(
        "RM207", "nowhere", "no such folder", options=("--outer", "nowhere")
    ),
    "model_config_not_json": Case(
        "RM202",
        "",
        "its config.json is not JSON",
        lambda root: (root / SOLVER / "config.json").write_text("{"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_malformed_releases(name: str, light: Path, tmp_path: Path) -> None:
    case = CASES[name]
    case.spoil(light)
    place = tmp_path / "made"
    ran = run_recmasc(
        *("import", "released", case.style, "--from", light, "--json"),
        *("-o", place / "spec.yaml", "--quiet", *case.options),
    )
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem["code"] == case.code
    assert ran.exit_code == CODES[case.code][0]
    assert case.says in f"{problem['message']}. {problem['hint']}"
    assert problem["hint"].endswith((".", "?"))
    assert (problem["file"] or "").endswith(case.names)
    assert not place.exists()
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def spec(release: Release, tmp_path: Path) -> Path:
    """An imported deliberation system."""
    folder, _ = release("deliberation")
    path = tmp_path / "made" / "spec.yaml"
    ran = run_recmasc("import", "released", "deliberation", "--from", folder, "-o", path, "--quiet")
    assert ran.exit_code == 0, ran.output
    return path


def edit(spec: Path, old: str, new: str) -> None:
    text = spec.read_text()
    assert old in text
    spec.write_text(text.replace(old, new))


def save_projected(spec: Path) -> None:
    link = make_link("projected", "inner", 48, 48)
    save_link(spec.parent / "links" / "reflector.inner.safetensors", link)


ONE_WAY = """
recmas: 1
name: one-way
backbones: {tiny: {source: tiny}}
agents:
  reflector: {backbone: tiny, prompt: "{{ question }}"}
  toolcaller: {backbone: tiny, prompt: "{{ question }} {{ latent.reflector }}"}
links: {reflector -> toolcaller: {}}
answer: {agent: toolcaller}
"""

INNER = '{weights: "links/reflector.inner.safetensors"}'

EXPORTS: dict[str, tuple[str, str, str, Callable[[Path], object], tuple[str, ...]]] = {
    "unknown_style": (
        *("RM506", "", "no released style `dialogue`", lambda spec: None),
        ("--style", "dialogue"),
    ),
    "another_style": (
        *("RM209", "spec.yaml", "those of distillation are `expert`, `learner`", lambda spec: None),
        ("--style", "distillation"),
    ),
    "another_graph": (
        *("RM209", "spec.yaml", "its links are `reflector -> toolcaller`, those of deliberation"),
        lambda spec: spec.write_text(ONE_WAY),
        ("--style", "deliberation"),
    ),
    "untrained": (
        *("RM209", "spec.yaml", "the inner link of `reflector` has no weights"),
        lambda spec: edit(spec, INNER, "{kind: ln_residual, init: random}"),
        ("--style", "deliberation"),
    ),
    "another_kind": (
        *("RM209", "reflector.inner.safetensors", "is of kind `projected`", save_projected),
        ("--style", "deliberation"),
    ),
    "missing_link": (
        *("RM208", "toolcaller-reflector.safetensors", "there is no such file"),
        lambda spec: (spec.parent / "links" / "toolcaller-reflector.safetensors").unlink(),
        ("--style", "deliberation"),
    ),
    "cut_off_link": (
        *("RM208", "reflector.inner.safetensors", "cannot be read"),
        lambda spec: (spec.parent / "links" / "reflector.inner.safetensors").write_bytes(b"x" * 90),
        ("--style", "deliberation"),
    ),
    "task_that_is_a_path": (
        *("RM506", "", "no name of a task", lambda spec: None),
        ("--style", "deliberation", "--task", "../math"),
    ),
    "models_that_are_not_there": (
        *("RM200", "spec.yaml", "does not exist"),
        lambda spec: edit(spec, 'reflector: {source: "', 'reflector: {source: "gone/'),
        ("--style", "deliberation", "--with-models"),
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_that_cannot_be(name: str, spec: Path, tmp_path: Path) -> None:
    code, names, says, spoil, options = EXPORTS[name]
    spoil(spec)
    ran = run_recmasc("export-links", spec, "-o", tmp_path / "out", *options, "--json")
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem["code"] == code
    assert ran.exit_code == CODES[code][0]
    assert says in problem["message"]
    assert (problem["file"] or "").endswith(names)
    assert not (tmp_path / "out").exists()


def test_nothing_stays_where_nothing_can_be_written(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while links are moved leaves no spec that names missing links."""
    folder, _ = release("deliberation")
    moved: list[str] = []
    replace_file = Path.replace

    def full_after_two(self: Path, target: Path) -> Path:
        if len(moved) == 2:
            raise OSError(28, "No space left on device", str(target))
        moved.append(Path(target).name)
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", full_after_two)
    arguments = ("deliberation", "--from", folder, "-o", tmp_path / "spec.yaml")
    ran = run_recmasc("import", "released", *arguments, "--json", "--quiet")
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem["code"] == "RM303"
    assert not (tmp_path / "spec.yaml").exists()
    assert not [name for name in files_in(tmp_path) if name.startswith(".")]


def test_a_folder_in_the_specs_place_stays(release: Release, tmp_path: Path) -> None:
    folder, _ = release("deliberation")
    (tmp_path / "spec.yaml").mkdir()
    arguments = ("deliberation", "--from", folder, "-o", tmp_path / "spec.yaml", "--force")
    ran = run_recmasc("import", "released", *arguments, "--json", "--quiet")
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem["code"] == "RM302"
    assert files_in(tmp_path) == {}
