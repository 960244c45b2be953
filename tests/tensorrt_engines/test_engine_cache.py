"""Which engines are taken, and why others are not."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.killed import kill, killed_in
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.tensorrt.engine_cache import (
    RECORD_NAME,
    TIMING_CACHE_NAME,
    BackbonePlans,
    DecoderPlan,
    Platform,
    choose_engines,
    engine_folders,
    parse_version,
    staged_engines,
    timing_caches,
    write_record,
)
from recmas_runtime.formats.bundle import ENGINES_FOLDER

HERE = Platform(tensorrt="11.4.0.106", architecture="sm90")
FINGERPRINT = "f" * 64


def write_engines(root: Path, platform: Platform = HERE, fingerprint: str = FINGERPRINT) -> Path:
    with staged_engines(root, platform) as folder:
        for name in ("smol.576.plan", "smol.head.plan"):
            (folder / name).write_bytes(name.encode())
        (folder / TIMING_CACHE_NAME).write_bytes(platform.key.encode())
        write_record(
            folder,
            fingerprint=fingerprint,
            platform=platform,
            backbones={
                "smol": BackbonePlans(
                    decoders=(DecoderPlan(capacity=576, file="smol.576.plan"),),
                    head="smol.head.plan",
                    max_rows=8,
                    max_groups=1,
                )
            },
        )
    return root / ENGINES_FOLDER / platform.key


def test_engines_that_fit_are_taken_whatever_else_is_there(tmp_path: Path) -> None:
    ours = write_engines(tmp_path)
    write_engines(tmp_path, replace(HERE, architecture="sm80"))
    write_engines(tmp_path, replace(HERE, tensorrt="10.15.1.29"))
    engines, reasons = choose_engines(tmp_path, FINGERPRINT, HERE)
    assert engines is not None
    assert engines.path == ours
    assert engines.file("smol.head.plan").read_bytes() == b"smol.head.plan"
    assert reasons == ()


def test_every_set_that_does_not_fit_has_a_reason(tmp_path: Path) -> None:
    write_engines(tmp_path, replace(HERE, architecture="sm80"))
    write_engines(tmp_path, replace(HERE, tensorrt="10.15.1.29"))
    write_engines(tmp_path, fingerprint="0" * 64)
    engines, reasons = choose_engines(tmp_path, FINGERPRINT, HERE)
    assert engines is None
    assert reasons == (
        "engines/tensorrt-11.4.0.106-sm90: built from another bundle (fingerprint 000000000000, "
        "this one's is ffffffffffff)",
        "engines/tensorrt-10.15.1.29-sm90: built by TensorRT 10.15.1.29, here is 11.4.0.106",
        "engines/tensorrt-11.4.0.106-sm80: built on a GPU of sm80, here is sm90",
    )


def _flip_a_byte(folder: Path) -> None:
    (folder / "smol.576.plan").write_bytes(b"smol.576.plaN")


def _cut(folder: Path) -> None:
    (folder / "smol.576.plan").write_bytes(b"smol")


def _remove(folder: Path) -> None:
    (folder / "smol.head.plan").unlink()


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        change(record)
        (folder / RECORD_NAME).write_text(json.dumps(record), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_a_byte, "smol.576.plan is damaged"),
        (_cut, "smol.576.plan is damaged"),
        (_remove, "smol.head.plan is missing"),
        (_edit(lambda r: r["files"].pop("smol.head.plan")), "does not list smol.head.plan"),
        (
            _edit(lambda r: r["files"].update({"../../plan.json": r["files"]["smol.576.plan"]})),
            "path '../../plan.json' is not inside the bundle",
        ),
        (_edit(lambda r: r.pop("architecture")), "architecture: missing"),
        (_edit(lambda r: r.update(version=2)), "of format version 2, this runtime reads 1"),
    ],
)
def test_damage_is_found_before_tensorrt_sees_it(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    damage(write_engines(tmp_path))
    engines, (found,) = choose_engines(tmp_path, FINGERPRINT, HERE)
    assert engines is None
    assert reason in found


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    before = write_engines(tmp_path)
    with pytest.raises(RecmasError, match="RM303"), staged_engines(tmp_path, HERE) as folder:
        (folder / "no-such-folder/half.plan").write_bytes(b"")
    assert engine_folders(tmp_path) == (before,)
    assert [path.name for path in (tmp_path / ENGINES_FOLDER).iterdir()] == [HERE.key]


def test_the_first_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_engines(tmp_path, HERE):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def write_killed(root: Path, where: str) -> None:
    """Write engines in a process that dies at a place."""

    def write_until_killed() -> None:
        if where == "building":
            Path.write_bytes = kill
        elif where == "within the swap":
            rename = Path.rename
            Path.rename = lambda self, to: kill() if "building" in self.name else rename(self, to)
        elif where == "after the swap":
            shutil.rmtree = kill
        write_engines(root)

    killed_in(write_until_killed)


@pytest.mark.parametrize("where", ["building", "within the swap", "after the swap"])
def test_a_killed_build_leaves_whole_engines_and_nothing_for_long(
    tmp_path: Path, where: str
) -> None:
    ours = write_engines(tmp_path)
    write_killed(tmp_path, where)
    engines, reasons = choose_engines(tmp_path, FINGERPRINT, HERE)
    assert (engines is None) == (where == "within the swap")
    assert reasons == ()
    # Engines of another machine are built next: they clear away all the same.
    theirs = write_engines(tmp_path, replace(HERE, architecture="sm80"))
    assert sorted((tmp_path / ENGINES_FOLDER).iterdir()) == [theirs, ours]
    engines, _ = choose_engines(tmp_path, FINGERPRINT, HERE)
    assert engines is not None


def test_a_swap_that_fails_puts_the_older_engines_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = write_engines(tmp_path)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if "building" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RecmasError, match=r"RM303.*Input/output error"):
        write_engines(tmp_path)
    assert list((tmp_path / ENGINES_FOLDER).iterdir()) == [ours]
    engines, _ = choose_engines(tmp_path, FINGERPRINT, HERE)
    assert engines is not None


def test_a_build_under_way_is_left_alone_by_another(tmp_path: Path) -> None:
    with staged_engines(tmp_path, HERE) as slow:
        write_engines(tmp_path)
        assert slow.is_dir()


def test_a_bundle_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / ENGINES_FOLDER).write_text("a file is in the way")
    with (
        pytest.raises(RecmasError, match=r"RM303.*cannot write engines"),
        staged_engines(tmp_path, HERE),
    ):
        pass


def test_timing_caches_outlive_engines(tmp_path: Path) -> None:
    write_engines(tmp_path)
    write_engines(tmp_path, replace(HERE, architecture="sm80"))
    kept = timing_caches(tmp_path)
    assert kept == {key: key.encode() for key in (HERE.key, "tensorrt-11.4.0.106-sm80")}
    shutil.rmtree(tmp_path / ENGINES_FOLDER)
    assert timing_caches(tmp_path) == {}


@pytest.mark.parametrize(
    ("version", "parsed"),
    [("11.4.0.106", (11, 4)), ("10.15.1.29", (10, 15)), ("10.9", (10, 9)), ("rubbish", (0, 0))],
)
def test_versions_compare_as_numbers(version: str, parsed: tuple[int, int]) -> None:
    assert parse_version(version) == parsed
