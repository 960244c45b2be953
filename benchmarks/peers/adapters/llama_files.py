"""Writes a GGUF file as another type: `llama_files.py IN OUT NUMBER`, by llama.cpp's quantizer."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama

source, target, number = sys.argv[1:]
settings = llama.llama_model_quantize_default_params()
settings.ftype = int(number)
settings.allow_requantize = True
status = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
assert status == 0, f"llama_model_quantize returned {status}"
