"""Standard streams that are closed, full or a terminal: every command ends well."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from kit.hand_bundle import edit_json, rehash

RECMAS = [sys.executable, "-m", "recmas_runtime.cli.main"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
COMMANDS = {
    "question": ["run", "B", "7"],
    "json": ["run", "B", "7", "--json"],
    "lines": ["run", "B", "--input", "Q", "--quiet"],
    "inspect": ["inspect", "B"],
    "verify": ["verify", "B"],
    "help": ["run", "--help"],
}
# What a shell would do to the streams, and the status that then is right.
STREAMS = {
    "stdin closed": ("<&-", 0),
    "stdout closed": (">&-", 0),
    "stderr closed": ("2>&-", 0),
    "all closed": ("<&- >&- 2>&-", 0),
    "stdout full": (">/dev/full", 1),
    "stderr full": ("2>/dev/full", 0),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_well(hand_bundle: Path, tmp_path: Path, command: str, streams: str) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "7"}\n')
    names = {"B": str(hand_bundle), "Q": str(questions)}
    arguments = [names.get(a, a) for a in COMMANDS[command]]
    redirects, status = STREAMS[streams]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirects}', "sh", *RECMAS, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    for wrong in ("Traceback", "internal error", "Exception ignored"):
        assert wrong not in done.stderr + done.stdout
    assert done.returncode == status
    if status:
        assert "error[RM503]: " in done.stderr
        assert "No space left on device" in done.stderr
    if streams == "stderr closed" and command == "json":
        assert json.loads(done.stdout)["ok"]
    if streams == "stderr closed" and command == "question":
        assert done.stdout == "h\n"  # the summary does not land there


def on_terminal(*arguments: str) -> bytes:
    """Return what a program writes to a terminal that is its standard output and error."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*RECMAS, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while block := os.read(ours, 2**16):
                written += block
        except OSError:  # Linux: the other side is closed
            pass
        os.close(ours)
        process.wait(timeout=60)
    return written


TITLE = "\x1b]0;title\x07\x9b31mred\u202e"


@pytest.mark.parametrize("command", ["inspect", "verify", "run", "json"])
def test_a_foreign_bundle_does_not_steer_the_terminal(own_bundle: Path, command: str) -> None:
    edit_json(own_bundle / "manifest.json", "backbones/one/source", f"by hand{TITLE}")
    edit_json(own_bundle / "manifest.json", "links/planner.inner/init", TITLE)
    (own_bundle / f"left{TITLE}").write_text("")
    arguments = {
        "inspect": ["inspect", str(own_bundle)],
        "verify": ["verify", str(own_bundle)],
        "run": ["run", str(own_bundle), "7", "--baseline", TITLE],
        "json": ["inspect", str(own_bundle), "--json"],
    }[command]
    rehash(own_bundle)
    written = on_terminal(*arguments)
    # Of the progress line's own clearing there may be some.
    rest = written.replace(b"\x1b[K", b"")
    assert b"title" in rest
    for harmful in (b"\x1b", b"\x07", "\x9b".encode(), "\u202e".encode()):
        assert harmful not in rest


@pytest.mark.parametrize("key", ["unknown", "agents", "steps"])
def test_keys_of_a_foreign_plan_do_not_steer_the_terminal(own_bundle: Path, key: str) -> None:
    place = {"unknown": TITLE, "agents": f"agents/{TITLE}", "steps": f"steps/0/{TITLE}"}[key]
    edit_json(own_bundle / "plan.json", place, {"then": 5})
    rehash(own_bundle)
    written = on_terminal("run", str(own_bundle), "7")
    assert b"RM404" in written
    for harmful in (b"\x1b", b"\x07", "\x9b".encode(), "\u202e".encode()):
        assert harmful not in written.replace(b"\x1b[K", b"")


def test_progress_shows_counts_and_the_rate(own_bundle: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text('{"question": "1"}\n{"question": ""}\n\n{"question": "2"}\n')
    arguments = ["--input", str(source), "--output", str(target), "--batch", "1"]
    written = on_terminal("run", str(own_bundle), *arguments).decode()
    *_, last = (part for part in written.split("\r") if part.startswith("Answered"))
    assert last.startswith("Answered 3/3, 1 failed, ")
    assert "/s" in last
    assert " left" in written
    target.write_bytes(target.read_bytes().splitlines(keepends=True)[0])
    written = on_terminal("run", str(own_bundle), *arguments, "--resume").decode()
    *_, last = (part for part in written.split("\r") if part.startswith("Answered"))
    assert last.startswith("Answered 3/3, 1 failed, 1 there already, ")
