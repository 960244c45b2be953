"""Mutated bundles: refused by a code, or right; what `verify` calls whole runs and answers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import pytest

from faults.cases import Case, parts, try_cases
from faults.mutators import (
    ODD_TEXTS,
    changed_tree,
    other_bytes,
    other_json,
    other_onnx,
    other_safetensors,
    other_template,
)
from faults.outcome import Outcome, codes_in, forked, judge
from kit.hand_bundle import rehash
from recmas_runtime.cli.main import main

QUESTION: Final = "What comes at 7"
ANSWER: Final = "h"
# A sound bundle may still refuse one question: it is too long for changed limits, a field is new.
OF_THE_QUESTION: Final = frozenset({"RM500", "RM501", "RM505", "RM506"})


@dataclass(frozen=True)
class Damaged:
    """A copy of the bundle; `sealed` says that its hashes were brought up to date."""

    root: Path
    sealed: bool

    def read(self, relative: str) -> bytes:
        return (self.root / relative).read_bytes()

    def write(self, relative: str, raw: bytes) -> None:
        path = self.root / relative
        path.unlink()  # a hard link to the whole one
        path.write_bytes(raw)


Damage = Callable[[Random, Damaged], None]


def files_of(root: Path, ending: str = "") -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob(f"*{ending}") if p.is_file())


def of_files(change: Callable[[Random, bytes], bytes], ending: str, folder: str = "") -> Damage:
    """Change one of the files whose names end so."""

    def damage(random: Random, bundle: Damaged) -> None:
        names = [n for n in files_of(bundle.root, ending) if n.startswith(folder)]
        name = random.choice(names)
        bundle.write(name, change(random, bundle.read(name)))

    damage.__name__ = f"{change.__name__} of {folder}*{ending}"
    return damage


def in_manifest(random: Random, bundle: Damaged) -> None:
    """Change what a manifest says of one backbone, link, file, or anything else."""
    whole = json.loads(bundle.read("manifest.json"))
    section = random.choice([None, "backbones", "links", "parity", "files", *whole])
    if section is None or not isinstance(whole[section], (dict, list)):
        whole = changed_tree(random, whole)
    else:
        whole[section] = changed_tree(random, whole[section])
    bundle.write("manifest.json", json.dumps(whole).encode())


def in_files(random: Random, bundle: Damaged) -> None:
    """Remove, exchange, link or replace files, as careless copies do."""
    names = files_of(bundle.root)
    name, other = random.sample(names, 2)
    path = bundle.root / name
    raw = bundle.read(other)
    path.unlink()
    match random.randrange(10):
        case 0:
            pass
        case 1:
            path.write_bytes(raw)
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to(path)
        case 5:
            path.symlink_to(bundle.root / other)
        case 6:
            path.symlink_to(random.choice(["/dev/zero", "/etc/passwd", "/dev/null", "nowhere"]))
        case 7:
            shutil.rmtree(path.parent) if path.parent != bundle.root else None
        case 8:
            path.symlink_to("..")
        case _:
            path.touch()


def in_paths(random: Random, bundle: Damaged) -> None:
    """Let the manifest name files by other paths."""
    whole = json.loads(bundle.read("manifest.json"))
    name = random.choice(list(whole["files"]))
    odd = random.choice(
        [*ODD_TEXTS, f"./{name}", f"a/../{name}", f"/{name}", f"{name}/", f"{name}\0", "n" * 300,
         "p/" * 3000, "\udce9", name.upper(), "links", "links/link.onnx/x"]
    )  # fmt: skip
    text = json.dumps(whole)
    if random.random() < 0.5:
        text = text.replace(json.dumps(name), json.dumps(odd))
    else:
        whole["files"][odd] = whole["files"].pop(name)
        text = json.dumps(whole)
    bundle.write("manifest.json", text.encode())


def in_plan(random: Random, bundle: Damaged) -> None:
    """Change what the plan says of one agent, step or limit."""
    whole = json.loads(bundle.read("plan.json"))
    section = random.choice([s for s in whole if isinstance(whole[s], (dict, list))])
    whole[section] = changed_tree(random, whole[section])
    bundle.write("plan.json", json.dumps(whole).encode())


# How often each is drawn, and what it does.
DAMAGES: Final[tuple[tuple[int, Damage], ...]] = (
    (4, in_manifest),
    (2, in_paths),
    (4, in_plan),
    (1, of_files(other_json, "plan.json")),
    (3, in_files),
    (3, of_files(other_bytes, "")),
    (3, of_files(other_safetensors, ".safetensors", "links/")),
    (2, of_files(other_safetensors, ".safetensors", "parity/")),
    (1, of_files(other_safetensors, ".safetensors", "backbones/")),
    (4, of_files(other_onnx, ".onnx")),
    (3, of_files(other_template, ".jinja")),
    (3, of_files(other_json, "tokenizer.json")),
)


def attempt(case: Case, whole: Path) -> Iterator[str]:
    random = case.random
    root = case.folder / random.choice(["bundle"] * 8 + ["b u", "[b]", "b\x1b[31m", "-b", "\u00e9"])
    shutil.copytree(whole, root, copy_function=os.link)
    (damage,) = random.choices([d for _, d in DAMAGES], [n for n, _ in DAMAGES])
    bundle = Damaged(root, sealed=random.random() < 0.75)
    damage(random, bundle)
    if bundle.sealed:
        reseal(root)
    before = listing(case.folder)
    json = ["--json"] if random.random() < 0.15 else []
    on_terminal = random.random() < 0.3
    runs: dict[str, Outcome] = {}
    faults: list[str] = []
    commands = {
        "verify": ["verify", str(root), "--quiet", *json],
        "run": ["run", str(root), QUESTION, "--quiet", *json],
        "inspect": ["inspect", str(root), *json],
    }
    for name, arguments in commands.items():
        if name == "inspect" and case.number % 4:
            continue
        runs[name] = forked(lambda arguments=arguments: main(arguments), on_terminal=on_terminal)
        data = name == "run" or bool(json)
        found = judge(runs[name], data_on_stdout=data, natively=True)
        faults += [f"{name}: {fault}" for fault in found]
    faults += disagreements(runs["verify"], runs["run"], sealed=bundle.sealed, as_json=bool(json))
    if listing(case.folder) != before:
        faults.append("a command wrote into the bundle or beside it")
    if faults:
        yield f"{damage.__name__}, sealed {bundle.sealed}: {'; '.join(faults)}"
        for name, outcome in runs.items():
            yield f"{name} ({outcome.status}): {outcome.text[-900:]!r}"


def disagreements(verified: Outcome, ran: Outcome, *, sealed: bool, as_json: bool) -> list[str]:
    """Return where `verify` and `run` contradict each other or the bundle as it was."""
    if (verified.status or 0) < 0 or (ran.status or 0) < 0:
        return []  # a native crash, which `judge` has seen
    if verified.status == 0 and ran.status != 0 and not set(codes_in(ran)) <= OF_THE_QUESTION:
        return [f"`verify` calls it whole, `run` ends with {', '.join(codes_in(ran))}"]
    if ran.status != 0 or sealed:
        return []
    answer = ran.stdout.decode(errors="replace").strip()
    if as_json:
        answer = ran.json()["data"]["answers"][0]["answer"]
    if answer != ANSWER and verified.status == 0:
        return [f"`verify` calls it whole, it answers {answer!r}"]
    return []


def reseal(root: Path) -> None:
    """Make hashes and sizes true again, where there is a manifest and a file to do it for."""
    if any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in root.rglob("*")):
        return  # a device or a pipe would be read for ever
    manifest = root / "manifest.json"
    if manifest.is_file() and b'"/' in manifest.read_bytes():
        return  # and so would one that the manifest names
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        rehash(root)


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def preloaded() -> None:
    """What a case needs is imported once, before it forks."""
    import recmas_runtime.checking.verify
    import recmas_runtime.cli.inspect
    import recmas_runtime.cli.run  # noqa: F401


@parts
def test_mutated_bundles(part: int, whole_bundle: Path, preloaded: None) -> None:
    try_cases("bundles", 2000, part, lambda case: attempt(case, whole_bundle))


def test_the_whole_bundle_answers(whole_bundle: Path, preloaded: None) -> None:
    outcome = forked(lambda: main(["run", str(whole_bundle), QUESTION, "--quiet"]))
    assert (outcome.status, outcome.stdout) == (0, f"{ANSWER}\n".encode())
