"""A system with its trained links set back to their start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.specs import MIXTURE, SEQUENTIAL
from recmas_cli.main import main
from recmas_compiler.links.trained import untrained_links
from recmas_compiler.spec.spec import Spec, parse_spec
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats.bundle import Bundle, open_bundle
from recmas_runtime.formats.safetensors_file import read_tensors

TRAINED = {
    "planner -> critic": "trained/forward.safetensors",
    "solver -> planner": "trained/back.safetensors",
}


def trained_spec() -> str:
    text = SEQUENTIAL
    for link, file in TRAINED.items():
        assert f"{link}: {{init: random" in text
        text = text.replace(f"{link}: {{init: random", f"{link}: {{weights: {file}")
    return text.replace("inner: {init: random}", "inner: {weights: trained/inner.safetensors}", 1)


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    """The project with a spec of trained links: any weights but those of an untrained start."""
    links = open_bundle(project / "bundle").manifest.links
    (project / "trained").mkdir(exist_ok=True)
    for name, file in {
        "critic->solver": "forward",
        "planner->critic": "back",
        "solver.inner": "inner",
    }.items():
        shutil.copy(project / "bundle" / links[name].file, project / f"trained/{file}.safetensors")
    (project / "trained.yaml").write_text(trained_spec())
    return project


def sections(spec: Spec) -> dict[str, dict[str, Any]]:
    document = spec.document
    found = {f"{name}.inner": agent.inner for name, agent in document.agents.items()}
    found |= dict(document.links)
    return {
        name: section.model_dump(include={"kind", "init", "weights"}, exclude_none=True)
        for name, section in found.items()
    }


def test_only_trained_links_change(trained: Path) -> None:
    spec = parse_spec(trained_spec(), base_dir=trained)
    frozen = untrained_links(spec)
    before, after = sections(spec), sections(frozen)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"planner.inner", *TRAINED}
    assert all(after[name] == {"kind": "projected", "init": "aligned"} for name in changed)
    assert frozen.document.links["solver -> planner"].feedback is True
    assert frozen.warnings == spec.warnings
    assert parse_spec(frozen.resolved_yaml(), base_dir=trained) == frozen
    assert frozen.digest != spec.digest
    assert sections(spec) == before  # the spec itself stays what it was


@pytest.mark.parametrize("kind", ["projected", "residual", "ln_residual"])
def test_the_start_is_the_closed_form(kind: str) -> None:
    text = SEQUENTIAL.replace("{init: random", f"{{kind: {kind}, weights: any.safetensors")
    after = sections(untrained_links(parse_spec(text)))
    assert after["critic.inner"] == {"kind": kind, "init": "aligned"}
    assert after["critic -> solver"] == {"kind": kind, "init": "aligned"}


def test_a_spec_without_trained_links_is_refused() -> None:
    with pytest.raises(RecmasError) as caught:
        untrained_links(parse_spec(MIXTURE, file="mixture.yaml"))
    (problem,) = caught.value.problems
    assert (problem.code, problem.file) == ("RM508", "mixture.yaml")
    assert problem.message.startswith("no link of this spec has trained weights")


def test_a_link_file_that_is_not_there() -> None:
    text = SEQUENTIAL.replace(
        "planner -> critic: {init: random}", "planner -> critic: {weights: x}"
    )
    with pytest.raises(RecmasError, match=r"RM120.*does not tell its kind: there is no such file"):
        untrained_links(parse_spec(text))
    assert untrained_links(parse_spec(text), kinds={"planner->critic": "residual"})


def weights(bundle: Bundle, link: str) -> dict[str, np.ndarray]:
    return read_tensors(bundle.root / bundle.manifest.links[link].file)[0]


def build(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    try:
        main(["build", *map(str, arguments), "--json", "--quiet"])
        status: Any = Exit.OK
    except SystemExit as ended:
        status = ended.code
    return {**json.loads(capsys.readouterr().out), "status": status}


def test_build_gives_another_bundle_with_the_same_plan(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build(capsys, trained / "trained.yaml")["ok"]
    assert build(capsys, trained / "trained.yaml", "--frozen-links")["ok"]  # its old name
    whole, frozen = open_bundle("out/sequential"), open_bundle("out/sequential-untrained")
    assert frozen.plan == whole.plan
    assert frozen.manifest.fingerprint != whole.manifest.fingerprint
    for link in whole.manifest.links:
        left, right = weights(whole, link), weights(frozen, link)
        equal = all(np.array_equal(left[name], right[name]) for name in left)
        is_trained = whole.manifest.links[link].init.endswith(".safetensors")
        assert equal != is_trained, link
    trained_links = [e for e in whole.manifest.links.values() if e.init.endswith(".safetensors")]
    assert len(trained_links) == 3
    again = build(capsys, trained / "trained.yaml", "--untrained-links")
    assert again["data"]["reused"] is True


def test_a_bundle_serves_as_its_own_spec(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = trained_spec().replace("source: llama", f"source: {trained / 'llama'}")
    (trained / "absolute.yaml").write_text(text)
    assert build(capsys, trained / "absolute.yaml", "-o", tmp_path / "whole")["ok"]
    body = build(capsys, tmp_path / "whole", "--untrained-links", "-o", tmp_path / "frozen")
    assert body["ok"], body
    whole, frozen = open_bundle(tmp_path / "whole"), open_bundle(tmp_path / "frozen")
    assert frozen.plan == whole.plan
    assert frozen.manifest.links["planner->critic"].init == "aligned"


def test_nothing_to_freeze(project: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bundle"
    body = build(capsys, project / "spec.yaml", "--untrained-links", "-o", out)
    assert (body["status"], body["problems"][0]["code"]) == (Exit.USAGE, "RM508")
    assert not out.exists()
