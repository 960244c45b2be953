"""`recmasc bench engines`: what is measured, what is shown, what is refused. Never how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kit.bundles import BuildTiny
from kit.hand_bundle import write_hand_bundle
from kit.specs import SEQUENTIAL
from recmas_cli.main import main
from recmas_compiler.bench.engine_worker import (
    ENGINES,
    restart_peak,
    weight_bytes,
    weight_precision,
)
from recmas_compiler.bench.engines import EngineOptions, engines_of
from recmas_runtime.checking.machine import peak_resident_bytes
from recmas_runtime.core.errors import Exit
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.safetensors_file import read_tensors

QUICK = ("--steps", "3", "--warmup", "0", "--repeats", "2", "--threads", "1", "--quiet")
SMALL = ("--capacity", "64", "--used", "8")
FIGURES = ("step_ms", "prefill_tokens_per_s", "decode_tokens_per_s")


@pytest.fixture(scope="module")
def bundle(project: Path, build_tiny: BuildTiny) -> Path:
    """The tiny bundle, its backbone named by an absolute path: other engines load it too."""
    text = SEQUENTIAL.replace("source: llama", f"source: {project / 'llama'}")
    return build_tiny(text).bundle


@pytest.fixture(scope="module")
def with_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle written by hand, whose backbone keeps a state."""
    return write_hand_bundle(tmp_path_factory.mktemp("by-hand") / "sums", with_state=True)


def recmasc(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "engines", *map(str, arguments), "--json"])
    body: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {**body, "status": ended.value.code}


def test_every_engine_has_a_row_in_every_cell(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ("--batch", "1,2", "--capacity", "64,128", "--used", "8")
    names = ("--engine", "onnx", "--engine", "huggingface", "--engine", "naive")
    body = recmasc(capsys, bundle, *QUICK, *cells, *names, "--out", tmp_path)
    assert (body["status"], body["ok"], body["problems"]) == (0, True, [])
    data = body["data"]
    rows = data["rows"]
    fixed = [(batch, capacity) for batch in (1, 2) for capacity in (64, 128)]
    assert {(r["engine"], r["batch"], r["capacity"], r["used"]) for r in rows} == {
        *(("onnx", *cell, 8) for cell in fixed),
        *((engine, batch, None, 8) for engine in ("huggingface", "naive") for batch in (1, 2)),
    }
    for row in rows:
        assert row["precision"] == "float32"
        assert row["memory_mb"] > 10
        step, floor = row["spread"]["step_ms"], row["spread"]["floor_ms"]
        # Each visit's own floor over its own step.
        least, most = floor["min"] / step["max"], floor["max"] / step["min"]
        assert 0.99 * least <= row["floor_share"] <= 1.01 * most
        assert (row["outside_share"] is not None) == (row["engine"] == "onnx")
        assert row["outside_share"] is None or 0 < row["outside_share"] < 1
        for name in FIGURES:
            spread = row["spread"][name]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    # Every engine's step reads the same weights: tables apart, the whole model and an inner link.
    (step_mb,) = {row["step_mb"] for row in rows}
    assert {round(read["mb"], 1) for read in data["reads"]} == {step_mb}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"engines.json", "engines.md", "engines.png"}
    assert json.loads((tmp_path / "engines.json").read_text()) == data
    assert "| onnx" in (tmp_path / "engines.md").read_text()


def test_the_torch_engine_is_measured_too(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = recmasc(capsys, bundle, *QUICK, *SMALL, "--engine", "torch")
    (row,) = body["data"]["rows"]
    assert (row["engine"], row["capacity"], row["precision"]) == ("torch", 64, "float32")


def test_bundles_of_other_precisions_stand_beside_the_first(
    bundle: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = project / "bundle"
    body = recmasc(capsys, bundle, "--bundle", other, *QUICK, *SMALL, "--engine", "onnx")
    assert [row["bundle"] for row in body["data"]["rows"]] == [str(bundle), str(other)]


def test_bytes_of_a_step_are_the_decoders_weights(bundle: Path) -> None:
    opened = open_bundle(bundle)
    entry = opened.manifest.backbones["tiny"]
    weights, _ = read_tensors(opened.file(entry.weights))
    # Tables of angles belong to the decoder for the CPU, which picks a row of each.
    matrices = sum(
        w.nbytes for name, w in weights.items() if w.ndim == 2 and not name.endswith(".table")
    )
    tables = 2 * entry.vocab_size * entry.width * 4
    counted = weight_bytes(opened.file(entry.decoder))
    # Norms and small constants are all that the matrices of the layers leave out.
    assert 0 <= counted - (matrices - tables) < 0.05 * matrices
    assert weight_precision(opened.file(entry.decoder)) == "float32"


def quantized(path: Path) -> Path:
    """Write a graph with a table that is looked up and a product with weights of 4 bits."""
    packed = np.zeros((8, 1, 8), np.uint8)
    values = [
        numpy_helper.from_array(np.zeros((100, 16), np.float32), "table"),
        numpy_helper.from_array(packed, "packed"),
        numpy_helper.from_array(np.zeros(8, np.float32), "scales"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node(
            "MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft",
            K=16, N=8, bits=4, block_size=16,
        ),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        initializer=values,
    )
    onnx.save(helper.make_model(graph), path)
    return path


def genai_model(folder: Path, bundle: Path, *, takes_tokens: bool) -> Path:
    """Write a graph with the inputs and outputs that onnxruntime-genai's builder gives its own."""
    entry = open_bundle(bundle).manifest.backbones["tiny"]
    width, vocab, rows = entry.width, entry.vocab_size, entry.layers[0].rows
    assert rows is not None
    heads = rows.heads
    cache = ["batch", heads, "capacity", rows.key_width]
    value = helper.make_tensor_value_info
    product = numpy_helper.from_array(np.full((width, width), 0.1, np.float32), "weight")
    table = numpy_helper.from_array(np.eye(vocab, dtype=np.float32), "table")
    if takes_tokens:
        inputs = [value("input_ids", TensorProto.INT64, ["batch", "positions"])]
        nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
        outputs = [value("logits", TensorProto.FLOAT, ["batch", "positions", vocab])]
    else:
        inputs = [value("inputs_embeds", TensorProto.FLOAT, ["batch", "positions", width])]
        nodes = [helper.make_node("MatMul", ["inputs_embeds", "weight"], ["hidden_states"])]
        outputs = [value("hidden_states", TensorProto.FLOAT, ["batch", "positions", width])]
    inputs.append(value("attention_mask", TensorProto.INT64, ["batch", "total"]))
    for part in ("key", "value"):
        past, present = f"past_key_values.0.{part}", f"present.0.{part}"
        inputs.append(value(past, TensorProto.FLOAT, cache))
        outputs.append(value(present, TensorProto.FLOAT, cache))
        nodes.append(helper.make_node("Identity", [past], [present]))
    graph = helper.make_graph(
        nodes, "genai", inputs, outputs, initializer=[table if takes_tokens else product]
    )
    folder.mkdir()
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "model.onnx")
    return folder


def test_genai_bodies_take_steps_and_whole_models_write(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = genai_model(tmp_path / "body", bundle, takes_tokens=False)
    whole = genai_model(tmp_path / "whole", bundle, takes_tokens=True)
    models = ("--engine", "genai", "--genai", body, "--genai", whole)
    rows = recmasc(capsys, bundle, *QUICK, *SMALL, *models)["data"]["rows"]
    assert [row["genai"] for row in rows] == [str(body), str(whole)]
    steps, text = rows
    assert steps["step_ms"] > 0
    assert steps["decode_tokens_per_s"] is None
    assert text["step_ms"] is None
    assert text["decode_tokens_per_s"] > 0


def test_packed_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    graph = quantized(tmp_path / "quantized.onnx")
    assert weight_bytes(graph) == 8 * 8 + 8 * 4
    assert weight_precision(graph) == "int4"


def test_peak_memory_counts_what_was_freed() -> None:
    restart_peak()
    before = peak_resident_bytes()
    block = np.ones(2**24, np.float32)
    size = block.nbytes
    del block
    assert peak_resident_bytes() - before > size // 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--engine", "tensorflow"], "is none of onnx, torch"),
        (["--engine", "genai"], "needs --genai DIR"),
        (["--capacity", "64", "--used", "62"], "less than 62 used rows and 3 steps"),
        (["--repeats", "0"], "--repeats 0"),
        (["--batch", "0"], "1 or more"),
        (["--batch", "one"], "list of numbers"),
    ],
)
def test_refusals(
    bundle: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    body = recmasc(capsys, bundle, *QUICK, *arguments)
    assert body["status"] == Exit.USAGE
    assert (body["problems"][0]["code"], reason in body["problems"][0]["message"]) == (
        "RM506",
        True,
    )


def test_an_engine_that_cannot_open_says_why(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # This bundle names its backbone by a folder beside the spec, not beside the bundle.
    body = recmasc(capsys, project / "bundle", *QUICK, *SMALL, "--engine", "huggingface")
    assert body["status"] == Exit.ENVIRONMENT
    assert body["problems"][0]["code"] == "RM200"


@pytest.mark.parametrize(
    "asked", [["--engine", "torch"], ["--engine", "huggingface"], ["--genai", "model"]]
)
def test_engines_that_keep_rows_only_are_refused(
    with_state: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any engine opens: this bundle is of no model that torch could load."""
    body = recmasc(capsys, with_state, *QUICK, *SMALL, *asked)
    assert body["status"] == Exit.ENVIRONMENT
    (problem,) = body["problems"]
    engine = "genai" if "model" in asked else asked[1]
    assert problem["code"] == "RM203"
    assert problem["message"].startswith(f"engine {engine!r} goes back to no layer states")


def test_all_that_are_there_are_those_that_can(with_state: Path, bundle: Path) -> None:
    options = EngineOptions(
        bundles=(with_state,),
        engines=(),
        genai=(),
        batches=(1,),
        capacities=(64,),
        used=(8,),
        steps=3,
        warmup=0,
        repeats=1,
        device="cpu",
        threads=1,
    )
    assert engines_of(options, open_bundle(with_state)) == ["onnx", "naive"]
    assert engines_of(options, open_bundle(bundle)) == list(ENGINES)


def test_an_interruption_keeps_what_was_measured(bundle: Path) -> None:
    many = ["--repeats", "100000", "--threads", "1", "--steps", "3", "--warmup", "0", *SMALL]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "recmas_cli.main", "bench", "engines", str(bundle)),
            *("--engine", "onnx", "--json", *many),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Measuring"):
            break
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    body = json.loads(out)
    assert (process.returncode, body["ok"]) == (Exit.INTERRUPTED, False)
    assert body["data"]["interrupted"] is True
    assert [row["engine"] for row in body["data"]["rows"]] == ["onnx"]


def test_bench_without_a_name_still_compares_systems(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--limit", "1", "--warmup", "0", "--repeats", "1", "--rounds", "1", "--quiet"]
    for words in (["bench"], ["bench", "systems"]):
        with pytest.raises(SystemExit):
            main([*words, str(bundle), *short, "--json"])
        rows = json.loads(capsys.readouterr().out)["data"]["rows"]
        assert [row["system"] for row in rows] == ["latent", "text"]
