#!/usr/bin/env bash
# onnxruntime 1.31.1: a valid model in opset 27 is refused, and the session option made for this case
# changes nothing. Only an environment variable, set before the process starts, does.
#
# Expected: session.allow_released_opsets_only=0, described as there for newer opsets, lets a model be
# tried whose one operator, Relu, onnxruntime has. The option is accepted and the refusal stays; with
# ALLOW_RELEASED_ONNX_OPSET_ONLY=0 in the environment the model runs, whatever the option says. To onnx
# 1.23.2 opset 27 is that of its release 1.22.0; onnxruntime 1.31.1 calls it under development, and
# 1.32.0 loads it as it is.
#
# Seen: option none refused, 0 refused, 1 refused; with the variable all three run
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet onnxruntime==1.31.1 onnx==1.23.2
cd "$work"
cat >load.py <<'PY'
import onnx
import onnxruntime
from onnx import TensorProto, helper

node = helper.make_node("Relu", ["x"], ["y"])
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([node], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
outcomes = []
for option in (None, "0", "1"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if option is not None:
        options.add_session_config_entry("session.allow_released_opsets_only", option)
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        outcomes.append("runs")
    except Exception as error:
        assert "opset" in str(error), error
        outcomes.append("refused")
print(" ".join(outcomes))
PY
plain=$(env -u ALLOW_RELEASED_ONNX_OPSET_ONLY "$work/venv/bin/python" load.py)
variable=$(ALLOW_RELEASED_ONNX_OPSET_ONLY=0 "$work/venv/bin/python" load.py)
echo "option none, 0, 1: $plain; with the variable: $variable"
if [ "$plain" != "refused refused refused" ] || [ "$variable" != "runs runs runs" ]; then
    echo "changed: opset 27 loads, or the option has an effect" >&2
    exit 1
fi
