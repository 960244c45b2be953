"""`recmasc bench training`: its rows, its processes, what it keeps, and what it says."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kit.models import write_tiny_backbone
from kit.training import changed, write_case
from recmas_cli.main import main
from recmas_compiler.bench.looplm_spec import looplm_spec, total_latent_steps
from recmas_compiler.bench.own_process import run_alone
from recmas_compiler.bench.training_costs import TABLE, RowResult, TrainingCosts
from recmas_compiler.bench.training_measure import MeasureRequest, measure
from recmas_compiler.bench.training_report import costs_json, costs_markdown
from recmas_compiler.bench.training_rows import METHODS, TrainingCostOptions, rows_of
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.errors import Exit, RecmasError

COMMANDS = "recmas_cli.main"
SPEC = changed(
    ("{tiny: {source: llama}, other: {source: qwen2}}", "{tiny: {source: llama}}"),
    ("backbone: other", "backbone: tiny"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a spec with data and a tiny backbone beside it."""
    folder = tmp_path_factory.mktemp("costs")
    write_tiny_backbone(folder / "llama", "llama", seed=0)
    return write_case(folder, text=SPEC)


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made.parent)
    return made


def costs(capsys: pytest.CaptureFixture[str], *given: object, status: int = 0) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "training", *map(str, given), "--json", "--quiet"])
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert ended.value.code == status, printed
    return printed


def test_the_self_loop_has_the_steps_of_the_system(here: Path, tmp_path: Path) -> None:
    spec = load_spec(here)
    program = run_pipeline(build_topology(spec))
    # Two rounds of three steps by two agents; the solver has none in the last.
    assert total_latent_steps(program) == 9
    path = tmp_path / "elsewhere" / "looplm.yaml"
    path.parent.mkdir()
    path.write_text(looplm_spec(spec, program, links_dir=tmp_path / "given"))
    loop = load_spec(path)
    compiled = run_pipeline(build_topology(loop))
    assert total_latent_steps(compiled) == 9
    (agent,) = loop.document.agents.values()
    assert agent.prompt.first == "{{ question }} Use  and answer."
    assert agent.prompt.then == "{{ question }} Use  and answer.\n\n{{ latent.solver }}"
    assert list(loop.document.links) == ["solver -> solver"]
    assert loop.document.train is not None
    assert loop.document.train.outer.mode == "rollout"
    assert loop.document.train.outer.steps == 8
    assert loop.document.train.targets == {"solver": "solution"}
    assert loop.document.train.data == str(here.parent / "train.jsonl")


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("{{ latent.planner }} Say it.", "Say it."),
        ("{% raw %}x^{{2}}{% endraw %} of {{ question }}", None),
    ],
)
def test_the_prompt_of_the_self_loop(
    here: Path, tmp_path: Path, prompt: str, asked: str | None
) -> None:
    path = here.parent / "other.yaml"
    other = prompt if "latent" in prompt else f"{prompt} {{{{ latent.planner }}}}"
    path.write_text(SPEC.replace("{{ question }} Use {{ latent.planner }} and answer.", other))
    spec = load_spec(path)
    loop = tmp_path / "looplm.yaml"
    program = run_pipeline(build_topology(spec))
    loop.write_text(looplm_spec(spec, program, links_dir=tmp_path))
    (agent,) = build_topology(load_spec(loop)).system.agents.values()
    assert agent.first is not None
    shown = "".join(part.value for part in agent.first)
    assert shown == (asked or "x^{{2}} of question")


def test_a_prompt_that_is_only_a_message_has_no_self_loop(here: Path, tmp_path: Path) -> None:
    path = here.parent / "message.yaml"
    path.write_text(
        SPEC.replace("{{ question }} Use {{ latent.planner }} and answer.", "{{ latent.planner }}")
    )
    spec = load_spec(path)
    with pytest.raises(RecmasError, match=r"RM508.*is a message and nothing else"):
        looplm_spec(spec, run_pipeline(build_topology(spec)), links_dir=tmp_path)


def test_a_system_without_latent_steps_has_no_self_loop(here: Path, tmp_path: Path) -> None:
    spec = load_spec(here, overrides=["latent_steps=0"])
    with pytest.raises(RecmasError, match=r"RM508.*takes 0 latent steps"):
        looplm_spec(spec, run_pipeline(build_topology(spec)), links_dir=tmp_path)


def test_rows(here: Path) -> None:
    options = TrainingCostOptions(spec=here, out=Path("out"), rounds=(1, 2))
    rows = {row.key: row for row in rows_of(options, load_spec(here), Path("loop.yaml"))}
    untrained = ["untrained", "alone", "texts"]
    trained = ["inner", "outer-1", "outer-2", "looplm", "lora", "sft", "text", "textgrad"]
    assert list(rows) == [*untrained, *trained]
    assert not [key for key in untrained if rows[key].train]
    assert rows["outer-1"].starts_from == "inner"
    assert rows["outer-1"].overrides == ("rounds=1",)
    assert rows["sft"].train == ("--method", "sft")
    assert (rows["text"].baseline, rows["text"].model) == ("text", "text/model")
    only = replace(options, methods=("outer",), rounds=())
    rows = {row.key: row for row in rows_of(only, load_spec(here), Path("loop.yaml"))}
    assert list(rows) == [*untrained, "outer"]
    assert rows["outer"].starts_from is None


def test_what_is_measured_is_what_training_measures(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained system's losses are those before the first step, with links as built."""
    arguments = ["--method", "sft", "--steps", "1", "--out", "sft-run", "--json", "--quiet"]
    with pytest.raises(SystemExit):
        main(["train", str(here), *arguments])
    told = json.loads(capsys.readouterr().out)["data"]["stages"]["sft"]["before"]["alone"]
    alone = measure(MeasureRequest(spec=str(here), overrides=(), kind="single"))
    assert alone.losses == {"alone": pytest.approx(told, rel=1e-5)}
    assert alone.num_records == 4
    system = measure(MeasureRequest(spec=str(here), overrides=(), kind="system"))
    assert list(system.losses) == ["latent", "null", "shuffled", "mean"]
    texts = measure(MeasureRequest(spec=str(here), overrides=(), kind="text"))
    assert list(texts.losses) == ["texts", "null", "shuffled"]
    assert texts.losses["null"] == pytest.approx(system.losses["null"], rel=1e-5)
    assert texts.losses["texts"] != pytest.approx(system.losses["latent"], rel=1e-5)


def test_a_command_in_a_process_of_its_own(here: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ran = run_alone(COMMANDS, ["check", str(here), "--json"], log=log)
    assert not ran.interrupted
    assert ran.wall_s > 0
    if Path("/proc/self/status").exists():
        assert ran.peak_memory_mb is not None
        # Its own, not that of this process, which has torch.
        assert 10 < ran.peak_memory_mb < 400
    with pytest.raises(RecmasError, match=r"RM100|RM200"):
        run_alone(COMMANDS, ["check", str(tmp_path / "none.yaml"), "--json"], log=log)
    with pytest.raises(RecmasError, match=r"RM507.*`this check` ended with status") as caught:
        run_alone("this", ["check"], log=log)
    assert str(log) in caught.value.problems[0].hint


def test_ctrl_c_reaches_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "waits_for_ctrl_c.py"
    module.write_text(
        "import json, sys, time\n"
        "try:\n"
        "    open(sys.argv[1], 'w').close()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print(json.dumps({'data': {'so': 'far'}}))\n"
        f"    sys.exit({int(Exit.INTERRUPTED)})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ready = tmp_path / "ready"

    def press() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    ran = run_alone("waits_for_ctrl_c", [str(ready)], log=tmp_path / "log")
    presser.join()
    assert ran.interrupted
    assert ran.data == {"so": "far"}


def done(key: str, **figures: Any) -> RowResult:
    return RowResult(key=key, title=key, learns="" if key == "alone" else "links", **figures)


def test_the_table(tmp_path: Path) -> None:
    right = {"share": 0.5, "low": 0.15, "high": 0.85, "right": 2, "of": 4, "by": "exact"}
    found = TrainingCosts(
        options=TrainingCostOptions(spec=Path("s"), out=tmp_path, hourly_rate=2.0),
        rows=[
            done("alone", losses={"alone": 2.5}),
            done(
                "outer",
                trainable_parameters=12345,
                steps=60,
                step_s=1.25,
                peak_memory_mb=1234.5,
                wall_s=1800.0,
                losses={"latent": 1.5, "shuffled": 1.75},
                accuracy=right,
            ),
            done("lora", why_not="peft is not there (RM201)"),
        ],
    )
    assert costs_markdown(found).splitlines()[2:5] == [
        "| alone | - | - | - | - | - | - | - | 2.5000 | - | - |",
        "| outer | links | 12,345 | 1,234 MiB | 1.25 | 60 | 30.0 min | 1 | 1.5000 | 1.7500 "
        "| 2 of 4, 50.0% (15.0% to 85.0%) |",
        "| lora | links | not run | - | - | - | - | - | - | - | - |",
    ]
    assert "Not run: lora: peft is not there (RM201)." in costs_markdown(found)
    rows = costs_json(found)["rows"]
    assert [row["price"] for row in rows] == [None, 1.0, None]
    free = TrainingCosts(options=replace(found.options, hourly_rate=None), rows=found.rows)
    assert "price" not in costs_markdown(free)


def test_finished_rows_are_kept(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all rows are there, nothing runs; another run's table is refused."""
    out = tmp_path / "out"
    given = (here, "--out", out, "--method", "inner", "--steps", "3")
    (out / "untrained").mkdir(parents=True)
    rows = [done(key, losses={"own": 1.0}) for key in ("untrained", "alone", "texts", "inner")]
    table = out / TABLE
    identity = dict.fromkeys(("the held-out data", "--data", "--protocol", "--limit"))
    table.write_text(json.dumps({"identity": identity, "rows": [asdict(r) for r in rows]}))
    (problem,) = costs(capsys, *given, status=Exit.USAGE)["problems"]
    assert problem["code"] == "RM302"
    (problem,) = costs(capsys, *given, "--resume", status=Exit.USAGE)["problems"]
    assert problem["code"] == "RM703"
    assert "the spec, the data, --steps, --rounds differ" in problem["message"]
    table.write_text("no table")
    (problem,) = costs(capsys, *given, "--resume", status=Exit.USAGE)["problems"]
    assert problem["code"] == "RM703"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--method", "dropout"), "--method dropout is none of inner, outer, looplm, lora"),
        (("--data", "q.jsonl"), "--data and --protocol belong together"),
        (("--limit", "3"), "--limit without --data"),
        (("--hourly-rate", "nan"), "--hourly-rate nan is no price"),
        (("--rounds", "0"), "are not all 1 or more"),
    ],
)
def test_options_that_make_no_sense(
    here: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], told: str
) -> None:
    printed = costs(capsys, here, "--out", "no-table", *more, status=Exit.USAGE)
    (problem,) = printed["problems"]
    assert problem["code"] == "RM506"
    assert told in problem["message"]
    assert not Path("no-table").exists()


def test_a_spec_without_training(
    here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = here.parent / "untrained.yaml"
    path.write_text(SPEC.split("train:")[0])
    printed = costs(capsys, path, "--out", tmp_path / "out", status=Exit.SPEC_INVALID)
    assert [problem["code"] for problem in printed["problems"]] == ["RM104"]


@pytest.mark.heavy
def test_every_row(here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Minutes: all methods on tiny models, interrupted by nobody, then asked once more."""
    out = tmp_path / "out"
    given = (here, "--out", out, "--steps", "4", "--hourly-rate", "3")
    rows = {row["key"]: row for row in costs(capsys, *given)["data"]["rows"]}
    assert list(rows) == ["untrained", "alone", "texts", *METHODS]
    assert rows["textgrad"]["why_not"] == "textual gradients need --data and --protocol"
    for key in METHODS[:-1]:
        row = rows[key]
        assert not row["why_not"]
        assert row["steps"] == 4
        assert min(row["trainable_parameters"], row["peak_memory_mb"], row["price"]) > 0
        assert row["accuracy"]["of"] == 4
    assert rows["outer"]["price"] > rows["inner"]["price"]
    assert rows["sft"]["losses"]["alone"] < rows["alone"]["losses"]["alone"]
    before = (out / TABLE).read_bytes()
    again = costs(capsys, *given, "--resume")["data"]["rows"]
    assert {row["key"]: row for row in again} == rows
    assert (out / TABLE).read_bytes() == before
    # Other rows may come later.
    assert (out / "table.md").read_text().count("\n| ") == len(rows)
