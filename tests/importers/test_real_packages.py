"""The frameworks themselves: they load the teams of this folder, and we import what they write."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kit.commands import run_recmasc
from team_cases import ROOT, TEAMS

pytestmark = pytest.mark.importers

SCRIPT = Path(__file__).with_name("real_packages.py")
# what a framework writes: agents, links, rounds, prompts to be filled in
WRITTEN = {
    "crewai": {"classic": (2, 2, 1, 0), "modern": (1, 1, 1, 0), "flowing": (3, 4, 1, 0)},
    "adk": {},
    "autogen": {"chat.json": (2, 2, 2, 0), "flow.json": (3, 4, 1, 0)},
    "langgraph": {"graph.json": (3, 4, 2, 4)},
    "agent-framework": {},
}


@pytest.mark.parametrize("framework", WRITTEN)
def test_newest_version(framework: str, tmp_path: Path) -> None:
    python = ROOT / ".importers" / framework / "bin" / "python"
    assert python.exists(), "run `make test-importers`"
    out = tmp_path / "written"
    out.mkdir()
    done = subprocess.run(
        [python, SCRIPT, framework, TEAMS, out],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, sizes in WRITTEN[framework].items():
        spec = tmp_path / f"{name}.yaml"
        ran = run_recmasc("import", framework, out / name, "-o", spec, "--json")
        assert ran.exit_code == 0, ran.output
        told = json.loads(ran.stdout)["data"]
        to_fill = len(told["to_fill"])
        assert (len(told["agents"]), told["links"], told["rounds"], to_fill) == sizes
        assert run_recmasc("check", spec).exit_code == (3 if to_fill else 0)
