"""Trained links survive what happens to them: another training, a kill, a move, a lost receipt."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import recmas_compiler as rc
from kit.training import SPEC, changed
from recmas_cli.main import main
from recmas_compiler.links.modules import save_link
from recmas_compiler.training.loop.metrics import METRICS_NAME
from recmas_compiler.training.preflight import claimed
from recmas_runtime.core.errors import Exit, RecmasError

COMMAND = [sys.executable, "-m", "recmas_cli.main", "train"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
IDS = ["planner.inner", "solver.inner", "planner->solver", "solver->planner"]


def recmasc(
    capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> dict[str, Any]:
    """Run `recmasc ... --json` in this process and return what it prints."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert ended.value.code == status, printed
    return printed


def codes(printed: dict[str, Any]) -> list[str]:
    return [p["code"] for p in printed["problems"] if p["code"] not in ("RM150", "RM152")]


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def trained(backbone_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose links were trained in two steps; only to be copied."""
    from kit.training import write_case

    root = tmp_path_factory.mktemp("trained")
    for name in ("llama", "qwen2"):
        shutil.copytree(backbone_folders / name, root / name)
    spec = rc.load_spec(write_case(root))
    rc.train(rc.compile(spec), root / "run", stage="outer", steps=2)
    return root


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that project elsewhere, with the current folder in it."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("spec.yaml")


def test_links_of_a_project_that_was_moved_are_taken(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = recmasc(capsys, "check", here)
    assert checked["data"]["trained_links"] == IDS
    assert codes(checked) == []
    assert recmasc(capsys, "explain", here)["data"]["trained_links"] == IDS
    with pytest.raises(SystemExit):
        main(["check", str(here)])
    assert f"A build takes trained links from {Path.cwd()}/links/pair: {', '.join(IDS)}." in (
        capsys.readouterr().out
    )


def test_links_made_for_other_weights_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path("llama/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    checked = recmasc(capsys, "check", here)
    assert codes(checked) == ["RM751"] * 3, "all but the planner's own"
    assert "it was made for the source `folder:" in checked["problems"][-1]["message"]


UNREADABLE: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "cut off": b'{"receipt": 1, "links": {"planner.in',
    "no JSON": b"links: []",
    "no UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "no links": b'{"receipt": 1}',
    "links of another type": b'{"receipt": 1, "links": []}',
    "an entry of another type": b'{"receipt": 1, "links": {"planner.inner": "abc"}}',
    "a digest of another type": b'{"receipt": 1, "links": {"planner.inner": {"sha256": 7}}}',
    "another version": b'{"receipt": 2, "links": {}}',
    "nested": b'{"receipt": 1, "links": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("name", [*UNREADABLE, "a folder", "a pipe", "a circle"])
def test_a_receipt_that_cannot_be_read_is_said(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    receipt = Path("links/pair/receipt.json")
    receipt.unlink()
    if name == "a folder":
        receipt.mkdir()
    elif name == "a pipe":
        os.mkfifo(receipt)
    elif name == "a circle":
        receipt.symlink_to("receipt.json")
    elif (content := UNREADABLE[name]) is not None:
        receipt.write_bytes(content)
    for command in ("check", "explain"):
        printed = recmasc(capsys, command, here)
        assert codes(printed) == ["RM757"]
        assert printed["data"]["trained_links"] == []
    program = rc.api.with_trained_links(rc.compile(rc.load_spec(here)))
    assert "RM757" in [w.code for w in program.spec.warnings], "as a build takes it"


def test_a_receipt_that_leaves_a_link_out_is_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("links/pair/receipt.json")
    receipt = json.loads(path.read_text())
    del receipt["links"]["planner->solver"]
    path.write_text(json.dumps(receipt))
    printed = recmasc(capsys, "check", here)
    assert codes(printed) == ["RM751"]
    assert "its receipt does not name it" in printed["problems"][-1]["message"]


def test_prompts_that_changed_after_training_are_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here.write_text(
        changed(("and answer.", "and answer well."), ("latent_steps: 3", "latent_steps: 4"))
    )
    printed = recmasc(capsys, "check", here)
    assert codes(printed) == ["RM756"]
    warning = next(p for p in printed["problems"] if p["code"] == "RM756")
    assert "the prompt of `solver`" in warning["message"]
    assert "the latent steps of `planner` (3 then, 4 now)" in warning["message"]
    assert "the prompt of `planner`" not in warning["message"]
    assert (warning["line"], warning["column"]) == (16, 13)
    assert printed["data"]["trained_links"] == IDS, "they are taken all the same"


def test_another_chat_template_or_date_is_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here.write_text(here.read_text().replace("rounds: 2", "rounds: 2\ndate: 2026-01-02"))
    (template,) = Path("llama").glob("chat_template*")
    template.write_text(template.read_text() + "{# other #}")
    printed = recmasc(capsys, "check", here)
    (warning,) = [p for p in printed["problems"] if p["code"] == "RM756"]
    assert "the chat template of `tiny`" in warning["message"]
    assert "the date (that of the day then, 2026-01-02 now)" in warning["message"]
    assert "`other`" not in warning["message"]


def test_the_same_training_gives_the_same_files(
    here: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("links")
    shutil.rmtree("run")
    recmasc(capsys, "train", here, "--quiet", "--stage", "outer", "--steps", "2")
    assert files(Path("links")) == files(trained / "links")


def test_a_training_that_fails_leaves_the_links_that_were_there(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, written = files(Path("links")), 0

    def full(*arguments: Any, **more: Any) -> None:
        nonlocal written
        written += 1
        if written == 7:  # the third file of the second folder
            raise OSError(28, "No space left on device")
        save_link(*arguments, **more)

    arguments = ("train", here, "--quiet", "--stage", "outer", "--steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr("recmas_compiler.training.receipt.save_link", full)
        printed = recmasc(capsys, *arguments, "--out", "other", status=Exit.RUN_FAILED)
    assert "RM303" in codes(printed)
    assert files(Path("links")) == before
    assert recmasc(capsys, "check", here)["data"]["trained_links"] == IDS
    recmasc(capsys, *arguments, "--out", "other", "--resume")
    assert files(Path("links")) != before


def test_a_second_training_in_one_place_is_refused_at_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(Path("run"))
    with claimed(Path("run")):
        arguments = ("train", here, "--quiet", "--stage", "outer", "--steps", "2", "--resume")
        printed = recmasc(capsys, *arguments, "--out", "run", status=Exit.USAGE)
    (problem,) = [p for p in printed["problems"] if p["severity"] == "error"]
    assert problem["code"] == "RM302"
    assert "another training writes here" in problem["message"]
    assert files(Path("run")) == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--out", "run"), "RM302"),
        (("--out", "run", "--resume", "--set", "train.outer.lr=0.5"), "RM703"),
        (("--set", "train.data=none.jsonl"), "RM700"),
        (("--out", "spec.yaml/run"), "RM303"),
        (("--set", "train.links_dir=train.jsonl"), "RM303"),
    ],
)
def test_what_is_refused_is_refused_before_torch_is_loaded(
    here: Path, arguments: tuple[str, ...], code: str
) -> None:
    program = (
        "import sys\n"
        "from recmas_cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules)\n"
    )
    given = ["train", str(here), "--stage", "outer", "--steps", "2", *arguments]
    ran = subprocess.run(
        [sys.executable, "-c", program, *given], capture_output=True, text=True, check=False
    )
    assert f"error[{code}]" in ran.stderr
    status, loaded = ran.stdout.split()
    assert int(status) > 0
    assert loaded == "False"


def test_going_on_takes_the_start_that_the_run_began_with(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case.parent)
    case.write_text(SPEC.replace("inner: {init: random}", "inner: {init: aligned}"))
    program = rc.compile(rc.load_spec(case))
    rc.train(program, "run", stage="outer", steps=4)
    whole = files(Path("links"))
    shutil.rmtree("links")
    shutil.rmtree("run/outer/checkpoints/step-00000004")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the start is computed again")

    with monkeypatch.context() as patch:
        patch.setattr("recmas_compiler.training.session.materialize_links", refuse)
        report = rc.train(program, "run", stage="outer", steps=4, resume=True)
    assert files(Path("links")) == whole
    assert not [w for w in report.warnings if w.code in ("RM753", "RM754")]
    # Another name of the folder, a start that was damaged: it goes on, and says what it did.
    moved = Path.cwd().with_name("moved")
    Path.cwd().rename(moved)
    monkeypatch.chdir(moved)
    start = next(Path("run/outer/start").glob("*.safetensors"))
    start.write_bytes(start.read_bytes()[:-1] + b"?")
    shutil.rmtree("run/outer/checkpoints/step-00000004")
    again = rc.compile(rc.load_spec(moved / case.name))
    report = rc.train(again, "run", stage="outer", steps=4, resume=True)
    assert "RM753" in [w.code for w in report.warnings]
    assert files(Path("links")) == whole


def test_a_batch_larger_than_the_data_is_said(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", here, "--quiet", "--stage", "outer", "--steps", "1", "--out", "large")
    printed = recmasc(capsys, *arguments, "--set", "train.outer.batch_size=50")
    (warning,) = [p for p in printed["problems"] if p["code"] == "RM758"]
    assert (
        "batches of 50 records are filled by taking the 12 training records" in warning["message"]
    )


def begin(here: Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = [*COMMAND, str(here), "--quiet", "--stage", "outer", *more]
    return subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_steps(metrics: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    while not metrics.exists() or metrics.read_bytes().count(b'"kind": "step"') < count:
        assert running.poll() is None, "it ended by itself"
        time.sleep(0.005)


def test_links_may_go_into_the_folder_of_the_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, links in (("straight", "straight/links"), ("below", "below/kept/links")):
        given = ("train", here, "--stage", "outer", "--steps", "1", "--out", out)
        recmasc(capsys, *given, "--set", f"train.links_dir={links}")
        assert len(list(Path(links).glob("*.safetensors"))) == len(IDS)


def test_sigterm_writes_a_checkpoint_and_says_so(here: Path) -> None:
    before = files(Path("links"))
    never = ("--set", "train.eval_every=5000")
    running = begin(here, "--out", "ended", "--steps", "5000", *never)
    wait_for_steps(Path("ended/outer") / METRICS_NAME, 5, running)
    running.send_signal(random.choice([signal.SIGTERM, signal.SIGHUP]))
    shown, said = running.communicate()
    assert running.returncode == Exit.INTERRUPTED
    assert b"at the start, not measured since" in shown
    assert b"->" not in shown
    assert b"finishing this step; once more stops without saving" in said
    newest = max(path.name for path in Path("ended/outer/checkpoints").iterdir())
    steps = Path("ended/outer") / METRICS_NAME
    done = steps.read_bytes().count(b'"kind": "step"')
    assert newest == f"step-{done:08d}", "the step that was under way is in it"
    assert files(Path("links")) == before


def test_kill_9_leaves_the_links_that_were_there(here: Path) -> None:
    before = files(Path("links"))
    for kill_at in (1, random.randint(2, 7)):
        running = begin(
            here, "--out", "killed", "--steps", "8", *(["--resume"] if kill_at > 1 else [])
        )
        wait_for_steps(Path("killed/outer") / METRICS_NAME, kill_at, running)
        running.kill()
        running.communicate()
        now = files(Path("links"))
        assert now == before or running.returncode == 0, f"killed at step {kill_at}"
    assert begin(here, "--out", "killed", "--steps", "8", "--resume").wait() == 0
    resumed = files(Path("links"))
    assert begin(here, "--out", "whole", "--steps", "8").wait() == 0
    assert files(Path("links")) == resumed


def test_memory_that_runs_out_before_the_steps_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        torch.empty(2**60)  # what torch itself raises then

    monkeypatch.setattr("recmas_compiler.training.session.materialize_links", full)
    arguments = ("train", here, "--quiet", "--stage", "outer", "--steps", "1", "--out", "x")
    printed = recmasc(capsys, *arguments, status=Exit.RUN_FAILED)
    assert "RM702" in codes(printed)


def test_a_folder_is_claimed_once_also_between_threads(tmp_path: Path) -> None:
    found: list[RecmasError] = []

    def claim() -> None:
        try:
            with claimed(tmp_path / "run"):
                pass
        except RecmasError as error:
            found.append(error)

    with claimed(tmp_path / "run"):
        other = threading.Thread(target=claim)
        other.start()
        other.join()
    assert [error.problems[0].code for error in found] == ["RM302"]
    assert not (tmp_path / "run").exists(), "nothing was written"
