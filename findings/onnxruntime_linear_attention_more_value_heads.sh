#!/usr/bin/env bash
# onnxruntime 1.31.1 has two operators LinearAttention that describe the same recurrences: the standard
# one (opset 27) and com.microsoft's. A gated DeltaNet with more value heads than query heads, as
# Qwen3-Next and Qwen3.5 have (16 and 32), can be stated in the second only.
#
# Expected: the standard operator takes what the other takes. It demands that the query heads be a
# multiple of the key/value heads and refuses the model at load; query and key have to be repeated to
# the number of value heads first. com.microsoft's gives one output per value head, and value head j
# belongs to query head j // 2 (repeated in place), not to j % 2 as tiling would have it.
#
# Seen: com.microsoft: 0 from repeat in place, 2 from tiling; standard: q_num_heads (2) must be a
# multiple of kv_num_heads (4)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import os
import sys

os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"  # else 1.31.1 refuses opset 27 as such
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

length, width = 3, 4


def session(domain, query_heads, value_heads, key_heads):
    shapes = {
        "q": [1, length, query_heads * width],
        "k": [1, length, key_heads * width],
        "v": [1, length, value_heads * width],
        "decay": [1, length, value_heads],
        "beta": [1, length, value_heads],
    }
    node = helper.make_node(
        "LinearAttention",
        ["q", "k", "v", "", "decay", "beta"],
        ["o", "state"],
        domain=domain,
        q_num_heads=query_heads,
        kv_num_heads=value_heads,
        update_rule="gated_delta",
    )
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {
            **shapes,
            "o": [1, length, max(query_heads, value_heads) * width],
            "state": [1, value_heads, width, width],
        }.items()
    }
    graph = helper.make_graph(
        [node], "g", [values[n] for n in shapes], [values["o"], values["state"]]
    )
    opsets = {"": 24, domain: 1} if domain else {"": 27}
    imports = [helper.make_opsetid(name, version) for name, version in opsets.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


random = np.random.default_rng(0)
q, k = (random.standard_normal((1, length, 2, width)).astype(np.float32) for _ in "qk")
rest = {
    "v": random.standard_normal((1, length, 4 * width)).astype(np.float32),
    "decay": -random.random((1, length, 4)).astype(np.float32),
    "beta": random.random((1, length, 4)).astype(np.float32),
}


def run(domain, q, k):
    heads, flat = q.shape[2], (1, length, -1)
    inputs = {"q": q.reshape(flat), "k": k.reshape(flat), **rest}
    return session(domain, heads, 4, heads).run(["o"], inputs)[0]


contrib = run("com.microsoft", q, k)
in_place = run("", q.repeat(2, 2), k.repeat(2, 2))
tiled = run("", np.tile(q, (1, 1, 2, 1)), np.tile(k, (1, 1, 2, 1)))
near, far = np.abs(contrib - in_place).max(), np.abs(contrib - tiled).max()
print(f"com.microsoft: {near:.1g} from repeat in place, {far:.1g} from tiling")
if near > 1e-5 or far < 1e-2:
    sys.exit("changed: com.microsoft's operator shares query heads in another order")
try:
    run("", q, k)
except Exception as error:
    if "must be a multiple of kv_num_heads" not in str(error):
        raise
    print(f"standard: {str(error).strip().split(']')[-1].strip()}")
else:
    sys.exit("changed: the standard operator takes more value heads than query heads")
PY
