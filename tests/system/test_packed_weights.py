"""Weights that are packed for this processor: kept in the cache, taken from it, never trusted."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.specs import SEQUENTIAL
from recmas_runtime.cache.settings import user_store
from recmas_runtime.cache.store import Store
from recmas_runtime.checking.verify import verify_bundle
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.engines.onnx import packed
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.engines.onnx.packed import KIND, WEIGHTS, PackedGraphs
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.links import read_operands, stack_operands

QUESTION = "What is 7 * 8?"
Bundles = dict[str, Path]


@pytest.fixture(scope="module")
def bundles(build_tiny: BuildTiny) -> Bundles:
    """The same small system in float32 and int4, whose prompts read 8 bits; only to be read."""
    return {
        precision: build_tiny(f"{SEQUENTIAL.rstrip()[:-1]}, precision: {precision}}}\n").bundle
        for precision in ("float32", "int4")
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty cache, in which small weights are kept too."""
    monkeypatch.setattr(packed, "SMALLEST_BYTES", 0)
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "cache"))
    found = user_store()
    assert found is not None
    return found


def answer_of(bundle: Path, *, cache: bool = True) -> tuple[str, tuple[Problem, ...]]:
    with rt.load(bundle, device="cpu", threads=1, cache=cache) as system:
        return system.run(QUESTION).answer, system.problems


def mapped(store: Store) -> list[str]:
    """Return what of the store this process has mapped."""
    return [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(store.folder) in line
    ]


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_states_are_the_same_bit_for_bit(bundles: Bundles, store: Store, precision: str) -> None:
    bundle = open_bundle(bundles[precision])
    (entry,) = bundle.manifest.backbones.values()
    links = read_operands(bundle.file, bundle.manifest.links)
    inner = stack_operands([links[bundle.plan.agents["planner"].inner]])

    def states(graphs: PackedGraphs | None) -> list[np.ndarray]:
        engine = BackboneEngine(entry, bundle.root, threads=1, packed=graphs)
        found = []
        for rows in (1, 3):
            ids = np.arange(rows * 17).reshape(rows, 17) % entry.vocab_size
            cache = engine.new_cache(rows, 24)
            starts, last = np.zeros(rows, np.int64), np.full(rows, 16)
            hidden, thought, embeds = engine.forward(cache, engine.embed(ids), starts, last, inner)
            found += [hidden, *engine.rollout(cache, thought, embeds, last + 1, inner, 4)]
            found.append(engine.logits(hidden[:, -1]))
        return found

    problems: list[Problem] = []
    plain = states(None)
    made = states(PackedGraphs(bundle, store, problems))
    taken = states(PackedGraphs(bundle, store, problems))
    assert not problems
    for expected, *others in zip(plain, made, taken, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, expected)


def test_weights_are_mapped(bundles: Bundles, store: Store) -> None:
    bundle = bundles["float32"]
    for _ in range(2):
        with rt.load(bundle, device="cpu", threads=1):
            assert mapped(store)
    with rt.load(bundle, device="cpu", threads=1, cache=False):
        assert not mapped(store)


def test_what_onnx_runtime_writes_wrongly_is_not_kept(bundles: Bundles, store: Store) -> None:
    """It does not align packed weights in its file, and MatMulNBits then reads others."""
    expected = answer_of(bundles["int4"], cache=False)
    assert [answer_of(bundles["int4"]) for _ in range(2)] == [expected] * 2
    (decoder,) = (each for each in store.entries() if "decoder" in each.entry.about)
    assert decoder.entry.about.endswith(": not kept")
    assert not decoder.entry.files


def test_answers_are_the_same_and_the_bundle_is_left_alone(bundles: Bundles, store: Store) -> None:
    bundle = bundles["float32"]
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    plain = answer_of(bundle, cache=False)
    assert not store.folder.exists(), "nothing is kept where that is not wanted"
    assert [answer_of(bundle), answer_of(bundle)] == [plain, plain]
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    (decoder,) = store.entries()
    assert decoder.entry.kind == KIND
    assert decoder.entry.about.startswith("backbones/tiny/decoder.cpu.onnx of sequential, ONNX")
    assert verify_bundle(bundle, device="cpu", threads=1, store=store).ok


def test_the_command_line_does_without_where_that_is_wanted(
    bundles: Bundles, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(bundles["float32"]), QUESTION, "--device", "cpu", "--quiet"]
    assert main([*command, "--no-cache"]) == 0
    assert not store.folder.exists()
    without = capsys.readouterr().out
    assert main(command) == 0
    assert store.entries()
    assert capsys.readouterr().out == without


def test_graphs_in_16_bits_are_opened_as_they_are(build_tiny: BuildTiny, store: Store) -> None:
    spec = f"{SEQUENTIAL.rstrip()[:-1]}, precision: bfloat16}}\n"
    bundle = build_tiny(spec).bundle
    assert answer_of(bundle) == answer_of(bundle, cache=False)
    assert KIND not in {kept.entry.kind for kept in store.entries()}


def test_small_weights_are_not_kept(bundles: Bundles, tmp_path: Path) -> None:
    problems: list[Problem] = []
    store = Store(tmp_path / "cache", limit_bytes=10**9)
    graphs = PackedGraphs(open_bundle(bundles["float32"]), store, problems)
    bundle = open_bundle(bundles["float32"])
    (entry,) = bundle.manifest.backbones.values()
    graphs.open(entry.decoder_on("cpu"), weights=entry.weights, threads=1)
    assert not store.folder.exists()


def weights_of(store: Store) -> Path:
    decoder = max(store.entries(), key=lambda each: each.size_bytes)
    places = store.files_of(decoder.key, decoder.entry)
    assert places is not None
    return places[WEIGHTS]


def cut_off(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def spoilt_graph(path: Path) -> None:
    folder = path.parent.parent
    for blob in folder.glob("*/*"):
        raw = blob.read_bytes()
        if path.name.encode() in raw:
            blob.write_bytes(raw.replace(path.name.encode(), b"0" * 64))


@pytest.mark.parametrize("spoil", [cut_off, spoilt_graph, Path.unlink])
def test_what_is_damaged_is_made_again(
    bundles: Bundles, store: Store, spoil: Callable[[Path], None]
) -> None:
    bundle = bundles["float32"]
    expected = answer_of(bundle)
    before = weights_of(store)
    spoil(before)
    assert answer_of(bundle) == expected
    assert weights_of(store).stat().st_size == store.entries()[0].entry.files[WEIGHTS].size_bytes
    assert answer_of(bundle) == expected


def test_verify_hashes_what_runs_only_measure(bundles: Bundles, store: Store) -> None:
    bundle = bundles["float32"]
    answer_of(bundle)
    path = weights_of(store)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert verify_bundle(bundle, device="cpu", threads=1, store=store).ok
    assert weights_of(store).read_bytes() == whole


def test_weights_that_are_not_the_bundle_s_own_are_not_kept(
    bundles: Bundles, store: Store, tmp_path: Path
) -> None:
    """Else a bundle that is copied again would go on with the weights of the damaged copy."""
    bundle = Path(shutil.copytree(bundles["float32"], tmp_path / "copy"))
    weights = bundle / "backbones/tiny/weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(RecmasError, match="RM401") as caught:
        answer_of(bundle)
    assert caught.value.problems[0].file == "backbones/tiny/weights.safetensors"
    assert not store.entries()


def test_a_folder_that_cannot_be_written_is_told(
    bundles: Bundles, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = answer_of(bundles["float32"], cache=False)

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Store, "place", full)
    answer, problems = answer_of(bundles["float32"])
    assert answer == expected
    (problem,) = problems
    assert (problem.code, problem.severity, problem.file) == (
        "RM350",
        "warning",
        str(store.folder),
    )
    assert "Read-only file system" in problem.message


LOAD = """
import sys
import recmas_runtime as rt
from recmas_runtime.engines.onnx import packed
packed.SMALLEST_BYTES = 0
for _ in range(2):
    with rt.load(sys.argv[1], device="cpu", threads=1) as system:
        assert not system.problems, system.problems
        print(repr(system.run("What is 7 * 8?").answer))
"""


def test_two_processes_at_once(bundles: Bundles, store: Store) -> None:
    expected, _ = answer_of(bundles["float32"], cache=False)
    command = [sys.executable, "-c", LOAD, str(bundles["float32"])]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0].decode().splitlines() for process in running]
    assert said == [[repr(expected)] * 2] * 2
    assert len(store.entries()) == 1
    assert not list((store.folder / "writing").iterdir())
