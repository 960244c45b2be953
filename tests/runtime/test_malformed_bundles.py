"""Bundles that are cut, altered, hostile or made by another version: refused, by name, at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.hand_bundle import DELETE, edit_json, rehash
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import CODES, RecmasError
from recmas_runtime.core.files import sha256_of
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import (
    inside,
    open_bundle,
    unlisted_files,
    write_json_atomic,
)
from recmas_runtime.formats.manifest import MANIFEST_NAME
from recmas_runtime.running.system import load

Spoil = Callable[[Path], object]


def cut(relative: str, share: float = 0.5) -> Spoil:
    def spoil(root: Path) -> None:
        raw = (root / relative).read_bytes()
        (root / relative).write_bytes(raw[: int(len(raw) * share)])

    return spoil


def flip(relative: str) -> Spoil:
    def spoil(root: Path) -> None:
        raw = bytearray((root / relative).read_bytes())
        raw[len(raw) // 2] ^= 1
        (root / relative).write_bytes(raw)

    return spoil


def remove(relative: str) -> Spoil:
    return lambda root: (root / relative).unlink()


def write(relative: str, raw: bytes) -> Spoil:
    return lambda root: (root / relative).write_bytes(raw)


def manifest(keys: str, value: object) -> Spoil:
    return lambda root: edit_json(root / MANIFEST_NAME, keys, value)


def plan(keys: str, value: object) -> Spoil:
    """Change the plan and make the manifest agree: only the contents are wrong."""

    def spoil(root: Path) -> None:
        edit_json(root / "plan.json", keys, value)
        rehash(root)

    return spoil


def rename_file(relative: str) -> Spoil:
    """Make the manifest list the spec under another path."""

    def spoil(root: Path) -> None:
        whole = json.loads((root / MANIFEST_NAME).read_text())
        whole["files"][relative] = whole["files"].pop("spec.yaml")
        (root / MANIFEST_NAME).write_text(json.dumps(whole))

    return spoil


def swap_for(relative: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(root: Path) -> None:
        (root / relative).unlink()
        make(root / relative)

    return spoil


def link_outside(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_text("recmas: 1\n")
    path.symlink_to(outside)


WEIGHTS = "backbones/one/weights.safetensors"
DECODER = "backbones/one/decoder.onnx"
TOKENIZER = "backbones/one/tokenizer.json"
STEP = {"op": "decode", "round": 2, "agent": "solver", "cache": "solver", "exits": []}

LOSS = {
    "text": "held_out.txt",
    "num_tokens": 5,
    "hidden_cosine": 0.9,
    "greedy_agreement": 0.9,
    "reference_loss": 1.0,
    "loss": 1.1,
}


def turned(tensor: str, index: int = 0, **other: object) -> Spoil:
    """Let rows of a tensor turn, as one rotation of four of their numbers says or is said to."""
    rotation = {"layout": "halves", "start": 0, "inv_freq": [1.0, 0.1], **other}
    positions = {"rotations": [rotation], "tensors": {tensor: index}}
    return manifest("backbones/one/row_positions", positions)


# name -> (what is done to the bundle, code, file named, part of the message)
CASES: dict[str, tuple[Spoil, str, str, str]] = {
    "no manifest": (remove(MANIFEST_NAME), "RM400", "", "has no manifest.json"),
    "manifest cut": (cut(MANIFEST_NAME), "RM404", MANIFEST_NAME, "not valid JSON"),
    "manifest empty": (write(MANIFEST_NAME, b""), "RM404", MANIFEST_NAME, "Expecting value"),
    "manifest is a list": (write(MANIFEST_NAME, b"[]"), "RM404", MANIFEST_NAME, "a table"),
    "manifest not UTF-8": (write(MANIFEST_NAME, b'"\xff"'), "RM404", MANIFEST_NAME, "UTF-8"),
    "manifest nested": (write(MANIFEST_NAME, b"[" * 10**6), "RM404", MANIFEST_NAME, "deeply"),
    "manifest NaN": (write(MANIFEST_NAME, b'{"a":NaN}'), "RM404", MANIFEST_NAME, "NaN"),
    "manifest with twice a key": (
        write(MANIFEST_NAME, b'{"name": 1, "name": 2}'), "RM404", MANIFEST_NAME, "duplicate key"),
    "manifest newer": (manifest("version", 3), "RM403", MANIFEST_NAME, "format version 3"),
    "manifest with unknown key": (manifest("mood", "good"), "RM404", MANIFEST_NAME, "mood"),
    "manifest without name": (manifest("name", DELETE), "RM404", MANIFEST_NAME, "name: missing"),
    "width negative": (
        manifest("backbones/one/width", -1), "RM404", MANIFEST_NAME, "backbones.one.width: -1"),
    "width huge": (
        manifest("backbones/one/width", 10**12), "RM404", MANIFEST_NAME, "out of bounds"),
    "layers a text": (
        manifest("backbones/one/layers", "30"), "RM404", MANIFEST_NAME, "backbones.one.layers"),
    "heads a text": (
        manifest("backbones/one/layers/0/rows/heads", "3"), "RM404", MANIFEST_NAME, "an integer"),
    "size beyond all disks": (
        manifest("files/plan.json/size_bytes", 2**60), "RM404", MANIFEST_NAME, "out of bounds"),
    "unknown precision": (
        manifest("backbones/one/precision", "int3"), "RM404", MANIFEST_NAME, "'int3'"),
    "loss without a text": (
        manifest("parity/0/loss", {"num_tokens": 5}), "RM404", MANIFEST_NAME, "text: missing"),
    "loss over nothing": (
        manifest("parity/0/loss", LOSS | {"num_tokens": 0}),
        "RM404", MANIFEST_NAME, "out of bounds"),
    "impossible cosine": (
        manifest("parity/0/loss", LOSS | {"hidden_cosine": 1.5}),
        "RM404", MANIFEST_NAME, "1.5 is not between -1 and 1"),
    "impossible share": (
        manifest("parity/0/loss", LOSS | {"greedy_agreement": -0.5}),
        "RM404", MANIFEST_NAME, "-0.5 is not between 0 and 1"),
    "loss a text": (
        manifest("parity/0/loss", LOSS | {"loss": "low"}), "RM404", MANIFEST_NAME, "a number"),
    "unknown figure": (
        manifest("parity/0/figures/mood", 0.5), "RM404", MANIFEST_NAME, "unknown figure 'mood'"),
    "unknown element type": (
        manifest("backbones/one/dtype", "float7"), "RM404", MANIFEST_NAME, "'float7'"),
    "end token outside vocabulary": (
        manifest("backbones/one/eos_token_ids", [9999]), "RM404", MANIFEST_NAME, "token 9999"),
    "rows of a layer that is not there": (
        turned("key.99"), "RM404", MANIFEST_NAME, "the cache has no rows 'key.99'"),
    "rotation that is not there": (
        turned("key.0", 1), "RM404", MANIFEST_NAME, "no rotation 1 among 1"),
    "more turns than there is": (
        turned("value.0", start=2**15), "RM404", MANIFEST_NAME, "32772 numbers turn"),
    "turns from before the start": (
        turned("key.0", start=-1), "RM404", MANIFEST_NAME, "rotations[0].start: -1"),
    "turns of an unknown layout": (
        turned("key.0", layout="spiral"), "RM404", MANIFEST_NAME, 'found "spiral"'),
    "turns nothing": (turned("key.0", inv_freq=[]), "RM404", MANIFEST_NAME, "inv_freq"),
    "turns by a text": (turned("key.0", inv_freq=["1"]), "RM404", MANIFEST_NAME, "a number"),
    "unknown kind of link": (
        manifest("links/planner.inner/kind", "cubic"), "RM404", MANIFEST_NAME, "'cubic'"),
    "inner link of two widths": (
        manifest("links/planner.inner/out_dim", 3), "RM404", MANIFEST_NAME, "260 and 3"),
    "parity of nothing": (
        manifest("parity/0/backbone", "two"), "RM404", MANIFEST_NAME, "unknown backbone 'two'"),
    "plan missing": (remove("plan.json"), "RM401", "plan.json", "missing"),
    "plan cut": (cut("plan.json"), "RM401", "plan.json", "bytes, the manifest says"),
    "plan flipped": (flip("plan.json"), "RM401", "plan.json", "SHA-256"),
    "plan a folder": (swap_for("plan.json", Path.mkdir), "RM401", "plan.json", "regular"),
    "plan a pipe": (swap_for("plan.json", os.mkfifo), "RM401", "plan.json", "not a regular file"),
    "plan not listed": (manifest("files/plan.json", DELETE), "RM401", "plan.json", "not list"),
    "plan newer": (plan("version", 3), "RM403", "plan.json", "format version 3"),
    "plan older": (plan("version", 1), "RM403", "plan.json", "this runtime reads version 2"),
    "weights missing": (remove(WEIGHTS), "RM401", WEIGHTS, "missing"),
    "weights cut": (cut(WEIGHTS), "RM401", WEIGHTS, "bytes, the manifest says"),
    "weights flipped": (flip(WEIGHTS), "RM401", WEIGHTS, "SHA-256"),
    "graph missing": (remove(DECODER), "RM401", DECODER, "missing"),
    "graph flipped": (flip(DECODER), "RM401", DECODER, "SHA-256"),
    "tokenizer longer": (
        lambda root: (root / TOKENIZER).open("a").write(" "), "RM401", TOKENIZER, "bytes"),
    "template altered": (
        flip("backbones/one/chat_template.jinja"), "RM401",
        "backbones/one/chat_template.jinja", "SHA-256"),
    "hash altered": (manifest("files/spec.yaml/sha256", "0" * 64), "RM401", "spec.yaml", "SHA-256"),
    "decoder elsewhere": (
        manifest("backbones/one/decoder", "../../decoder.onnx"), "RM401",
        "../../decoder.onnx", "does not list"),
    "path with ..": (rename_file("../spec.yaml"), "RM402", MANIFEST_NAME, "'../spec.yaml'"),
    "path with inner ..": (rename_file("a/../../x"), "RM402", MANIFEST_NAME, "'a/../../x'"),
    "absolute path": (rename_file("/etc/passwd"), "RM402", MANIFEST_NAME, "'/etc/passwd'"),
    "backslash path": (rename_file("..\\spec"), "RM402", MANIFEST_NAME, "not inside"),
    "drive path": (rename_file("C:spec"), "RM402", MANIFEST_NAME, "'C:spec'"),
    "NUL in a path": (rename_file("a\0b"), "RM402", MANIFEST_NAME, "not inside"),
    "half a character in a path": (
        rename_file("a\ud800"), "RM402", MANIFEST_NAME, "not inside"),
    "name longer than names are": (rename_file("x" * 300), "RM401", "x" * 300, "cannot be read"),
    "empty path": (rename_file(""), "RM402", MANIFEST_NAME, "''"),
    "path to itself": (rename_file("./spec.yaml"), "RM402", MANIFEST_NAME, "not inside"),
    "link out of the bundle": (
        swap_for("spec.yaml", link_outside), "RM402", "spec.yaml", "by a link"),
    "link to nothing": (
        swap_for("spec.yaml", lambda p: p.symlink_to("nowhere")), "RM401", "spec.yaml", "missing"),
    "link to itself": (
        swap_for("spec.yaml", lambda p: p.symlink_to(p)), "RM401", "spec.yaml", "cannot be read"),
    "unknown answer agent": (plan("answer_agent", "boss"), "RM404", "plan.json", "'boss'"),
    "unknown backbone": (
        plan("agents/planner/backbone", "two"), "RM404", "plan.json", "unknown backbone 'two'"),
    "outer link as inner": (
        plan("agents/planner/inner", "planner->solver"), "RM404", "plan.json", "inner link"),
    "slot for nobody": (
        plan("agents/solver/then/1/value", "ghost"), "RM404", "plan.json", "agent 'ghost'"),
    "field not declared": (plan("fields", []), "RM404", "plan.json", "field 'question'"),
    "entry of no list": (
        plan("fields", ["question", "facts[-1]"]), "RM404", "plan.json", "names neither"),
    "conversation without a question": (
        plan("serve", {"fields": {"question": "system"}}), "RM404", "plan.json", "0 fields take"),
    "conversation with two questions": (
        plan("serve", {"fields": {"question": "last_user", "a": "last_user"}}),
        "RM404", "plan.json", "2 fields take the last question"),
    "two fields of system messages": (
        plan("serve", {"fields": {"question": "last_user", "a": "system", "b": "system"}}),
        "RM404", "plan.json", "2 fields take the system messages"),
    "conversation into an entry": (
        plan("serve", {"fields": {"facts[0]": "last_user"}}), "RM404", "plan.json", "'facts[0]'"),
    "conversation of an unknown form": (
        plan("serve", {"fields": {"question": "last_user"}, "history": "all"}),
        "RM404", "plan.json", "history"),
    "link of nobody": (
        plan("links/a->b", {"source": "a", "target": "solver", "carries": "thoughts"}),
        "RM404", "plan.json", "links.a->b: unknown agent 'a'"),
    "unknown outer link": (
        plan("links/a->b", {"source": "planner", "target": "solver", "carries": "thoughts"}),
        "RM404", "plan.json", "outer link 'a->b'"),
    "link of another width": (
        manifest("links/planner->solver/out_dim", 3), "RM404", "plan.json", "maps 260 to 3"),
    "text without a bound": (
        plan("links/planner->solver/carries", "text"), "RM404", "plan.json", "has a bound"),
    "rows of nothing": (
        plan("links/planner->solver/carries", "cache"), "RM404", "plan.json",
        "none cannot be handed over"),
    "rows moved nobody knows how": (
        plan("links/planner->solver", {"source": "planner", "target": "solver",
                                       "carries": "cache", "rows": ["thoughts"]}),
        "RM404", "plan.json", "rows of backbone 'one' are moved, and nothing says how"),
    "link that carries a mood": (
        plan("links/planner->solver/carries", "mood"), "RM404", "plan.json", 'found "mood"'),
    "link the other way": (
        plan("links/planner->solver/source", "solver"), "RM404", "plan.json",
        "expected planner->solver"),
    "cache of nobody": (plan("caches/solver/agents", []), "RM404", "plan.json", "one or more"),
    "cache of the wrong agent": (
        plan("caches/solver/agents", ["planner"]), "RM404", "plan.json", "not that of the step"),
    "cache too small": (plan("caches/solver/capacity", 64), "RM404", "plan.json", "prompt of 128"),
    "round too late": (plan("steps/3/round", 5), "RM404", "plan.json", "round 5"),
    "rounds backwards": (plan("steps/1/round", 2), "RM404", "plan.json", "round 1 after 2"),
    "step of nobody": (plan("steps/2/source", "ghost"), "RM404", "plan.json", "agent 'ghost'"),
    "unknown cache": (plan("steps/0/cache", "attic"), "RM404", "plan.json", "cache 'attic'"),
    "link that does not fit": (
        plan("steps/2/links", ["solver->planner"]), "RM404", "plan.json",
        "expected planner->solver"),
    "variant too many": (
        plan("steps/0/variants", ["first", "then"]), "RM404", "plan.json", "one is needed"),
    "prompt that is not there": (
        plan("steps/3/variants", ["first"]), "RM404", "plan.json", "no prompt `first`"),
    "slot without message": (
        plan("steps/0/variants", ["then"]), "RM404", "plan.json", "who has sent nothing"),
    "message that was not sent": (
        plan("steps/3/messages/0/round", 2), "RM404", "plan.json",
        "nothing was sent over 'planner->solver' in round 2"),
    "message over another link": (
        plan("steps/3/messages/0/link", "solver->planner"), "RM404", "plan.json",
        "'solver->planner' is no link from 'planner' to 'solver'"),
    "message for nobody": (
        plan("steps/3/messages/0/agent", "planner"), "RM404", "plan.json", "'planner' has no slot"),
    "message without a slot": (
        plan("steps/0/messages", [{"agent": "planner", "slot": "solver", "link": "solver->planner",
                                   "round": 1}]),
        "RM404", "plan.json", "'planner' has no slot 'solver'"),
    "message missing": (plan("steps/3/messages", []), "RM404", "plan.json", "has sent nothing"),
    "layer state to restore": (
        plan("steps/3/restore", "begin"), "RM404", "plan.json", "unknown snapshot 'begin'"),
    "layer state to save": (
        plan("steps/3/snapshots", ["begin"]), "RM404", "plan.json", "unknown snapshot 'begin'"),
    "snapshot of rows": (
        plan("snapshots", {"begin": {"cache": "planner", "bytes_per_sample": 4}}),
        "RM404", "plan.json", "no layer of the backbone of cache 'planner' keeps a state"),
    "exit from a plan that has none": (
        plan("steps/10/exits", [{"link": "solver->planner", "round": 1}]), "RM404", "plan.json",
        "steps[10].exits: not the messages"),
    "nothing to reuse": (plan("steps/0/reuse_prefix", True), "RM404", "plan.json", "earlier"),
    "prefix of itself": (
        plan("steps/0/prefix_from", "planner"), "RM404", "plan.json", "'planner' is no cache"),
    "prefix of what comes later": (
        plan("steps/0/prefix_from", "solver"), "RM404", "plan.json", "'solver' is no cache"),
    "prefix of nothing": (
        plan("steps/0/prefix_from", "attic"), "RM404", "plan.json", "'attic' is no cache"),
    "thinks nothing": (
        plan("agents/planner/latent_steps", 0), "RM404", "plan.json", "at least one step"),
    "thinks first": (
        plan("steps/0", {"op": "think", "round": 1, "agents": ["planner"], "fused": True,
                         "cache": "planner"}),
        "RM404", "plan.json", "no prefill of this round"),
    "sends without inner link": (
        plan("steps/1/fused", False), "RM404", "plan.json", "has applied the inner link"),
    "decodes twice": (plan("steps/6", STEP), "RM404", "plan.json", "exactly the last step"),
    "never decodes": (plan("steps", []), "RM404", "plan.json", "exactly the last step"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_by_code_and_file(
    own_bundle: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, code, file, message = CASES[name]
    spoil(own_bundle)
    before = {path: path.lstat().st_mtime_ns for path in own_bundle.parent.rglob("*")}
    with pytest.raises(RecmasError) as caught:
        open_bundle(own_bundle, verify_hashes=True)
    problem = caught.value.problems[0]
    assert problem.code == code
    assert problem.file == (file or str(own_bundle))
    assert any(message in found.message for found in caught.value.problems)
    assert problem.hint.endswith(".") or code == "RM402"

    for command in ("verify", "run"):
        arguments = [command, str(own_bundle), *(["hello"] if command == "run" else []), "--json"]
        status = main(arguments)
        printed = capsys.readouterr()
        assert status == CODES[code][0]
        body = json.loads(printed.out)
        assert body["ok"] is False
        assert body["problems"][0]["code"] == code
        assert "Traceback" not in printed.err
    assert before == {path: path.lstat().st_mtime_ns for path in own_bundle.parent.rglob("*")}


def test_a_bundle_from_before_there_was_a_choice_still_runs(own_bundle: Path) -> None:
    for key in ("precision", "cpu_decoder", "row_positions"):
        edit_json(own_bundle / MANIFEST_NAME, f"backbones/one/{key}", DELETE)
    edit_json(own_bundle / MANIFEST_NAME, "parity/0/loss", DELETE)
    for key in ("stop_when", "tools", "serve"):
        plan(key, DELETE)(own_bundle)
    entry = open_bundle(own_bundle).manifest.backbones["one"]
    assert (entry.precision, entry.cpu_decoder) == ("float32", None)
    system = load(own_bundle, device="cpu", threads=1)
    plan_ = system.plan
    assert (plan_.stop_when, plan_.tools, plan_.serve) == (None, None, None)
    assert system.run("7").answer == "h"


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 30


def test_a_whole_bundle_opens(hand_bundle: Path) -> None:
    bundle = open_bundle(hand_bundle, verify_hashes=True, progress=Silent())
    assert bundle.file("plan.json") == hand_bundle / "plan.json"
    assert unlisted_files(bundle) == ()


@pytest.mark.parametrize("path", ["missing", "file"])
def test_what_is_no_folder_is_no_bundle(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecmasError, match=r"RM400.*is not a folder"):
        open_bundle(tmp_path / path)


def test_all_damage_is_reported_at_once(own_bundle: Path) -> None:
    for relative in ("spec.yaml", DECODER, WEIGHTS):
        (own_bundle / relative).unlink()
    with pytest.raises(RecmasError) as caught:
        open_bundle(own_bundle)
    assert {problem.file for problem in caught.value.problems} == {"spec.yaml", DECODER, WEIGHTS}


def test_large_files_are_hashed_only_on_request(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recmas_runtime.formats.bundle.SMALL_FILE_BYTES", 300_000)
    flip(WEIGHTS)(own_bundle)
    open_bundle(own_bundle)
    with pytest.raises(RecmasError, match=r"RM401.*SHA-256"):
        open_bundle(own_bundle, verify_hashes=True)


@pytest.mark.parametrize(
    "relative",
    [
        "plan.json",
        "links/link.onnx",
        DECODER,
        "backbones/one/tokenizer.json",
        "backbones/one/chat_template.jinja",
    ],
)
def test_what_says_what_is_done_is_hashed_whatever_its_size(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, relative: str
) -> None:
    monkeypatch.setattr("recmas_runtime.formats.bundle.SMALL_FILE_BYTES", 0)
    flip(relative)(own_bundle)
    with pytest.raises(RecmasError, match=r"RM401.*SHA-256") as caught:
        open_bundle(own_bundle)
    assert caught.value.problems[0].file == relative


def test_a_bundle_may_be_reached_by_a_link(hand_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(hand_bundle)
    assert open_bundle(tmp_path / "linked").plan.name == "by-hand"


def test_files_of_a_bundle_are_asked_for_by_name(own_bundle: Path) -> None:
    bundle = open_bundle(own_bundle)
    with pytest.raises(RecmasError, match=r"RM401.*does not list"):
        bundle.file("../plan.json")
    (own_bundle / "spec.yaml").unlink()
    with pytest.raises(RecmasError, match=r"RM401.*missing"):
        bundle.file("spec.yaml")


def test_files_that_nobody_listed_are_a_warning(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_bundle / "notes.txt").write_text("")
    assert main(["verify", str(own_bundle), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] is True
    (problem,) = body["problems"]
    assert (problem["severity"], problem["file"]) == ("warning", "notes.txt")


def test_inside_follows_links(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/up").symlink_to("..")
    with pytest.raises(RecmasError, match="RM402"):
        inside(tmp_path / "root", "up/secret")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": "\u00e9"})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "\u00e9"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_hashes_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea")


def cache_of(bundle: Path, folder: Path) -> Path:
    """Lay a bundle out as the cache of Hugging Face does; returns the snapshot."""
    blobs, snapshot = folder / "models--o--n/blobs", folder / "models--o--n/snapshots/0123abc"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(bundle.rglob("*"))):
        if path.is_file():
            blob = blobs / f"{number:064x}"
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(bundle)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_in_the_cache_of_hugging_face_runs(hand_bundle: Path, tmp_path: Path) -> None:
    snapshot = cache_of(hand_bundle, tmp_path)
    assert load(snapshot, device="cpu", threads=1).run("7").answer == "h"
    assert main(["verify", str(snapshot), "--json"]) == 0
    (tmp_path / "reached").symlink_to(snapshot)
    assert load(tmp_path / "reached", device="cpu", threads=1).run("7").answer == "h"


def test_what_links_of_a_cache_lead_to_is_hashed_whatever_its_size(
    hand_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache_of(hand_bundle, tmp_path)
    monkeypatch.setattr("recmas_runtime.formats.bundle.SMALL_FILE_BYTES", 0)
    flip(WEIGHTS)(snapshot)
    with pytest.raises(RecmasError, match=r"RM401.*SHA-256"):
        open_bundle(snapshot)


def test_links_of_a_cache_lead_nowhere_else(hand_bundle: Path, tmp_path: Path) -> None:
    snapshot = cache_of(hand_bundle, tmp_path)
    (tmp_path / "outside").write_bytes((snapshot / "spec.yaml").read_bytes())
    (snapshot / "spec.yaml").unlink()
    (snapshot / "spec.yaml").symlink_to(tmp_path / "outside")
    with pytest.raises(RecmasError, match=r"RM402.*cp -rL"):
        open_bundle(snapshot)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "n\0l", "file/below", "loop", "\udcff"])
def test_places_that_no_system_takes_are_no_bundles(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RecmasError, match="RM400"):
        open_bundle(tmp_path / name)
