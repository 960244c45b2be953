"""The imported teams on the real model: each builds as it was written, and answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.commands import run_recmasc
from team_cases import CASES, TEAMS

pytestmark = [pytest.mark.heavy, pytest.mark.smollm2]

# What to ask where a team's files have no example of their own.
ASKED = {
    "question": "A train leaves at 14:20 and arrives at 16:05. How long does it take?",
    "harbour": "Ostend",
    "month": "May",
    "tone": "friendly",
    "place": "Lisbon",
    "soil": "dry and sandy",
    "guests": "four friends",
    "season": "autumn",
}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_prompts])
def test_builds_and_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TEAMS)
    spec, bundle = tmp_path / "spec.yaml", tmp_path / "bundle"
    ran = run_recmasc("import", *CASES[name].arguments, "-o", spec, "--json")
    told = json.loads(ran.stdout)["data"]
    built = run_recmasc("build", spec, "-o", bundle)
    assert built.exit_code == 0, built.output
    with rt.load(bundle) as system:
        answer = system.run({field: ASKED[field] for field in told["fields"]})
    shutil.rmtree(bundle)
    print(f"\n{name}: {answer.rounds} rounds: {answer.answer!r}")
    assert answer.answer.strip()
    assert answer.rounds == told["rounds"]
