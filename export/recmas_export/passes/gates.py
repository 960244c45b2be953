"""Which activation a model's experts have, found out by computing it.

ONNX Runtime's operators for experts know a few activations by name. Whether a graph computes one of
them is not read off its nodes: it is run on numbers and compared.

Shape legend: m rows of an expert's first product, w = m or m / 2 numbers that it hands on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from recmas_runtime.engines.onnx.session import onnx_runtime

Array = NDArray[np.float32]

_ERRORS_ONLY: Final = 3
# Two computations of one activation differ by rounding, two activations by 1e-4 and more.
_TOLERANCE: Final = 2e-5
# Decimals of a factor, an offset or a limit that is found.
_DECIMALS: Final = 4
# Larger than any limit that a model has.
_LARGE: Final = 1e6


@dataclass(frozen=True)
class Gate:
    """An activation in the operator's terms.

    Attributes:
        attributes: Those of the operator.
        order: By place, the row of the first product that the operator expects there; None where
            they are in its order.
    """

    attributes: Mapping[str, Any]
    order: NDArray[np.int64] | None = None


def known_gate(graph: ir.Graph, rows_Pm: ir.Value, inner_Pw: ir.Value | None) -> Gate | None:
    """Return the activation between an expert's products if the operator has it, else None."""
    assert inner_Pw is not None
    assert rows_Pm.shape is not None
    assert inner_Pw.shape is not None
    num_rows, width = rows_Pm.shape[1], inner_Pw.shape[1]
    compute = _computed(graph, rows_Pm, inner_Pw)
    if compute is None or not isinstance(num_rows, int):
        return None
    if num_rows == width:
        return next(_plain(compute, num_rows), None)
    return next(_gated(compute, num_rows), None)


def _plain(compute: Callable[[Array], Array], width: int) -> Iterator[Gate]:
    x = _numbers(width)
    found = compute(x)
    for name, expected in _PLAIN.items():
        if _is_same(found, expected(x.astype(np.float64))):
            yield Gate({"activation_type": name})


def _gated(compute: Callable[[Array], Array], num_rows: int) -> Iterator[Gate]:
    """Yield what computes gate * sigmoid(alpha gate) * (input + beta), within limits."""
    halves, in_turn = (np.arange(num_rows).reshape(shape) for shape in ((2, -1), (-1, 2)))
    for pairs in (halves.T, in_turn, halves.T[:, ::-1], in_turn[:, ::-1]):  # [w, gate and input]
        order = pairs.reshape(-1)

        def of(gate: Array, given: Array, order: NDArray[np.int64] = order) -> Array:
            rows = np.empty((len(gate), num_rows), np.float32)
            rows[:, order[0::2]], rows[:, order[1::2]] = gate, given
            return compute(rows)

        settings = _settings(of, num_rows // 2)
        if settings is None:
            continue
        gate, given = _numbers(num_rows // 2), _numbers(num_rows // 2, seed=1)
        expected = _swiglu(gate.astype(np.float64), given.astype(np.float64), **settings)
        if _is_same(of(gate, given), expected):
            names = {"alpha": "activation_alpha", "beta": "activation_beta", "limit": _LIMIT}
            attributes = {names[key]: value for key, value in settings.items() if value < math.inf}
            is_in_order = np.array_equal(order, np.arange(num_rows))
            yield Gate(
                {"activation_type": "swiglu", "swiglu_fusion": 1, **attributes},
                None if is_in_order else order,
            )


_LIMIT: Final = "swiglu_limit"


def _settings(of: Callable[[Array, Array], Array], width: int) -> dict[str, float] | None:
    """Return alpha, beta and limit as four values of the activation tell them, if they do."""

    def at(gate: float, given: float) -> float:
        row = np.ones((1, width), np.float32)
        return float(of(row * np.float32(gate), row * np.float32(given))[0, 0])

    slope = at(1.0, 1.0) - at(1.0, 0.0)
    if not 0 < slope < 1:
        return None
    alpha = round(math.log(slope / (1 - slope)), _DECIMALS)
    most = at(_LARGE, 1.0) - at(_LARGE, 0.0)
    limit = math.inf if most > _LARGE / 2 else round(most, _DECIMALS)
    return {"alpha": alpha, "beta": round(at(1.0, 0.0) / slope, _DECIMALS), "limit": limit}


def _swiglu(
    gate: NDArray[Any], given: NDArray[Any], *, alpha: float, beta: float, limit: float
) -> NDArray[Any]:
    gate, given = np.minimum(gate, limit), np.clip(given, -limit, limit)
    return np.asarray(gate * _sigmoid(alpha * gate) * (given + beta))


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _tanh_gelu(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


_PLAIN: Final[Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: np.asarray(x * _sigmoid(x)),
    "gelu": _tanh_gelu,
    "identity": lambda x: x,
}


def _numbers(width: int, *, seed: int = 0) -> Array:
    """Return rows of small, usual and large numbers.

    Not larger ones: ONNX Runtime's sigmoid is never below 1e-8, which they would show.
    """
    rows = np.random.default_rng(seed).standard_normal((12, width))
    return np.asarray(rows * np.repeat([0.1, 1, 3, 5], 3)[:, None], np.float32)


def _is_same(found: Array, expected: NDArray[Any]) -> bool:
    return bool(np.all(np.abs(found - expected) <= _TOLERANCE * (1 + np.abs(expected))))


def _computed(
    graph: ir.Graph, given: ir.Value, result: ir.Value
) -> Callable[[Array], Array] | None:
    """Return what computes `result` from `given`; None where it needs more than that."""
    try:
        part = ir.convenience.extract(graph, [given], [result])
    except ValueError:
        return None
    settings = onnx_runtime().SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    model = ir.to_proto(ir.Model(part, ir_version=10))
    session = onnx_runtime().InferenceSession(model.SerializeToString(), settings)
    (name,) = (each.name for each in session.get_inputs())

    def compute(rows: Array) -> Array:
        (array,) = session.run(None, {name: rows})
        return np.asarray(array, np.float32)

    return compute
