#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export drops the epsilon of a norm where it is 1e-8,
# so a row of zeros is 0 in torch and NaN in the exported graph. Every other row agrees.
#
# Expected: an export may reorder, but x * rsqrt(mean(x^2) + 1e-8) keeps its Add, whose one purpose is
# the row of zeros. The exporter's optimizer removes additions of zero, and takes a constant for zero
# within an absolute tolerance of 1e-8. Norms with this epsilon are published (Helium), and padding is
# made of rows of zeros: a test on one unpadded row sees nothing. optimize=False keeps the Add.
#
# Seen: row of zeros: epsilon 1e-08 nan, unoptimized 0.0, 2e-08 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 onnxruntime==1.31.1
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging
import sys

logging.disable(logging.WARNING)
import numpy as np
import onnxruntime
import torch


class Norm(torch.nn.Module):
    def __init__(self, epsilon):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


torch.manual_seed(0)
x = torch.randn(2, 8)
x[1] = 0


def rows(epsilon, optimize):
    program = torch.onnx.export(Norm(epsilon).eval(), (x,), optimize=optimize, verbose=False)
    program.save("norm.onnx")
    session = onnxruntime.InferenceSession("norm.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got[0], Norm(epsilon)(x)[0].numpy(), atol=1e-6)
    return got[1]


dropped, kept, larger = rows(1e-8, True), rows(1e-8, False), rows(2e-8, True)
print(f"row of zeros: epsilon 1e-08 {dropped[0]}, unoptimized {kept[0]}, 2e-08 {larger[0]}")
if not np.isnan(dropped).all() or kept.any() or larger.any():
    sys.exit("changed: the export of a norm with epsilon 1e-8 keeps its epsilon")
PY
