"""Files of keys and origins: what is wrong with them is said before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.keys import read_key_file

KEY = "correct-horse-battery"
OTHER_KEY = "second-key-for-a-change"


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "my keys"
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def test_lines_that_hold_no_key(tmp_path: Path) -> None:
    warnings: list[Problem] = []
    file = key_file(tmp_path, f"# of Ann\n{KEY}\n\n  # of Bob\r\n  {OTHER_KEY} \r\n")
    assert read_key_file(file, warnings).keys == (KEY, OTHER_KEY)
    assert not warnings


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (f"{KEY}\nshort\n", 2, "an API key is shorter than 8 characters"),
        (f"# keys\n\n{KEY} of-ann\n", 3, "or has others than visible ASCII"),
        (f"{KEY}\nschl\u00fcssel\n", 2, "or has others than visible ASCII"),
        ("# none yet\n\n", None, "holds no key"),
        (f"{KEY}\n" * 5000, None, "it is larger than 65.5 kB"),
    ],
)
def test_a_bad_key_has_its_file_and_line(
    tmp_path: Path, text: str, line: int | None, message: str
) -> None:
    file = key_file(tmp_path, text)
    with pytest.raises(RecmasError) as caught:
        read_key_file(file, [])
    (problem,) = caught.value.problems
    assert (problem.code, problem.file, problem.line) == ("RM545", str(file), line)
    assert message in problem.message
    assert "correct" not in str(problem)
    assert "schl" not in str(problem)


@pytest.mark.parametrize(
    ("mode", "how"),
    [(0o600, None), (0o400, None), (0o640, "read"), (0o644, "read"), (0o622, "changed")],
)
def test_who_else_reads_or_writes_it(tmp_path: Path, mode: int, how: str | None) -> None:
    warnings: list[Problem] = []
    file = key_file(tmp_path, KEY, mode)
    assert read_key_file(file, warnings).keys == (KEY,)
    told = [str(each) for each in warnings]
    hint = f"Run: chmod 600 '{file}'."
    expected = f"warning[RM545]: the keys in {file} can be {how} by others than its owner. {hint}"
    assert told == ([expected] if how else [])


@pytest.mark.parametrize(
    "origin",
    ["https://app.example", "http://localhost:3000", "http://[::1]:8080", "chrome-extension://abc"],
)
def test_origins_that_browsers_send(origin: str) -> None:
    assert HttpSettings(cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "foo",
        "app.example",
        "https://app.example/",
        "https://App.example",
        "https://app.example:443",
        "http://localhost:80",
        "https://*.example",
        "https://a.example,https://b.example",
        "https://",
        "",
    ],
)
def test_origins_that_match_nothing_are_refused(origin: str) -> None:
    with pytest.raises(RecmasError, match=r"RM545.*scheme://host\[:port\]"):
        HttpSettings(cors_origins=(origin,))


def test_any_origin_needs_a_key(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(hand_bundle), "--port", "0", "--cors-origin", "*"]) == 2
    assert "error[RM545]: --cors-origin * lets every page" in capsys.readouterr().err


def test_two_models_of_one_name(hand_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [f"a={hand_bundle}", f"a={hand_bundle}"]
    assert main(["serve", *both, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert "two bundles are named 'a'" in error
    assert "Give one of them another name, with NAME=BUNDLE." in error


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_printed_line_works_and_shows_no_key(hand_bundle: Path, tmp_path: Path) -> None:
    file = key_file(tmp_path, f"# keys\n{KEY}\n")
    environment = {k: v for k, v in os.environ.items() if k != "RECMAS_API_KEY"}
    command = [
        *(sys.executable, "-P", "-m", "recmas_runtime.cli.main", "serve", str(hand_bundle)),
        *("--port", "0", "--threads", "1", "--api-key-file", file.name),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert KEY not in line
            curl = line.partition(" Ask: ")[2].replace("curl ", "curl -s ", 1)
            told = subprocess.run(
                ["sh", "-c", curl], capture_output=True, text=True, check=True, env=environment
            )
            assert json.loads(told.stdout)["object"] == "chat.completion"
        finally:
            process.terminate()
