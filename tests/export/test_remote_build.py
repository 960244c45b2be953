"""A build of a system with an agent behind an API: it asks nobody, and holds no key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.commands import run_recmasc
from kit.files import WORDS_PROTOCOL
from kit.remote_systems import KEY_ENV, Reply, completion, endpoint
from recmas_cli.build import _load_seconds
from recmas_export.replan import Replanner
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import open_bundle

KEY = "sk-verysecret"
MIXED = """
recmas: 1
name: mixed
rounds: 2
latent_steps: 3
backbones:
  far: {{source: 'openai:far', base_url: '{url}', api_key_env: {variable}}}
  small: {{source: llama}}
agents:
  planner:
    backbone: far
    prompt: {{first: "P {{{{ question }}}}", then: "P {{{{ question }}}} {{{{ latent.solver }}}}"}}
  critic:
    backbone: small
    inner: {{init: random}}
    prompt: "C {{{{ question }}}} {{{{ latent.planner }}}}"
  solver:
    backbone: small
    inner: {{init: random}}
    prompt: "S {{{{ question }}}} {{{{ latent.planner }}}} {{{{ latent.critic }}}}"
links:
  planner -> critic: {{carries: text, max_tokens: 8}}
  planner -> solver: {{carries: text, max_tokens: 8}}
  critic -> solver: {{init: random}}
  solver -> planner: {{carries: text, max_tokens: 8, feedback: true}}
answer: {{agent: solver, max_new_tokens: 6}}
build: {{max_prompt_tokens: 256, max_batch: 4}}
"""


def test_a_build_asks_nobody_and_a_run_does(
    build_tiny: BuildTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    with endpoint(Reply(completion("a plan"))) as far:
        built = build_tiny(MIXED.format(url=far.url, variable=KEY_ENV))
        assert far.asked == []
        assert not [path for path in files_of(built.bundle) if KEY.encode() in path.read_bytes()]
        manifest = json.loads((built.bundle / "manifest.json").read_text())
        assert manifest["remotes"] == {
            "far": {"model": "far", "base_url": far.url, "api_key_env": KEY_ENV}
        }
        results = built.system.run_batch(["What is 7?", "And 8?"])
        told = [each.to_json()["usage"] for each in results if isinstance(each, rt.Answer)]
        assert [(each["remote"]["far"]["calls"], each["latent_steps"]) for each in told] == [
            (2, 6),
            (2, 6),
        ]
        assert [each["messages"][0]["content"] for each in far.asked[:2]] == [
            "P What is 7?",
            "P And 8?",
        ]
        # In round 2 the planner sees what the solver wrote for it.
        assert far.asked[2]["messages"][0]["content"].startswith("P What is 7? ")
    assert far.keys == [f"Bearer {KEY}"] * 4
    monkeypatch.delenv(KEY_ENV)
    assert _load_seconds(built.bundle, Silent()) > 0  # `recmasc build` needs no key
    # `recmasc bench --rounds` makes other plans of the bundle alone.
    plan = Replanner(open_bundle(built.bundle)).plan(rounds=3)
    assert [step.round for step in plan.steps if step.op == "ask"] == [1, 2, 3]


def test_eval_and_bench_ask_and_count(
    build_tiny: BuildTiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)
    (tmp_path / "words.yaml").write_text(WORDS_PROTOCOL)
    records = [{"id": f"q{i}", "question": f"Q{i}", "answer": f"a{i}"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    with endpoint(Reply(completion("a plan"))) as far:
        bundle = build_tiny(MIXED.format(url=far.url, variable=KEY_ENV)).bundle
        where = ("--data", tmp_path / "data.jsonl", "--protocol", tmp_path / "words.yaml")
        names = ("latent", "text", "shuffled", "single", "null")
        asked = (*(f"--baseline={name}" for name in names), "--out", tmp_path / "out")
        evaluated = run_recmasc("eval", bundle, *where, *asked)
        assert evaluated.exit_code == 0, evaluated.output
        # The planner is asked in each of two rounds; who answers alone, or with nothing, asks not.
        assert len(far.asked) == 3 * 2 * len(("latent", "text", "shuffled"))
        for name in ("latent", "text", "shuffled"):
            assert f"- {name}: 6 calls of remote model far, 66 prompt tokens" in evaluated.stdout
        benched = run_recmasc("bench", bundle, "--rounds", "1", "--repeats", "1", "--limit", "2")
    assert benched.exit_code == 0, benched.output
    table = benched.stdout.split("## Remote models, per question")[1]
    (row,) = (line.split("|") for line in table.splitlines() if "latent" in line)
    assert [cell.strip() for cell in row[4:8]] == ["1.0", "11", "2", "no prices"]


def files_of(bundle: Path) -> list[Path]:
    return [path for path in bundle.rglob("*") if path.is_file()]
