"""Products of integers by rows: the numbers are those of numpy, and no row depends on another."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from kit.engines import relative
from recmas_export.passes.row_products import QuantizeRows, quantized_channels, smoothing
from recmas_export.passes.tidy import IR_VERSION, OPSET
from recmas_export.pipeline import beside_rows, run_passes
from recmas_runtime.formats.precisions import GATED_BLOCK

WIDTH, INNER = 48, 96
WEIGHTS = {"gate": (WIDTH, INNER), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}
LOUD_CHANNEL = 5


def numbers(*shape: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MATRICES = {name: numbers(*shape, seed=len(name)) for name, shape in WEIGHTS.items()}
GAIN = np.ones(WIDTH, np.float32)
GAIN[LOUD_CHANNEL] = 50


def positions(count: int) -> NDArray[np.float32]:
    """Return [1, S, K], the first position far larger than the others."""
    x = numbers(1, count, WIDTH, seed=1)
    x[:, 0] *= 300
    return x


def value(name: str, width: int) -> ir.Value:
    shape = ir.Shape(("batch", "positions", width))
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)


def model_of(tape: Tape, x: ir.Value, y: ir.Value) -> ir.Model:
    y.name, y.type, y.shape = "y", x.type, ir.Shape(("batch", "positions", None))
    opsets = {"": OPSET}
    parts = {"nodes": tape.nodes, "initializers": tape.initializers, "opset_imports": opsets}
    return ir.Model(ir.Graph([x], [y], name="part", **parts), ir_version=IR_VERSION)  # type: ignore[arg-type]


def weight(tape: Tape, name: str) -> ir.Value:
    return tape.initializer(ir.Tensor(MATRICES[name], name=f"body.{name}.weight.transposed"))


def one_product(*more: str) -> ir.Model:
    tape, x = Tape(), value("x", WIDTH)
    y = tape.op("MatMul", (x, weight(tape, "gate")))
    for name in more:
        y = tape.op("Add", (y, tape.op("MatMul", (x, weight(tape, name)))))
    return model_of(tape, x, y)


def feed_forward() -> ir.Model:
    """Return x -> (n W1 * n W2) W3 with n the normed x, as a layer has it."""
    tape, x = Tape(), value("x", WIDTH)
    gain = tape.initializer(ir.Tensor(GAIN, name="body.norm.weight"))
    normed = tape.op("RMSNormalization", (x, gain), {"epsilon": 1e-6})
    packed = np.concatenate([MATRICES["gate"], MATRICES["up"]], axis=1)
    joined = tape.initializer(ir.Tensor(packed, name="body.gate.weight.transposed.packed"))
    both = tape.op("MatMul", (normed, joined))
    halves = tape.op_multi_out("Split", (both,), {"axis": -1, "num_outputs": 2}, num_outputs=2)
    y = tape.op("MatMul", (tape.op("Mul", halves), weight(tape, "down")))
    return model_of(tape, x, y)


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    raw = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def rewritten(model: ir.Model, peaks: dict[str, NDArray[np.float32]] | None = None) -> ir.Model:
    assert QuantizeRows(peaks or {})(model).modified
    return model


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def by_rows(x: NDArray[np.float32], weight_KN: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the product of integers, in numpy."""
    integers_KN, scales_N = quantized_channels(weight_KN)
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30))
    integers = np.rint(x / largest / np.float32(1 / 127)).astype(np.int64)
    product = (integers @ integers_KN.astype(np.int64)).astype(np.float32)
    return np.asarray(product * (np.float32(1 / 127) * scales_N) * largest)


def test_a_product_is_that_of_integers_by_row() -> None:
    x = positions(9)
    found, expected = run(rewritten(one_product()), x), by_rows(x, MATRICES["gate"])
    # Where x / largest lies between two integers, they may be rounded to either.
    assert np.median(np.abs(found - expected) / np.abs(expected)) < 1e-6
    for row in range(9):
        assert relative(found[:, row], x[:, row] @ MATRICES["gate"]) < 0.02


def test_no_row_depends_on_the_rest_of_its_call() -> None:
    x, rows, layer = positions(9), rewritten(one_product("up")), rewritten(feed_forward())
    assert run_passes(beside_rows(), layer)
    # Blocks are added up in another order where there are several rows.
    for model, most in ((rows, 0.0), (layer, 1e-6)):
        whole = run(model, x)
        for row in range(9):
            alone = run(model, x[:, row : row + 1])[:, 0]
            assert relative(alone, whole[:, row]) <= most
        folded = run(model, x.reshape(3, 3, WIDTH)).reshape(whole.shape)
        assert relative(folded, whole) <= most


def test_products_of_one_input_share_its_integers() -> None:
    found = operators(rewritten(one_product("up")))
    assert (found["MatMulIntegerToFloat"], found["QuantizeLinear"], found["Abs"]) == (2, 1, 1)


def test_what_a_gate_makes_is_left_to_blocks() -> None:
    model = rewritten(feed_forward())
    assert operators(model)["MatMulIntegerToFloat"] == operators(model)["MatMul"] == 1
    tape, x, down = Tape(), value("x", 16 * GATED_BLOCK), numbers(16 * GATED_BLOCK, WIDTH, seed=2)
    down[0] = 0  # the loud one shall be wrong by what it does to others only
    matrix = tape.initializer(ir.Tensor(down, name="body.down.weight"))
    squared = model_of(tape, x, tape.op("MatMul", (tape.op("Mul", (x, x)), matrix)))
    assert run_passes(beside_rows(), squared)
    assert operators(squared)["MatMulNBits"] == 1
    loud = numbers(1, 4, 16 * GATED_BLOCK, seed=3)
    loud[:, :, 0] = 60  # beside which 8 bits have nothing left for the others of its block
    exact = loud**2 @ down
    errors = [
        np.abs(found - exact).mean() for found in (run(squared, loud), by_rows(loud**2, down))
    ]
    assert errors[0] < errors[1] / 3


def test_rows_of_zeros_give_zeros() -> None:
    for part in (feed_forward(), one_product()):
        assert not run(rewritten(part), np.zeros((2, 3, WIDTH), np.float32)).any()


def test_channels_are_made_alike_before_they_are_rounded() -> None:
    x = positions(9)
    expected = run(feed_forward(), x)
    peaks = np.full(WIDTH, 0.1, np.float32)
    peaks[LOUD_CHANNEL] = 1
    plain, smooth = feed_forward(), feed_forward()
    rewritten(plain)
    rewritten(smooth, {"body.gate": peaks})
    errors = [np.abs(run(model, x) - expected).mean() for model in (plain, smooth)]
    assert errors[1] < 0.7 * errors[0]
    factors = smoothing(peaks, MATRICES["gate"])
    assert np.isclose(np.log(factors).mean(), 0, atol=1e-5)
    assert factors.argmax() == LOUD_CHANNEL


def test_a_graph_that_chooses_stays_as_it_is() -> None:
    model = one_product()
    tape = Tape()
    one = tape.initializer(ir.tensor([1], name="one"))
    model.graph.register_initializer(one)
    tape.op_multi_out("TopK", (model.graph.outputs[0], one), num_outputs=2)
    model.graph.extend(tape.nodes)
    assert not QuantizeRows({})(model).modified
    assert operators(model)["MatMul"] == 1
