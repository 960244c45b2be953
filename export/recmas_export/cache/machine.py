"""What a computation depends on beside its inputs: the processor, and the packages that run it."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Final

from recmas_runtime.cache.processor import processor
from recmas_runtime.engines.onnx.session import physical_cores

# What changes with which instructions, or how many threads, torch and its libraries compute.
_VARIABLES: Final = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
)

# What reads weights, writes graphs or renders prompts, beside what a manifest names.
FURTHER_TOOLS: Final = (
    "gguf",
    "jinja2",
    "ml-dtypes",
    "msgspec",
    "onnx",
    "onnxruntime-directml",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "safetensors",
    "sentencepiece",
    "tiktoken",
)


def machine() -> dict[str, object]:
    """Return what tells this machine from others that may round numbers in another way."""
    return {
        **processor(),
        "cores": physical_cores(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }


def further_tools() -> dict[str, str | None]:
    """Return the versions of further packages; None for one that is not installed."""
    return {name: _version(name) for name in FURTHER_TOOLS}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
