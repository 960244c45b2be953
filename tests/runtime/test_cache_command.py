"""`recmas cache`: what is kept on this machine, where no compiler is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recmas_runtime.cache.store import CacheEntry, Store, copy_and_hash
from recmas_runtime.cli.main import main

KEY = "0" * 64


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A cache with one entry."""
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "cache"))
    made, copied = tmp_path / "made", tmp_path / "copied"
    made.write_bytes(bytes(1000))
    with made.open("rb") as stream:
        file = copy_and_hash(stream, copied)
    found = Store(tmp_path / "cache", limit_bytes=10**6)
    entry = CacheEntry(kind="packed", about="a graph", files={"graph": file}, data=None)
    found.keep(KEY, entry, {"graph": made})
    return found


def test_what_is_kept_is_listed_and_removed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "ls"]) == 0
    first, total = capsys.readouterr().out.splitlines()
    assert first.startswith("00000000  packed")
    assert first.endswith("a graph")
    assert total.endswith(f"of at most 20.0 GB, in {store.folder}")
    assert main(["cache", "where", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["folder"] == str(store.folder)
    assert main(["cache", "prune", "--to", "1 MB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["removed"] == 0
    assert main(["cache", "prune", "--all"]) == 0
    assert capsys.readouterr().out.startswith("Removed 1 part, ")
    assert not store.entries()


def test_options_of_another_action_are_refused(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "ls", "--all"]) == 2
    assert "RM506" in capsys.readouterr().err
    assert main(["cache", "prune", "--all", "--to", "1 MB"]) == 2
    assert "--all and --to say different things" in capsys.readouterr().err
    assert store.entries()


def test_without_a_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECMAS_CACHE", "off")
    assert main(["cache", "where"]) == 0
    assert capsys.readouterr().out == "off\n"
    assert main(["cache", "ls"]) == 2
    assert "RM305" in capsys.readouterr().err


def test_files_are_read_where_they_are_unless_their_size_is_wrong(store: Store) -> None:
    entry = store.find(KEY)
    assert entry is not None
    places = store.files_of(KEY, entry)
    assert places is not None
    assert places["graph"].read_bytes() == bytes(1000)
    with places["graph"].open("ab") as file:
        file.write(b"1")
    assert store.files_of(KEY, entry) is None
    assert store.find(KEY) is None
