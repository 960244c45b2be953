"""`recmasc import` as people call it: options, paths, what it says, what it leaves alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from kit.commands import run_recmasc
from recmas_compiler.importers.json_source import parse_json
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.errors import RecmasError
from team_cases import TEAMS

PAIR = TEAMS / "crewai_pair"


def test_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "new" / "spec.yaml"
    ran = run_recmasc("import", "crewai", PAIR, "-o", out)
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout == (
        f"Wrote {out} from a crew of CrewAI: 3 agents, 4 links and 1 round; "
        "24 keys carried over, 0 not.\n"
        f"Next: recmasc check {out}, then recmasc build {out}.\n"
    )
    assert sorted(path.name for path in out.parent.iterdir()) == ["recmas.v1.json", "spec.yaml"]


def test_places_to_fill_in_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "spec.yaml"
    ran = run_recmasc("import", "langgraph", TEAMS / "langgraph" / "library.json", "-o", out)
    assert ran.exit_code == 0
    assert f"Fill in 5 places, then recmasc check {out}:\n  {out}:" in ran.stdout
    assert ran.stderr.count("warning[RM166]") == 5
    text = out.read_text()
    for agent in ("rewrite", "retrieve", "grade", "generate"):
        text = text.replace(f"{{{{ fill in: what {agent} is asked }}}}", "Do it.")
    out.write_text(text)
    assert run_recmasc("check", out).exit_code == 0


def test_nodes_behind_a_hidden_route_are_named(tmp_path: Path) -> None:
    """As LangGraph draws a route without a path map: the node before it seems to end the graph."""
    nodes = [{"id": name} for name in ("__start__", "ask", "answer", "__end__")]
    edges = [("__start__", "ask"), ("ask", "__end__")]
    graph = {"nodes": nodes, "edges": [{"source": s, "target": t} for s, t in edges]}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    ran = run_recmasc("import", "langgraph", tmp_path / "graph.json", "-o", tmp_path / "s.yaml")
    assert ran.exit_code == 0
    assert "`answer` is left out: no edge of the dump leads to it; routes show only" in ran.stderr
    assert set(load_agents(tmp_path / "s.yaml")) == {"ask"}


def load_agents(path: Path) -> dict[str, object]:
    agents: dict[str, object] = yaml.safe_load(path.read_text())["agents"]
    return agents


def test_existing_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "spec.yaml"
    out.write_text("mine")
    ran = run_recmasc("import", "crewai", PAIR, "-o", out)
    assert ran.exit_code == 2
    assert "error[RM302]" in ran.stderr
    assert out.read_text() == "mine"
    assert run_recmasc("import", "crewai", PAIR, "-o", out, "--force").exit_code == 0


def test_options_reach_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = ("--latent-steps", 7, "--carries", "thoughts", "--rounds", 4)
    ran = run_recmasc(
        "import", "crewai", PAIR, "-o", "specs/a.yaml", "--backbone", "models/small", *options
    )
    assert ran.exit_code == 0, ran.output
    document = load_spec("specs/a.yaml").document
    assert (document.latent_steps, document.rounds) == (7, 4)
    assert {link.carries for link in document.links.values()} == {"thoughts"}
    # paths of the command line start from the working folder, those of a spec from its own
    assert document.backbones["base"].source == "../models/small"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rounds", "0"), "1<=x<=64"),
        (("--latent-steps", "5000"), "0<=x<=4096"),
        (("--carries", "mail"), "'mail' is not one of"),
        (("--prompts", "p.yaml"), "--prompts"),
    ],
)
def test_options_out_of_bounds(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    ran = run_recmasc("import", "crewai", PAIR, "-o", tmp_path / "s.yaml", *options)
    assert ran.exit_code == 2
    assert "error[RM506]" in ran.stderr
    assert says in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_thoughts_that_no_prompt_holds_are_refused(tmp_path: Path) -> None:
    """What the language itself refuses is said before anything is written."""
    options = ("--carries", "thoughts", "--latent-steps", 4096)
    ran = run_recmasc("import", "adk", TEAMS / "adk_panel", "-o", tmp_path / "s.yaml", *options)
    assert ran.exit_code == 3
    assert "error[RM105]: the messages to `chair` alone take 12288 positions" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_long_teams_pass_the_check(tmp_path: Path) -> None:
    """Prompts of a team that is too long for the default backbone: a warning, and the limit."""
    agents = [f"a{i}" for i in range(12)]
    said = "Say what is to be said of this, and why. " * 60
    (tmp_path / "agents.yaml").write_text(
        "".join(f"{a}: {{role: {a}, goal: say, backstory: none}}\n" for a in agents)
    )
    (tmp_path / "tasks.yaml").write_text(
        "".join(
            f"t_{a}: {{description: '{said} {{topic}}', expected_output: x, agent: {a}}}\n"
            for a in agents
        )
    )
    ran = run_recmasc("import", "crewai", tmp_path, "-o", tmp_path / "s.yaml")
    assert ran.exit_code == 0, ran.output
    assert "warning[RM167]: a prompt may take" in ran.stderr
    assert run_recmasc("check", tmp_path / "s.yaml").exit_code == 0


def test_errors_as_json(tmp_path: Path) -> None:
    ran = run_recmasc("import", "autogen", tmp_path / "none.json", "--json")
    assert ran.exit_code == 3
    (problem,) = json.loads(ran.stdout)["problems"]
    assert (problem["code"], problem["file"]) == ("RM160", str(tmp_path / "none.json"))


def test_json_reads_as_the_standard_library_has_it() -> None:
    rng = random.Random(0)

    def value(depth: int) -> object:
        kinds = [
            None,
            True,
            False,
            rng.randrange(-99, 99),
            rng.random() * 1e9,
            'a"\\\n\t\u00e9\U0001f600',
        ]
        if depth < 4 and rng.random() < 0.6:
            items = [value(depth + 1) for _ in range(rng.randrange(4))]
            return items if rng.random() < 0.5 else {f"k{i}": v for i, v in enumerate(items)}
        return rng.choice(kinds)

    for _ in range(200):
        given = value(0)
        for ascii_only in (True, False):
            text = json.dumps(given, indent=rng.choice([None, 2]), ensure_ascii=ascii_only)
            assert parse_json(text, file="f", comments=False).value == given


def test_json_places() -> None:
    text = '{\n  // one\n  "a": [1, {"b": "x"},],\n}'
    source = parse_json(text, file="f", comments=True)
    assert source.value == {"a": [1, {"b": "x"}]}
    assert str(source.places.key(("a", 1, "b"))) == "f:3:13"
    assert str(source.places.value(("a", 0))) == "f:3:9"


@pytest.mark.parametrize(
    "text", ["", "{", "[1,]", "[1 2]", '{"a" 1}', "{1: 2}", '"\\q"', "01", "+1", "1e", "nul", "[]]"]
)
def test_json_that_is_none(text: str) -> None:
    with pytest.raises(RecmasError, match=r"f:1:\d+: error\[RM160\]: not valid JSON"):
        parse_json(text, file="f", comments=False)
