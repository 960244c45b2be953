"""Teams in the form of real ones: what a spec says of them, what is listed, that they answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit.bundles import BuildTiny
from kit.commands import run_recmasc
from kit.models import write_tiny_backbone
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.spec.spec import load_spec
from team_cases import CASES, PAGE, ROOT, TEAMS, with_table

WITH_PROMPTS = [name for name, case in CASES.items() if case.has_prompts]


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return what imports a team into `tmp_path`; it gives what `--json` says."""
    monkeypatch.chdir(TEAMS)

    def run(name: str, *options: str) -> dict[str, Any]:
        arguments = CASES[name].arguments
        out = tmp_path / "spec.yaml"
        ran = run_recmasc("import", *arguments, "-o", out, "--force", "--json", *options)
        assert ran.exit_code == 0, ran.output
        told: dict[str, Any] = json.loads(ran.stdout)
        assert told["ok"]
        return told

    return run


@pytest.mark.parametrize("name", CASES)
def test_specs_stay_as_they_are(
    name: str,
    imported: Callable[..., dict[str, Any]],
    golden: Callable[..., None],
    tmp_path: Path,
) -> None:
    told = imported(name)
    golden((tmp_path / "spec.yaml").read_text())
    checked = run_recmasc("check", tmp_path / "spec.yaml", "--json")
    problems = json.loads(checked.stdout)["problems"]
    if CASES[name].has_prompts:
        assert (checked.exit_code, problems) == (0, [])
        return
    assert checked.exit_code == 3
    places = [(p["line"], p["column"]) for p in problems if p["code"] == "RM117"]
    assert len(places) == len(problems) == 5
    assert places == [(p["line"], p["column"]) for p in told["data"]["to_fill"]]


@pytest.mark.parametrize("carries", ["thoughts", "context", "written", "text"])
@pytest.mark.parametrize("name", ["adk_story", "crewai_flow"])
def test_links_may_carry_other_things(
    name: str, carries: str, imported: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    imported(name, "--carries", carries, "--rounds", "2", "--latent-steps", "5")
    spec = load_spec(tmp_path / "spec.yaml")
    assert {link.carries for link in spec.document.links.values()} == {carries}
    assert (spec.document.rounds, spec.document.latent_steps) == (2, 5)


def test_a_pair_of_crewai_is_the_sequential_spec(
    imported: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The graph is that of `specs/sequential.yaml`, prompts included; CrewAI adds who one is."""
    imported("crewai_pair")
    graph = print_graph(build_topology(load_spec(tmp_path / "spec.yaml")))
    written_out = print_graph(build_topology(load_spec(ROOT / "specs" / "sequential.yaml")))
    assert graph.count(" system\n") == 3
    graph = re.sub(r"^  \w+ system\n(    \|.*\n)+", "", graph, flags=re.MULTILINE)
    graph = graph.replace("system  crewai_pair", "system  sequential")
    # which makes prompts longer
    graph = graph.replace("max_prompt_tokens=768", "max_prompt_tokens=512")
    assert graph == written_out


def keys_of(value: object, loc: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all keys of mappings."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*loc, str(key))
            yield from keys_of(item, (*loc, str(key)))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from keys_of(item, (*loc, str(i)))


def plain(file: str) -> object:
    """Return what a file holds, read by other libraries."""
    text = Path(file).read_text()
    if file.endswith(".yaml"):
        return yaml.safe_load(text)
    return json.loads(re.sub(r"//.*|/\*.*?\*/|,(?=\s*[}\]])", "", text))


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_carried_or_listed(name: str, imported: Callable[..., dict[str, Any]]) -> None:
    told = imported(name)["data"]
    carried = 0
    for file in told["files"]:
        if file.endswith(".py"):
            continue
        listed = {tuple(e["key"].split(".")) for e in told["left_out"] if e["file"] == file}
        keys = list(keys_of(plain(file)))
        assert listed <= set(keys) | {key for key in listed if key[-1].isdigit()}
        above = [any(key[: len(left)] == left for left in listed) for key in keys]
        carried += above.count(False)
    # two paths, six `config`, one `tools`, `context`; `agents`, `tasks` and `process` of the crew
    in_code = 13 if name == "crewai_report" else 0
    assert told["carried"] == carried + in_code
    for entry in told["left_out"]:
        line = Path(entry["file"]).read_text().split("\n")[entry["line"] - 1]
        last = entry["key"].split(".")[-1]
        assert last.isdigit() or last in line[entry["column"] - 1 :], entry


def test_code_of_a_team_never_runs(imported: Callable[..., dict[str, Any]]) -> None:
    told = imported("crewai_report")["data"]
    assert "crewai_report/src/harbour_report/crew.py" in told["files"]
    assert (TEAMS / "crewai_report/src/harbour_report/tools/fee_table.py").read_text()[
        :5
    ] == "raise"


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_teams_answer(
    name: str,
    imported: Callable[..., dict[str, Any]],
    build_tiny: BuildTiny,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """On a tiny random model, whose text means nothing; every agent's message gets somewhere."""
    folder = tmp_path_factory.getbasetemp() / "importers"
    if not folder.exists():
        write_tiny_backbone(
            folder / "tiny", "llama", num_hidden_layers=1, max_position_embeddings=16_384
        )
    told = imported(name, "--backbone", str(folder / "tiny"))["data"]
    text = (tmp_path / "spec.yaml").read_text()
    text = re.sub(r"max_prompt_tokens: \d+", "max_prompt_tokens: 4096", text)  # of letters
    text = re.sub(r"max_new_tokens: \d+", "max_new_tokens: 4", text)
    built = build_tiny(text, base_dir=folder)
    answer = built.system.run({field: f"a {field}" for field in told["fields"]})
    assert answer.rounds == told["rounds"]
    assert answer.usage.completion_tokens > 0


def test_the_page_has_the_table_of_today() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "<!-- teams -->" in page
    assert with_table(page) == page
