"""The whole path from a bundle to answers on engines, with stand-ins for TensorRT and CUDA.

What this shows: bindings, addresses, pitches, profiles, captured rollouts and the choice of engines
are right under the documented rules, which the stand-ins enforce. What it cannot show: that the
real TensorRT builds these graphs, and how fast they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.files import read_messages
from recmas_runtime.engines.tensorrt.own_engines import remember_engines
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.running.run_trace import RECORDS_NAME
from simulated_commands import SIMULATED, data_of, run_python, run_simulated

QUESTIONS = ["What is seven times eight?", "Why?", "Three friends plan a garden."]
LONG = ("--max-new-tokens", "150")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "questions.jsonl"
    rows = [{"id": str(i), "question": question} for i, question in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(bundle: Path, records: Path, *more: str, **variables: str) -> dict[str, Any]:
    asked = ("run", str(bundle), "--input", str(records), "--json", "--quiet", *more)
    body: dict[str, Any] = json.loads(run_simulated(*asked, **variables).stdout)
    return body


def texts(body: dict[str, Any]) -> list[str]:
    return [answer["answer"] for answer in body["data"]["answers"]]


def test_engines_pass_the_parity_cases(engine_bundle: Path) -> None:
    ran = run_simulated("verify", str(engine_bundle), "--json")  # auto: engines that fit are taken
    data = data_of(ran)
    assert data["device"] == "tensorrt"
    assert {case["backbone"] for case in data["cases"]} == {"small", "other"}
    assert all(case["greedy_tokens_equal"] for case in data["cases"])
    assert json.loads(ran.stdout)["problems"] == []


def test_batches_think_and_answer_as_on_onnx_runtime(
    engine_bundle: Path, records: Path, tmp_path: Path
) -> None:
    found = {}
    # One by one, a batch finds the caches of the one before it, and its captured rollouts.
    runs = {"cpu": (), "tensorrt": (), "one-by-one": ("--batch", "1")}
    for name, more in runs.items():
        device = "cpu" if name == "cpu" else "tensorrt"
        trace = ("--trace", str(tmp_path / name), "--thoughts", "2")
        body = run(engine_bundle, records, "--device", device, *trace, *more)
        assert body["problems"] == []  # whatever is read of thoughts, the engines take it
        found[name] = texts(body)
    assert found["tensorrt"] == found["one-by-one"] == found["cpu"]
    expected, messages = (read_messages(tmp_path / name) for name in ("cpu", "tensorrt"))
    assert set(messages) == set(expected)
    for name in expected:
        difference = np.abs(messages[name] - expected[name]).max()
        assert difference <= TOLERANCES["message_absolute"], name
    assert nearest_tokens(tmp_path / "tensorrt") == nearest_tokens(tmp_path / "cpu")


def nearest_tokens(folder: Path) -> list[int]:
    """Return the tokens nearest to each thought of a trace through the head."""
    records = map(json.loads, (folder / RECORDS_NAME).read_text(encoding="utf-8").splitlines())
    thoughts = [thought for record in records for thought in record["thoughts"]]
    return [token["id"] for thought in thoughts for token in thought["head"]["tokens"]]


def test_what_is_too_long_for_the_engines_runs_on_onnx_runtime(
    engine_bundle: Path, records: Path
) -> None:
    body = run(engine_bundle, records, *LONG)
    assert texts(body) == texts(run(engine_bundle, records, "--device", "cpu", *LONG))
    (warning,) = body["problems"]
    assert warning["code"] == "RM550"
    assert warning["message"].startswith(
        "backbone 'other': a batch needs more than its TensorRT engines take (3 rows, "
    )


def test_building_again(own_bundle: Path) -> None:
    assert data_of(run_simulated("engines", str(own_bundle), "--json"))["reused"]
    forced = data_of(run_simulated("engines", str(own_bundle), "--json", "--force"))
    assert not forced["reused"]
    # A build goes on with what the one before measured: two decoders and two heads each time.
    (cache,) = own_bundle.glob("engines/*/timing.cache")
    assert cache.read_bytes() == b"." * 8


def test_engines_of_others_are_taken_only_on_demand(
    engine_bundle: Path, records: Path, tmp_path: Path
) -> None:
    elsewhere = {"XDG_STATE_HOME": str(tmp_path)}
    body = run(engine_bundle, records, **elsewhere)
    (warning,) = body["problems"]
    assert (warning["code"], warning["severity"]) == ("RM550", "warning")
    assert "were not built by this user" in warning["message"]
    assert "--device tensorrt" in warning["hint"]
    strict = run(engine_bundle, records, "--device", "tensorrt", **elsewhere)
    assert (strict["problems"], texts(strict)) == ([], texts(body))
    for command in ("inspect", "verify"):
        shown = run_simulated(command, str(engine_bundle), **elsewhere).stdout
        assert "not built by this user; loaded only with --device tensorrt" in shown
    assert "built by this user" in run_simulated("inspect", str(engine_bundle)).stdout


def test_the_capacities_are_those_of_the_plan(engine_bundle: Path) -> None:
    plan = json.loads((engine_bundle / "plan.json").read_text(encoding="utf-8"))
    (record,) = engine_bundle.glob("engines/*/engines.json")
    built = json.loads(record.read_text(encoding="utf-8"))["backbones"]
    assert set(built) == {"small", "other"}
    for name, plans in built.items():
        needed = {c["capacity"] for c in plan["caches"].values() if c["backbone"] == name}
        assert needed <= {decoder["capacity"] for decoder in plans["decoders"]}


def test_what_does_not_fit_is_named_and_onnx_runtime_used(
    engine_bundle: Path, records: Path
) -> None:
    other = {"SIMULATED_TENSORRT": "10.16.1.11"}
    body = run(engine_bundle, records, **other)
    assert texts(body) == texts(run(engine_bundle, records, "--device", "cpu"))
    (warning,) = body["problems"]
    assert (warning["code"], warning["severity"]) == ("RM550", "warning")
    assert warning["message"] == (
        "no TensorRT engine of this bundle can be used here: "
        "engines/tensorrt-11.4.0.106-sm90: built by TensorRT 11.4.0.106, here is 10.16.1.11; "
        "ONNX Runtime is used"
    )
    hint = f"Build engines for this machine with `recmas engines {engine_bundle}`."
    assert warning["hint"] == hint
    strict = run(engine_bundle, records, "--device", "tensorrt", **other)
    assert [problem["code"] for problem in strict["problems"]] == ["RM511"]


def test_tensorrt_that_is_too_old_is_refused(engine_bundle: Path) -> None:
    ran = run_simulated("engines", str(engine_bundle), "--json", SIMULATED_TENSORRT="10.14.1.48")
    assert ran.returncode == 4
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem["code"] == "RM509"
    assert problem["message"].startswith("TensorRT 10.14.1.48 is installed")


def test_a_plan_that_tensorrt_refuses(own_bundle: Path, records: Path) -> None:
    (record,) = own_bundle.glob("engines/*/engines.json")
    (plan,) = own_bundle.glob("engines/*/small.head.plan")
    plan.write_bytes(b"garbage")
    changed = json.loads(record.read_text(encoding="utf-8"))
    changed["files"][plan.name] = {
        "sha256": hashlib.sha256(b"garbage").hexdigest(),
        "size_bytes": len(b"garbage"),
    }
    record.write_text(json.dumps(changed), encoding="utf-8")
    assert remember_engines(record)  # or else nobody would look at them
    body = run(own_bundle, records)
    assert body["ok"]
    assert len(texts(body)) == len(QUESTIONS)
    (warning,) = body["problems"]
    assert warning["message"] == (
        "TensorRT 11.4.0.106 refuses the plan: the plan has no magic tag; ONNX Runtime is used"
    )


EXCHANGE = """
import sys
import numpy as np
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.links import load_operands, stack_operands
from recmas_runtime.running.open_engines import open_engines

bundle = open_bundle(sys.argv[1])
backbone = open_engines(bundle, device="tensorrt", threads=1).backbones["small"]
link = bundle.manifest.links["one.inner"]
inner = stack_operands([load_operands(bundle.file(link.file), link)])
larger = backbone.new_cache(20, 64)  # more rows than the engines take
embeds = backbone.embed(np.arange(20 * 7).reshape(20, 7) % 50)
backbone.forward(larger, embeds, np.zeros(20, int), np.full(20, 6), inner)
cache = backbone.new_cache(2, 64)
cache.copy_rows(larger, [13, 1], 7)
other = backbone.new_cache(2, 64)
other.copy_rows(cache, [1, 0], 5)
print(type(larger).__name__, type(cache).__name__)
from recmas_runtime.core.errors import RecmasError
rows = larger.read_rows([13, 1], 7), cache.read_rows([0, 1], 7), other.read_rows([1, 0], 5)
for a, b, c in zip(*rows, strict=True):
    assert a.any()
    assert np.array_equal(a, b)
    assert np.array_equal(a[:, :, :5], c)
for go_back in (cache.save_states, lambda: cache.restore_states({}, {0: 0})):
    try:
        go_back()
    except RecmasError as error:
        print(error.problems[0].code)
"""


HALF_CAPTURED = """
import sys
import numpy as np
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.links import load_operands, stack_operands
from recmas_runtime.running.open_engines import open_engines
from recmas_runtime.engines.tensorrt import execution
from recmas_runtime.engines.tensorrt.execution import Stream

execution.MOST_STEPS_OF_A_GRAPH = 2
bundle = open_bundle(sys.argv[1])
backbone = open_engines(bundle, device="tensorrt", threads=1).backbones["small"]
link = bundle.manifest.links["one.inner"]
inner = stack_operands([load_operands(bundle.file(link.file), link)])
capture, captured = Stream.capture, []

def failing(stream, launch):
    captured.append(launch)
    if len(captured) == 2:
        raise MemoryError
    return capture(stream, launch)

def rollout(cache):
    embeds = backbone.embed(np.arange(4)[None])
    index = np.zeros(1, int)
    _, *last = backbone.forward(cache, embeds, index, index + 3, inner)
    return backbone.rollout(cache, *last, index + 4, inner, 6)

expected = rollout(backbone.new_cache(1, 64))[0]
assert expected.any(axis=(1, 2)).all()
backbone._waiting.clear()
cache = backbone.new_cache(1, 64)
Stream.capture = failing
try:
    rollout(cache)
except MemoryError:
    print(len(captured))
assert np.array_equal(rollout(cache)[0], expected)
"""


def test_a_capture_that_fails_midway_begins_anew(engine_bundle: Path) -> None:
    ran = run_python("-c", HALF_CAPTURED, str(engine_bundle), paths=(str(SIMULATED),))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["2"]


def test_rows_move_between_engines(engine_bundle: Path) -> None:
    ran = run_python("-c", EXCHANGE, str(engine_bundle), paths=(str(SIMULATED),))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["Cache", "TensorrtCache", "RM203", "RM203"]
