"""Engines that fail while they run, or give results of another shape: told as such, not as bugs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tokenizers import Tokenizer

from kit.hand_bundle import edit_json, make_tokenizer, rehash
from recmas_runtime.cli.main import main
from recmas_runtime.formats.safetensors_file import read_tensors, write_tensors

CASE = "parity/one.safetensors"


def problem_of(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int
) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == status
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    return dict(problem)


def demand_failure(capsys: pytest.CaptureFixture[str], bundle: Path, *, is_in_case: bool) -> None:
    """A run names the engine's reason; to `verify` it is a bundle that is not right here."""
    reason = "Got invalid dimensions for input"
    problem = problem_of(capsys, "run", bundle, "q", status=1)
    assert problem["code"] == "RM507"
    assert reason in problem["message"]
    assert "\n" not in problem["message"]
    assert "recmas verify" in problem["hint"]
    if is_in_case:
        problem = problem_of(capsys, "verify", bundle, status=5)
        assert (problem["code"], problem["file"]) == ("RM405", CASE)
        assert reason in problem["message"]


@pytest.mark.parametrize("graph", ["backbones/one/embed", "backbones/one/head", "links/link"])
def test_a_graph_that_takes_other_shapes(
    own_bundle: Path, capsys: pytest.CaptureFixture[str], graph: str
) -> None:
    path = own_bundle / f"{graph}.onnx"
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7  # instead of any number
    onnx.save(model, path)
    rehash(own_bundle)
    # The case of this bundle has no vectors of links.
    demand_failure(capsys, own_bundle, is_in_case=graph != "links/link")


ROWS = {"heads": 1, "key_width": 1, "value_width": 1}


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("layers/0/rows/key_width", 2, "key.0"),
        ("layers/0/rows/heads", 3, "key.0"),
        ("layers", [{"rows": ROWS}, {"rows": ROWS}], "key.1"),
        ("layers", [{"rows": ROWS, "states": [{"name": "conv", "shape": [4, 3]}]}], "conv.0"),
    ],
)
@pytest.mark.parametrize("command", [("run", "q"), ("verify",)])
def test_caches_that_do_not_fit_the_decoder(
    own_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    key: str,
    value: object,
    other: str,
) -> None:
    edit_json(own_bundle / "manifest.json", f"backbones/one/{key}", value)
    name, *more = command
    problem = problem_of(capsys, name, own_bundle, *more, status=5)
    assert (problem["code"], problem["file"]) == ("RM404", "backbones/one/decoder.onnx")
    assert repr(other) in problem["message"]


def test_a_decoder_without_an_input_of_decoders(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_bundle / "backbones/one/decoder.onnx"
    model = onnx.load(path)
    (last_index,) = (i for i in model.graph.input if i.name == "last_index")
    (unsqueeze,) = (n for n in model.graph.node if n.input[0] == "last_index")
    last_index.name = unsqueeze.input[0] = "another_index"
    onnx.save(model, path)
    rehash(own_bundle)
    problem = problem_of(capsys, "run", own_bundle, "q", status=1)
    assert problem["code"] == "RM507"
    assert "last_index" in problem["message"]


def test_a_probe_of_another_shape(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_bundle / "parity/probe.onnx"
    model = onnx.load(path)
    (two,) = (tensor for tensor in model.graph.initializer if tensor.name == "two")
    two.CopyFrom(numpy_helper.from_array(np.full(2, 2, np.float32), "two"))
    model.graph.output[1].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    rehash(own_bundle)
    problem = problem_of(capsys, "verify", own_bundle, status=5)
    assert (problem["code"], problem["file"]) == ("RM405", "parity/probe.onnx")
    assert problem["message"].startswith("probe_absolute is inf, allowed")


def test_a_case_of_another_shape(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, metadata = read_tensors(own_bundle / CASE)
    kept = {name: tensor.copy() for name, tensor in tensors.items()}
    write_tensors(own_bundle / CASE, {**kept, "hidden": kept["hidden"][:, 1:]}, metadata)
    rehash(own_bundle)
    problem = problem_of(capsys, "verify", own_bundle, status=5)
    assert (problem["code"], problem["file"]) == ("RM405", CASE)
    assert problem["message"].startswith("hidden_relative is inf, allowed")


def ask_all(bundle: Path, tmp_path: Path, *questions: str) -> list[dict[str, Any]]:
    source, target = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    main(["run", str(bundle), "--input", str(source), "--output", str(target), "--quiet"])
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def test_a_token_without_a_row_costs_only_its_record(own_bundle: Path, tmp_path: Path) -> None:
    path = own_bundle / "backbones/one/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["extra"])
    tokenizer.save(str(path))
    rehash(own_bundle)
    first, failed, last = ask_all(own_bundle, tmp_path, "1", "an extra 2", "3")
    assert (first["answer"], last["answer"]) == ("b", "d")
    assert failed == {
        "id": "2",
        "record": {"question": "an extra 2"},
        "error": {
            "code": "RM500",
            "message": "record '2': the prompt of agent 'planner' has the token 'extra' (260); "
            "backbone 'one' has embeddings for 260 only",
        },
    }


def test_an_engine_that_fails_costs_only_the_record_at_fault(
    own_bundle: Path, tmp_path: Path
) -> None:
    path = own_bundle / "backbones/one/embed.onnx"
    model = onnx.load(path)
    nine = make_tokenizer().encode("9").ids[0]
    rows = np.arange(260)
    rows[nine] = 10**6
    model.graph.initializer.append(numpy_helper.from_array(rows, "rows"))
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["rows", "input_ids"], ["row"]))
    gather = model.graph.node[1]
    gather.input[1] = "row"
    onnx.save(model, path)
    rehash(own_bundle)
    found = ask_all(own_bundle, tmp_path, *"1239456")
    assert [line.get("answer") for line in found] == ["b", "c", "d", None, "e", "f", "g"]
    (failed,) = (line["error"] for line in found if "error" in line)
    assert failed["code"] == "RM507"
    assert failed["message"].startswith("record '4': ONNX Runtime ")


LITTLE_MEMORY = """
import json, resource, sys
import recmas_runtime as rt
system = rt.load(sys.argv[1], threads=1)
asked = [{"question": "x" * int(n) + "7"} for n in sys.argv[3].split(",")]
system.run([{"question": "7"}] * 4)
with open("/proc/self/statm") as statm:
    now = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[2]) * 2**20,) * 2)
for index, result in enumerate(system.run_batch([
    rt.Record(id=i, fields=fields, index=i) for i, fields in enumerate(asked)
])):
    error = isinstance(result, rt.RecmasError)
    print(str(result) if error else (result.answer, result.batch_size))
"""


@pytest.fixture
def roomy_bundle(own_bundle: Path) -> Path:
    """A bundle of prompts so long that a batch of them takes hundreds of megabytes."""
    edit_json(own_bundle / "plan.json", "limits/max_prompt_tokens", 100_000)
    for agent in ("planner", "solver"):
        edit_json(own_bundle / "plan.json", f"caches/{agent}/capacity", 100_352)
        edit_json(own_bundle / "plan.json", f"caches/{agent}/bytes_per_sample", 100_352 * 2 * 4)
    edit_json(own_bundle / "manifest.json", "backbones/one/max_positions", 200_000)
    rehash(own_bundle)
    return own_bundle


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("megabytes", [800, 400])
def test_memory_that_runs_out_makes_batches_smaller(roomy_bundle: Path, megabytes: int) -> None:
    lengths = "10,90000,20,30" if megabytes < 800 else "50000,50000,50000,50000"
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(roomy_bundle), str(megabytes), lengths],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert "Traceback" not in done.stderr
    found = done.stdout.splitlines()
    if megabytes < 800:
        assert [found[i] for i in (0, 2, 3)] == [f"('h', {n})" for n in (1, 2, 2)]
        assert found[1].startswith("error[RM507]: record 1: memory runs out: ")
        assert "Lower --batch" in found[1]
    else:
        assert [line[:4] for line in found] == ["('h'"] * 4
        assert any(int(line.split()[1][0]) < 4 for line in found)
