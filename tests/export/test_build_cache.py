"""Builds that take parts from the cache: the same bundle, and only what has changed is made."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.bundles import compile_system, each_backbone_exported_once
from kit.commands import run_recmasc
from kit.files import MadeOnce
from kit.models import write_tiny_backbone
from recmas_export import torch_parts
from recmas_export.build import BuildResult, build
from recmas_runtime.cache.store import Store
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.bundle import open_bundle

SPEC = """\
recmas: 1
name: kept
rounds: 2
latent_steps: 2
backbones:
  tiny: {source: llama}
agents:
  planner:
    backbone: tiny
    system: You are careful.
    prompt: {first: "{{ question }} Plan.", then: "{{ question }} {{ latent.solver }} Plan."}
  solver: {backbone: tiny, prompt: "{{ question }} Plan: {{ latent.planner }}"}
links:
  planner -> solver: {}
  solver -> planner: {feedback: true}
answer: {agent: solver, max_new_tokens: 8}
build: {max_prompt_tokens: 96, max_batch: 4}
"""
ALL = {"texts": 1, "engines": 1, "link": 4, "graphs": 1, "case": 1, "parity": 1}
LIMIT = 10**9


@pytest.fixture(scope="module", autouse=True)
def exported_once(made_once: MadeOnce) -> Iterator[None]:
    """Exports take most of a build; that equal ones are equal to the byte is tested elsewhere."""
    with each_backbone_exported_once(made_once):
        yield


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    write_tiny_backbone(folder / "llama", "llama", num_hidden_layers=1)
    (folder / "spec.yaml").write_text(SPEC)
    return folder / "spec.yaml"


def built(spec: Path, out: Path, *overrides: str) -> BuildResult:
    loaded, program = compile_system(spec, *overrides)
    return build(program, spec=loaded, out=out)


@pytest.fixture(scope="module")
def first(system: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, Path]:
    """The bundle of a build with an empty cache, and the cache; only to be read."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECMAS_CACHE", str(folder / "cache"))
        return built(system, folder / "bundle"), folder / "cache"


@pytest.fixture
def cache(
    first: tuple[BuildResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    """A copy of the cache that the first build has left, which builds now use."""
    shutil.copytree(first[1], tmp_path / "cache")
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "cache", limit_bytes=LIMIT)


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_bundle_is_the_same_with_and_without(
    first: tuple[BuildResult, Path], cache: Store, system: Path, tmp_path: Path
) -> None:
    assert (first[0].from_cache, first[0].made, first[0].warnings) == ({}, ALL, ())
    again = built(system, tmp_path / "again")
    assert (again.from_cache, again.made) == (ALL, {})
    spec, program = compile_system(system)
    without = build(program, spec=spec, out=tmp_path / "without", cache=False)
    assert (without.from_cache, without.made) == ({}, ALL)
    assert content_of(again.path) == content_of(first[0].path) == content_of(without.path)
    assert open_bundle(again.path, verify_hashes=True).manifest.parity == again.parity


def test_a_bundle_and_the_cache_share_no_file(
    first: tuple[BuildResult, Path], cache: Store, system: Path, tmp_path: Path
) -> None:
    """Whoever writes into a bundle changes that bundle."""
    path = built(system, tmp_path / "again").path
    links = [p.stat().st_nlink for root in (path, cache.folder) for p in root.rglob("*.*")]
    assert {p.stat().st_nlink for p in path.rglob("*") if p.is_file()} == {1}, links
    assert len({p.stat().st_mode for p in path.rglob("*") if p.is_file()}) == 1
    (path / "backbones/tiny/weights.safetensors").write_bytes(b"changed")
    assert content_of(built(system, tmp_path / "third").path) == content_of(first[0].path)


# Builds with one override after the other; prints what was made, and which modules are loaded.
WARM = """
import json, sys
from pathlib import Path
from recmas_compiler.api import build_bundle, load_and_compile
made = []
for number, change in enumerate(sys.argv[3:]):
    program = load_and_compile(sys.argv[1], (change,))
    _, built = build_bundle(program, Path(sys.argv[2]) / str(number))
    made.append([built.from_cache, built.made])
heavy = [m for m in ("torch", "onnx_ir", "onnxscript", "safetensors.torch") if m in sys.modules]
print(json.dumps([made, heavy]))
"""
ANYTHING_ELSE = (
    "agents.planner.system=You are quick.",
    "rounds=3",
    "latent_steps=5",
    "answer.temperature=0.7",
    "answer.max_new_tokens=9",
    "build.max_batch=2",
)


def test_what_engines_do_not_depend_on_needs_no_torch(
    cache: Store, system: Path, tmp_path: Path
) -> None:
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{WARM}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(system), str(tmp_path), *ANYTHING_ELSE],
        capture_output=True,
        check=True,
    )
    made, heavy = json.loads(done.stdout)
    assert made == [[ALL, {}]] * len(ANYTHING_ELSE)
    assert heavy == []


def test_a_changed_prompt_is_held_against_transformers(
    cache: Store, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of that is in the cache: another tokenizer than transformers' is found."""
    from recmas_compiler.lowering import prompt_parity

    seen: list[str] = []
    usual = prompt_parity.prompt_difference

    def differs(prompt: object, **given: object) -> str | None:
        assert usual(prompt, **given) is None  # type: ignore[arg-type]
        seen.append(type(given["tokenizer"]).__name__)
        return "it differs"

    monkeypatch.setattr(prompt_parity, "prompt_difference", differs)
    with pytest.raises(RecmasError, match=r"RM301.*prompt `first` of agent 'planner': it differs"):
        built(system, tmp_path / "out", "agents.planner.system=You are quick.")
    assert len(seen) >= 3
    assert not (tmp_path / "out").exists()


def test_figures_from_the_cache_are_held_to_the_tolerances(
    cache: Store, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "recmas_export.assemble.beyond_tolerance", lambda figures, precision: ["hidden is off"]
    )
    with pytest.raises(RecmasError, match=r"RM301.*hidden is off"):
        built(system, tmp_path / "out")


# What changes -> what is made again; all else comes from the cache.
CHANGES: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "precision": (("build.precision=int8",), {"engines": 1, "parity": 1, "loss": 1}),
    "a link's kind": (
        ("links.planner -> solver.kind=residual",),
        {"link": 1, "case": 1, "parity": 1},
    ),
    "a link's start": (
        ("agents.solver.inner.init=random",),
        {"link": 1, "case": 1, "parity": 1},
    ),
    "element type": (
        ("backbones.tiny.dtype=bfloat16",),
        {"texts": 1, "engines": 1, "link": 4, "case": 1, "parity": 1},
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_made_again(
    cache: Store, system: Path, tmp_path: Path, what: str
) -> None:
    overrides, made = CHANGES[what]
    result = built(system, tmp_path / "out", *overrides)
    assert result.made == made
    left = {kind: number - made.get(kind, 0) for kind, number in ALL.items()}
    assert result.from_cache == {kind: number for kind, number in left.items() if number}


def copy_of(system: Path, folder: Path) -> Path:
    shutil.copytree(system.parent / "llama", folder / "llama")
    shutil.copy(system, folder / "spec.yaml")
    return folder / "spec.yaml"


def test_a_copy_of_a_backbone_is_the_same_one(cache: Store, system: Path, tmp_path: Path) -> None:
    assert built(copy_of(system, tmp_path), tmp_path / "out").made == {}


def test_other_weights_make_everything_anew(cache: Store, system: Path, tmp_path: Path) -> None:
    other = copy_of(system, tmp_path)
    weights = tmp_path / "llama/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    assert built(other, tmp_path / "out").made == {k: n for k, n in ALL.items() if k != "graphs"}


def test_weights_that_change_during_a_build_are_not_kept(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest would be that of others."""
    other = copy_of(system, tmp_path)
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "cache"))
    write = torch_parts.write_case

    def changing(*given: object, **named: object) -> None:
        write(*given, **named)  # type: ignore[arg-type]
        (tmp_path / "llama/model.safetensors").write_bytes(b"others")

    monkeypatch.setattr(torch_parts, "write_case", changing)
    assert built(other, tmp_path / "out").made == ALL
    assert not (tmp_path / "cache").exists()


def test_other_conditions_make_everything_anew(
    cache: Store, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def find(self: Store, key: str) -> None:
        asked.append(key)

    monkeypatch.setattr(Store, "find", find)

    def keys() -> list[str]:
        """Return the first key that a build asks for: all have the same conditions."""
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_parts, "texts_of", stop)
            with pytest.raises(KeyboardInterrupt):
                built(system, tmp_path / "out")
        return list(asked)

    before = keys()
    assert len(before) == 1
    assert keys() == before
    monkeypatch.setattr("recmas_export.build.machine", lambda: {"cpu": "another"})
    assert keys() != before


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_tools_of_unknown_versions_keep_nothing(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Store
) -> None:
    from recmas_export.build import tool_versions

    versions = {**tool_versions(), "torch": "unknown"}
    monkeypatch.setattr("recmas_export.build.tool_versions", lambda: versions)
    monkeypatch.setattr(torch_parts, "texts_of", stop)
    monkeypatch.setattr(Store, "find", pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        built(system, tmp_path / "out")


@pytest.mark.parametrize("what", ["weights.safetensors", "decoder.onnx", "an entry"])
def test_what_is_damaged_is_made_again(
    first: tuple[BuildResult, Path], cache: Store, system: Path, tmp_path: Path, what: str
) -> None:
    (kept,) = (each for each in cache.entries() if each.entry.kind == "engines")
    path = cache.folder / "entries" / f"{kept.key}.json"
    if what != "an entry":
        digest = kept.entry.files[what].sha256
        path = cache.folder / "blobs" / digest[:2] / digest
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    result = built(system, tmp_path / "out")
    assert result.made == {"engines": 1}
    assert content_of(result.path) == content_of(first[0].path)
    assert built(system, tmp_path / "again").made == {}, "and kept again"


def test_off(system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECMAS_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert built(system, tmp_path / "out").from_cache == {}
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_only_warned_of(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/blobs").write_text("in the way")
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "cache"))
    result = built(system, tmp_path / "out")
    assert result.made == ALL
    (warning,) = result.warnings
    assert str(warning).startswith(
        f"{tmp_path / 'cache'}: warning[RM350]: what this build has made"
    )
    assert open_bundle(result.path).manifest.fingerprint == result.fingerprint


def test_two_builds_at_once(
    first: tuple[BuildResult, Path], cache: Store, system: Path, tmp_path: Path
) -> None:
    """Both find the engines, and keep all else at about the same time."""
    for kept in cache.entries():
        if kept.entry.kind != "engines":
            cache.forget(kept.key)
    builds = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "recmas_cli.main", "build", str(system), "--json"),
                *("--quiet", "--out", str(tmp_path / name)),
            ],
            stdout=subprocess.PIPE,
        )
        for name in ("one", "two")
    ]
    for each in builds:
        told = json.loads(each.communicate()[0])
        assert told["ok"]
        assert told["problems"] == [p for p in told["problems"] if p["code"] == "RM152"]
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert content_of(tmp_path / "one") == content_of(first[0].path)
    assert built(system, tmp_path / "three").made == {}


# The command.


def test_the_cache_is_listed_and_pruned(cache: Store, tmp_path: Path) -> None:
    told = run_recmasc("cache", "ls", "--json")
    data = json.loads(told.stdout)["data"]
    assert data["folder"] == str(cache.folder)
    assert data["size_bytes"] == cache.size_bytes()
    kinds = [part["kind"] for part in data["parts"]]
    assert sorted(kinds) == sorted(kind for kind, number in ALL.items() for _ in range(number))
    lines = run_recmasc("cache", "ls").stdout.splitlines()
    assert len(lines) == len(kinds) + 1
    assert any(line.endswith("llama in float32") for line in lines)
    assert lines[-1].endswith(f"of at most 20.0 GB, in {cache.folder}")
    assert run_recmasc("cache", "where").stdout == f"{cache.folder}\n"
    assert "Removed 0 parts" in run_recmasc("cache", "prune").stdout
    pruned = json.loads(run_recmasc("cache", "prune", "--to", "100 kB", "--json").stdout)["data"]
    assert pruned["removed"] > 0
    assert pruned["size_bytes"] == cache.size_bytes() <= 100_000
    run_recmasc("cache", "prune", "--all")
    assert cache.entries() == []


def test_commands_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECMAS_CACHE", "off")
    assert run_recmasc("cache", "where").stdout == "off\n"
    for command in ("ls", "prune"):
        ran = run_recmasc("cache", command)
        assert ran.exit_code == 2
        assert "error[RM305]: there is no cache of builds: RECMAS_CACHE is `off`" in ran.output
    monkeypatch.setenv("RECMAS_CACHE", str(tmp_path / "none"))
    assert run_recmasc("cache", "prune", "--all").exit_code == 0, "there is nothing to remove"
    assert run_recmasc("cache", "ls").stdout.startswith("0 parts, 0 B of at most 20.0 GB")
    assert "RM305" in run_recmasc("cache", "prune", "--to", "lots").output
    assert "RM506" in run_recmasc("cache", "prune", "--to", "1 GB", "--all").output


def test_a_build_says_what_it_took(cache: Store, system: Path, tmp_path: Path) -> None:
    ran = run_recmasc("build", system, "--out", tmp_path / "out", "--set", "rounds=3", "--quiet")
    said = "1 tokenizer, 4 links, 1 backbone, 1 set of common graphs, 1 parity case"
    assert f"From the cache: {said}, 1 set of parity figures; made: nothing.\n" in ran.stdout
