"""The store of parts by itself: what is kept comes back whole, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.killed import kill, killed_in
from recmas_export.build import own_digest, part_conditions, tool_versions
from recmas_export.cache.build_parts import BuildParts
from recmas_export.cache.machine import machine
from recmas_runtime.cache import store as store_module
from recmas_runtime.cache.settings import size_of, user_store
from recmas_runtime.cache.store import CacheEntry, Store, copy_and_hash
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import sha256_of
from recmas_runtime.formats.manifest import FileEntry

KEY = "a" * 64


def file_entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(path), size_bytes=path.stat().st_size)


def keep(store: Store, key: str, folder: Path, **texts: bytes) -> CacheEntry:
    """Keep files of these names and contents under a key."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    paths = {name: folder / name for name in texts}
    entry = CacheEntry(
        kind="link",
        about="of a test",
        files={name: file_entry(path) for name, path in paths.items()},
        data={"names": sorted(texts), "number": 0.1},
    )
    store.keep(key, entry, paths)
    return entry


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", limit_bytes=10**6)


def taken(store: Store, key: str, folder: Path) -> dict[str, bytes] | None:
    entry = store.find(key)
    folder.mkdir()
    if entry is None or not store.take(key, entry, folder):
        assert list(folder.iterdir()) == []
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_kept_comes_back(store: Store, tmp_path: Path) -> None:
    entry = keep(store, KEY, tmp_path / "made", a=b"one", b=b"two", c=b"one")
    assert store.find(KEY) == entry
    assert taken(store, KEY, tmp_path / "out") == {"a": b"one", "b": b"two", "c": b"one"}
    assert store.find("b" * 64) is None
    assert len(list((store.folder / "blobs").glob("*/*"))) == 2, "equal files are kept once"
    assert list((store.folder / "writing").iterdir()) == []


def test_what_is_taken_is_no_link_into_the_store(store: Store, tmp_path: Path) -> None:
    """A bundle is its user's, who may change it."""
    keep(store, KEY, tmp_path / "made", a=b"one")
    taken(store, KEY, tmp_path / "out")
    (tmp_path / "out/a").write_bytes(b"changed")
    (tmp_path / "made/a").write_bytes(b"changed")
    assert taken(store, KEY, tmp_path / "again") == {"a": b"one"}


def blob_of(store: Store, content: bytes) -> Path:
    (path,) = (p for p in (store.folder / "blobs").glob("*/*") if p.read_bytes() == content)
    return path


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "a bit of a file": lambda blob, _: blob.write_bytes(b"onf"),
    "the end of a file": lambda blob, _: blob.write_bytes(b"on"),
    "a file": lambda blob, _: blob.unlink(),
    "a digit of an entry": lambda _, entry: entry.write_bytes(
        entry.read_bytes().replace(b"0.1", b"0.2")
    ),
    "the end of an entry": lambda _, entry: entry.write_bytes(entry.read_bytes()[:-9]),
    "all of an entry": lambda _, entry: entry.write_bytes(b""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_counts_as_not_there(store: Store, tmp_path: Path, what: str) -> None:
    keep(store, KEY, tmp_path / "made", a=b"two", b=b"one")
    DAMAGE[what](blob_of(store, b"one"), store.folder / "entries" / f"{KEY}.json")
    assert taken(store, KEY, tmp_path / "out") is None
    assert store.find(KEY) is None, "it is gone"
    keep(store, KEY, tmp_path / "made", a=b"two", b=b"one")
    assert taken(store, KEY, tmp_path / "again") == {"a": b"two", "b": b"one"}


@pytest.mark.parametrize("name", ["../out", "/etc/hostname", "a/../../b", ""])
def test_entries_lead_nowhere_else(store: Store, tmp_path: Path, name: str) -> None:
    entry = keep(store, KEY, tmp_path / "made", a=b"one")
    other = CacheEntry(kind="link", about="", files={name: entry.files["a"]}, data=None)
    (store.folder / "entries" / f"{KEY}.json").write_bytes(store_module._written(other))
    assert store.find(KEY) is None


def test_files_that_change_while_they_are_kept_are_not(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    said = file_entry(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"two")
    entry = CacheEntry(kind="link", about="", files={"a": said}, data=None)
    store.keep(KEY, entry, {"a": tmp_path / "a"})
    assert store.find(KEY) is None
    assert list((store.folder / "blobs").glob("*/*")) == []


def test_no_more_is_kept_than_may_be(store: Store, tmp_path: Path) -> None:
    """What was used longest ago goes first, and files with the last entry that holds them."""
    keys = [f"{number:064x}" for number in range(4)]
    for number, key in enumerate(keys[:3]):
        keep(store, key, tmp_path / "made", own=bytes([number]) * 300_000, shared=b"x" * 50_000)
        os.utime(store.folder / "entries" / f"{key}.json", (number, number))
    assert taken(store, keys[0], tmp_path / "used") is not None
    assert store.size_bytes() < 960_000, "the shared file counts once"
    keep(store, keys[3], tmp_path / "made", own=b"3" * 300_000)
    assert [each.key for each in store.entries()] == [keys[3], keys[0], keys[2]]
    assert store.size_bytes() <= store.limit_bytes
    keep(store, KEY, tmp_path / "made", own=b"4" * 1_000_001)
    assert store.find(KEY) is None, "alone it is more than may be"
    assert len(store.entries()) == 3
    pruned = store.prune(400_000)
    assert (pruned.num_removed, len(store.entries())) == (2, 1)
    assert pruned.left_bytes == store.size_bytes() < 400_000
    assert store.prune(0).left_bytes == 0
    assert [p for p in store.folder.rglob("*") if p.is_file()] == [store.folder / "lock"]


def test_a_disk_that_is_nearly_full_is_left_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LEFT_FREE_BYTES", 2**60)
    with pytest.raises(OSError, match="No space left"):
        keep(store, KEY, tmp_path / "made", a=b"one")
    assert store.entries() == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_kill_leaves_nothing_that_would_be_taken(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """In the midst of the first file, of the second, and before the entry is in its place."""
    calls: list[object] = []

    def copy(source: object, target: Path) -> FileEntry:
        calls.append(target)
        if len(calls) == at:
            target.write_bytes(b"hal")
            kill()
        return copy_and_hash(source, target)

    def dying() -> None:
        monkeypatch.setattr(store_module, "copy_and_hash", copy)
        if at == 3:
            monkeypatch.setattr(store_module, "_written", kill)
        keep(store, KEY, tmp_path / "made", a=b"one", b=b"two")

    killed_in(dying)
    assert store.find(KEY) is None
    assert list((store.folder / "writing").iterdir()) != []
    keep(store, "b" * 64, tmp_path / "other", c=b"three")
    assert list((store.folder / "writing").iterdir()) == [], "what the dead one wrote is gone"
    keep(store, KEY, tmp_path / "made", a=b"one", b=b"two")
    assert taken(store, KEY, tmp_path / "out") == {"a": b"one", "b": b"two"}


# Keeps, takes and prunes the same few entries; exits with 1 if something comes back wrong.
HAMMER = """
import random, sys, tempfile
from pathlib import Path
from recmas_runtime.cache.store import Store
from test_cache_store import keep, taken
draw = random.Random(int(sys.argv[1]))
store = Store(Path(sys.argv[2]), limit_bytes=1_000_000)
with tempfile.TemporaryDirectory() as name:
    for turn in range(60):
        number = draw.randrange(6)
        contents = {"a": bytes([number]) * 200_000, "b": b"shared" * 1000}
        key = f"{number:064x}"
        match draw.randrange(5):
            case 0:
                store.prune(draw.choice([0, 300_000]))
            case 1 | 2:
                keep(store, key, Path(name) / "made", **contents)
            case _:
                found = taken(store, key, Path(name) / f"out-{turn}")
                assert found in (None, contents)
"""


def test_many_processes_share_a_store(store: Store, tmp_path: Path) -> None:
    here = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", here + HAMMER, str(seed), str(store.folder)],
            stderr=subprocess.PIPE,
        )
        for seed in range(4)
    ]
    errors = [child.communicate()[1].decode() for child in children]
    assert [child.returncode for child in children] == [0] * 4, errors
    kept = store.entries()
    for number, each in enumerate(kept):
        assert taken(store, each.key, tmp_path / f"after-{number}") is not None
    blobs = {path.name for path in (store.folder / "blobs").glob("*/*")}
    assert blobs >= {digest for each in kept for digest in each.digests}
    assert list((store.folder / "writing").iterdir()) == []


# Parts of builds.


def made_with(
    store: Store | None, root: Path, inputs: object, conditions: dict[str, object], text: str = "x"
) -> tuple[bool, str, BuildParts]:
    """Ask for a part and keep it; return whether it was made, and its file's text."""
    root.mkdir()
    calls: list[Path] = []

    def make(folder: Path) -> str:
        (folder / "part.txt").write_text(text)
        calls.append(folder)
        return "said"

    with BuildParts(store, conditions=conditions, root=root) as parts:
        assert parts.files("link", "a link", inputs, make, str, root / "links") == "said"
        assert parts.keep(root) == ()
    assert [p.name for p in root.iterdir()] == ["links"]
    return bool(calls), (root / "links/part.txt").read_text(), parts


def test_a_part_is_made_once(store: Store, tmp_path: Path) -> None:
    inputs: dict[str, object] = {"weights": "1", "masks": ((1, 2),)}
    is_made, _, parts = made_with(store, tmp_path / "1", inputs, {"tools": "1"})
    assert is_made
    assert parts.reuse.text == "From the cache: nothing; made: 1 link."
    is_made, text, parts = made_with(store, tmp_path / "2", inputs, {"tools": "1"}, "other")
    assert (is_made, text) == (False, "x")
    assert parts.reuse.text == "From the cache: 1 link; made: nothing."
    assert parts.digests() == {"links/part.txt": file_entry(tmp_path / "2/links/part.txt")}
    assert parts.digest(tmp_path / "2/links/part.txt") == sha256_of(tmp_path / "2/links/part.txt")


@pytest.mark.parametrize(
    ("inputs", "conditions"),
    [
        ({"weights": "2", "masks": ((1, 2),)}, {"tools": "1"}),
        ({"weights": "1", "masks": ((1,), (2,))}, {"tools": "1"}),
        ({"weights": "1", "masks": ((1, 2),)}, {"tools": "2"}),
    ],
)
def test_what_a_part_depends_on_is_in_its_key(
    store: Store, tmp_path: Path, inputs: dict[str, object], conditions: dict[str, object]
) -> None:
    made_with(store, tmp_path / "1", {"weights": "1", "masks": ((1, 2),)}, {"tools": "1"})
    is_made, text, _ = made_with(store, tmp_path / "2", inputs, conditions, "other")
    assert (is_made, text) == (True, "other")


def test_without_a_store_all_is_made(tmp_path: Path) -> None:
    for name in ("1", "2"):
        assert made_with(None, tmp_path / name, {}, {})[0]


def test_what_is_said_in_another_form_is_made_again(store: Store, tmp_path: Path) -> None:
    made_with(store, tmp_path / "1", {}, {})
    (path,) = (store.folder / "entries").iterdir()
    entry = store.find(path.stem)
    assert entry is not None
    other = CacheEntry(kind=entry.kind, about=entry.about, files=entry.files, data=[1])
    path.write_bytes(store_module._written(other))
    assert made_with(store, tmp_path / "2", {}, {})[0]


def test_a_part_that_fails_is_not_kept(store: Store, tmp_path: Path) -> None:
    def fail(folder: Path) -> str:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        BuildParts(store, conditions={}, root=tmp_path) as parts,
    ):
        parts.files("link", "a link", {}, fail, str, tmp_path / "links")
    assert list(tmp_path.iterdir()) == []


# What all parts depend on.


def test_conditions_name_code_tools_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    told = part_conditions()
    assert told == json.loads(json.dumps(told)), "they are in keys as JSON"
    assert told["tools"] == tool_versions()
    assert {"torch", "transformers", "onnx-ir", "onnxruntime", "onnxscript", "recmas"} <= set(
        tool_versions()
    )
    assert told["machine"] == machine()
    monkeypatch.setenv("OMP_NUM_THREADS", "63")
    assert part_conditions() != told, "sums of several threads are added up in another order"


def test_processors_are_told_apart(tmp_path: Path) -> None:
    from recmas_runtime.cache.processor import cpu_facts

    text = (
        "processor\t: 0\nmodel name\t: A\nflags\t\t: fpu avx2\ncpu MHz\t: 2.5\n\nprocessor\t: 1\n"
    )
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert cpu_facts(path) == {"model name": "A", "flags": "fpu avx2"}
    assert cpu_facts(tmp_path / "none") == {}


def test_the_code_of_every_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is made by code: any change of a source file makes other parts."""
    package = tmp_path / "made_up_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "code.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = own_digest("made_up_package")
    (package / "code.py").write_text("A = 2\n")
    own_digest.cache_clear()
    assert own_digest("made_up_package") != before
    own_digest.cache_clear()
    recmas = own_digest("recmas_compiler", "recmas_export")
    assert tool_versions()["recmas"].endswith(recmas[:12])
    assert part_conditions()["runtime"] == own_digest("recmas_runtime")


# Settings.


def test_the_store_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECMAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = user_store()
    assert found is not None
    assert found.folder == tmp_path / "recmas/builds"
    assert found.limit_bytes == 20 * 10**9
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("RECMAS_CACHE_SIZE", "1.5 MB")
    found = user_store()
    assert found is not None
    assert (found.folder, found.limit_bytes) == (tmp_path / "own", 1_500_000)
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"
    monkeypatch.setenv("RECMAS_CACHE", "off")
    assert user_store() is None


def test_wrong_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("RECMAS_CACHE_SIZE", "lots")
    with pytest.raises(RecmasError, match=r"RM305.*RECMAS_CACHE_SIZE says 'lots'.*such as `20 GB`"):
        user_store()
    monkeypatch.setenv("RECMAS_CACHE_SIZE", "")
    (tmp_path / "own").write_text("")
    with pytest.raises(RecmasError, match=r"own: error\[RM305\]: this is no folder"):
        user_store()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0 B", 0), ("12kB", 12_000), ("1.5 gb", 1_500_000_000), (" 2 TB ", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text, said_by="a test") == size


@pytest.mark.parametrize("text", ["", "12", "-1 GB", "1 GiB x", "nan GB", "1e9 B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecmasError, match="RM305"):
        size_of(text, said_by="a test")
