"""Each rewrite of a decoder: the graph gets smaller and computes the same; other forms are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from kit.engines import CASES, Exported
from recmas_export.pipeline import CLEAN, run_passes

Arrays = Mapping[str, NDArray[Any]]
Sizes = tuple[int, ...]

RNG = np.random.default_rng(0)

# A table of angles [B, S, D] as transformers computes it, the same in both halves.
ANGLES = """
    f = Mul (p, freqs)
    t = Concat <axis = -1> (f, f)
    c = Cos (t)
    s = Sin (t)
"""
# Constants by name: what the exporter folds into every graph.
COMMON: Arrays = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "three": np.array([3]),
    "last": np.array([-1]),
    "two": np.float32(2),
    "eps": np.float32(1e-5),
    "half": np.array([4]),
    "end": np.array([2**63 - 1]),
    "heads": np.array([0, 0, -1, 8]),
}


def model_of(body: str, inputs: Mapping[str, Sizes], outputs: str, constants: Arrays) -> ir.Model:
    """Return the model of a text of nodes: inputs are floats whose first two sizes are free."""
    free = [f"float[batch,positions,{','.join(map(str, s[2:]))}] {n}" for n, s in inputs.items()]
    text = (
        f'<ir_version: 10, opset_import: ["": 24]> g ({", ".join(free)}) => ({outputs}) {{{body}}}'
    )
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    for name, array in {**COMMON, **constants}.items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(model)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, feeds: Arrays) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [np.asarray(array) for array in session.run(None, dict(feeds))]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def check(
    body: str,
    inputs: Mapping[str, Sizes],
    outputs: str,
    constants: Arrays,
    *,
    expected: Mapping[str, int],
) -> ir.Model:
    """Clean a graph; assert that it has the expected operators and computes what it did."""
    model = model_of(body, inputs, outputs, constants)
    feeds = {name: normal(*sizes) for name, sizes in inputs.items()}
    before = run(model, feeds)
    run_passes(CLEAN, model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert operators(model) == dict(expected)
    for found, wanted in zip(run(model, feeds), before, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    return model


def normal(*sizes: int) -> NDArray[np.float32]:
    return RNG.standard_normal(sizes, np.float32)


NORM = """
    sq = Pow (x, two)
    m = ReduceMean <keepdims = 1> (sq, last)
    e = Add (m, eps)
    r = Sqrt (e)
    i = Reciprocal (r)
"""


@pytest.mark.parametrize(
    "product", ["u = Mul (x, i) y = Mul (u, w)", "u = Mul (i, x) y = Mul (w, u)"]
)
def test_a_norm(product: str) -> None:
    check(
        NORM + product,
        {"x": (2, 3, 8)},
        "float[batch,positions,8] y",
        {"w": normal(8)},
        expected={"RMSNormalization": 1},
    )


def test_a_norm_with_a_scale_per_head_stays() -> None:
    """Engines differ in how they broadcast a scale of more than one axis."""
    model = check(
        NORM + "u = Mul (x, i) y = Mul (u, w)",
        {"x": (2, 3, 4, 8)},
        "float[batch,positions,4,8] y",
        {"w": normal(4, 8)},
        expected={"Pow": 1, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Reciprocal": 1, "Mul": 2},
    )
    assert "RMSNormalization" not in operators(model)


ROTATE = """
    h = Transpose <perm = [0, 2, 1, 3]> (x)
    cc = Unsqueeze (cos, one)
    ss = Unsqueeze (sin, one)
    a = Mul (h, cc)
    lo = Slice (h, zero, half, three, one)
    hi = Slice (h, half, end, three, one)
    n = Neg (hi)
    turned = Concat <axis = -1> (n, lo)
    b = Mul (turned, ss)
    y = Add (a, b)
"""


@pytest.mark.parametrize(
    ("tables", "extra"),
    [
        ("cos = Identity (c) sin = Identity (s)", {}),
        # Some models scale their tables (YaRN); a factor of one is dropped.
        ("cos = Mul (c, k) sin = Mul (s, k)", {"Mul": 2}),
        ("cos = Mul (c, unit) sin = Mul (s, unit)", {}),
    ],
)
def test_a_rotation(tables: str, extra: Mapping[str, int]) -> None:
    check(
        ANGLES + tables + ROTATE,
        {"x": (2, 3, 2, 8), "p": (2, 3, 1)},
        "float[batch,2,positions,8] y",
        {"freqs": normal(1, 1, 4), "k": np.float32(1.3), "unit": np.float32(1)},
        expected=Counter({"Mul": 1, "Cos": 1, "Sin": 1, "Transpose": 1, "RotaryEmbedding": 1})
        + Counter(extra),
    )


def test_a_rotation_of_unequal_halves_stays() -> None:
    body = ANGLES.replace("(f, f)", "(f, g)").replace("t =", "g = Neg (f) t =")
    body += "cos = Identity (c) sin = Identity (s)" + ROTATE
    inputs = {"x": (2, 3, 2, 8), "p": (2, 3, 1)}
    model = model_of(body, inputs, "float[batch,2,positions,8] y", {"freqs": normal(1, 1, 4)})
    run_passes(CLEAN, model)
    assert "RotaryEmbedding" not in operators(model)


def test_a_rotation_of_a_part_of_the_head() -> None:
    part = """
    h = Transpose <perm = [0, 2, 1, 3]> (x)
    part = Slice (h, zero, eight, three, one)
    rest = Slice (h, eight, end, three, one)
    """
    body = ANGLES + "cos = Identity (c) sin = Identity (s)" + part
    body += ROTATE.split("(x)")[1].replace("(h,", "(part,").replace("y =", "rotated =")
    model = check(
        body + "y = Concat <axis = -1> (rotated, rest)",
        {"x": (2, 3, 2, 12), "p": (2, 3, 1)},
        "float[batch,2,positions,12] y",
        {"freqs": normal(1, 1, 4), "eight": np.array([8])},
        expected={"Mul": 1, "Cos": 1, "Sin": 1, "Transpose": 1, "RotaryEmbedding": 1},
    )
    (rotation,) = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert rotation.attributes["rotary_embedding_dim"].as_int() == 8


def test_products_of_one_input_are_packed() -> None:
    model = check(
        "a = MatMul (x, wa) b = MatMul (x, wb) c = MatMul (b, wc)",
        {"x": (2, 3, 8)},
        "float[batch,positions,6] a, float[batch,positions,4] b, float[batch,positions,2] c",
        {"wa": normal(8, 6), "wb": normal(8, 4), "wc": normal(4, 2)},
        expected={"MatMul": 2, "Split": 1},
    )
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    matrices = sorted(tuple(t.shape.numpy()) for t in weights if len(t.shape) == 2)
    assert matrices == [(4, 2), (8, 10)], "what was packed is stored once"


def test_biases_are_packed_too() -> None:
    """Products without a bias are packed with each other, not with those that have one."""
    check(
        "ma = MatMul (x, wa) a = Add (ma, ba) mb = MatMul (x, wb) b = Add (bb, mb)"
        " c = MatMul (x, wc) d = MatMul (x, wd)",
        {"x": (2, 3, 8)},
        "float[batch,positions,6] a, float[batch,positions,4] b,"
        "float[batch,positions,2] c, float[batch,positions,2] d",
        {
            **{f"w{n}": normal(8, k) for n, k in (("a", 6), ("b", 4), ("c", 2), ("d", 2))},
            "ba": normal(6),
            "bb": normal(4),
        },
        expected={"MatMul": 2, "Add": 1, "Split": 2},
    )


HEADS = " ".join(
    f"r{n} = Reshape ({n}, heads) {n}h = Transpose <perm = [0, 2, 1, 3]> (r{n})" for n in "qkv"
)
HEADS_OUT = (
    "float[batch,2,positions,8] qh, float[batch,1,positions,8] kh, float[batch,1,positions,8] vh"
)


def test_equal_biases_and_weights_are_packed_wherever_they_are() -> None:
    """The exporter writes equal constants once, whatever layers they are in."""
    first = "a = MatMul (x, w) ab = Add (a, zeros) c = MatMul (x, v) cb = Add (c, zeros)"
    second = "d = MatMul (z, w) db = Add (d, zeros) e = MatMul (z, u) eb = Add (e, zeros)"
    outputs = ", ".join(f"float[batch,positions,8] {name}" for name in ("ab", "cb", "db", "eb"))
    check(
        f"{first} {second}",
        {"x": (2, 3, 8), "z": (2, 3, 8)},
        outputs,
        {"w": normal(8, 8), "v": normal(8, 8), "u": normal(8, 8), "zeros": np.zeros(8, np.float32)},
        expected={"MatMul": 2, "Add": 2, "Split": 2},
    )


def test_heads_are_transposed_together() -> None:
    check(
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)" + HEADS,
        {"x": (2, 3, 8)},
        HEADS_OUT,
        {"wq": normal(8, 16), "wk": normal(8, 8), "wv": normal(8, 8)},
        expected={"MatMul": 1, "Reshape": 1, "Transpose": 1, "Split": 1},
    )


def test_a_packed_matrix_that_is_sliced() -> None:
    cuts = "q = Slice (p, zero, n16, two_i, one) k = Slice (p, n16, n24, two_i, one)"
    numbers = {"n16": np.array([16]), "n24": np.array([24]), "two_i": np.array([2])}
    check(
        "p = MatMul (x, w)" + cuts + " v = Slice (p, n24, end, two_i, one)" + HEADS,
        {"x": (2, 3, 8)},
        HEADS_OUT,
        {"w": normal(8, 32), **numbers},
        expected={"MatMul": 1, "Reshape": 1, "Transpose": 1, "Split": 1},
    )


def test_slices_that_leave_something_out_stay() -> None:
    cuts = "q = Slice (p, zero, n16, two_i, one) k = Slice (p, n24, end, two_i, one)"
    check(
        "p = MatMul (x, w)" + cuts,
        {"x": (2, 3, 8)},
        "float[batch,positions,16] q, float[batch,positions,8] k",
        {"w": normal(8, 32), "n16": np.array([16]), "n24": np.array([24]), "two_i": np.array([2])},
        expected={"MatMul": 1, "Slice": 2},
    )


def test_norms_of_heads_come_after_the_transpose() -> None:
    norm = NORM.replace("(x,", "(rq,") + "u = Mul (rq, i) nq = Mul (u, w)"
    body = HEADS.replace("(rq)", "(nq)").replace("qh =", norm + " qh =")
    check(
        "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)" + body,
        {"x": (2, 3, 8)},
        HEADS_OUT,
        {"wq": normal(8, 16), "wk": normal(8, 8), "wv": normal(8, 8), "w": normal(8)},
        expected={"MatMul": 1, "Reshape": 1, "Transpose": 1, "Split": 1, "RMSNormalization": 1},
    )


@pytest.mark.parametrize(
    ("node", "number", "stays"),
    [
        ("Add", 0.0, False),
        ("Add", 1e-8, True),
        ("Add", 1e-30, True),
        ("Mul", 1.0, False),
        ("Mul", 1.000005, True),
    ],
)
def test_no_ops_are_told_exactly(node: str, number: float, stays: bool) -> None:
    body = f"z = {node} (x, c) y = Neg (z)"
    check(
        body,
        {"x": (2, 3, 8)},
        "float[batch,positions,8] y",
        {"c": np.float32(number)},
        expected={node: 1, "Neg": 1} if stays else {"Neg": 1},
    )


def test_a_power_that_is_nearly_a_square_stays() -> None:
    model = model_of(
        NORM + "u = Mul (x, i) y = Mul (u, w)",
        {"x": (2, 3, 8)},
        "float[batch,positions,8] y",
        {"w": normal(8), "two": np.float32(2.00001)},
    )
    run_passes(CLEAN, model)
    assert "RMSNormalization" not in operators(model)


def test_shapes_become_constants() -> None:
    shape = "sh = Shape <start = 0, end = 2> (x) to = Concat <axis = 0> (sh, four, last)"
    check(
        shape + " y = Reshape (x, to)",
        {"x": (2, 3, 8)},
        "float[batch,positions,4,2] y",
        {"four": np.array([4])},
        expected={"Reshape": 1},
    )


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_is_clean(exported: Callable[[str], Exported], name: str) -> None:
    """Per layer: four products, one transpose of heads and one back, two rotations."""
    case = exported(name)
    layers = case.backbone.facts.num_layers
    model = ir.load(case.folder / "decoder.onnx")
    # The inner link at the graph's end has three products and norms of its own.
    found = operators(model)
    norms_per_layer = {"gemma3": 6, "qwen3": 4}.get(CASES[name][0], 2)
    assert found["MatMul"] == 4 * layers + 3
    assert found["Transpose"] == found["RotaryEmbedding"] == found["Split"] == 2 * layers
    assert found["RMSNormalization"] == norms_per_layer * layers + 1
    assert found["Reshape"] == 2 * layers + 2
    assert not found.keys() & {"Identity", "Slice", "Neg", "Pow", "Reciprocal", "Expand"}
