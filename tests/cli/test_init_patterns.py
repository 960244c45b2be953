"""Every pattern as `recmasc init` writes it: checked, built and run over the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.commands import run_recmasc
from recmas_compiler.spec.patterns.starter_specs import STARTERS
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import Exit
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.plan import filled_fields

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.yaml"))
# Nobody reads what a tiny model writes, and it has 1024 positions.
SMALL = ("answer.max_new_tokens=4", "build.max_batch=2", "build.max_prompt_tokens=512")
# A system takes a second; these few are in the default run.
OFTEN = ("diamond", "self_loop")


def built_and_run(spec: Path, families: Path, folder: Path) -> dict[str, Any]:
    """Build a spec with a tiny model in the place of SmolLM2; return the answer to one record."""
    ran = run_recmasc("check", spec, "--json")
    assert ran.exit_code == Exit.OK, ran.output
    assert json.loads(ran.stdout)["problems"] == []
    overrides = ["backbones.smol.source=" + str(families / "llama"), *SMALL]
    sets = [part for override in overrides for part in ("--set", override)]
    ran = run_recmasc("build", spec, "--out", folder / "bundle", *sets, "--quiet")
    assert ran.exit_code == Exit.OK, ran.output
    source, target = folder / "questions.jsonl", folder / "answers.jsonl"
    fields = open_bundle(folder / "bundle").plan.fields
    source.write_text(json.dumps(filled_fields(fields, "What is 2 + 2?")) + "\n")
    command = ["run", str(folder / "bundle"), "--input", str(source), "--output", str(target)]
    assert main([*command, "--threads", "1", "--quiet"]) == 0
    (answer,) = map(json.loads, target.read_text().splitlines())
    return dict(answer)


@pytest.mark.heavy
@pytest.mark.parametrize("paper", [False, True], ids=["rows", "thoughts"])
@pytest.mark.parametrize("name", STARTERS)
def test_a_pattern(name: str, paper: bool, families: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    ran = run_recmasc("init", name, *(["--paper"] if paper else []), "--out", spec)
    assert ran.exit_code == Exit.OK, ran.output
    answer = built_and_run(spec, families, tmp_path)
    assert answer["usage"]["completion_tokens"] > 0
    thinks = paper or name == "relay"
    if name != "latentmas":
        assert (answer["usage"]["latent_steps"] > 0) is thinks


@pytest.mark.parametrize(
    "spec",
    [path if path.stem in OFTEN else pytest.param(path, marks=pytest.mark.heavy) for path in SPECS],
    ids=[path.stem for path in SPECS],
)
def test_a_shipped_spec(spec: Path, families: Path, tmp_path: Path) -> None:
    """None of them hands over what untrained links compute."""
    answer = built_and_run(spec, families, tmp_path)
    assert answer["usage"]["latent_steps"] == 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_no_shipped_spec_carries_thoughts(spec: Path) -> None:
    links = load_spec(spec).document.links
    assert links
    assert {link.carries for link in links.values()} == {"cache"}
