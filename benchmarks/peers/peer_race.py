"""Bundles beside llama.cpp, OpenVINO GenAI, onnxruntime-genai and transformers, in one run.

    python benchmarks/peers/peer_race.py --float32 DIR --int8 DIR --int4 DIR [--texts FILE.jsonl]
        [--peers NAME,...] [--environments .peers] [--out out/peers] [--quick] [--json]
        [--prepare-only | --table-only]

DIRs are bundles of one system on SmolLM2 in three precisions. Packages of the peers, and the same
weights in their formats, are made on first use below `--environments`: 3 GB, some minutes of
compiling, then another ten of building models. Every contender then has a process of its own, which
stays while the others are asked, and takes its turn in every cell. A cell that is there is not
measured again: after Ctrl-C the same command goes on. `peer_table.py` writes the section of
docs/performance.md from `OUT/peers.json`.

Texts are the first of a file with the fields of `--fields`; without one, the paragraphs of the text
that ships with recmas.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from contenders import (
    LOAD,
    PEERS,
    PRECISIONS,
    RECMAS,
    TRANSFORMERS,
    Contender,
    Models,
    Precision,
    cells_of,
    contenders_of,
)
from peer_files import make_environments, make_models, write_random
from peer_table import draw, section
from peer_turns import Race, read, write
from tokenizers import Tokenizer

from recmas_compiler.backbones.sources import SMOLLM2, resolve_source
from recmas_runtime.bench.report import machine_facts
from recmas_runtime.formats.bundle import open_bundle

# The spec of one agent on given weights is that of the race of frameworks.
sys.path.append(str(Path(__file__).parents[1] / "frameworks"))
from team import endpoint_spec

TURNS, QUICK_TURNS = 7, 3
TEXTS, QUICK_TEXTS = 200, 40
# Of a text; the rest of a longer one is not read, and how many those are is said.
MOST_TOKENS: Final = 256
# Of the text on random weights.
ERROR_TOKENS: Final = 128
SHIPPED: Final = files("recmas_export") / "held_out.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for precision in PRECISIONS:
        parser.add_argument(f"--{precision}", type=Path, metavar="BUNDLE")
    parser.add_argument("--texts", type=Path, help="JSON lines, for the losses")
    parser.add_argument(
        "--fields", default="question,solution", help="of a text, where it has them"
    )
    parser.add_argument("--limit", type=int, help=f"texts [default: {TEXTS}]")
    parser.add_argument("--peers", default=",".join(PEERS), help=", ".join(PEERS))
    parser.add_argument("--turns", type=int, help=f"of a cell [default: {TURNS}]")
    parser.add_argument("--quick", action="store_true", help="fewer cells, turns and texts")
    parser.add_argument("--errors", action="store_true", help="on random weights too, once")
    parser.add_argument("--threads", type=int, default=2, help="of everyone [default: 2]")
    parser.add_argument("--environments", type=Path, default=Path(".peers"))
    parser.add_argument("--out", type=Path, default=Path("out/peers"))
    parser.add_argument("--json", action="store_true", help="print figures instead of tables")
    parser.add_argument("--prepare-only", action="store_true", help="make what is missing")
    parser.add_argument("--table-only", action="store_true", help="of the cells that are there")
    given = parser.parse_args()
    if given.table_only:
        show(given.out, as_json=given.json)
        return
    bundles = bundles_of(given)
    peers = names_of(given.peers)
    given.turns = number_of("turns", given.turns, QUICK_TURNS if given.quick else TURNS)
    given.limit = number_of("limit", given.limit, QUICK_TEXTS if given.quick else TEXTS)
    # Whatever ends this program ends the processes that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(given, bundles, peers)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        show(given.out, as_json=given.json)
        sys.exit(130)


def run(given: argparse.Namespace, bundles: dict[Precision, Path], peers: list[str]) -> None:
    """Prepare, measure, and show what was found."""
    models = smollm2(given.environments)
    make_environments(given.environments, peers)
    make_models(models, given.environments, peers)
    found = contenders_of(models, bundles, threads=given.threads)
    race = Race(
        contenders=[contender for contender in found if contender.peer in peers],
        environments=given.environments,
        folder=given.out,
        threads=given.threads,
        turns=given.turns,
    )
    texts, cut = texts_of(given)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = keep_settings(given, race.contenders, texts, cut)
    digests = {name: facts["digest"] for name, facts in settings["contenders"].items()}
    if given.errors:
        measure_errors(race, given, texts, digests)
    race.losses(
        texts, {name: f"{each} {settings['texts']['digest']}" for name, each in digests.items()}
    )
    if not given.prepare_only:
        race.run(cells_of(quick=given.quick))
        show(given.out, as_json=given.json)


def bundles_of(given: argparse.Namespace) -> dict[Precision, Path]:
    """Return the bundles by precision; all three must be there."""
    found: dict[Precision, Path] = {}
    for precision in PRECISIONS:
        path = getattr(given, precision)
        if path is None or not (path / "manifest.json").exists():
            told = "is missing" if path is None else f"{path} is no bundle"
            raise SystemExit(
                f"--{precision} {told}: `recmasc build benchmarks/specs/sequential.yaml "
                f"--set build.precision={precision} --out DIR` writes one"
            )
        found[precision] = path
    return found


def names_of(text: str) -> list[str]:
    """Return the peers that were asked for, recmas always among them."""
    names = [RECMAS, *(name for name in text.split(",") if name != RECMAS)]
    for name in names:
        if name not in PEERS:
            raise SystemExit(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    return names


def number_of(name: str, given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise SystemExit(f"--{name} {given} is not 1 or more")
    return default if given is None else given


def smollm2(environments: Path) -> Models:
    """Return the files of the embedded model, whose type is 4 bits already."""
    source = resolve_source(SMOLLM2, base_dir=Path()).gguf_path
    assert source is not None
    return Models(folder=environments / "models", source=source, own_type="Q4_1")


def texts_of(given: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Return the tokens of the texts, and how many texts are longer than what is read of them."""
    if given.texts is None:
        texts = SHIPPED.read_text(encoding="utf-8").strip().split("\n\n")
    elif not given.texts.exists():
        raise SystemExit(f"--texts {given.texts}: there is no such file")
    else:
        records = map(json.loads, given.texts.read_text(encoding="utf-8").splitlines())
        fields = given.fields.split(",")
        texts = ["\n".join(str(r[name]) for name in fields if name in r) for r in records]
        if not all(texts):
            raise SystemExit(f"--texts {given.texts}: a record has none of {given.fields}")
    tokenizer = Tokenizer.from_file(str(tokenizer_of(given.float32)))
    ids = [tokenizer.encode(text).ids for text in texts[: given.limit]]
    return [each[:MOST_TOKENS] for each in ids], sum(len(each) > MOST_TOKENS for each in ids)


def tokenizer_of(path: Path) -> Path:
    """Return the file of a bundle's tokenizer, which everyone's tokens are made with."""
    bundle = open_bundle(path, verify_hashes=False)
    backbone = bundle.plan.agents[bundle.plan.answer_agent].backbone
    return bundle.file(bundle.manifest.backbones[backbone].tokenizer)


def keep_settings(
    given: argparse.Namespace,
    contenders: Sequence[Contender],
    texts: Sequence[Sequence[int]],
    cut: int,
) -> dict[str, Any]:
    """Write what all cells have in common, or refuse if other cells are there already."""
    fixed: dict[str, Any] = {
        "turns": given.turns,
        "threads": given.threads,
        "texts": {
            "name": "recmas's text" if given.texts is None else given.texts.name,
            "number": len(texts),
            "tokens": sum(len(text) - 1 for text in texts),
            "longer_than_read": cut,
            "digest": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
        },
        "machine": machine_facts(),
        "contenders": {
            c.name: {
                "peer": c.peer,
                "precision": c.precision,
                "form": c.form,
                "file": c.file.name,
                "made": c.made,
                "digest": digest(c.file),
                "file_mib": round(size_of(c.file) / 2**20, 1),
            }
            for c in contenders
        },
    }
    path = given.out / "settings.json"
    before = read(path)
    differ = [name for name in fixed if before and before.get(name) != fixed[name]]
    if differ:
        raise SystemExit(
            f"{given.out} has cells of other {', '.join(differ)}: take another --out, or remove it"
        )
    if not before:
        write(path, {**fixed, "date": date.today().isoformat()})
    return fixed


def digest(path: Path) -> str:
    """Return what tells a file or folder from another one, without reading all weights."""
    manifest = path / "manifest.json"
    if manifest.exists():
        return str(json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"])[:16]
    with (path if path.is_file() else max(parts_of(path), key=os.path.getsize)).open("rb") as file:
        file.seek(-(2**20), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()[:16]


def size_of(path: Path) -> int:
    return sum(part.stat().st_size for part in parts_of(path))


def parts_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]


def measure_errors(
    race: Race, given: argparse.Namespace, texts: Sequence[Sequence[int]], keys: Mapping[str, str]
) -> None:
    """Measure everyone's error on random weights; the files of those go when it is done.

    They are made of the same tree as the bundles that race, or the errors are those of others.
    """
    folder = given.environments / "random"
    peers = {contender.peer for contender in race.unknown_errors(keys)}
    found: list[Contender] = []
    if peers:
        folder.mkdir(parents=True, exist_ok=True)
        models = Models(folder=folder, source=folder / "random-F32.gguf", own_type="F32")
        if not models.source.exists():
            new = folder / "new-random.gguf"
            write_random(smollm2(given.environments).gguf("F32"), new)
            new.rename(models.source)
        make_models(models, given.environments, peers | {TRANSFORMERS})
        bundles = random_bundles(folder, models.source) if RECMAS in peers else {}
        found = contenders_of(models, bundles, threads=given.threads)
    ids = [token for text in texts for token in text][:ERROR_TOKENS]
    race.errors(found, ids, keys)
    shutil.rmtree(folder, ignore_errors=True)


def random_bundles(folder: Path, source: Path) -> dict[Precision, Path]:
    """Build bundles of one agent on given weights, in every precision that a build allows them.

    Random weights lose more than a trained model may; a build that refuses says so itself.
    """
    found: dict[Precision, Path] = {}
    for precision in PRECISIONS:
        bundle = folder / precision
        if not bundle.exists():
            print(f"building {bundle}", file=sys.stderr, flush=True)
            spec = folder / f"{precision}.yaml"
            text = endpoint_spec(precision=precision, source=f"gguf:./{source.name}")
            spec.write_text(text, encoding="utf-8")
            recmasc = str(Path(sys.executable).with_name("recmasc"))
            command = [recmasc, "build", str(spec), "--out", str(bundle), "--quiet"]
            subprocess.run(command, check=False, stdout=sys.stderr)
        if bundle.exists():
            found[precision] = bundle
    return found


def show(folder: Path, *, as_json: bool) -> None:
    """Write `peers.json`, `peers.md` and `peers.png` of what is there, and print one of them."""
    settings = read(folder / "settings.json")
    if not settings:
        raise SystemExit(f"{folder} has no cells")
    names = [LOAD, *(cell.name for cell in cells_of(quick=False))]
    cells = {name: read(folder / "cells" / f"{name}.json") for name in names}
    contenders = {
        name: {**facts, **read(folder / "files" / f"{name}.json")}
        for name, facts in settings["contenders"].items()
    }
    figures = {
        **settings,
        "contenders": contenders,
        "cells": {name: cell for name, cell in cells.items() if cell},
    }
    text = json.dumps(figures, separators=(",", ":"))
    # A turn a line: a file that changes line by line, and is not three times as long.
    text = text.replace('"turns":[{', '"turns":[\n{').replace("}},{", "}},\n{")
    (folder / "peers.json").write_text(text + "\n", encoding="utf-8")
    tables = section(figures)
    (folder / "peers.md").write_text(tables + "\n", encoding="utf-8")
    draw(figures, folder / "peers.png")
    print(text if as_json else tables)


if __name__ == "__main__":
    main()
