"""Graphs of 16 bits: every value's type, and what they compute beside float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from kit.narrow_graphs import NORMS, PRODUCTS, checked, computed_in, types_of
from recmas_export.element_types import ComputeWide, UseElementTypes
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.element_types import narrowed, widened
from recmas_runtime.engines.onnx.session import make_session
from recmas_runtime.formats.precisions import PRECISIONS, ElementTypes

# A layer in small: a norm, a product whose parts are turned, gated and added to what came in; a
# choice among rows of another product; a lookup.
LAYER = """
<ir_version: 10, opset_import: ["": 24]>
layer (float[R,S,8] x, int64[R,S] ids, float[R,2,C,4] key_0, int64[R] at, bool[R,1,S,C] mask)
    => (float[R,S,8] hidden, float[R,2,C,4] present_key_0, float[R,S,1] best,
        float[R,S,8] looked_up)
<WEIGHTS, int64[4] heads = {0,0,2,4}, int64[3] flat = {0,0,8}, int64[1] one = {1}>
{
    normed = RMSNormalization <axis = -1> (x, scale)
    wide = MatMul (normed, q)
    split = Reshape (wide, heads)
    queries = Transpose <perm = [0, 2, 1, 3]> (split)
    present_key_0 = TensorScatter <axis = 2, mode = "linear"> (key_0, queries, at)
    seen = Attention <scale = 0.5> (queries, present_key_0, present_key_0, mask)
    turned = Transpose <perm = [0, 2, 1, 3]> (seen)
    joined = Reshape (turned, flat)
    gate = Sigmoid (joined)
    gated = Mul (joined, gate)
    halved = Mul (gated, root)
    product = MatMul (halved, out)
    hidden = Add (x, product)
    scores = MatMul (hidden, router)
    best, which = TopK <axis = -1> (scores, one)
    rows = Gather (table, ids)
    looked_up = Mul (rows, root)
}
"""

Export = Callable[[str, Path], Path]


WEIGHTS = {
    "scale": (8,),
    "q": (8, 8),
    "out": (8, 8),
    "router": (8, 4),
    "table": (16, 8),
    "root": (),
}


def layer() -> ir.Model:
    generator = np.random.default_rng(0)
    weights = []
    for name, shape in WEIGHTS.items():
        sizes = f"[{','.join(map(str, shape))}]" if shape else ""
        numbers = ", ".join(f"{number:.8f}" for number in generator.normal(size=shape).reshape(-1))
        weights.append(f"float{sizes} {name} = {{{numbers}}}")
    model = ir.from_onnx_text(LAYER.replace("WEIGHTS", ", ".join(weights)))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in ("key_0", "present_key_0"):  # the text form takes no dots
            value.name = value.name.replace("_0", ".0")
    return model


def written(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


def feeds(dtype: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(2, 2, 6, 4)).astype(np.float32)
    kinds = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    mask = np.arange(6) <= np.array([[2, 3], [3, 4]])[..., None]
    return {
        "x": generator.normal(size=(2, 2, 8)).astype(np.float32),
        "ids": np.array([[1, 2], [3, 15]]),
        "key.0": rows.astype(kinds[dtype]),
        "at": np.array([2, 3]),
        "mask": mask[:, None],
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_which_operators_compute_in_16_bits(dtype: str, tmp_path: Path) -> None:
    model = layer()
    UseElementTypes(PRECISIONS[dtype].types["cuda"])(model)
    graph = checked(written(model, tmp_path / "layer.onnx"))
    narrow, wide = frozenset({dtype}), frozenset({"float32"})
    found = list(computed_in(graph))
    assert [kinds for name, kinds in found if name in ("Attention", "TensorScatter")] == [
        narrow
    ] * 2
    assert [kinds for name, kinds in found if name == "RMSNormalization"] == [wide]
    # two products of a layer, and the choice of experts
    assert [kinds for name, kinds in found if name == "MatMul"] == [narrow, narrow, wide]
    assert [kinds for name, kinds in found if name == "TopK"] == [wide]
    # the gate and its factor, and what was looked up
    assert [kinds for name, kinds in found if name == "Mul"] == [narrow, narrow, wide]
    assert [kinds for name, kinds in found if name == "Add"] == [wide]
    assert [kinds for name, kinds in found if name == "Gather"] == [narrow]
    types = types_of(graph)
    assert (types["x"], types["hidden"], types["best"], types["looked_up"]) == ("float32",) * 4
    assert (types["key.0"], types["present_key.0"], types["key.0"]) == (dtype,) * 3


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_a_cpu_rounds_where_the_graph_says(dtype: str, most: float, tmp_path: Path) -> None:
    """Against ONNX's reference implementation, operator by operator, on the graph for a GPU."""
    from onnx.reference import ReferenceEvaluator

    model = layer()
    UseElementTypes(PRECISIONS[dtype].types["cuda"])(model)
    narrow = written(model, tmp_path / "narrow.onnx")
    ComputeWide()(model)
    checked(for_cpu := written(model, tmp_path / "cpu.onnx"))
    names = ["hidden", "present_key.0", "best", "looked_up"]
    given = feeds(dtype)
    expected = [
        np.asarray(a, np.float32) for a in ReferenceEvaluator(str(narrow)).run(names, given)
    ]
    session = make_session(for_cpu, threads=1)
    from recmas_runtime.engines.onnx.caches import ELEMENT_TYPES, ort_value

    kinds = {value.name: value.type for value in session.get_inputs()}
    values = {
        name: ort_value(
            array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array, kinds[name]
        )
        for name, array in given.items()
    }
    assert ELEMENT_TYPES[kinds["key.0"]] == dtype
    found = session.run_with_ort_values(names, values)
    bits = found[1].numpy() if dtype == "float16" else None
    assert bits is None or np.array_equal(np.float32(bits), expected[1])
    for name, value, other in zip(names, found, expected, strict=True):
        if name == "present_key.0":
            continue
        spread = np.abs(other).max()
        assert np.abs(value.numpy() - other).max() <= most * spread, name
    wide = make_session(written(layer(), tmp_path / "wide.onnx"), threads=1)
    exact = wide.run(["hidden"], feeds("float32") | {"key.0": feeds("float32")["key.0"]})[0]
    assert 0 < np.abs(found[0].numpy() - exact).max() <= most * np.abs(exact).max()


def test_weights_that_are_too_large_are_refused() -> None:
    model = layer()
    weight = model.graph.initializers["out"]
    weight.const_value = ir.tensor(np.full((8, 8), 1e5, np.float32), name="out")
    with pytest.raises(RecmasError, match=r"RM202.*float16 cannot hold, in 'out'"):
        UseElementTypes(PRECISIONS["float16"].types["cuda"])(model)


def test_float32_stays_as_it_is() -> None:
    model = layer()
    before = ir.to_proto(model).SerializeToString()
    assert not UseElementTypes(ElementTypes())(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_bits_of_bfloat16_on_the_host() -> None:
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=1000).astype(np.float32) * np.float32(10.0) ** np.arange(
        -10, 10, 0.02
    )
    numbers = np.float32([*numbers, 0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45])
    with np.errstate(over="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16)
    bits = narrowed(numbers, "bfloat16")
    assert bits.dtype == np.uint16
    again = widened(bits, "bfloat16")
    assert np.array_equal(again, expected.astype(np.float32), equal_nan=True)
    assert np.array_equal(narrowed(again, "bfloat16"), bits)
    assert TensorProto.BFLOAT16 == 16


@pytest.mark.parametrize("operator", [*PRODUCTS, *NORMS])
def test_no_operator_is_told_of_twice(operator: str) -> None:
    assert (operator in PRODUCTS) != (operator in NORMS)
