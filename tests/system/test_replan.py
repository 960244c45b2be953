"""Plans for the engines of a bundle: what the compiler would give for the changed spec."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.models import write_tiny_backbone
from kit.specs import SPECS
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.lowering.plan import build_plan
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import parse_spec
from recmas_export.build import build
from recmas_export.replan import Replanner
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.plan import Plan, ThinkStep

# Equal backbones under two names, one of a dead agent, links from files, a corpus to search.
FILES = """
recmas: 1
name: files
rounds: 2
latent_steps: 3
date: 2026-11-30
backbones:
  small: {source: models/llama, template: own.jinja}
  twin: {source: ./models/llama, template: own.jinja}
  idle: {source: models/idle, template: none}
agents:
  planner:
    backbone: small
    inner: {init: random}
    prompt:
      first: "{{ question }} Plan. {{ hint }}"
      then: "{{ question }} Seen: {{ latent.solver }}"
  unheard:
    backbone: idle
    inner: {init: random}
    prompt: "{{ question }} {{ latent.planner }}"
  checker:
    backbone: small
    latent_steps: 2
    inner: {init: random}
    prompt: "Check. {{ question }} {{ latent.planner }}"
  solver:
    backbone: twin
    inner: {init: random}
    prompt: "{{ question }} {{ latent.planner }} {{ latent.checker }}"
links:
  planner -> unheard: {init: random}
  planner -> checker: {init: random}
  planner -> solver: {init: random}
  checker -> solver: {init: random}
  solver -> planner: {init: random, feedback: true}
answer:
  agent: solver
  max_new_tokens: 4
  tools: {search: {corpus: facts}}
build: {max_prompt_tokens: 128}
"""


def compiled(text: str, base_dir: Path, *overrides: str) -> Plan:
    spec = parse_spec(text, base_dir=base_dir, overrides=overrides)
    return build_plan(run_pipeline(build_topology(spec)))


@pytest.mark.parametrize("latent_steps", [None, 0, 1, 7])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SPECS)
def test_plans_are_those_of_the_changed_spec(
    build_tiny: BuildTiny, families: Path, name: str, rounds: int, latent_steps: int | None
) -> None:
    overrides = [f"rounds={rounds}"]
    if latent_steps is not None:
        overrides.append(f"latent_steps={latent_steps}")
    expected = compiled(SPECS[name], families, *overrides)
    replanner = Replanner(open_bundle(build_tiny(SPECS[name]).bundle))
    assert replanner.plan(rounds=rounds, latent_steps=latent_steps) == expected


@pytest.mark.parametrize("name", ["sequential", "mixture", "interlocked"])
def test_a_new_plan_answers_like_a_bundle_built_for_it(build_tiny: BuildTiny, name: str) -> None:
    text = SPECS[name]
    lines = text.splitlines()
    rounds = next(line for line in lines if line.startswith("rounds: "))
    steps = next(line for line in lines if line.startswith("latent_steps: "))
    built = build_tiny(text.replace(rounds, "rounds: 1").replace(steps, "latent_steps: 6"))
    original = build_tiny(text)
    plan = Replanner(open_bundle(original.bundle)).plan(rounds=1, latent_steps=6)
    questions = ["What is 7 * 8?", "Why?", "A longer question about trains and oranges."]
    expected = built.system.run(questions)
    found = original.system.with_plan(plan).run(questions)
    assert [(a.answer, a.usage) for a in found] == [(a.answer, a.usage) for a in expected]
    assert original.system.plan.rounds > 1


OWN_TEMPLATE = (
    "{% for m in messages %}{{ strftime_now('%Y') }}: {{ m.content }}<|eot_id|>{% endfor %}"
)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle far from everything it was made of, and the folder with all that."""
    source = tmp_path_factory.mktemp("source")
    write_tiny_backbone(source / "models/llama", "llama", num_hidden_layers=1)
    write_tiny_backbone(source / "models/idle", "qwen3", num_hidden_layers=1, hidden_size=32)
    (source / "own.jinja").write_text(OWN_TEMPLATE)
    (source / "facts").mkdir()
    (source / "facts/one.txt").write_text("Seven times eight is fifty-six.")
    spec = parse_spec(FILES, base_dir=source)
    bundle = tmp_path_factory.mktemp("bundles") / "bundle"
    build(run_pipeline(build_topology(spec)), spec=spec, out=bundle)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "bundle"
    shutil.move(bundle, elsewhere)
    return elsewhere, source


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_nothing_but_the_bundle_is_needed(moved: tuple[Path, Path], rounds: int) -> None:
    bundle, source = moved
    expected = compiled(FILES, source, f"rounds={rounds}", "latent_steps=5")
    assert "idle" not in open_bundle(bundle).manifest.backbones
    template = open_bundle(bundle).manifest.backbones["small"].chat_template
    assert (bundle / template).read_text() == OWN_TEMPLATE
    assert open_bundle(bundle).plan.date == "2026-11-30"
    plan = Replanner(open_bundle(bundle)).plan(rounds=rounds, latent_steps=5)
    assert plan == expected
    thinks = [step for step in plan.steps if isinstance(step, ThinkStep)]
    assert {plan.num_latent_steps(step) for step in thinks} == {
        5,
        2,
    }  # the checker has steps of its own


def test_links_from_files_need_no_files(moved: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, source = moved
    text = FILES.replace(
        "planner -> solver: {init: random}", "planner -> solver: {weights: trained.safetensors}"
    )
    entry = open_bundle(bundle).manifest.links["planner->solver"]
    shutil.copy(bundle / entry.file, source / "trained.safetensors")
    spec = parse_spec(text, base_dir=source)
    build(run_pipeline(build_topology(spec)), spec=spec, out=tmp_path / "bundle")
    expected = compiled(text, source, "rounds=1")
    (source / "trained.safetensors").unlink()
    assert Replanner(open_bundle(tmp_path / "bundle")).plan(rounds=1) == expected


def test_more_rounds_need_links_that_the_bundle_has(build_tiny: BuildTiny) -> None:
    one_round = SPECS["sequential"].replace("rounds: 3", "rounds: 1")
    replanner = Replanner(open_bundle(build_tiny(one_round).bundle))
    assert replanner.plan(rounds=1).rounds == 1
    with pytest.raises(rt.RecmasError) as caught:
        replanner.plan(rounds=2)
    (problem,) = caught.value.problems
    assert problem.code == "RM506"
    assert problem.message.startswith("the bundle cannot run rounds=2: ")
    assert "solver->planner" in problem.message


@pytest.mark.parametrize(
    ("rounds", "latent_steps", "told"), [(0, None, "rounds"), (2, 5000, "latent_steps")]
)
def test_values_that_the_spec_refuses(
    build_tiny: BuildTiny, rounds: int, latent_steps: int | None, told: str
) -> None:
    replanner = Replanner(open_bundle(build_tiny(SPECS["sequential"]).bundle))
    with pytest.raises(rt.RecmasError) as caught:
        replanner.plan(rounds=rounds, latent_steps=latent_steps)
    assert {problem.code for problem in caught.value.problems} == {"RM122"}
    assert told in str(caught.value)


def test_a_bundle_whose_spec_tells_another_story_is_refused(
    build_tiny: BuildTiny, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(build_tiny(SPECS["sequential"]).bundle, copy)
    bundle = open_bundle(copy)
    spec = copy / "spec.yaml"
    spec.write_text(spec.read_text().replace("rounds: 3", "rounds: 4"))
    with pytest.raises(rt.RecmasError, match=r"RM400.*does not compile to the bundle's plan"):
        Replanner(bundle)
