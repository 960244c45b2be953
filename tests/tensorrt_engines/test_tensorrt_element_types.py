"""Element types that numpy lacks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from recmas_runtime.engines.tensorrt.element_types import from_engine, to_engine

BITS = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.39e38], np.float32)


def test_bfloat16_rounds_as_ml_dtypes_does() -> None:
    values = np.concatenate([BITS.view(np.float32), SPECIAL])
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        found = from_engine(to_engine(values, "BF16"), "BF16")
    np.testing.assert_array_equal(found, expected)  # NaN where NaN is


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("FLOAT", np.float32), ("HALF", np.float16), ("INT64", np.int64), ("BOOL", np.bool_)],
)
def test_other_types_are_numpys_own(name: str, dtype: type) -> None:
    array = np.array([[0, 1], [1, 0]])[:, ::-1]
    found = to_engine(array, name)
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    assert from_engine(found, name).dtype == (np.float32 if name == "HALF" else dtype)
