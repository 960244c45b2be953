"""Trained links are replaced as a set, whatever ends the process and wherever; no torch in here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.killed import kill
from recmas_compiler.links.link_set import RECEIPT_NAME, finish_replacing, replaced_links
from recmas_runtime.core.files import write_whole

NAMES = ("inner.a.safetensors", "outer.a.b.safetensors", RECEIPT_NAME)
# What changes anything on a disk.
CALLS = ("mkdir", "rename", "replace", "fsync", "rmdir", "unlink", "chmod")


def write_set(folder: Path, word: str) -> None:
    with replaced_links(folder) as staged:
        for name in NAMES:
            write_whole(staged / name, f"{word} {name}")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def whole(word: str) -> dict[str, str]:
    return {name: f"{word} {name}" for name in NAMES}


def killed_at(action: Callable[[], object], place: int) -> bool:
    """Run `action` in a child, killed before its call number `place`; False if it came through."""
    child = os.fork()
    if child == 0:
        left = place

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **more: Any) -> Any:
                nonlocal left
                if left == 0:
                    kill()
                left -= 1
                return call(*arguments, **more)

            return counted

        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize("can_exchange", [False, True])
def test_a_kill_anywhere_leaves_one_of_the_two_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_more: bool, can_exchange: bool
) -> None:
    folder, place, seen = tmp_path / "links", 0, set()
    more = {"notes.txt": "mine"} if has_more else {}
    if not can_exchange:
        monkeypatch.setattr("recmas_compiler.links.link_set._exchanged", lambda *_: False)
    while True:
        write_set(folder, "old")
        for name, text in more.items():
            (folder / name).write_text(text)
        if not killed_at(lambda: write_set(folder, "new"), place):
            break
        if not has_more and can_exchange:
            assert content(folder) in (whole("old"), whole("new")), "also without any repair"
        finish_replacing(folder)
        found = content(folder)
        assert found in (whole("old") | more, whole("new") | more), f"killed before call {place}"
        seen.add(found[RECEIPT_NAME])
        place += 1
    assert place > 12
    assert len(seen) == 2
    assert content(folder) == whole("new") | more
    write_set(folder, "newest")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, *more])
    assert list(tmp_path.iterdir()) == [folder]


def test_what_fails_leaves_the_set_that_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "links"
    write_set(folder, "old")

    def fail_midway() -> None:
        with replaced_links(folder) as staged:
            write_whole(staged / NAMES[0], "new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail_midway()
    assert content(folder) == {name: f"old {name}" for name in NAMES}
    assert len(list(folder.iterdir())) == len(NAMES)


def test_a_folder_in_the_place_of_a_link_stops_before_anything_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "links"
    write_set(folder, "old")
    (folder / NAMES[0]).unlink()
    (folder / NAMES[0]).mkdir()
    with pytest.raises(IsADirectoryError):
        write_set(folder, "new")
    assert content(folder)[RECEIPT_NAME] == f"old {RECEIPT_NAME}"


def test_a_folder_that_cannot_be_renamed_is_written_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "links"
    write_set(folder, "old")
    (tmp_path / "other").symlink_to("links")
    write_set(tmp_path / "other", "new")
    assert content(folder) == whole("new")
    assert (tmp_path / "other").is_symlink()
    monkeypatch.setattr("recmas_compiler.links.link_set._can_be_renamed", lambda _: False)
    inode = folder.stat().st_ino
    write_set(folder, "newest")
    assert content(folder) == whole("newest")
    assert folder.stat().st_ino == inode
    assert len(list(folder.iterdir())) == len(NAMES)
