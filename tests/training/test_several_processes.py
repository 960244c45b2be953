"""Two processes that train as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from recmas_cli.main import main
from recmas_cli.train import without_option
from recmas_compiler.training.loop.distributed import joined_world
from recmas_compiler.training.loop.metrics import METRICS_NAME
from recmas_runtime.core.errors import Exit
from recmas_runtime.core.jsonl import read_json_lines

COMMAND = [sys.executable, "-m", "recmas_cli.main", "train"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ROUNDING = 1e-6  # sums of gradients in another order


def train(spec: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    places = ["--out", out, "--set", f"train.links_dir=links/{out}"]
    return subprocess.run(
        [*COMMAND, str(spec), *places, "--quiet", "--json", *more],
        cwd=spec.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def curve(spec: Path, out: str, stage: str) -> list[dict[str, Any]]:
    return list(read_json_lines(spec.parent / out / stage / METRICS_NAME))


# Two minutes of two processes on a busy machine: in `make test-heavy`.
@pytest.mark.heavy
def test_two_processes_give_the_curve_of_one(case: Path) -> None:
    # three pieces of four records: the shares of two processes are cut in other places
    more = ("--set", "train.accumulation=3", "--set", "train.inner.batch_size=5")
    alone = train(case, "alone", *more)
    assert alone.returncode == 0, alone.stderr
    together = train(case, "together", "--nproc", "2", *more)
    assert together.returncode == 0, together.stderr
    printed = json.loads(together.stdout)  # one object: the other process prints nothing
    assert printed["data"]["processes"] == 2
    for stage in ("inner/planner", "inner/solver", "outer"):
        one, two = curve(case, "alone", stage), curve(case, "together", stage)
        assert [e["step"] for e in one] == [e["step"] for e in two]
        for left, right in zip(one, two, strict=True):
            assert left.get("tokens") == right.get("tokens")
            for name in ("loss", "latent", "null", "shuffled", "mean", "cosine"):
                if name in left:
                    assert right[name] == pytest.approx(left[name], rel=ROUNDING)


def test_more_processes_than_records_in_a_batch(
    case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--nproc", "5", "--set", "train.inner.batch_size=8")
    with pytest.raises(SystemExit) as ended:
        main(["train", str(case), *more, "--json"])
    assert ended.value.code == Exit.USAGE
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["code"] == "RM704"
    assert "5 processes cannot share batches of 4 records" in problem["message"]


@pytest.mark.parametrize("debug", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_a_mistake_is_told_once_with_its_own_status(case: Path, debug: bool) -> None:
    missing = ["--set", "train.data=none.jsonl"]  # what the processes find themselves
    more = ["--nproc", "2", *missing, *(["--debug"] if debug else [])]
    ran = subprocess.run(
        [*COMMAND, str(case), *more],
        cwd=case.parent, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == Exit.RUN_FAILED
    assert ran.stderr.count("error[RM700]") == 1 + debug
    assert (len(ran.stderr.splitlines()) == 1) == (not debug)
    assert ("ChildFailedError" in ran.stderr) == debug


def test_what_only_another_process_says_is_shown(case: Path) -> None:
    # Python imports this before anything else.
    (case.parent / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    print('out of luck', file=sys.stderr, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '0':\n"
        "    time.sleep(600)\n"
    )
    path = os.pathsep.join([str(case.parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [*COMMAND, str(case), "--nproc", "2"],
        cwd=case.parent, env={**ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == Exit.RUN_FAILED
    assert ran.stderr == "out of luck\nprocess 1 of the run was ended by SIGKILL\n"


def test_the_others_may_wait_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: given.update(more))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with joined_world():
        assert given["timeout"] > timedelta(hours=24)


def test_the_wrapper_passes_on_all_other_arguments() -> None:
    given = ["spec.yaml", "--nproc", "2", "--stage", "inner", "--set", "a=--nproc"]
    assert without_option(given, "--nproc") == ["spec.yaml", *given[3:]]
    assert without_option(["--nproc=4", "spec.yaml"], "--nproc") == ["spec.yaml"]
