"""`recmasc` from the outside: outcomes, envelopes, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.specs import SEQUENTIAL
from recmas_cli.main import main
from recmas_runtime.core.errors import Exit
from recmas_runtime.formats.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Ran:
    """What a command printed and its exit status."""

    returncode: object
    stdout: str
    stderr: str


def in_a_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `recmasc` as a shell would."""
    return subprocess.run(
        [sys.executable, "-m", "recmas_cli.main", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def recmasc(*arguments: str, cwd: Path) -> Ran:
    """Run `recmasc` in this process, in another folder."""
    out, err = io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return Ran(returncode=ended.value.code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def project(families: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec and its tiny backbone."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "llama").symlink_to(families / "llama")
    (folder / "spec.yaml").write_text(SEQUENTIAL)
    return folder


def test_init_writes_a_spec_that_checks(tmp_path: Path) -> None:
    assert in_a_process("init", "sequential", cwd=tmp_path).returncode == Exit.OK
    assert in_a_process("check", "spec.yaml", cwd=tmp_path).returncode == Exit.OK
    first, *_ = (tmp_path / "spec.yaml").read_text().splitlines()
    schema = first.partition("$schema=")[2]
    json.loads((tmp_path / schema).read_text())


@pytest.mark.parametrize("pattern", ["mixture", "distillation", "deliberation", "custom"])
def test_init_writes_a_spec_of_every_pattern(pattern: str, tmp_path: Path) -> None:
    task = [] if pattern == "custom" else ["--task", "math"]
    assert recmasc("init", pattern, *task, cwd=tmp_path).returncode == Exit.OK
    checked = json.loads(recmasc("check", "spec.yaml", "--json", cwd=tmp_path).stdout)
    assert checked["ok"]
    assert checked["problems"] == []
    assert checked["data"]["name"] == pattern
    explained = recmasc("explain", "spec.yaml", cwd=tmp_path).stdout
    assert ("\\boxed{}" in explained) is bool(task)


def test_check_says_what_becomes_of_conversations(project: Path) -> None:
    usual = recmasc("check", "spec.yaml", cwd=project).stdout
    assert "conversation" not in usual
    said = recmasc("check", "spec.yaml", "--set", "serve.history=turns", cwd=project).stdout
    told = "the last message is 'question'; what came before are turns in front of"
    assert said == f"{usual}In a conversation {told} the answer agent's prompt.\n"
    ran = recmasc("check", "spec.yaml", "--set", "serve.contxt=system", cwd=project)
    assert ran.returncode == Exit.SPEC_INVALID
    assert "RM128" in ran.stderr


def test_init_with_records_to_learn_from(tmp_path: Path) -> None:
    made = json.loads(recmasc("init", "relay", "--train", "--json", cwd=tmp_path).stdout)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == set(made["data"]["files"])
    assert {"spec.yaml", "train.jsonl", "questions.jsonl", "protocol.yaml"} < names
    (tmp_path / "spec.yaml").unlink()
    (tmp_path / "train.jsonl").write_text("mine")
    ran = recmasc("init", "sequential", "--train", cwd=tmp_path)
    assert ran.returncode == Exit.USAGE
    assert "questions.jsonl exist already" in ran.stderr
    assert (tmp_path / "train.jsonl").read_text() == "mine"
    assert not (tmp_path / "spec.yaml").exists()


@pytest.mark.parametrize("task", ["qa", "two-hop"])
def test_init_split_comes_with_questions(task: str, tmp_path: Path) -> None:
    made = json.loads(recmasc("init", "split", "--task", task, "--json", cwd=tmp_path).stdout)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == set(made["data"]["files"])
    assert "questions.jsonl" in names
    assert "train.jsonl" not in names
    checked = json.loads(recmasc("check", "spec.yaml", "--json", cwd=tmp_path).stdout)
    assert (checked["problems"], checked["data"]["name"]) == ([], f"split-{task}")
    questions = map(json.loads, (tmp_path / "questions.jsonl").read_text().splitlines())
    assert all(one["answer"] and len(one["facts"]) == 2 for one in questions)
    trained = recmasc("init", "split", "--task", task, "--train", "--force", cwd=tmp_path)
    assert trained.returncode == Exit.OK
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 12
    refused = recmasc("init", "split", "--task", "math", "--force", cwd=tmp_path)
    assert refused.returncode == Exit.SPEC_INVALID
    assert "`split` has no task `math`" in refused.stderr


@pytest.mark.parametrize("place", ["", "/", ".", "..", "folder"])
def test_init_does_not_write_over_a_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for force in ((), ("--force",)):
        ran = recmasc("init", "custom", "-o", place, *force, cwd=tmp_path)
        assert ran.returncode == Exit.USAGE
        assert "error[RM302]" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert recmasc("init", "custom", "-o", "new/spec.yaml", cwd=tmp_path).returncode == Exit.OK


def test_init_names_the_tasks_it_knows(tmp_path: Path) -> None:
    ran = in_a_process("init", "mixture", "--task", "maths", cwd=tmp_path)
    assert ran.returncode == Exit.SPEC_INVALID
    assert "Did you mean `math`?" in ran.stderr
    assert not (tmp_path / "spec.yaml").exists()


def test_init_keeps_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("mine")
    ran = recmasc("init", "sequential", cwd=tmp_path)
    assert ran.returncode == Exit.USAGE
    assert "RM302" in ran.stderr
    assert (tmp_path / "spec.yaml").read_text() == "mine"
    assert recmasc("init", "sequential", "--force", cwd=tmp_path).returncode == Exit.OK


def test_init_names_the_patterns_it_knows(tmp_path: Path) -> None:
    ran = recmasc("init", "sequentail", cwd=tmp_path)
    assert ran.returncode == Exit.SPEC_INVALID
    assert "sequential" in ran.stderr


@pytest.mark.parametrize("command", ["check", "explain", "plan", "graph", "ir"])
def test_commands_print_one_envelope(project: Path, command: str) -> None:
    ran = recmasc(command, "spec.yaml", "--json", cwd=project)
    assert ran.returncode == Exit.OK, ran.stderr
    envelope = json.loads(ran.stdout)
    assert set(envelope) == {"ok", "data", "problems"}
    assert envelope["ok"] is True
    assert envelope["data"]


def test_a_wrong_spec_reports_all_errors_at_once(project: Path) -> None:
    text = SEQUENTIAL.replace("rounds: 3", "rounds: 99").replace("backbone: tiny", "backbone: tny")
    (project / "wrong.yaml").write_text(text)
    ran = recmasc("check", "wrong.yaml", cwd=project)
    assert ran.returncode == Exit.SPEC_INVALID
    lines = ran.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("wrong.yaml:") for line in lines)
    assert "did you mean" in ran.stderr.lower()
    envelope = json.loads(recmasc("check", "wrong.yaml", "--json", cwd=project).stdout)
    assert envelope["ok"] is False
    assert {problem["code"] for problem in envelope["problems"]} == {"RM105", "RM110", "RM112"}


def test_set_overrides_and_is_checked(project: Path) -> None:
    ran = recmasc("check", "spec.yaml", "--set", "rounds=2", "--json", cwd=project)
    assert json.loads(ran.stdout)["data"]["rounds"] == 2
    ran = recmasc("check", "spec.yaml", "--set", "ronds=2", cwd=project)
    assert ran.returncode == Exit.SPEC_INVALID
    assert "RM122" in ran.stderr


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("check",), ("check", "spec.yaml", "--nope"), ("ir", "--after")]
)
def test_wrong_usage(project: Path, arguments: tuple[str, ...]) -> None:
    ran = recmasc(*arguments, cwd=project)
    assert ran.returncode == Exit.USAGE
    assert "Traceback" not in ran.stderr


def test_ir_after_a_pass_and_dumps(project: Path, tmp_path: Path) -> None:
    ran = recmasc("ir", "spec.yaml", "--after", "UnrollRounds", cwd=project)
    assert "r3/solver/decode" in ran.stdout
    assert "reuse=" not in ran.stdout
    recmasc("ir", "spec.yaml", "--dump-ir", str(tmp_path / "ir"), cwd=project)
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert names[0] == "000_topology.txt"
    assert len(names) == 10
    ran = recmasc("ir", "spec.yaml", "--after", "Nonsense", cwd=project)
    assert ran.returncode == Exit.USAGE
    assert "HoistPromptPrefix" in ran.stderr


def test_graph_writes_svg(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "topology.svg"
    assert recmasc("graph", "spec.yaml", "-o", str(out), cwd=project).returncode == Exit.OK
    assert out.read_text().startswith("<svg")
    ran = recmasc("graph", "spec.yaml", "-o", str(tmp_path / "no" / "x.svg"), cwd=project)
    assert ran.returncode == Exit.RUN_FAILED
    assert "RM303" in ran.stderr


def test_build_run_and_reuse(project: Path) -> None:
    built = recmasc("build", "spec.yaml", "-o", "bundle", "--json", cwd=project)
    assert built.returncode == Exit.OK, built.stderr
    told = json.loads(built.stdout)
    assert told["data"]["reused"] is False
    *_, warning = told["problems"]
    assert warning["code"] == "RM152"
    assert warning["message"].startswith("6 of 6 links are untrained: ")
    files = (project / "bundle").rglob("*")
    size_bytes = sum(f.stat().st_size for f in files if f.is_file() and f.name != MANIFEST_NAME)
    assert told["data"]["size_bytes"] == size_bytes
    assert told["data"]["load_seconds"] > 0
    again = recmasc("build", "spec.yaml", "-o", "bundle", "--json", cwd=project)
    assert json.loads(again.stdout)["data"]["reused"] is True
    ran = in_a_process("run", "bundle", "What is 7 * 8?", "--json", cwd=project)
    assert ran.returncode == Exit.OK, ran.stderr
    (answer,) = json.loads(ran.stdout)["data"]["answers"]
    assert set(answer) == {
        "id",
        "record",
        "answer",
        "finish_reason",
        "rounds",
        "usage",
        "timing_ms",
        "tool_calls",
        "batch_size",
    }
    assert answer["usage"]["latent_steps"] == 8 * 4
    from_spec = recmasc("run", "spec.yaml", "What is 7 * 8?", "--json", cwd=project)
    (same,) = json.loads(from_spec.stdout)["data"]["answers"]
    assert same["answer"] == answer["answer"]
    assert "Hashing weights" in from_spec.stderr
    quiet = recmasc("run", "spec.yaml", "What is 7 * 8?", "--quiet", cwd=project)
    assert (quiet.returncode, quiet.stdout) == (Exit.OK, f"{answer['answer']}\n")
    assert "Hashing weights" not in quiet.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["q", "--bogus"], "RM506"),
        ([], "RM506"),
        (["q", "--input", "x"], "RM506"),
        (["q", "--temperature", "50"], "RM505"),
    ],
)
def test_run_refuses_arguments_before_it_builds(
    project: Path, arguments: list[str], code: str
) -> None:
    ran = recmasc("run", "spec.yaml", *arguments, cwd=project)
    assert ran.returncode == Exit.USAGE
    assert f"error[{code}]" in ran.stderr
    assert "Hashing weights" not in ran.stderr
    assert "usage: recmas run" in recmasc("run", "spec.yaml", "--help", cwd=project).stdout


def test_build_says_what_it_built(project: Path) -> None:
    built = recmasc("build", "spec.yaml", "-o", "small", "--precision", "int8", cwd=project)
    assert built.returncode == Exit.OK, built.stderr
    *_, parity, cache, size, after = built.stdout.splitlines()
    assert parity.startswith("tiny against the reference: hidden ")
    assert parity.endswith(("; greedy text equal.", "; greedy text different."))
    assert cache.startswith("From the cache: ")
    assert size.startswith("Size ")
    assert ", loads in " in size
    assert after == 'Next: recmas run small "..."'
    manifest = json.loads((project / "small" / MANIFEST_NAME).read_text())
    assert manifest["precision"] == "int8"


def test_precision_is_of_all_backbones(project: Path) -> None:
    text = SEQUENTIAL.replace("source: llama", "source: llama, precision: int4")
    assert text != SEQUENTIAL
    (project / "own.yaml").write_text(text.replace("{{ question }}", "{{ ticket }} {{ user }}"))
    built = recmasc("build", "own.yaml", "-o", "own", "--precision", "int8", cwd=project)
    assert built.returncode == Exit.OK, built.stderr
    manifest = json.loads((project / "own" / MANIFEST_NAME).read_text())
    assert {each["precision"] for each in manifest["backbones"].values()} == {"int8"}
    assert built.stdout.endswith('Next: recmas run own --field ticket="..." --field user="..."\n')


def test_precisions_are_offered_by_name(project: Path) -> None:
    built = recmasc("build", "spec.yaml", "--precision", "fp8", cwd=project)
    assert built.returncode == Exit.USAGE
    offered = "'float32', 'bfloat16', 'float16', 'int8', 'int4'. See `recmasc build --help`."
    assert offered in built.stderr
    checked = recmasc("check", "spec.yaml", "--set", "build.precision=fp16", cwd=project)
    assert "should be float32, bfloat16, float16, int8 or int4" in checked.stderr
    assert "Did you mean `float16`?" in checked.stderr


@pytest.mark.parametrize(("given", "meant"), [("bf16", "bfloat16"), ("FP32", "float32")])
def test_names_that_others_use(project: Path, given: str, meant: str) -> None:
    checked = recmasc("check", "spec.yaml", "--set", f"backbones.tiny.dtype={given}", cwd=project)
    assert f"Did you mean `{meant}`?" in checked.stderr


def test_plan_refuses_prompts_that_no_backbone_takes(project: Path) -> None:
    assert recmasc("plan", "spec.yaml", "--prompt-tokens", "16", cwd=project).returncode == Exit.OK
    ran = recmasc("plan", "spec.yaml", "--prompt-tokens", "1000000", cwd=project)
    assert ran.returncode == Exit.USAGE
    assert "RM506" in ran.stderr
    most = ran.stderr.rpartition("at most ")[2].rstrip(".\n")
    assert recmasc("plan", "spec.yaml", "--prompt-tokens", most, cwd=project).returncode == Exit.OK


def test_one_is_no_plural(project: Path, tmp_path: Path) -> None:
    ran = recmasc("check", "spec.yaml", "--set", "rounds=2", cwd=project)
    assert "(3 agents, 3 links, 2 rounds, " in ran.stdout
    text = "recmas: 1\nname: one\nbackbones: {tiny: {source: llama}}\nagents: {solver: "
    text += '{backbone: tiny, prompt: "{{ question }}"}}\nanswer: {agent: solver}\n'
    (project / "one.yaml").write_text(text)
    assert "(1 agent, 0 links, 1 round, " in recmasc("check", "one.yaml", cwd=project).stdout


def test_wrong_usage_names_the_command(tmp_path: Path) -> None:
    for command in ("build", "check", "bench systems", "import released"):
        ran = recmasc(*command.split(), "--no-such", cwd=tmp_path)
        assert ran.returncode == Exit.USAGE
        assert f"See `recmasc {command} --help`." in ran.stderr


def test_build_does_not_touch_what_is_no_bundle(project: Path) -> None:
    (project / "precious").mkdir()
    (project / "precious" / "thesis.txt").write_text("years of work")
    ran = recmasc("build", "spec.yaml", "-o", "precious", cwd=project)
    assert ran.returncode == Exit.USAGE
    assert "RM302" in ran.stderr
    assert (project / "precious" / "thesis.txt").read_text() == "years of work"


def test_interrupted_build_leaves_nothing(project: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "recmas_cli.main", "build", "spec.yaml", "-o", "stopped"],
        cwd=project,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores the signal, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Exporting"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    # Python dies of the signal itself if it came while an extension was being imported; a shell
    # shows both as 130.
    assert process.wait(timeout=60) in (Exit.INTERRUPTED, -signal.SIGINT)
    assert not list(project.glob("*stopped*"))
    assert not list(project.glob(f"**/stopped*/{MANIFEST_NAME}"))


def test_doctor(tmp_path: Path) -> None:
    data = json.loads(recmasc("doctor", "--json", cwd=tmp_path).stdout)["data"]
    assert data["packages"]["torch"]


PLACES = ("x" * 300, "file/here", "loop/here", "x" * 300 + "/here", "no\nwhere/" + "y" * 300)
WRITING = {
    "graph": ("graph", "spec.yaml", "-o", "{}.svg"),
    "ir": ("ir", "spec.yaml", "--dump-ir", "{}"),
    "build": ("build", "spec.yaml", "-o", "{}"),
    "dump": ("build", "spec.yaml", "-o", "unused", "--dump-ir", "{}"),
    "init": ("init", "custom", "-o", "{}"),
    "import": ("import", "released", "mixture", "--from", "spec.yaml", "-o", "{}"),
    "bench": ("bench", "nothing", "--out", "{}"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", WRITING)
def test_places_that_no_file_system_has(project: Path, command: str, place: str) -> None:
    (project / "file").touch()
    if not (project / "loop").is_symlink():
        (project / "loop").symlink_to("loop")
    before = {path for path in project.rglob("*") if path.is_file()}
    arguments = [argument.format(place) for argument in WRITING[command]]
    ran = recmasc(*arguments, cwd=project)
    assert ran.returncode in (Exit.RUN_FAILED, Exit.USAGE, Exit.ENVIRONMENT, Exit.VERIFICATION)
    assert "error[RM" in ran.stderr
    assert "internal error" not in ran.stderr
    if command not in ("import", "bench"):  # they look at what they read first
        assert "error[RM303]" in ran.stderr or "error[RM302]" in ran.stderr
    assert {path for path in project.rglob("*") if path.is_file()} == before


def test_errors_of_the_spec_hide_none_of_its_files(tmp_path: Path) -> None:
    text = SEQUENTIAL.replace("source: llama", "source: nowhere").replace("rounds: 3", "round: 3")
    assert "nowhere" in text
    assert "build: {" in text
    build = "build: {loss_text: gone.txt, max_batch: -1, "
    wrong = re.sub(r"build: \{[^}]*\}", f"{build}seed: 1}}", text)
    (tmp_path / "spec.yaml").write_text(wrong)
    ran = recmasc("check", "spec.yaml", "--json", cwd=tmp_path)
    assert ran.returncode == Exit.SPEC_INVALID
    problems = json.loads(ran.stdout)["problems"]
    codes = [problem["code"] for problem in problems]
    assert codes == ["RM103", "RM200", "RM126", "RM105", "RM103"]
    assert [problem["line"] for problem in problems] == sorted(p["line"] for p in problems)
