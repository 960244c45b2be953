from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.safetensors_file import read_tensors, write_tensors

TENSORS: dict[str, Any] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([True, False]),
    "c": np.array([1, -2], np.int64),
    "d": np.float16([0.5]),
    "e": np.zeros((0, 4), np.float32),
    "f": np.array(3.0, np.float64),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", TENSORS, {"kind": "test"})
    found, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"kind": "test"}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)
        assert not found[name].flags.writeable


def test_the_reference_library_agrees(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    write_tensors(tmp_path / "ours", TENSORS)
    for name, tensor in library.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(tensor, TENSORS[name], strict=True)
    library.save_file(TENSORS, tmp_path / "theirs")
    for name, tensor in read_tensors(tmp_path / "theirs")[0].items():
        np.testing.assert_array_equal(tensor, TENSORS[name], strict=True)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", TENSORS, {"x": "1", "y": "2"})
    write_tensors(tmp_path / "two", dict(reversed(TENSORS.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tensors_that_are_not_contiguous_are_written_right(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "t", {"m": matrix})
    np.testing.assert_array_equal(read_tensors(tmp_path / "t")[0]["m"], matrix)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    header = {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    path = raw_file(tmp_path, header, bytes.fromhex("803f20c0"))
    np.testing.assert_array_equal(read_tensors(path)[0]["x"], np.float32([1.0, -2.5]), strict=True)


def raw_file(folder: Path, header: object, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "raw"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


TWICE = json.dumps(entry() | {"y": entry()["x"]}).replace('"y"', '"x"').encode()


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{", b""),
        (b"[]", b""),
        (b"[" * 100_000, b""),
        (b'{"x": 1, "x": 2}', b""),
        ({"__metadata__": {"a": 1}}, b""),
        ({"x": []}, b""),
        ({"x": {"dtype": "F32", "shape": [1]}}, b""),
        (entry(extra=1), bytes(4)),
        (entry(dtype="F4"), bytes(4)),
        (entry(dtype=[]), bytes(4)),
        (entry(dtype="F8_E4M3", shape=[4]), bytes(4)),
        (TWICE, bytes(4)),
        (entry(shape=[-1]), bytes(4)),
        (entry(shape=[True]), bytes(4)),
        (entry(shape=[2**62, 2**62]), bytes(4)),
        (entry(shape=[2]), bytes(4)),
        (entry(shape=[1] * 33), bytes(4)),
        (entry(data_offsets=[0, 8]), bytes(4)),
        (entry(data_offsets=[4, 8]), bytes(8)),
        (entry(data_offsets=[0]), bytes(4)),
        (entry(), bytes(3)),
        (entry(), bytes(5)),
        ({**entry(), "y": entry()["x"]}, bytes(4)),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, header: object, data: bytes) -> None:
    path = raw_file(tmp_path, header, data)
    with pytest.raises(RecmasError) as caught:
        read_tensors(path)
    (problem,) = caught.value.problems
    assert (problem.code, problem.file) == ("RM404", str(path))


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 9)])
def test_cut_files_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "cut").write_bytes(raw)
    with pytest.raises(RecmasError, match="RM404"):
        read_tensors(tmp_path / "cut")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        with pytest.raises(RecmasError, match="RM401"):
            read_tensors(path)
