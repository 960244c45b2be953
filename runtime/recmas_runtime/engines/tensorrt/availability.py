"""Whether this machine has TensorRT and a GPU for it, found out before anything takes long."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any, Final

from recmas_runtime.core.errors import fail

# The first version whose parser reads TensorScatter, the cache write of every decoder graph.
OLDEST_VERSION: Final = (10, 15)

_INSTALL: Final = "Install it with `pip install recmas[tensorrt]`, or use target onnx."


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What engines are good for: they run on nothing else.

    Attributes:
        tensorrt: Full version; plans of another build of TensorRT are refused by it.
        architecture: Compute capability of the GPU, such as `sm90`.
    """

    tensorrt: str
    architecture: str

    @property
    def key(self) -> str:
        """The name of the folder that holds such engines."""
        return f"tensorrt-{self.tensorrt}-{self.architecture}"


def find_platform() -> Platform:
    """Return what this machine has.

    Raises:
        RecmasError: RM201 for a package that is missing or cannot be imported, RM509 for a TensorRT
            that is too old, RM504 for a GPU or driver that is not there.
    """
    version = str(_package("tensorrt").__version__)
    if parse_version(version) < OLDEST_VERSION:
        raise fail(
            "RM509",
            f"TensorRT {version} is installed; its parser does not read TensorScatter",
            hint="Install TensorRT 10.15 or newer, or use target onnx.",
        )
    cuda = _package("cuda.bindings.runtime")
    return Platform(tensorrt=version, architecture=_architecture(cuda))


def parse_version(version: str) -> tuple[int, int]:
    """Return major and minor; what does not look like a version counts as the oldest."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _package(name: str) -> Any:
    distribution = {"tensorrt": "tensorrt", "cuda.bindings.runtime": "cuda-bindings"}[name]
    missing = fail("RM201", f"{distribution} is not installed", hint=_INSTALL)
    try:
        module = importlib.import_module(name)
    # A package whose shared libraries are missing fails to import in ways of its own.
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name)):
            raise missing from None
        raise fail(
            "RM201", f"{distribution} is installed but cannot be imported: {error}", hint=_INSTALL
        ) from error
    if module.__file__ is None:  # any folder of this name that happens to be on the path
        raise missing
    return module


def _architecture(cuda: Any) -> str:
    error, num_devices = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess or num_devices == 0:
        _, text = cuda.cudaGetErrorString(error)
        reason = text.decode() if num_devices is None else "there is no device"
        raise fail(
            "RM504",
            f"CUDA finds no GPU: {reason}",
            hint="Check the driver (CUDA 13 needs r580 or newer), or use target onnx.",
        )
    attributes = cuda.cudaDeviceAttr
    digits = []
    for attribute in (
        attributes.cudaDevAttrComputeCapabilityMajor,
        attributes.cudaDevAttrComputeCapabilityMinor,
    ):
        error, value = cuda.cudaDeviceGetAttribute(attribute, 0)
        assert error == cuda.cudaError_t.cudaSuccess, "a device has a compute capability"
        digits.append(str(value))
    return f"sm{''.join(digits)}"
