#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: a model written with its packed weights
# (`session.save_external_prepacked_constant_initializers`) computes other numbers than the model that
# it was made from, where the matrices of MatMulNBits are small.
#
# The layout of packed blocks depends on the address they are packed at (data begin at the next
# multiple of 64 bytes in the buffer), and what is written to the external file is not aligned: small
# weights lie one behind the other. Where a blob is mapped to an address with another remainder, the
# kernel reads beside what was packed. There is no error, and the numbers are finite or not by
# chance. With matrices of some dozen kilobytes and more offsets are aligned, and results are equal.
#
# It saves memory, not the packing: kernels pack at each load all the same, to find what was saved by
# the hash of what they have packed.
#
# Seen: offsets modulo 64 are 0, 62, 60, 58, and the result is nan; the model itself gives numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet onnxruntime==1.31.1 onnx==1.22.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

K = N = 64
BLOCK = 32
draw = np.random.default_rng(0)
weights, nodes, name = [], [], "x"
for i in range(4):
    blocks = draw.integers(0, 256, (N, K // BLOCK, BLOCK // 2)).astype(np.uint8)
    scales = draw.random((N, K // BLOCK), np.float32) / 50
    weights += [numpy_helper.from_array(blocks, f"b{i}"), numpy_helper.from_array(scales, f"s{i}")]
    nodes.append(
        helper.make_node(
            "MatMulNBits", [name, f"b{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
            K=K, N=N, bits=4, block_size=BLOCK, accuracy_level=4,
        )
    )  # fmt: skip
    name = f"y{i}"
value = lambda n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, K])
graph = helper.make_graph(nodes, "g", [value("x")], [value("y3")], weights)
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), "model.onnx")


def result(path, save=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if save:
        options.optimized_model_filepath = save
        for key, text in {
            "session.optimized_model_external_initializers_file_name": "saved.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "session.save_external_prepacked_constant_initializers": "1",
        }.items():
            options.add_session_config_entry(key, text)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.cos(np.arange(K, dtype=np.float32))[None]
    return session.run(None, {"x": x})[0]


expected = result("model.onnx", save="saved.onnx")
found = result("saved.onnx")
saved = onnx.load("saved.onnx", load_external_data=False)
places = [
    int(entry.value.split("|")[1].split(";")[0]) % 64
    for tensor in saved.graph.initializer
    for entry in tensor.external_data
    if entry.key.startswith("prepacked")
]
print("offsets modulo 64:", places)
print("largest difference:", float(np.abs(found - expected).max()))
if np.array_equal(found, expected):
    sys.exit("changed: the saved model computes the same")
PY
