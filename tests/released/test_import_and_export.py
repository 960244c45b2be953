"""Released systems come in, check, run, and go out again with the very same tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu

import recmas_runtime as rt
from kit.bundles import Built
from kit.commands import Ran, run_recmasc
from kit.models import write_tiny_backbone
from recmas_compiler import api
from recmas_compiler.backbones.sources import describe_backbone, resolve_source
from recmas_compiler.backbones.torch_model import load_backbone
from recmas_compiler.links.modules import load_link
from recmas_compiler.released.styles import STYLES
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.errors import Exit
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.links import load_operands
from recmas_runtime.formats.manifest import LinkEntry
from released_form import Release, copy_tree, edit_json, files_in, narrow_model, write_release

RECORDS: list[dict[str, object]] = [
    {"id": "1", "question": "What is 7 * 8?"},
    {"id": "2", "question": "Anna has three plans. Which is the best one, and why?"},
]


def imported(style: str, folder: Path, out: Path, *more: object) -> Ran:
    ran = run_recmasc("import", "released", style, "--from", folder, "-o", out, "--quiet", *more)
    assert ran.exit_code == Exit.OK, ran.output
    return ran


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("name", STYLES)
def test_every_style_comes_in_and_goes_out(name: str, release: Release, tmp_path: Path) -> None:
    folder, links = release(name)
    style, spec = STYLES[name], tmp_path / "made" / "spec.yaml"
    ran = imported(name, folder, spec, "--json")
    data = json.loads(ran.stdout)["data"]
    assert data["path"] == str(spec)
    assert len(data["links"]) == len(style.agents) + len(style.links)
    assert run_recmasc("check", spec).exit_code == Exit.OK

    found = {Path(path).name: load_file(path) for path in data["links"]}
    for agent in style.agents:
        ours = found[f"{agent.role}.inner.safetensors"]
        assert ours.keys() == links[agent.role].keys()
        assert all(same_bytes(ours[key], links[agent.role][key]) for key in ours)

    document = load_spec(spec).document
    assert (document.rounds, document.latent_steps) == (3, 80)
    assert document.answer.agent == style.answer
    assert {backbone.dtype for backbone in document.backbones.values()} == {"bfloat16"}
    assert list(document.agents) == [agent.role for agent in style.agents]

    out = tmp_path / "again"
    ran = run_recmasc("export-links", spec, "-o", out, "--style", name, "--with-models")
    assert ran.exit_code == Exit.OK, ran.output
    released = {agent.role: style.agent_repository(agent.role) for agent in style.agents}
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*released.values(), style.outer_repository]
    )
    for role, repository in released.items():
        config = json.loads((out / repository / "innerlink_config.json").read_text())
        state = torch.load(
            out / repository / config["tasks"]["math"]["adapter.pt"], weights_only=True
        )
        assert state.keys() == links[role].keys()
        assert all(same_bytes(state[key], links[role][key]) for key in state)
        weights = "model.safetensors"
        assert (out / repository / weights).read_bytes() == (
            folder / repository / weights
        ).read_bytes()
    outer = out / style.outer_repository
    config = json.loads((outer / "outerlink_config.json").read_text())
    entries = config["tasks"]["math"]["adapters"]
    assert [entry["legacy_key"] for entry in entries] == [link.key for link in style.links]
    for entry in entries:
        state = torch.load(outer / entry["filename"], weights_only=True)
        expected = links[entry["legacy_key"]]
        assert state.keys() == expected.keys()
        assert all(same_bytes(state[key], expected[key]) for key in state)
        assert (entry["in_dim"], entry["out_dim"]) == (
            expected["proj1.weight"].shape[1],
            expected["proj2.weight"].shape[0],
        )

    # What was written is in the released form: it comes in again, to the same links.
    second = tmp_path / "second" / "spec.yaml"
    imported(name, out, second)
    for path in sorted((tmp_path / "made" / "links").iterdir()):
        again = load_file(second.parent / "links" / path.name)
        assert all(same_bytes(again[key], tensor) for key, tensor in load_file(path).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_element_types_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    style = STYLES["deliberation"]
    links = write_release(tmp_path / "released", style, dtype=dtype)
    imported(style.name, tmp_path / "released", tmp_path / "spec.yaml")
    path = tmp_path / "links" / "reflector-toolcaller.safetensors"
    assert all(same_bytes(t, links["outer_rt"][key]) for key, t in load_file(path).items())
    widths = links["outer_rt"]["proj1.weight"].shape[1], links["outer_rt"]["proj2.weight"].shape[0]
    # The reference computes in float32, on the very same numbers.
    link = load_link(path, "ln_residual", "outer", *widths)
    assert torch.equal(link.proj1.weight, links["outer_rt"]["proj1.weight"].float())


def drop_forms(folder: Path) -> None:
    """Take away what says the links' forms."""
    for config in folder.rglob("adapter_config.json"):
        config.unlink()
    for config in folder.rglob("outerlink_config.json"):
        edit_json(config, lambda c: [entry.pop("adapter_type") for entry in c["adapters"]])


@pytest.mark.parametrize("is_said", [True, False])
def test_links_of_the_trainers_default_form(is_said: bool, tmp_path: Path) -> None:
    """Two linear layers with biases beside a residual: `res_adapter` and `outer_res_adapter`."""
    style, spec = STYLES["deliberation"], tmp_path / "spec.yaml"
    released = tmp_path / "released"
    links = write_release(released, style, dtype=torch.float32, kind="biased_residual")
    if not is_said:
        drop_forms(released)
    imported(style.name, released, spec)
    assert run_recmasc("check", spec).exit_code == Exit.OK
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    for name, key in (("reflector.inner", "reflector"), ("reflector-toolcaller", "outer_rt")):
        w, path = links[key], tmp_path / "links" / f"{name}.safetensors"
        role = "inner" if key == "reflector" else "outer"
        branch = gelu(hidden @ w["proj1.weight"].T + w["proj1.bias"])
        expected = branch @ w["proj2.weight"].T + w["proj2.bias"] + hidden
        if role == "outer":
            expected += hidden @ w["residual_proj.weight"].T + w["residual_proj.bias"] - hidden
        link = load_link(path, "biased_residual", role, 48, 48)
        torch.testing.assert_close(link(hidden), expected)
        entry = LinkEntry(
            file=path.name, kind="biased_residual", role=role, in_dim=48, out_dim=48, init="file"
        )
        x = {name: torch.from_numpy(value) for name, value in load_operands(path, entry).items()}
        mapped = gelu(hidden @ x["w1"] + x["b1"]) @ x["w2"] + hidden @ x["w3"] + x["bias"]
        torch.testing.assert_close(mapped, expected)
    again = tmp_path / "again"
    ran = run_recmasc("export-links", spec, "-o", again, "--style", style.name)
    assert ran.exit_code == Exit.OK, ran.output
    forms = {
        json.loads(path.read_text())["adapter_type"] for path in again.rglob("adapter_config.json")
    }
    assert forms == {"res_adapter"}
    outer = json.loads((again / style.outer_repository / "outerlink_config.json").read_text())
    adapters = outer["tasks"]["math"]["adapters"]
    assert {entry["adapter_type"] for entry in adapters} == {"outer_res_adapter"}


def test_links_refuse_other_backbones(release: Release, tmp_path: Path) -> None:
    folder, _ = release("deliberation")
    spec = tmp_path / "spec.yaml"
    imported("deliberation", folder, spec)
    with safe_open(tmp_path / "links" / "reflector-toolcaller.safetensors", "pt") as file:
        metadata = file.metadata()
    for end, name in (("source", "Reflector"), ("target", "Toolcaller")):
        backbone = resolve_source(f"Deliberation-{name}-Qwen3.5-4B", base_dir=folder)
        assert metadata[end] == backbone.identity
    assert metadata["kind"] == "ln_residual"
    swapped = spec.read_text().replace("reflector.inner", "toolcaller.inner", 1)
    spec.write_text(swapped)
    assert "RM120" in run_recmasc("check", spec).output


def test_the_task_chooses_the_links(release: Release, tmp_path: Path) -> None:
    folder, links = release("sequential_light")
    imported("sequential_light", folder, tmp_path / "spec.yaml", "--task", "code")
    ours = load_file(tmp_path / "links" / "planner.inner.safetensors")
    expected = torch.load(
        folder / "Sequential-Light-Planner-Qwen3-1.7B" / "adapter(code).pt", weights_only=True
    )
    assert all(same_bytes(ours[key], expected[key]) for key in ours)
    assert not same_bytes(ours["proj1.weight"], links["planner"]["proj1.weight"])
    assert "block of code" in (tmp_path / "spec.yaml").read_text()


def test_one_link_for_all_tasks(release: Release, tmp_path: Path) -> None:
    """Repositories without `innerlink_config.json` serve every task."""
    imported("mixture", release("mixture")[0], tmp_path / "spec.yaml", "--task", "code")
    assert run_recmasc("check", tmp_path / "spec.yaml").exit_code == Exit.OK


def test_repositories_named_one_by_one(light: Path, tmp_path: Path) -> None:
    moved = (light / "Sequential-Light-Critic-Llama3.2-1B").rename(tmp_path / "someone")
    outer = (light / "Sequential-Light-Outerlinks").rename(tmp_path / "bridges")
    ran = imported(
        *("sequential_light", light, tmp_path / "spec.yaml"),
        *("--agent", f"critic={moved}", "--outer", outer),
    )
    assert "7 links" not in ran.output
    assert run_recmasc("check", tmp_path / "spec.yaml").exit_code == Exit.OK
    assert 'source: "./someone"' in (tmp_path / "spec.yaml").read_text()


def test_names_in_any_case(light: Path, tmp_path: Path) -> None:
    (light / "Sequential-Light-Critic-Llama3.2-1B").rename(light / "sequential-light-critic")
    imported("sequential_light", light, tmp_path / "spec.yaml")


def test_existing_files_are_replaced_only_by_force(release: Release, tmp_path: Path) -> None:
    folder, _ = release("deliberation")
    imported("deliberation", folder, tmp_path / "spec.yaml")
    (tmp_path / "spec.yaml").write_text("mine")
    before = files_in(tmp_path)
    arguments = ("deliberation", "--from", folder, "-o", tmp_path / "spec.yaml")
    ran = run_recmasc("import", "released", *arguments)
    assert ran.exit_code == Exit.USAGE
    assert "RM302" in ran.output
    assert files_in(tmp_path) == before
    imported("deliberation", folder, tmp_path / "spec.yaml", "--force")
    assert run_recmasc("check", tmp_path / "spec.yaml").exit_code == Exit.OK
    out = tmp_path / "released"
    export = ("export-links", tmp_path / "spec.yaml", "-o", out, "--style", "deliberation")
    assert run_recmasc(*export).exit_code == Exit.OK
    assert "RM302" in run_recmasc(*export).output
    assert run_recmasc(*export, "--force").exit_code == Exit.OK


def test_a_model_that_recmas_refuses_comes_in_with_a_warning(
    release: Release, tmp_path: Path
) -> None:
    folder = copy_tree(release("deliberation")[0], tmp_path / "released")

    def unknown(config: dict[str, object]) -> None:
        layers = config["num_hidden_layers"]
        assert isinstance(layers, int)
        config["layer_types"] = ["gated_delta"] * (layers - 1) + ["full_attention"]

    edit_json(folder / "Deliberation-Toolcaller-Qwen3.5-4B" / "config.json", unknown)
    ran = imported("deliberation", folder, tmp_path / "spec.yaml", "--json")
    (problem,) = json.loads(ran.stdout)["problems"]
    assert (problem["code"], problem["severity"]) == ("RM203", "warning")
    assert "check and build will refuse" in problem["message"]
    assert "gated_delta" in problem["message"]
    refused = run_recmasc("check", tmp_path / "spec.yaml")
    assert refused.exit_code == Exit.ENVIRONMENT
    assert "gated_delta" in refused.output


def test_transformers_sees_only_the_model(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An `adapter_config.json` makes loaders look for PEFT weights, so it is kept from them."""
    folder, _ = release("deliberation")
    repository = folder / "Deliberation-Reflector-Qwen3.5-4B"
    plain = write_tiny_backbone(tmp_path / "plain", "qwen3", seed=0, hidden_size=48)
    narrow_model(plain, torch.bfloat16)
    from recmas_compiler.backbones import own_tokenizer, torch_model

    shown: list[set[str]] = []
    for loader in (torch_model.AutoModelForCausalLM, own_tokenizer.AutoTokenizer):
        load = loader.from_pretrained

        def spy(path: Path, *args: object, load: object = load, **kwargs: object) -> object:
            shown.append({p.name for p in Path(path).iterdir()})
            return load(path, *args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(loader, "from_pretrained", spy)

    def loaded(path: Path) -> dict[str, Tensor]:
        facts = describe_backbone(str(path), base_dir=path)
        backbone = load_backbone(facts, progress=Silent())
        return backbone.model.state_dict()

    weights = loaded(repository)
    assert shown == [
        {
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    ] * len(shown)
    assert len(shown) == 2
    expected = loaded(plain)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_an_imported_system_runs(release: Release, tmp_path: Path) -> None:
    """One style all the way: the engines say what the reference says."""
    folder, links = release("sequential_light")
    imported("sequential_light", folder, tmp_path / "spec.yaml")
    small = ("latent_steps=4", "answer.max_new_tokens=12", "build.max_batch=2")
    program = api.compile(load_spec(tmp_path / "spec.yaml", overrides=small))
    bundle = api.build(program, tmp_path / "bundle")
    built = Built(
        bundle=bundle,
        topology=program.topology,
        program=program.graph,
        system=rt.load(bundle, threads=1),
    )
    answers = built.system.run(RECORDS)
    expected = built.reference(RECORDS)
    assert [answer.answer for answer in answers] == list(expected.texts)
    assert expected.texts == built.naive(RECORDS).texts
    assert len(set(expected.texts)) == 2
    # The bundle's links are the released numbers.
    stored = load_file(bundle / built.system.manifest.links["planner->critic"].file)
    assert torch.equal(stored["proj1.weight"], links["outer_12"]["proj1.weight"].float())


def write_hub(cache: Path, released: Path, *, commit: str) -> None:
    """Lay repositories out as the Hugging Face cache does: blobs, and links to them."""
    for folder in released.iterdir():
        repository = cache / f"models--RecursiveMAS--{folder.name}"
        snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        for number, path in enumerate(sorted(folder.iterdir())):
            blob = blobs / f"{number:040x}"
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(Path("../..") / "blobs" / blob.name)


def test_from_the_hub_cache(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_hub(tmp_path / "cache", release("deliberation")[0], commit=commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    spec = tmp_path / "spec.yaml"
    imported("deliberation", Path("hf"), spec)
    source = f"hf:RecursiveMAS/Deliberation-Reflector-Qwen3.5-4B@{commit}"
    assert load_spec(spec).document.backbones["reflector"].source == source
    with safe_open(tmp_path / "links" / "reflector.inner.safetensors", "pt") as file:
        assert file.metadata()["source"] == source
    assert run_recmasc("check", spec).exit_code == Exit.OK
    before = files_in(tmp_path)
    ran = run_recmasc(
        *("import", "released", "mixture", "--from", "hf", "-o", tmp_path / "other.yaml"),
    )
    assert ran.exit_code == Exit.ENVIRONMENT
    assert "RM200" in ran.output
    assert "RecursiveMAS/Mixture-Math-DeepSeek-R1-Distill-Qwen-1.5B" in ran.output
    assert files_in(tmp_path) == before


def test_names_of_other_models(release: Release, tmp_path: Path) -> None:
    """Exported repositories end in the name of the model that the agent really has."""
    folder, _ = release("deliberation")
    imported("deliberation", folder, tmp_path / "spec.yaml")
    plain = write_tiny_backbone(tmp_path / "Own-Model 2", "qwen3", seed=0, hidden_size=48)
    (tmp_path / "plain").symlink_to(folder / "Deliberation-Reflector-Qwen3.5-4B")
    spec = tmp_path / "spec.yaml"
    text = spec.read_text()
    source = next(line for line in text.splitlines() if line.startswith("  reflector: {source"))
    spec.write_text(text.replace(source, f'  reflector: {{source: "{plain}"}}'))
    ran = run_recmasc(
        "export-links", spec, "-o", tmp_path / "out", "--style", "deliberation", "--json"
    )
    names = [Path(path).name for path in json.loads(ran.stdout)["data"]["repositories"]]
    assert names == [
        "Deliberation-Reflector-Own-Model-2",
        "Deliberation-Toolcaller-Qwen3.5-4B",
        "Deliberation-Outerlinks",
    ]


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, contextlib\n"
        "from recmas_cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['import', 'released', '--help'])\n"
        "print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"
