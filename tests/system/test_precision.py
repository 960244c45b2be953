"""Weights in blocks of integers: whole systems run on them, and say what they cost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import recmas_runtime as rt
from kit.bundles import BuildTiny, Built, num_weight_bytes
from kit.specs import on_three_backbones
from recmas_compiler.analysis.explain import explain
from recmas_compiler.analysis.memory import memory_plan
from recmas_compiler.backbones.facts import row_weights_bytes, weights_bytes
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import parse_spec
from recmas_export import parity
from recmas_export.backbone_graph import DECODER, EMBED, HEAD, WEIGHTS
from recmas_export.build import build
from recmas_export.replan import Replanner
from recmas_runtime.checking.verify import verify_bundle
from recmas_runtime.cli.inspect import bundle_text
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.manifest import ParityEntry
from recmas_runtime.formats.precisions import PRECISIONS, TOLERANCES, loss_figures

RECORDS: list[dict[str, object]] = [
    {"id": "1", "question": "What is 7 * 8?"},
    {"id": "2", "question": "Anna has three plans and a pen. Which plan is best, and why is it?"},
    {"id": "3", "question": "Go on."},
]

PAIR = """
recmas: 1
name: pair
rounds: 2
latent_steps: 3
backbones:
  small: {source: FAMILY}
agents:
  planner:
    backbone: small
    inner: {init: random}
    prompt:
      first: "Plan: {{ question }}"
      then: "Plan: {{ question }} {{ latent.solver }}"
  solver:
    backbone: small
    inner: {init: random}
    prompt: "{{ question }} {{ latent.planner }} Answer."
links:
  planner -> solver: {init: random}
  solver -> planner: {init: random, feedback: true}
answer: {agent: solver, max_new_tokens: 12}
build: {precision: PRECISION, max_prompt_tokens: 384, max_batch: 8}
"""


def pair(family: str, precision: str) -> str:
    return PAIR.replace("FAMILY", family).replace("PRECISION", precision)


def only_case(built: Built) -> ParityEntry:
    (case,) = built.system.manifest.parity
    return case


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("llama", "int8"),
        pytest.param("llama", "int4", marks=pytest.mark.families),
        pytest.param("qwen3", "int4", marks=pytest.mark.families),
        ("gemma3", "int4"),
        pytest.param("llama", "bfloat16", marks=pytest.mark.families),
        pytest.param("gemma3", "float16", marks=pytest.mark.families),
    ],
)
def test_systems_run_and_say_what_they_lost(
    build_tiny: BuildTiny, family: str, precision: str
) -> None:
    built = build_tiny(pair(family, precision))
    answers = built.system.run(RECORDS)
    assert [answer.usage.latent_steps for answer in answers] == [9, 9, 9]
    alone = [built.system.run([record])[0] for record in RECORDS]
    assert [answer.answer for answer in answers] == [answer.answer for answer in alone]

    (entry,) = built.system.manifest.backbones.values()
    assert entry.precision == precision
    case = only_case(built)
    assert case.loss is not None
    assert case.loss.text == "recmas's text"
    assert 8 * 250 <= case.loss.num_tokens <= 8 * 256
    assert 0.9 < case.loss.hidden_cosine < 1.0
    assert abs(case.loss.loss - case.loss.reference_loss) < 0.1 * case.loss.reference_loss
    for name, value in loss_figures(case.loss).items():
        assert value <= PRECISIONS[precision].loss_limits[name]
    for name, value in case.figures.items():
        assert value <= PRECISIONS[precision].tolerances[name]
    assert case.figures["hidden_relative"] > TOLERANCES["hidden_relative"], "nothing was quantized"
    assert case.figures["link_relative"] <= TOLERANCES["link_relative"]

    report = verify_bundle(built.bundle, threads=1)
    assert report.ok, report.problems
    assert [case.precision for case in report.cases] == [precision]
    shown = bundle_text(open_bundle(built.bundle))
    assert f"{precision} over {case.loss.num_tokens} tokens of recmas's text: hidden" in shown


def test_baselines_and_other_plans_run_on_quantized_engines(build_tiny: BuildTiny) -> None:
    built = build_tiny(pair("llama", "int4"))
    for name in ("single", "text", "null-latents"):
        answers = built.system.baseline(name).run(RECORDS)
        assert all(answer.usage.completion_tokens > 0 for answer in answers), name
    plan = Replanner(open_bundle(built.bundle)).plan(rounds=1, latent_steps=5)
    answers = built.system.with_plan(plan).run(RECORDS)
    assert [answer.usage.latent_steps for answer in answers] == [5, 5, 5]


def test_fewer_bits_are_fewer_bytes_and_lose_more(build_tiny: BuildTiny) -> None:
    sizes, cosines = {}, {}
    for precision in ("float32", "int8", "int4"):
        built = build_tiny(pair("llama", precision))
        (entry,) = built.system.manifest.backbones.values()
        sizes[precision] = num_weight_bytes(built.bundle / entry.weights)
        loss = only_case(built).loss
        cosines[precision] = 1.0 if loss is None else loss.hidden_cosine
        backbone = built.program.system.backbones["small"]
        planned = weights_bytes(backbone.facts, precision=precision)
        (planned_memory,) = memory_plan(built.program).backbones
        rows = row_weights_bytes(backbone.facts, precision=precision)
        has_copy = PRECISIONS[precision].cpu_products == "rows in prompts"
        assert planned_memory.weights_bytes == planned + rows * has_copy
        planned += rows
        # norms and blocks that are not full weigh something in models this small
        assert 0.7 * sizes[precision] < planned < 1.05 * sizes[precision]
    # Layers are stored twice, in blocks and in rows of 8 bits.
    assert sizes["float32"] > 1.5 * sizes["int8"] > 1.5 * 1.1 * sizes["int4"]
    assert cosines["float32"] > cosines["int8"] > cosines["int4"]


def test_a_tied_table_is_stored_once_and_norms_stay(build_tiny: BuildTiny) -> None:
    built = build_tiny(pair("gemma3", "int4"))
    folder = (built.bundle / built.system.manifest.backbones["small"].decoder).parent
    graphs = {
        name: onnx.load(folder / name, load_external_data=False).graph
        for name in (DECODER, EMBED, HEAD)
    }
    facts = built.program.system.backbones["small"].facts
    places = []
    for name in (EMBED, HEAD):
        packed = [t for t in graphs[name].initializer if t.data_type == onnx.TensorProto.UINT8]
        table = max(packed, key=lambda t: np.prod(t.dims))
        assert table.dims[0] == facts.vocab_size
        places.append({entry.key: entry.value for entry in table.external_data})
    assert places[0] == places[1]
    assert places[0]["location"] == WEIGHTS
    kinds = {name: {node.op_type for node in graph.node} for name, graph in graphs.items()}
    assert "GatherBlockQuantized" in kinds[EMBED]
    assert "MatMulNBits" in kinds[HEAD]
    matrices = [node for node in graphs[DECODER].node if node.op_type == "MatMulNBits"]
    assert len(matrices) >= 4 * facts.num_layers
    bits = {a.i for node in matrices for a in node.attribute if a.name == "bits"}
    assert bits == {4}
    norms = [t for t in graphs[DECODER].initializer if list(t.dims) == [facts.width]]
    assert {t.data_type for t in norms} == {onnx.TensorProto.FLOAT}


MIXED = on_three_backbones(
    "source: llama",
    "source: llama, precision: int4, device: cpu",
    "source: gemma3, precision: float32",
    build="precision: int8, max_prompt_tokens: 384, max_batch: 8",
)


def test_several_precisions_in_one_system(build_tiny: BuildTiny) -> None:
    built = build_tiny(MIXED)
    manifest = built.system.manifest
    assert manifest.precision == "int8"
    found = {name: entry.precision for name, entry in manifest.backbones.items()}
    assert found == {"small": "int8", "other": "int4", "third": "float32"}
    assert {case.backbone: case.loss is not None for case in manifest.parity} == {
        "small": True,
        "other": True,
        "third": False,
    }
    answers = built.system.run(RECORDS)
    alone = [built.system.run([record])[0].answer for record in RECORDS]
    assert [answer.answer for answer in answers] == alone
    assert {name: entry.device for name, entry in manifest.backbones.items()} == {
        "small": "auto",
        "other": "cpu",
        "third": "auto",
    }
    placed = rt.load(built.bundle, device="cpu,third=cpu", threads=1)
    assert [answer.answer for answer in placed.run(RECORDS)] == alone
    said = explain(built.topology, [])
    assert "other runs on cpu: int4, caches in float32, hidden states in float32." in said
    assert "through memory of the host" in said


def test_the_text_of_a_file(
    families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "NUM_PASSAGES", 2)
    text = tmp_path / "held_out.txt"
    text.write_text("The plan is in the garden, and the rain is near. " * 60, encoding="utf-8")
    source = pair("llama", "int8").replace("build: {", f"build: {{loss_text: {text}, ")
    spec = parse_spec(source, file=str(families / "spec.yaml"), base_dir=families)
    program = run_pipeline(build_topology(spec))
    first = build(program, spec=spec, out=tmp_path / "out")
    (case,) = first.parity
    assert case.loss is not None
    assert case.loss.text == "held_out.txt"
    assert 2 * 254 <= case.loss.num_tokens <= 2 * 256
    assert build(program, spec=spec, out=tmp_path / "out").reused
    text.write_text("Another text. " * 300, encoding="utf-8")
    assert not build(program, spec=spec, out=tmp_path / "out").reused
    text.write_text("", encoding="utf-8")
    with pytest.raises(RecmasError, match=r"RM126.*too few to predict one"):
        build(program, spec=spec, out=tmp_path / "out")
    text.unlink()
    with pytest.raises(RecmasError, match=r"RM126.*is not there"):
        build_topology(spec)


def test_a_build_that_loses_too_much_fails(
    families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int4 = PRECISIONS["int4"]
    strict = replace(int4, loss_limits=dict.fromkeys(int4.loss_limits, -1.0))
    monkeypatch.setitem(PRECISIONS, "int4", strict)
    spec = parse_spec(pair("llama", "int4"), file=str(families / "spec.yaml"), base_dir=families)
    with pytest.raises(RecmasError) as caught:
        build(run_pipeline(build_topology(spec)), spec=spec, out=tmp_path / "out")
    assert caught.value.exit_code is Exit.VERIFICATION
    assert [problem.code for problem in caught.value.problems] == ["RM301"] * 3
    assert "of int4 is " in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_text_plays_no_part_where_nothing_is_quantized(families: Path, tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("Some words.", encoding="utf-8")
    source = pair("llama", "float32").replace("build: {", f"build: {{loss_text: {text}, ")
    spec = parse_spec(source, file=str(families / "spec.yaml"), base_dir=families)
    program = run_pipeline(build_topology(spec))
    (case,) = build(program, spec=spec, out=tmp_path / "out").parity
    assert case.loss is None
    text.write_text("Other words.", encoding="utf-8")
    assert build(program, spec=spec, out=tmp_path / "out").reused


def test_a_bundle_from_before_there_were_precisions(build_tiny: BuildTiny, tmp_path: Path) -> None:
    """Such a manifest lacks the keys; its engines are float32."""
    built = build_tiny(pair("llama", "float32"))
    manifest = json.loads((built.bundle / "manifest.json").read_text(encoding="utf-8"))
    del manifest["backbones"]["small"]["precision"]
    del manifest["parity"][0]["loss"]
    whole = tmp_path / "whole"
    shutil.copytree(built.bundle, whole)
    (whole / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert rt.load(whole, threads=1).manifest == built.system.manifest
