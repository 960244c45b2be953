"""One engine from one graph, on the stand-ins: what the parser refuses, progress, interruption."""

from __future__ import annotations

import json
from pathlib import Path

from simulated_commands import SIMULATED, run_python

BUILD = """
import json, sys
from contextlib import contextmanager
from pathlib import Path
import onnx
from onnx import TensorProto, helper
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.tensorrt.network import serialize_engine
from recmas_runtime.engines.tensorrt.static_graph import profile_shapes

class Recorded:
    "Progress that keeps what it was told, and gives up at a step."
    def __init__(self, interrupt_at=None):
        self.told, self.interrupt_at = [], interrupt_at

    @contextmanager
    def stage(self, title, total=None):
        def step(num_units=1):
            self.told.append(f"step {title}")
            if title == self.interrupt_at:
                raise KeyboardInterrupt
        self.told.append(f"open {title} /{total}")
        yield step
        self.told.append(f"close {title}")

def model_of(*nodes):
    value = helper.make_tensor_value_info
    inputs = [value("q", TensorProto.FLOAT, ["batch", 1]), value("index", TensorProto.INT64, [1])]
    return helper.make_model(helper.make_graph(nodes, "graph", inputs, []))

def node(name, operator, *inputs, outputs=1, **attributes):
    results = [f"{name}.{i}" for i in range(outputs)]
    return helper.make_node(operator, inputs, results, name=name, **attributes)

def serialize(model, progress=None, timing_cache=b""):
    shapes = profile_shapes({"q": ("batch", 1)}, {"batch": (1, 2, 8)})
    options = {"timing_cache": timing_cache, "title": "smol.576"}
    path = Path("decoder.onnx")
    return serialize_engine(model, path, [shapes], progress=progress or Recorded(), **options)

def error_of(*nodes, model=None):
    try:
        serialize(model or model_of(*nodes))
    except RecmasError as error:
        (problem,) = error.problems
        return [problem.code, problem.file, problem.message]
"""


def run_build(script: str) -> object:
    ran = run_python("-c", f"{BUILD}\n{script}", paths=(str(SIMULATED),))
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


REFUSED = """
attention = ("Attention", "q", "k", "v", "mask")
decomposable = {"scale": 1.0, "TRT_decomposable": 1}
scatter = ("TensorScatter", "cache", "rows", "index")
print(json.dumps([
    error_of(node("a", *attention, **decomposable), node("s", *scatter, axis=-2, mode="linear")),
    error_of(node("a", *attention, **decomposable, outputs=3)),
    error_of(node("a", *attention, **decomposable, softcap=50.0)),
    error_of(node("a", *attention, **decomposable, softcap=0.0)),
    error_of(node("a", *attention, **decomposable, q_num_heads=4)),
    error_of(node("s", *scatter, axis=2)),
    error_of(node("s", *scatter, axis=-2, mode="circular")),
    error_of(node("n", "LinearAttention", "q")),
    error_of(node("n", "MatMulNBits", "q", domain="com.microsoft")),
    error_of(node("m", "MatMul", "index", "index")),
    error_of(node("r", "ReduceMean", "q", "index")),
]))
"""


def test_what_the_parser_does_not_read_is_named() -> None:
    refused = "TensorRT's parser does not read operator "
    found = run_build(REFUSED)
    assert isinstance(found, list)
    assert {tuple(error[:2]) for error in found if error} == {("RM203", "decoder.onnx")}
    assert [error and error[2].removeprefix(refused) for error in found] == [
        None,
        "Attention (a): only one output is supported",
        "Attention (a): softcap is not supported",
        None,
        "Attention (a): three-dimensional inputs are not supported",
        "TensorScatter (s): axis must be -2",
        "TensorScatter (s): circular mode is not supported",
        "LinearAttention (n): no importer and no plugin of this name",
        "MatMulNBits (n): no importer and no plugin of this name",
        "MatMul (m): int64 is not supported",
        "ReduceMean (r): axes must be an initializer",
    ]


def test_nodes_of_one_kind_are_named_together() -> None:
    script = """
layers = [node(f"layer.{i}", "LinearAttention", "q") for i in range(6)]
print(json.dumps(error_of(node("m", "MatMul", "index", "index"), *layers)))
"""
    assert run_build(script) == [
        "RM203",
        "decoder.onnx",
        "TensorRT's parser does not read operator MatMul (m): int64 is not supported; operator "
        "LinearAttention (layer.0, layer.1, layer.2, layer.3 and 2 more): no importer and no "
        "plugin of this name",
    ]


def test_what_is_no_nodes_fault_is_refused_with_the_reason() -> None:
    script = """
class Damaged:
    SerializeToString = lambda self: b"no graph"

print(json.dumps([
    error_of(model=Damaged()),
    error_of(node("a", "Attention", "q", "k", "v", "mask", scale=1.0)),
]))
"""
    refuses = "TensorRT 11.4.0.106"
    assert run_build(script) == [
        ["RM510", "decoder.onnx", f"{refuses} refuses the graph: Failed to parse the ONNX model."],
        ["RM510", "decoder.onnx", f"{refuses} built no engine: no fused kernel for float32"],
    ]


def test_two_levels_of_phases_are_shown_and_the_timing_cache_grows() -> None:
    script = """
progress = Recorded()
_, cache = serialize(model_of(node("y", "Relu", "q")), progress, b"..")
print(json.dumps([cache.decode(), progress.told]))
"""
    assert run_build(script) == [
        "...",
        [
            "open smol.576: Building /2",
            "open smol.576: Timing /3",
            "step smol.576: Timing",
            "step smol.576: Timing",
            "step smol.576: Timing",
            "close smol.576: Timing",
            "step smol.576: Building",
            "close smol.576: Building",
        ],
    ]


def test_an_interrupt_ends_the_build_at_the_next_step() -> None:
    script = """
progress = Recorded(interrupt_at="smol.576: Timing")
try:
    serialize(model_of(node("y", "Relu", "q")), progress)
except KeyboardInterrupt:
    print(json.dumps(progress.told))
"""
    assert run_build(script) == [
        "open smol.576: Building /2",
        "open smol.576: Timing /3",
        "step smol.576: Timing",
        "close smol.576: Timing",
        "close smol.576: Building",
    ]


def test_an_interrupted_build_of_a_bundle_leaves_nothing(portable_bundle: Path) -> None:
    script = f"""
from recmas_runtime.checking.build_tensorrt import build_engines
try:
    build_engines(Path({str(portable_bundle)!r}), progress=Recorded("other.head: Building"))
except KeyboardInterrupt:
    print(json.dumps(True))
"""
    assert run_build(script)
    assert not (portable_bundle / "engines").exists()
