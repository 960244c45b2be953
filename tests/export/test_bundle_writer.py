"""Bundles get into place whole or not at all, and nothing of the user's is ever lost."""

from __future__ import annotations

import errno
import json
import os
from collections import namedtuple
from pathlib import Path

import pytest

from kit.killed import kill, killed_in
from recmas_export.bundle import bundle_writer
from recmas_export.bundle.bundle_writer import check_target, staged_bundle
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats.codec import read_json_file
from recmas_runtime.formats.manifest import Manifest
from recmas_runtime.formats.plan import Limits, Plan, SamplingPlan

PLAN = Plan(
    name="test",
    rounds=1,
    answer_agent="solver",
    agents={},
    links={},
    caches={},
    steps=(),
    sampling=SamplingPlan(),
    limits=Limits(max_prompt_tokens=64, max_batch=1),
    fields=(),
)


def manifest(name: str) -> Manifest:
    return Manifest(
        name=name,
        fingerprint="0" * 64,
        spec_digest="0" * 64,
        precision="float32",
        tools={},
        backbones={},
        links={},
        link_engine="links/link.onnx",
        probe="parity/probe.onnx",
        parity=(),
        files={},
    )


def write(target: Path, name: str, *, stop_at: str = "") -> Manifest:
    """Write a bundle with one file; `stop_at` fails at that place."""
    with staged_bundle(target, needed_bytes=1000) as staged:
        (staged.folder / "links").mkdir()
        data = staged.folder / "links/data.bin"
        data.write_bytes(name.encode() * 100)
        if stop_at == "files":
            raise KeyboardInterrupt
        return staged.commit(manifest(name), plan=PLAN, spec_yaml=f"name: {name}\n")


def name_of(target: Path) -> str:
    return read_json_file(Manifest, target / "manifest.json", file="manifest.json").name


def around(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_bundle_lists_every_file(tmp_path: Path) -> None:
    target = tmp_path / "deep/er/out"
    written = write(target, "first")
    assert sorted(written.files) == ["links/data.bin", "plan.json", "spec.yaml"]
    assert read_json_file(Manifest, target / "manifest.json", file="manifest.json") == written
    assert written.files["links/data.bin"].size_bytes == 500
    assert around(target) == ["out"]


def test_older_bundle_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "first")
    write(target, "second")
    assert name_of(target) == "second"
    assert around(target) == ["out"]


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "first")
    assert name_of(tmp_path / "out") == "first"


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    write(tmp_path / "out", "first")
    assert (tmp_path / "out").is_symlink()
    assert name_of(tmp_path / "real") == "first"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"notes.txt": "mine"}, "is a folder with other things in it"),
        ({"manifest.json": "{}"}, "is a folder with other things in it"),
        ({"sub/deep.txt": "mine"}, "is a folder with other things in it"),
    ],
)
def test_other_things_are_left_alone(
    tmp_path: Path, content: dict[str, str], complaint: str
) -> None:
    target = tmp_path / "out"
    for name, text in content.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    with pytest.raises(RecmasError) as caught:
        write(target, "first")
    assert caught.value.exit_code is Exit.USAGE
    assert str(caught.value) == (
        f"error[RM302]: {target} {complaint}; it is left as it is. Name a folder that does not "
        "exist yet, is empty, or is a bundle to be replaced."
    )
    assert {n: (target / n).read_text() for n in content} == content
    assert around(target) == ["out"]


def test_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RecmasError, match=r"RM302.*is a file"):
        write(tmp_path / "out", "first")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_in_a_circle_is_refused_before_a_build(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("other")
    (tmp_path / "other").symlink_to("out")
    with pytest.raises(RecmasError, match=r"RM302.*is a link that leads in a circle"):
        check_target(tmp_path / "out")


def test_a_link_to_what_is_not_there_yet_is_followed(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("other")
    write(tmp_path / "out", "first")
    assert (tmp_path / "out").is_symlink()
    assert name_of(tmp_path / "other") == "first"


def test_bundle_with_a_stranger_in_it_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "first")
    (target / "answers.jsonl").write_text("precious")
    with pytest.raises(RecmasError, match=r"RM302.*such as 'answers\.jsonl'"):
        check_target(target)
    with pytest.raises(RecmasError, match="RM302"):
        write(target, "second")
    assert name_of(target) == "first"


def test_stranger_that_comes_during_the_build_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_bundle(target, needed_bytes=0) as staged:
        target.mkdir()
        (target / "answers.jsonl").write_text("precious")
        with pytest.raises(RecmasError, match="RM302"):
            staged.commit(manifest("first"), plan=PLAN, spec_yaml="")
    assert (target / "answers.jsonl").read_text() == "precious"
    assert around(target) == ["out"]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "first", stop_at="files")
    assert around(tmp_path / "out") == []


def test_interrupt_keeps_the_older_bundle(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "second", stop_at="files")
    assert name_of(tmp_path / "out") == "first"
    assert around(tmp_path / "out") == ["out"]


def test_failed_swap_puts_the_older_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    write(target, "first")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if "building" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(target, "second")
    assert name_of(target) == "first"
    assert around(target) == ["out"]


def write_killed(target: Path, where: str) -> None:
    """Write a bundle in a process that dies at a place."""

    def write_until_killed() -> None:
        if where == "files":
            bundle_writer.sha256_of = kill
        elif where == "manifest":
            write_json = bundle_writer._write_json

            def first_plan(path: Path, value: object) -> None:
                if path.name == "manifest.json":
                    path.write_text('{"version": 1, "na')
                    kill()
                write_json(path, value)

            bundle_writer._write_json = first_plan
        elif where == "before the swap":
            bundle_writer.move_into_place = kill
        elif where == "within the swap":
            rename = Path.rename
            Path.rename = lambda self, to: kill() if "building" in self.name else rename(self, to)
        elif where == "after the swap":
            bundle_writer.shutil.rmtree = kill
        write(target, "second")

    killed_in(write_until_killed)


PLACES = ("files", "manifest", "before the swap", "within the swap", "after the swap")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_killed_build_leaves_a_whole_bundle_or_none(
    tmp_path: Path, where: str, older: bool
) -> None:
    target = tmp_path / "out"
    if older:
        write(target, "first")
    write_killed(target, where)
    if target.exists():
        assert name_of(target) == ("second" if where == "after the swap" else "first")
    else:
        assert not older or where == "within the swap"
    # What is left over is hidden, and the next build takes it away.
    assert all(name.startswith(".out.") for name in around(target) if name != "out")
    write(target, "third")
    assert name_of(target) == "third"
    assert around(target) == ["out"]


def test_replacement_cut_off_in_the_middle_is_undone(tmp_path: Path) -> None:
    """The next build fails too, for a reason of its own: the older bundle is back all the same."""
    target = tmp_path / "out"
    write(target, "first")
    write_killed(target, "within the swap")
    assert not target.exists()
    with pytest.raises(KeyboardInterrupt):
        write(target, "third", stop_at="files")
    assert name_of(target) == "first"
    assert around(target) == ["out"]


def test_a_build_under_way_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_bundle(target, needed_bytes=0) as slow:
        (slow.folder / "half.bin").write_bytes(b"half")
        write(target, "quick")
        assert (slow.folder / "half.bin").exists()
        slow.commit(manifest("slow"), plan=PLAN, spec_yaml="")
    assert name_of(target) == "slow"
    assert around(target) == ["out"]


def test_full_disk_is_told_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 0, 600 * 10**6)
    monkeypatch.setattr(bundle_writer.shutil, "disk_usage", lambda path: usage)
    target = tmp_path / "out"
    with pytest.raises(RecmasError) as caught, staged_bundle(target, needed_bytes=700 * 10**6):
        pytest.fail("the build began")
    assert caught.value.exit_code is Exit.RUN_FAILED
    assert str(caught.value) == (
        f"error[RM303]: the bundle needs about 734 MB, but {tmp_path} has 600 MB free. Free some "
        "space, or choose an output folder on another disk."
    )
    assert around(target) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_during_the_build(tmp_path: Path, number: int) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(RecmasError, match=r"RM303.*cannot write the bundle .*out: "),
        staged_bundle(target, needed_bytes=100),
    ):
        raise OSError(number, os.strerror(number))
    assert around(target) == []


def test_folders_that_cannot_be_locked_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems whose server keeps no locks."""

    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    target = tmp_path / "out"
    with (
        pytest.raises(RecmasError, match=r"RM303.*No locks available"),
        staged_bundle(target, needed_bytes=100),
    ):
        pass
    assert around(target) == []


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_bundle(tmp_path / "out", needed_bytes=100):
        (tmp_path / "nowhere/file").read_text()


def test_names_with_wildcards(tmp_path: Path) -> None:
    target = tmp_path / "out[1]*"
    write(target, "first")
    write(target, "second")
    assert name_of(target) == "second"


def test_manifest_is_json_for_people(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    text = (tmp_path / "out/manifest.json").read_text()
    assert json.loads(text)["name"] == "first"
    assert text.startswith('{\n "version": 2,')
