"""Whether products of 8-bit integers are added in 32 bits is read off the processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from recmas_runtime.engines.onnx import session


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fpu avx2 avx512f", False),
        ("x86_64", "fpu avx2 avx512f avx512_vnni", True),
        ("AMD64", "fpu avx2 avx_vnni", True),
        ("aarch64", "asimd", True),
        ("x86_64", None, False),
    ],
)
def test_processors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    flags: str | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(session.platform, "machine", lambda: machine)
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")
    session.adds_in_32_bits.cache_clear()
    try:
        assert session.adds_in_32_bits(path) is expected
    finally:
        session.adds_in_32_bits.cache_clear()
