"""The known-answer probe: does ONNX Runtime compute what the decoders need rightly here?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.onnx.session import Device, call_onnx, make_session


def measure_probe(path: Path, *, threads: int | None = None, device: Device = "cpu") -> float:
    """Return how far the known-answer probe is from its answer, largest absolute difference."""
    session = make_session(path, threads=threads, device=device)
    output, expected = call_onnx(session.run, ["output", "expected"], {})
    return difference(np.asarray(output), np.asarray(expected))


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return max |found - expected|; infinite for shapes that are not the same."""
    return largest(found - expected) if found.shape == expected.shape else math.inf


def largest(array: NDArray[Any]) -> float:
    """Return max |array|, 0 of nothing; infinite for what is not a number."""
    found = float(np.abs(array).max(initial=0.0))
    return math.inf if np.isnan(found) else found
