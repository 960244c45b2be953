#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: GroupQueryAttention with norms of heads (inputs `q_norm_weight` and
# `k_norm_weight`, as Qwen3 and Gemma 3 would have them) opens, and is refused at the first run.
#
# The operator's schema has the inputs for every provider, and the CPU has a kernel of that name and
# version, so the session is made, the node is placed on the CPU, and nothing is logged. Whether the
# kernel takes the inputs is looked at in a run. A graph that was only opened to see whether a
# machine can run it has shown nothing; without the two inputs the same graph runs.
#
# Seen: opened; InvalidArgument at the run, "implemented only on the CUDA and WebGPU EPs".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet onnxruntime==1.31.1 onnx==1.22.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

HEADS, WIDTH, ROWS = 2, 16, 4
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32
PLAIN = {
    "query": (FLOAT, [1, 1, HEADS * WIDTH]),
    "key": (FLOAT, [1, 1, WIDTH]),
    "value": (FLOAT, [1, 1, WIDTH]),
    "past_key": (FLOAT, [1, 1, ROWS, WIDTH]),
    "past_value": (FLOAT, [1, 1, ROWS, WIDTH]),
    "seqlens_k": (INT32, [1]),
    "total_sequence_length": (INT32, [1]),
}
NORMS = {"q_norm_weight": (FLOAT, [WIDTH]), "k_norm_weight": (FLOAT, [WIDTH])}


def opened(inputs):
    # Seven optional inputs lie between.
    named = [*PLAIN, *([""] * 7 + [*NORMS] if len(inputs) > len(PLAIN) else [])]
    node = helper.make_node(
        "GroupQueryAttention", named, ["out", "keys", "values"], domain="com.microsoft",
        num_heads=HEADS, kv_num_heads=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in node.output],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feeds(inputs):
    made = {name: np.ones(shape, np.float32) for name, (_, shape) in inputs.items()}
    return made | {
        "seqlens_k": np.array([0], np.int32),
        "total_sequence_length": np.array([1], np.int32),
    }


plain = opened(PLAIN).run(["out"], feeds(PLAIN))[0]
print("without norms:", plain[0, 0, :3])
session = opened(PLAIN | NORMS)
print("with norms: opened, with the inputs", [i.name for i in session.get_inputs()][-2:])
try:
    session.run(["out"], feeds(PLAIN | NORMS))
except Exception as error:
    print("run:", type(error).__name__, str(error)[-90:])
    if "only on the CUDA and WebGPU" in str(error):
        print("as described")
        sys.exit(0)
sys.exit("this has changed: the CPU's kernel takes norms of heads, or says something else")
PY
