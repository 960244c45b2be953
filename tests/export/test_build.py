"""The whole way: a spec becomes a bundle, once, and only if its engines compute what torch does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers

from kit.broken_graphs import behind_kept_rows, change_graph
from kit.bundles import compile_system, write_twins
from kit.hand_bundle import edit_json, rehash
from recmas_cli.main import main
from recmas_compiler.backbones.sources import resolve_source
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone
from recmas_compiler.lowering.materialize import materialize_links
from recmas_export import assemble, torch_parts
from recmas_export.backbone_graph import DECODER
from recmas_export.build import (
    BuildResult,
    build,
    fingerprint,
    sha256_text,
    source_digest,
    tool_versions,
)
from recmas_runtime.checking.verify import verify_bundle
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.plan import PrefillStep
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.formats.safetensors_file import read_tensors


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twins(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def built(system: Path) -> BuildResult:
    spec, program = compile_system(system)
    return build(program, spec=spec, out=system.parent / "bundle")


def test_bundle_is_whole(built: BuildResult) -> None:
    bundle = open_bundle(built.path, verify_hashes=True)
    manifest = bundle.manifest
    assert not built.reused
    assert manifest.fingerprint == built.fingerprint
    assert manifest.name == "pair"
    assert set(manifest.backbones) == {"small", "other"}
    assert set(manifest.links) == {
        "planner.inner",
        "critic.inner",
        "solver.inner",
        "planner->critic",
        "critic->solver",
        "solver->planner",
    }
    assert manifest.links["critic->solver"].file == "links/outer.critic.solver.safetensors"
    assert manifest.links["solver.inner"].file == "links/inner.solver.safetensors"
    assert manifest.spec_digest == sha256_text((built.path / "spec.yaml").read_text())
    digest = manifest.files["backbones/small/weights.safetensors"].sha256
    assert manifest.backbones["small"].digest == digest
    assert set(built.seconds) == {"fingerprint", "load", "links", "export", "parity", "write"}
    assert not list(built.path.parent.glob(".bundle*"))


def test_files_can_be_read_by_others(built: BuildResult) -> None:
    """Some writers make files for their owner alone, but a bundle is there to be handed on."""
    modes = {p.stat().st_mode & 0o777 for p in built.path.rglob("*") if p.is_file()}
    assert len(modes) == 1


def test_room_on_the_disk_is_asked_for_tables_of_angles_too(
    system: Path, built: BuildResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []

    def refuse(target: Path, *, needed_bytes: int) -> NoReturn:
        needed.append(needed_bytes)
        raise KeyboardInterrupt

    monkeypatch.setattr("recmas_export.build.staged_bundle", refuse)
    spec, program = compile_system(system)
    for most_positions in (2**17, 0):
        monkeypatch.setattr("recmas_compiler.backbones.facts.MOST_TABLE_POSITIONS", most_positions)
        with pytest.raises(KeyboardInterrupt):
            build(program, spec=spec, out=tmp_path / "bundle")
    tables = 0
    for entry in open_bundle(built.path).manifest.backbones.values():
        tensors, _ = read_tensors(built.path / entry.weights)
        tables += sum(t.nbytes for name, t in tensors.items() if name.endswith(".table"))
    assert tables > 0
    assert needed[0] - needed[1] >= tables


def test_disk_that_fills_up_during_the_build(system: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: links still fit, the backbone does not."""
    script = (
        "import resource, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from kit.bundles import compile_system\n"
        "from recmas_export.build import build\n"
        "from recmas_runtime.core.errors import RecmasError\n"
        f"spec, program = compile_system(Path({str(system)!r}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        "try:\n"
        f"    build(program, spec=spec, out=Path({str(tmp_path / 'out')!r}))\n"
        "except RecmasError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.decode().startswith("error[RM303]: cannot write the bundle ")
    assert list(tmp_path.iterdir()) == []


def test_engines_agree_with_torch(built: BuildResult) -> None:
    assert {case.backbone for case in built.parity} == {"small", "other"}
    for case in built.parity:
        assert set(case.figures) == set(TOLERANCES) - {
            "message_absolute",
            "moved_rows_relative",
            "probe_absolute",
            "text_loss_relative",
        }
        for name, value in case.figures.items():
            assert value <= TOLERANCES[name]
        assert case.greedy_tokens_equal


def test_parity_case_covers_what_it_should(built: BuildResult) -> None:
    small, _ = read_tensors(built.path / "parity/small.safetensors")
    other, metadata = read_tensors(built.path / "parity/other.safetensors")
    assert metadata == {"inner": "critic.inner"}
    steps = [[1, 1]] * 8
    assert small["lengths"].tolist() == [[24, 12], [24, 12], *steps]
    window = 8
    assert other["lengths"].tolist() == [[window + 24, window + 12], [24, 12], *steps]
    assert other["hidden"].shape == other["inputs_embeds"].shape == (1, 64, 48)
    assert other["feedback_lengths"].tolist() == [[14, 10], [1, 1], [1, 1], [4, 2]]
    assert other["feedback_embeds"].shape == (1, 20, 48)
    assert other["feedback_hidden"].shape == (2, 20, 48)
    assert other["thought_next"].shape == (10 + 4, 2, 48)
    assert small["greedy_tokens"].shape == (16,)
    starts = {"planner.inner", "solver.inner", "planner->critic", "solver->planner"}
    assert {n for n in small if n.startswith("link.")} == {
        f"link.{link}.{end}" for link in starts for end in "xy"
    }
    hidden_states = small["hidden"][0, -4:]
    assert np.array_equal(small["link.planner.inner.x"], hidden_states)
    assert np.array_equal(small["link.planner->critic.x"], small["link.planner.inner.y"])


def test_prompts_are_kept_as_tokens(built: BuildResult) -> None:
    bundle = open_bundle(built.path)
    prefilled = {
        (agent, variant)
        for step in bundle.plan.steps
        if isinstance(step, PrefillStep)
        for agent, variant in zip(step.agents, step.variants, strict=True)
    }
    kept = bundle.manifest.prompt_digests
    assert {(agent, variant) for agent in kept for variant in kept[agent]} == prefilled
    digests = [digest for variants in kept.values() for digest in variants.values()]
    assert bundle.manifest.token_digests.keys() == {"small", "other"}
    digests += bundle.manifest.token_digests.values()
    assert all(len(digest) == 64 for digest in digests)


def test_runtime_verifies_it(built: BuildResult) -> None:
    report = verify_bundle(built.path, threads=1)
    assert report.ok
    assert report.problems == ()


def test_nothing_names_this_machine(built: BuildResult, system: Path) -> None:
    for path in built.path.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert str(system.parent).encode() not in raw, path
            assert b"site-packages" not in raw, path


def test_second_build_reuses_the_bundle_without_torch(built: BuildResult, system: Path) -> None:
    script = (
        "import json, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "from recmas_compiler.ir.build_topology import build_topology\n"
        "from recmas_compiler.passes.pipeline import run_pipeline\n"
        "from recmas_compiler.spec.spec import load_spec\n"
        "from recmas_export.build import build\n"
        f"spec = load_spec({str(system)!r})\n"
        "program = run_pipeline(build_topology(spec))\n"
        f"result = build(program, spec=spec, out=Path({str(built.path)!r}))\n"
        "heavy = [m for m in ('torch', 'transformers', 'onnx_ir') if m in sys.modules]\n"
        "print(json.dumps([result.reused, result.fingerprint, len(result.parity), heavy]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == [True, built.fingerprint, 2, []]


def test_what_a_killed_build_left_goes_also_where_the_bundle_is_there_already(
    built: BuildResult, system: Path
) -> None:
    left = built.path.with_name(f".{built.path.name}.replaced-0123abcd")
    left.mkdir()
    spec, program = compile_system(system)
    assert build(program, spec=spec, out=built.path).reused
    assert not left.exists()


def test_damaged_bundle_is_not_reused(
    built: BuildResult, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(built.path, copy)
    (copy / "plan.json").write_text("{}")
    spec, program = compile_system(system)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt("it began to build")

    monkeypatch.setattr(assemble, "assemble", stop)
    with pytest.raises(KeyboardInterrupt, match="it began to build"):
        build(program, spec=spec, out=copy)
    assert (copy / "plan.json").read_text() == "{}"


def test_fingerprint_is_stable_and_does_not_depend_on_the_place(
    system: Path, tmp_path: Path
) -> None:
    shutil.copytree(system.parent / "models", tmp_path / "models")
    shutil.copy(system, tmp_path / "spec.yaml")
    assert identity(system) == identity(system) == identity(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "rounds=3",
        "latent_steps=4",
        "answer.temperature=0.5",
        "answer.seed=1",
        "build.max_batch=5",
        "build.max_prompt_tokens=65",
        "agents.planner.system=Be quick.",
        "name=other",
    ],
)
def test_fingerprint_follows_the_spec(system: Path, override: str) -> None:
    assert identity(system, override) != identity(system)


def test_fingerprint_follows_weights_and_tools(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity(system)
    shutil.copytree(system.parent / "models", tmp_path / "models")
    shutil.copy(system, tmp_path / "spec.yaml")
    weights = tmp_path / "models/other/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert identity(tmp_path / "spec.yaml") != before
    versions = {**tool_versions(), "onnxruntime": "0.1"}
    monkeypatch.setattr("recmas_export.build.tool_versions", lambda: versions)
    assert identity(system) != before


def identity(path: Path, *overrides: str) -> str:
    spec, program = compile_system(path, *overrides)
    digests = {
        name: source_digest(resolve_source(b.facts.source, base_dir=spec.base_dir))
        for name, b in program.system.backbones.items()
    }
    return fingerprint(program, spec_yaml=spec.resolved_yaml(), backbones=digests, links={})


# Everything on one backbone: one export, and the figures of one case.
ONE_BACKBONE = ("backbones.other.source=models/small",)

# What is wrong -> the figure that must say so.
SPOILED = {
    "o_proj": "hidden_relative",
    "embedding": "embeds_relative",
    "lm_head": "logits_relative",
}


@pytest.mark.parametrize("weight", SPOILED)
def test_wrong_engine_is_refused(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    """One percent on one weight after the export: the answers would still look fluent."""

    def change(folder: Path) -> None:
        spoil(folder / "weights.safetensors", weight)

    messages = refused_after(system, tmp_path / "out", monkeypatch, change)
    assert all(m.startswith("error[RM301]: backbone 'small': ") for m in messages)
    figure = SPOILED[weight]
    (message,) = (m for m in messages if f": {figure} is " in m)
    assert f", allowed is {TOLERANCES[figure]:.0e}. No bundle was written." in message
    assert list(tmp_path.iterdir()) == []


def refused_after(
    system: Path, out: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> list[str]:
    """Change a backbone's folder behind its export; return what the build says of it."""
    spec, program = compile_system(system, *ONE_BACKBONE)
    export = torch_parts.export_backbone

    def wrong(backbone: TorchBackbone, folder: Path, **options: Any) -> None:
        export(backbone, folder, **options)
        change(folder)

    monkeypatch.setattr(torch_parts, "export_backbone", wrong)
    with pytest.raises(RecmasError) as caught:
        build(program, spec=spec, out=out)
    assert caught.value.exit_code is Exit.VERIFICATION
    assert not out.exists()
    return [str(problem) for problem in caught.value.problems]


def test_writes_behind_kept_rows_are_tried(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(folder: Path) -> None:
        change_graph(folder / DECODER, behind_kept_rows)

    (message,) = refused_after(system, tmp_path / "out", monkeypatch, change)
    assert message.startswith("error[RM301]: backbone 'small': hidden_relative is ")


def test_other_prompts_than_those_of_transformers_are_refused(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(folder: Path) -> None:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().rstrip() + "Sure:")

    messages = refused_after(system, tmp_path / "out", monkeypatch, change)
    assert len(messages) == 4, "every prompt of every agent once"
    told = re.compile(
        r"error\[RM301\]: the bundle: prompt `(first|then)` of agent '[a-z]+': its token [0-9]+"
        r"( behind the message of '[a-z]+')? begins \".*Sure:\", with transformers \".*\"\. "
        r"No bundle was written\. Try other versions of transformers.*"
    )
    assert all(told.fullmatch(message) for message in messages), messages


def test_another_tokenizer_than_the_models_own_is_refused(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save(str(folder / "tokenizer.json"))

    (message,) = refused_after(system, tmp_path / "out", monkeypatch, change)
    assert message.startswith(
        "error[RM301]: backbone 'small': the tokenizer is not that of transformers: in "
    )
    assert " it has h e l l in the place of H e l l." in message


def test_verify_tries_writes_behind_kept_rows(built: BuildResult, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(built.path, copy)
    # The portable decoder writes rows by an operator of its own, which a change can get behind.
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["backbones"]["other"]["cpu_decoder"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    entry = open_bundle(copy).manifest.backbones["other"]
    change_graph(copy / entry.decoder_on("cpu"), behind_kept_rows)
    rehash(copy)
    report = verify_bundle(copy, threads=1)
    assert [problem.code for problem in report.problems if problem.severity == "error"] == ["RM405"]
    assert "hidden_relative is " in report.problems[0].message


def spoil(path: Path, weight: str) -> None:
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    (first, last), *_ = (e["data_offsets"] for name, e in header.items() if weight in name)
    np.frombuffer(raw, np.float32)[(start + first) // 4 : (start + last) // 4] *= np.float32(1.01)
    path.write_bytes(raw)


def test_given_links_are_part_of_the_identity(
    system: Path, built: BuildResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained links come as modules; other weights must make another bundle."""
    spec, program = compile_system(system)
    backbones = {
        name: load_backbone(program.system.backbones[name].facts, progress=Silent())
        for name in ("small", "other")
    }
    links = materialize_links(program, backbones, progress=Silent())
    seen: list[str] = []

    def record(program: object, **inputs: object) -> str:
        seen.append(fingerprint(program, **inputs))  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr("recmas_export.build.fingerprint", record)
    for change in (0.0, 1.0):
        with torch.no_grad():
            next(iter(links["planner.inner"].module.parameters())).add_(change)
        with pytest.raises(KeyboardInterrupt):
            build(program, spec=spec, out=tmp_path / "out", links=links)
    assert len(set(seen)) == 2


def test_a_bundle_of_an_older_plan_is_refused_with_the_command_that_rebuilds_it(
    built: BuildResult, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(built.path, copy)
    edit_json(copy / "plan.json", "version", 1)
    rehash(copy)
    with pytest.raises(RecmasError, match=r"RM403.*format version 1") as caught:
        open_bundle(copy)
    command = re.search(r"recmasc (build \S+ --out \S+),", caught.value.problems[0].hint)
    assert command is not None
    arguments = command[1].replace("BUNDLE", str(copy)).split()
    # This spec's backbones lie beside it.
    for name, folder in (("small", "small"), ("twin", "small"), ("other", "other")):
        arguments += ["--set", f"backbones.{name}.source={system.parent / 'models' / folder}"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0, capsys.readouterr().err
    assert open_bundle(copy, verify_hashes=True).plan == open_bundle(built.path).plan
