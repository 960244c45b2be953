#!/usr/bin/env bash
# safetensors 0.8.0 read through numpy: a bfloat16 tensor raises TypeError, an F8 tensor AttributeError
# or TypeError, and neither is the package's own SafetensorError.
#
# A reader that catches SafetensorError around safe_open(..., framework="numpy") looks complete: bad
# headers, bad offsets and unknown names all raise it. The most common dtype of published language
# models does not: numpy has no bfloat16, and the failure is numpy's own error from inside the wheel.
# The header itself is read without complaint, so get_dtype works and get_tensor does not.
#
# Seen: get_slice(...).get_dtype() -> BF16, get_tensor -> TypeError: data type 'bfloat16' not understood
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
import struct
import sys

from safetensors import SafetensorError, safe_open

header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
header += b" " * (-len(header) % 8)
with open("w.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + bytes(4))

with safe_open("w.safetensors", framework="numpy") as file:
    dtype = file.get_slice("w").get_dtype()
    try:
        file.get_tensor("w")
    except SafetensorError as error:
        sys.exit(f"changed: SafetensorError: {error}")
    except TypeError as error:
        print(f"dtype {dtype}: TypeError: {error}")
    else:
        sys.exit("changed: bfloat16 is read through numpy now")
PY
