"""Headers of link files that nobody should have written: refused, each with a reason."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from recmas_compiler.links.files import LinkFileError, read_link_header

SHAPES = ["[1e999]", "[Infinity]", "[NaN]", "[-1]", '["a"]', "null", "[[1]]", "[2.5]", "[" * 50_000]
SHAPES.append(f"[1{'0' * 5000}]")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[:12])
def test_a_shape_that_is_none(tmp_path: Path, shape: str) -> None:
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'.encode()
    path = tmp_path / "link.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(LinkFileError, match="it is not a safetensors file: "):
        read_link_header(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / ("n" * 300)):
        with pytest.raises(LinkFileError, match="it cannot be read: "):
            read_link_header(path)
