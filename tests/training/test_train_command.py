"""`recmasc train` from the outside: stages, resume after kill -9, what is written, the build."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import recmas_compiler as rc
from kit.training import changed
from recmas_cli.main import main
from recmas_compiler.training.loop.metrics import METRICS_NAME
from recmas_runtime.core.errors import Exit, fail
from recmas_runtime.core.jsonl import read_json_lines

COMMAND = [sys.executable, "-m", "recmas_cli.main", "train"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def recmasc(
    capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> dict[str, Any]:
    """Run `recmasc ... --json` in this process and return what it prints."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    assert ended.value.code == status
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def trained_links(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every link file."""
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture
def here(case: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The spec; commands run beside it."""
    monkeypatch.chdir(case.parent)
    return Path(case.name)


def test_both_stages(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recmasc(capsys, "train", here, "--quiet")["data"]
    assert data["trained"] == [
        "planner.inner",
        "solver.inner",
        "planner->solver",
        "solver->planner",
    ]
    assert data["records"] == {"train": 12, "held_out": 4, "left_out": {}}
    for agent in ("planner", "solver"):
        figures = data["stages"]["inner"][agent]
        assert figures["after"]["cosine"] > figures["before"]["cosine"]
        assert {"random", "constant", "expectation"} <= figures["baselines"].keys()
    outer = data["stages"]["outer"]
    assert outer["steps"] == 8
    assert outer["before"].keys() == outer["after"].keys() == {
        "latent", "null", "shuffled", "mean",
    }  # fmt: skip
    assert outer["shuffled"] == {"records": 4, "seed": 0, "repeated": 0, "same_input": 0}
    assert outer["after"]["latent"] < outer["before"]["latent"]
    assert outer["after"]["null"] == pytest.approx(outer["before"]["null"]), "no link is in it"

    run = Path("out/pair-training")
    entries = list(read_json_lines(run / "outer" / METRICS_NAME))
    assert [e["step"] for e in entries if e["kind"] == "eval"] == [0, 4, 8]
    step = next(e for e in entries if e["kind"] == "step")
    assert step["round_grad_norm"].keys() >= {"planner->solver@1", "solver->planner@1"}
    assert step["grad_norm"].keys() == set(data["trained"])
    receipt = json.loads(Path("links/pair/receipt.json").read_text())
    assert receipt["stages"] == data["stages"]
    assert receipt["links"].keys() == set(data["trained"])
    assert receipt["settings"]["outer"]["steps"] == 8
    assert receipt["data"]["sha256"].keys() == {"train"}
    assert [path.name for path in sorted(Path("links/pair").iterdir())] == [
        "inner.planner.safetensors",
        "inner.solver.safetensors",
        "outer.planner.solver.safetensors",
        "outer.solver.planner.safetensors",
        "receipt.json",
    ]


def test_one_stage_after_the_other_is_both(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recmasc(capsys, "train", here, "--quiet")
    both = trained_links(Path("links/pair"))
    shutil.rmtree("links")
    recmasc(capsys, "train", here, "--quiet", "--stage", "inner", "--out", "run")
    inner = trained_links(Path("links/pair"))
    recmasc(capsys, "train", here, "--quiet", "--stage", "outer", "--out", "run")
    after = trained_links(Path("links/pair"))
    assert all(torch.equal(after[name], both[name]) for name in both)
    assert any(not torch.equal(inner[name], both[name]) for name in both)


def test_an_outer_stage_that_fails_leaves_the_links_as_they_were(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> None:
        raise fail("RM701", "the loss diverges")

    monkeypatch.setattr("recmas_compiler.training.run._outer_stage", diverge)
    recmasc(capsys, "train", here, "--quiet", "--steps", "1", status=Exit.RUN_FAILED)
    assert not Path("links").exists()
    assert Path("out/pair-training/inner/links/inner.planner.safetensors").exists()


def test_the_build_takes_trained_links(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = recmasc(capsys, "build", here, "--quiet", "-o", "before")
    untrained = first["data"]
    assert untrained["trained_links"] == []
    assert untrained["held_out"] == {}
    assert [p["code"] for p in first["problems"]].count("RM152") == 3, "each random start, and all"
    recmasc(capsys, "train", here, "--quiet", "--steps", "3")
    second = recmasc(capsys, "build", here, "--quiet", "-o", "bundle")
    built = second["data"]
    assert len(built["trained_links"]) == 4
    assert {"latent", "shuffled", "null"} <= built["held_out"].keys()
    assert "RM152" not in [p["code"] for p in second["problems"]], "they are trained by now"
    assert built["fingerprint"] != untrained["fingerprint"]
    manifest = json.loads(Path("bundle/manifest.json").read_text())
    assert (
        Path("bundle/training/receipt.json").read_bytes()
        == Path("links/pair/receipt.json").read_bytes()
    )
    assert "training/receipt.json" in manifest["files"]
    assert "train:" not in Path("bundle/spec.yaml").read_text()
    bundled = load_file(Path("bundle") / manifest["links"]["planner->solver"]["file"])
    trained = load_file(Path("links/pair/outer.planner.solver.safetensors"))
    assert all(torch.equal(bundled[name], trained[name]) for name in trained)

    # How a system was trained is in its links; settings alone change nothing.
    again = recmasc(capsys, "build", here, "--quiet", "-o", "bundle", "--set", "train.seed=9")
    assert again["data"]["reused"]
    frozen = recmasc(capsys, "build", here, "--quiet", "-o", "before", "--untrained-links")["data"]
    assert frozen["reused"]
    assert not Path("before/training").exists()

    link = Path("links/pair/outer.planner.solver.safetensors")
    link.write_bytes(link.read_bytes()[:-4] + b"\0\0\0\1")
    altered = recmasc(capsys, "build", here, "--quiet", "-o", "other")
    (warning,) = [p for p in altered["problems"] if p["code"] == "RM751"]
    assert "its hash is not the one in its receipt" in warning["message"]
    assert "planner->solver" not in altered["data"]["trained_links"]
    shutil.rmtree("links")
    assert recmasc(capsys, "build", here, "--quiet", "-o", "before")["data"]["reused"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"stage": "nope"},
        {"stage": None},
        {"method": "links"},
        {"steps": 0},
        {"steps": "5"},
        {"steps": True},
    ],
)
def test_the_python_door_refuses_what_would_train_nothing(
    here: Path, arguments: dict[str, Any]
) -> None:
    program = rc.compile(rc.load_spec(here))
    ((name, value),) = arguments.items()
    with pytest.raises(rc.RecmasError, match=f"RM506.*{name} is {value!r}"):
        rc.train(program, "trained", **arguments)
    assert not Path("trained").exists()


def test_the_python_door_says_what_it_takes(here: Path) -> None:
    spec: Any = rc.load_spec(here, overrides="latent_steps=1")
    assert spec.document.latent_steps == 1
    wrong: Any
    for wrong in (None, str(here), rc.compile(spec)):
        with pytest.raises(rc.RecmasError, match=r"RM506.*takes a Spec.*`load_spec`"):
            rc.compile(wrong)
    for wrong in (None, str(here), spec):
        for use in (rc.to_torch, rc.train, lambda program: rc.build(program, "bundle")):
            with pytest.raises(rc.RecmasError, match=r"RM506.*takes a Program.*`compile`"):
                use(wrong)


def test_the_python_door_trains_and_builds_as_the_commands_do(here: Path) -> None:
    spec = rc.load_spec(here, overrides=("train.outer.steps=2",))
    report = rc.train(rc.compile(spec), "trained", stage="outer")
    assert report.stages["outer"]["steps"] == 2
    assert set(report.trained) == {"planner->solver", "solver->planner"} | {
        "planner.inner",
        "solver.inner",
    }
    bundle = rc.build(rc.compile(spec), "bundle")
    assert (bundle / "training/receipt.json").exists()
    without = rc.build(rc.compile(spec), "without", trained_links=False)
    assert not (without / "training").exists()


def test_links_of_another_kind_are_left_aside(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recmasc(capsys, "train", here, "--quiet", "--stage", "outer", "--steps", "1")
    here.write_text(changed(("planner -> solver: {}", "planner -> solver: {kind: residual}")))
    built = recmasc(capsys, "build", here, "--quiet", "-o", "bundle")
    (warning,) = [p for p in built["problems"] if p["code"] == "RM751"]
    assert "it is of kind `projected`, not `residual`" in warning["message"]
    assert (warning["line"], warning["column"]) == (18, 3)
    assert "planner->solver" not in built["data"]["trained_links"]
    measured = recmasc(capsys, "train", here, "--quiet", "--eval-only")
    assert [p for p in measured["problems"] if p["code"] == "RM751"] == [warning]
    with pytest.raises(SystemExit) as ended:
        main(["run", str(here), "What is 1 + 2?", "--max-new-tokens", "1"])
    assert ended.value.code == 0
    assert f"warning[RM751]: {warning['message']}" in capsys.readouterr().err


def test_links_that_no_stage_trained_are_not_called_trained(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recmasc(capsys, "train", here, "--quiet", "--stage", "inner", "--steps", "1")
    built = recmasc(capsys, "build", here, "--quiet", "-o", "bundle")["data"]
    assert built["trained_links"] == ["planner.inner", "solver.inner"]
    with pytest.raises(SystemExit):
        main(["build", str(here), "--quiet", "-o", "bundle"])
    printed = capsys.readouterr()
    assert "links/pair: planner.inner, solver.inner.\n" in printed.out
    untrained = "2 of 4 links are untrained (planner->solver, solver->planner): thoughts pass"
    assert f"warning[RM152]: {untrained}" in printed.err


def test_measuring_without_a_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recmasc(capsys, "train", here, "--quiet", "--eval-only")["data"]
    assert [record["id"] for record in data["records"]] == [f"r{n}" for n in range(16)]
    assert all(record["loss"] > 0 and record["tokens"] > 5 for record in data["records"])
    tokens = sum(record["tokens"] for record in data["records"])
    mean = sum(record["loss"] * record["tokens"] for record in data["records"]) / tokens
    assert data["mean"] == pytest.approx(mean)
    assert not Path("out").exists()
    assert not Path("links").exists()
    # ... under the links that a build would take.
    recmasc(capsys, "train", here, "--quiet", "--stage", "outer", "--set", "train.outer.lr=1e-2")
    after = recmasc(capsys, "train", here, "--quiet", "--eval-only")["data"]
    assert after["mean"] < data["mean"]


def test_frozen_inner_links_do_not_learn(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("train", here, "--quiet", "--stage", "outer", "--steps", "2")
    data = recmasc(capsys, *arguments, "--set", "train.outer.freeze_inner=true")["data"]
    assert data["trained"] == ["planner->solver", "solver->planner"]
    receipt = json.loads(Path("links/pair/receipt.json").read_text())
    assert not receipt["links"]["planner.inner"]["trained"]


def test_links_named_in_the_spec_do_not_learn(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", here, "--quiet", "--stage", "outer", "--steps", "2")
    frozen = "train.outer.freeze=[planner, planner->solver]"
    data = recmasc(capsys, *arguments, "--set", frozen)["data"]
    assert data["trained"] == ["solver.inner", "solver->planner"]


FROZEN = "train.outer.freeze=[planner, solver, planner->solver, solver->planner]"


@pytest.mark.parametrize(
    ("stage", "settings", "why"),
    [
        ("all", (FROZEN,), "the outer stage has nothing to learn: all links that the answer"),
        ("outer", ("latent_steps=0",), "the outer stage has nothing to learn: no message"),
        (
            "outer",
            ("rounds=1", "train.outer.freeze=[planner, planner->solver]"),
            "the outer stage has nothing to learn: all links that the answer depends on are frozen",
        ),
        ("inner", ("latent_steps=0",), "the inner stage has nothing to learn: no agent that"),
    ],
)
def test_a_stage_with_nothing_to_learn_is_refused(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    settings: tuple[str, ...],
    why: str,
) -> None:
    given = [word for setting in settings for word in ("--set", setting)]
    arguments = ("train", here, "--quiet", "--stage", stage, *given)
    (problem,) = [
        p
        for p in recmasc(capsys, *arguments, status=Exit.USAGE)["problems"]
        if p["severity"] == "error"
    ]
    assert problem["code"] == "RM705"
    assert problem["message"].startswith(why)
    assert "latent_steps" in problem["hint"]
    assert not Path("out").exists()


def test_rollout_without_the_planners_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here.write_text(
        changed(
            ("targets: {planner: plan, solver: solution}", "targets: {solver: solution}"),
            ("{steps: 8,", "{mode: rollout, supervise: all, steps: 4,"),
        )
    )
    data = recmasc(capsys, "train", here, "--quiet")["data"]
    assert list(data["stages"]["inner"]) == ["solver"]
    assert len(data["trained"]) == 4


def test_long_records_are_said_to_be_left_out(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    rows[5]["solution"] *= 20
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = recmasc(
        capsys, "train", here, "--quiet", "--eval-only", "--set", "train.max_length=160"
    )
    ids = [record["id"] for record in printed["data"]["records"]]
    assert ids == [f"r{n}" for n in range(16) if n != 5]
    (reason,) = printed["data"]["left_out"]
    assert "`solver` takes more than 160 positions" in reason
    assert [p["code"] for p in printed["problems"] if p["code"] == "RM750"] == ["RM750"]


def test_in_rollouts_too_a_long_target_is_long(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No rollout reads the planner's text, but its inner link learns from it and is aligned to it.
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    rows[5]["plan"] *= 20
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = ("--set", "train.outer.mode=rollout", "--set", "train.max_length=160")
    printed = recmasc(capsys, "train", here, "--quiet", "--eval-only", *rollout)
    assert printed["data"]["left_out"] == {"a call of `planner` takes more than 160 positions": 1}


def test_mistakes_have_their_exit_status(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("--set", "train.outer.mode=fast"): (Exit.SPEC_INVALID, "RM122"),
        ("--set", "train.data=none.jsonl"): (Exit.RUN_FAILED, "RM700"),
        ("--stage", "both"): (Exit.USAGE, "RM506"),
        ("--steps", "0"): (Exit.USAGE, "RM506"),
    }
    for arguments, (status, code) in cases.items():
        printed = recmasc(capsys, "train", here, *arguments, status=status)
        assert [p["code"] for p in printed["problems"]] == [code]
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        printed = recmasc(capsys, "train", here, "--tensorboard", "tb", status=Exit.ENVIRONMENT)
        assert printed["problems"][0]["code"] == "RM201"


def test_a_run_is_gone_on_with_only_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recmasc(capsys, "train", here, "--quiet", "--stage", "outer")
    printed = recmasc(capsys, "train", here, "--quiet", "--stage", "outer", status=Exit.USAGE)
    assert printed["problems"][0]["code"] == "RM302"
    other = ("--resume", "--set", "train.outer.lr=0.5")
    printed = recmasc(capsys, "train", here, "--quiet", "--stage", "outer", *other, status=2)
    assert printed["problems"][0]["code"] == "RM703"
    assert "the settings differ" in printed["problems"][0]["message"]
    recmasc(capsys, "train", here, "--quiet", "--stage", "outer", "--resume")


def test_figures_that_were_not_measured_before_are_said_to_be_missing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One record cannot be shuffled; how many are measured may change when a run is gone on with.
    arguments = ("train", here, "--quiet", "--stage", "outer", "--set")
    recmasc(capsys, *arguments, "train.eval_records=1", "--steps", "8")
    shutil.rmtree(Path("out/pair-training/outer/checkpoints/step-00000008"))
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "train.eval_records=4", "--resume"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"shuffled  - -> \d", printed)
    assert re.search(r"latent    \d+\.\d+ -> \d", printed)


def test_resume_after_kill_9_gives_the_same_weights(case: Path) -> None:
    arguments = [*COMMAND, str(case), "--quiet", "--set", "train.outer.steps=40"]

    def start(out: str, links: str, *more: str) -> subprocess.Popen[bytes]:
        wanted = [*arguments, "--out", out, "--set", f"train.links_dir={links}", *more]
        return subprocess.Popen(wanted, cwd=case.parent, env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    assert start("whole", "links/whole").wait() == 0
    running = start("killed", "links/killed")
    metrics = case.parent / "killed" / "outer" / METRICS_NAME
    kill_at = random.randint(4, 32)
    while running.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b'"kind": "step"') >= kill_at:
            running.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert running.wait() == -signal.SIGKILL, f"it ended before step {kill_at}"
    assert start("killed", "links/killed", "--resume").wait() == 0
    whole = trained_links(case.parent / "links/whole")
    resumed = trained_links(case.parent / "links/killed")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), f"{name} differs, killed at {kill_at}"
