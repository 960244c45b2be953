"""`recmasc` as a program: without its packages, interrupted, on all kinds of streams."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import recmas_compiler
from kit.specs import SEQUENTIAL
from recmas_cli.commands import COMMANDS, group
from recmas_runtime.core.errors import Exit, RecmasError

# What only the extra `compile` installs, is not there.
SLIM = """
import sys
missing = sys.argv.pop(1).split(",")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in missing:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
sys.meta_path.insert(0, Blocked())
"""
COMPILE = "click,rich,yaml,pydantic,networkx,torch,transformers,onnx"
MAIN = "from recmas_cli.main import main; main()"


def start(*arguments: str, code: str = MAIN, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=options.pop("stdout", subprocess.PIPE),  # type: ignore[call-overload]
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        # A test run in the background ignores the signal, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


@pytest.mark.parametrize("missing", [COMPILE, "networkx", "click", "yaml"])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["check", "spec.yaml"]])
def test_the_slim_install_says_what_to_install(missing: str, arguments: list[str]) -> None:
    process = start(missing, *arguments, code=SLIM + MAIN)
    out, err = process.communicate(timeout=60)
    assert process.returncode == Exit.ENVIRONMENT
    assert out == ""
    assert err.startswith("error[RM201]: the Python package `")
    assert "Install recmas with its extra `compile`, from its wheel or in a clone" in err
    assert err.endswith('pip install "WHEEL[compile]" or pip install ".[compile]".\n')


def test_the_slim_install_keeps_its_envelope() -> None:
    process = start(COMPILE, "check", "--json", "spec.yaml", code=SLIM + MAIN)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (Exit.ENVIRONMENT, "")
    (problem,) = json.loads(out)["problems"]
    assert problem["code"] == "RM201"


def test_the_compiler_s_names_say_what_to_install() -> None:
    code = "import recmas_compiler as rc; print(dir(rc))\ntry: rc.load_spec\n"
    code += "except rc.RecmasError as error: print(error)\n"
    process = start(COMPILE, code=SLIM + code)
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert "'load_spec'" in out
    assert 'pip install "WHEEL[compile]"' in out


def test_a_module_of_ours_that_is_missing_is_no_package() -> None:
    process = start(
        "recmas_cli.commands", code=SLIM.replace('name.partition(".")[0]', "name") + MAIN
    )
    _, err = process.communicate(timeout=60)
    assert "ModuleNotFoundError" in err
    assert "RM201" not in err


def test_the_door_shows_its_names() -> None:
    assert {"load_spec", "compile", "build", "train", "to_torch", "__version__"} <= set(
        dir(recmas_compiler)
    )
    assert recmas_compiler.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        recmas_compiler.nothing  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_has_help_of_its_own(name: str) -> None:
    import click

    context = click.Context(group)
    command = group.get_command(context, name)
    assert command is not None
    assert command.name == name
    commands = [command]
    if isinstance(command, click.Group):
        commands += command.commands.values()
    for each in commands:
        assert each.help
        options = [p for p in each.params if isinstance(p, click.Option)]
        assert [option.name for option in options if not option.help] == []


def test_help_loads_no_compiler() -> None:
    code = f"import sys\ntry:\n    {MAIN}\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    out, _ = start("--help", code=code).communicate(timeout=60)
    *shown, modules = out.splitlines()
    assert len(shown) > len(COMMANDS)
    for package in ("pydantic", "networkx", "yaml", "torch", "numpy", "rich"):
        assert f"'{package}'" not in modules


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    out, err = start("--completion", shell).communicate(timeout=60)
    assert "_RECMASC_COMPLETE" in out
    assert err == ""


def test_completion_of_commands_and_options() -> None:
    def completed(words: str, at: int) -> list[str]:
        settings = {
            "_RECMASC_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(at),
        }
        out, _ = start(env={**os.environ, **settings}).communicate(timeout=60)
        return [line.partition(",")[2] for line in out.splitlines()]

    assert completed("recmasc e", 1) == ["explain", "eval", "export-links"]
    assert "--prompt-tokens" in completed("recmasc plan --pr", 2)


@pytest.mark.parametrize("pressed", [1, 2])
@pytest.mark.parametrize("after_s", [0.03, 0.1, 0.2, 0.4, 0.7])
def test_ctrl_c_at_any_time(after_s: float, pressed: int, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SEQUENTIAL)
    code = MAIN.replace("main()", "print(flush=True); main()")  # Python itself has started
    process = start("check", "spec.yaml", code=code, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    for number in range(pressed):
        time.sleep(0.002 if number else after_s)
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    # 130 is what a shell shows; Python may end by the signal while it starts. Or it was done.
    assert process.returncode in (Exit.INTERRUPTED, -signal.SIGINT, Exit.ENVIRONMENT)


FULL = "/dev/full"


@pytest.mark.skipif(not Path(FULL).exists(), reason="only Linux has a device that is full")
@pytest.mark.parametrize("arguments", [["init", "custom"], ["--help"], ["check", "no", "--json"]])
def test_full_streams(arguments: list[str], tmp_path: Path) -> None:
    with Path(FULL).open("w") as full:
        process = start(*arguments, stdout=full, cwd=tmp_path)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err.count("\n")) == (Exit.RUN_FAILED, 1)
        assert err.startswith("error[RM503]: cannot write to standard output: No space left")
        process = start("check", "no.yaml", stderr=full, cwd=tmp_path)
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (Exit.SPEC_INVALID, "")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_streams(closed: int, tmp_path: Path) -> None:
    def close() -> None:
        os.close(closed)

    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ran = subprocess.run(
        [sys.executable, "-c", MAIN, "init", "custom"],
        **options,  # type: ignore[call-overload]
        cwd=tmp_path,
        text=True,
        preexec_fn=close,
        timeout=60,
    )
    assert ran.returncode == Exit.OK
    assert ran.stderr == ""
    assert ran.stdout.startswith("Wrote spec.yaml") is (closed != 1)
    assert "Wrote" not in (tmp_path / "spec.yaml").read_text()


def test_a_reader_who_goes_away_is_none_who_complains(tmp_path: Path) -> None:
    process = start("--completion", "bash", cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == Exit.OK


def on_a_terminal(*arguments: str, code: str = MAIN, cwd: Path) -> str:
    """Return what a terminal gets of a program."""
    above, below = pty.openpty()
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = start(*arguments, code=code, cwd=cwd, stdout=below, stderr=below, env=settings)
    os.close(below)
    shown = b""
    with suppress(OSError):  # how Linux tells that the other end is closed
        while chunk := os.read(above, 4096):
            shown += chunk
    os.close(above)
    process.wait(timeout=60)
    return shown.decode("utf-8")


STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m"


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_foreign_text_does_not_steer_the_terminal(
    json_too: tuple[str, ...], tmp_path: Path
) -> None:
    quoted = json.dumps(f"folder{STEERING}")
    spec = SEQUENTIAL.replace("source: llama", f"source: {quoted}")
    assert quoted in spec
    (tmp_path / "spec.yaml").write_text(spec)
    for command in ("check", "plan", "graph", "explain", "build"):
        shown = on_a_terminal(command, "spec.yaml", *json_too, cwd=tmp_path)
        assert "folder" in shown
        assert not {"\x1b]", "\x07", "\x9b", "\x1b[2J"} & set(shown)
        assert "\x1b]0;" not in shown


def test_titles_of_stages_are_no_markup(tmp_path: Path) -> None:
    code = "from recmas_cli.console import RichProgress\nimport sys\n"
    code += "with RichProgress().stage(sys.argv[1], 2) as advance: advance(2, note='[/i] x[b]')\n"
    shown = on_a_terminal(f"a[/b] {STEERING}", code=code, cwd=tmp_path)
    assert "a[/b]" in shown
    assert "[/i] x[b]" in shown
    assert "\x1b]0;" not in shown


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "custom", "-o", LONG],
        ["init", "custom", "-o", f"{LONG}/spec.yaml"],
        ["init", "custom", "-o", "file/spec.yaml"],
        ["init", "custom", "-o", "loop/spec.yaml"],
    ],
)
def test_places_that_cannot_be_written(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    process = start(*arguments, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert "error[RM303]" in err, err
    assert process.returncode == Exit.RUN_FAILED


@pytest.mark.parametrize("place", [LONG, "file", "file/spec.yaml", "loop", "folder", "no.yaml"])
@pytest.mark.parametrize("command", ["check", "build"])
def test_places_that_cannot_be_read(command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    process = start(command, place, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert "error[RM100]" in err, err
    assert process.returncode == Exit.SPEC_INVALID


def test_missing_packages_of_ours_are_raised_again() -> None:
    from recmas_runtime.core.errors import missing_package

    ours = ModuleNotFoundError("No module named 'recmas_cli.x'", name="recmas_cli.x")
    with pytest.raises(ModuleNotFoundError):
        missing_package(ours)
    assert isinstance(missing_package(ModuleNotFoundError("x", name="a.b")), RecmasError)
