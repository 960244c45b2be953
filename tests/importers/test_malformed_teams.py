"""Everything that can be wrong with a team's files: refused by code and place, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit.commands import run_recmasc
from recmas_runtime.core.errors import CODES
from team_cases import TEAMS


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def change(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Return what replaces a piece of a file."""

    def spoil(root: Path) -> None:
        text = (root / file).read_text(encoding="utf-8")
        assert old in text, old
        (root / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return spoil


def edit(file: str, how: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return what edits a JSON file."""

    def spoil(root: Path) -> None:
        value = json.loads((root / file).read_text())
        how(value)
        (root / file).write_text(json.dumps(value, indent=2))

    return spoil


def put(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Return what writes a file."""

    def spoil(root: Path) -> None:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).unlink()


def link_outside(root: Path) -> None:
    outside = root.absolute().parent / "outside.yaml"
    write(outside, "name: outside\ninstruction: No.\n")
    (root / "chair.yaml").unlink()
    (root / "chair.yaml").symlink_to(outside)


@dataclass(frozen=True)
class Case:
    """A way to spoil a team, and what is said about it.

    Attributes:
        place: File, line and column, from the team's folder.
    """

    form: str
    team: str
    spoil: Callable[[Path], object]
    code: str
    place: str
    says: str
    options: tuple[str, ...] = ()


CHAT = "autogen_round_robin.json"
GRAPH = "autogen_graph.json"
WORKFLOW = "agent_framework_tutor"
PAIR_TASKS = "config/tasks.yaml"

CASES = {
    # what cannot be read
    "no_such_folder": Case(
        "crewai", "crewai_pair", shutil.rmtree, "RM160", "crewai_pair", "no such folder"
    ),
    "no_crew": Case(
        "crewai", "adk_story", lambda root: None, "RM161", "adk_story", "no crew of CrewAI"
    ),
    "no_such_file": Case(
        "adk", "adk_story", remove("root_agent.yaml"), "RM160", "root_agent.yaml", "no such file"
    ),
    "a_folder_for_a_file": Case(
        "autogen", "adk_story", lambda root: None, "RM160", "adk_story", "is a directory"
    ),
    "broken_yaml": Case(
        "crewai",
        "crewai_pair",
        change(PAIR_TASKS, "agent: planner", "agent: [planner"),
        "RM101",
        f"{PAIR_TASKS}:9:7",
        "not valid YAML",
    ),
    "yaml_tag": Case(
        "adk",
        "adk_panel",
        change("chair.yaml", "name: chair", "name: !!python/object/apply:os.getcwd []"),
        "RM101",
        "chair.yaml:1:7",
        "the tag `!!python/object/apply:os.getcwd` is refused",
    ),
    "yaml_anchors_that_explode": Case(
        "adk",
        "adk_panel",
        put(
            "chair.yaml",
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
                for a, b in ("ab", "bc", "cd", "de", "ef")
            ),
        ),
        "RM101",
        "chair.yaml:5:8",
        "counting aliases each time",
    ),
    "two_documents": Case(
        "adk",
        "adk_panel",
        change("chair.yaml", "model:", "---\nmodel:"),
        "RM101",
        "chair.yaml:2:1",
        "second YAML document",
    ),
    "key_twice": Case(
        "crewai",
        "crewai_pair",
        change("config/agents.yaml", "critic:", "planner:"),
        "RM102",
        "config/agents.yaml:7:1",
        "`planner` is given a second time, first in line 2",
    ),
    "not_utf8": Case(
        "crewai",
        "crewai_pair",
        put(PAIR_TASKS, b"plan:\n  description: caf\xe9\n"),
        "RM160",
        f"{PAIR_TASKS}:2:19",
        "not UTF-8: byte 0xe9",
    ),
    "too_large": Case(
        "autogen", CHAT, put("", " " * (1 << 20) + "{}"), "RM160", f"{CHAT}:1:1", "larger than"
    ),
    "broken_json": Case(
        "autogen", CHAT, change("", '"version": 1,', '"version": 1'), "RM160", f"{CHAT}:5:3", "`,`"
    ),
    "json_with_comments": Case(
        "autogen", CHAT, change("", '"version": 1,', "// one\n"), "RM160", f"{CHAT}:4:3", "comments"
    ),
    "json_cut_off": Case(
        "langgraph",
        "langgraph/library.json",
        put("", '{"nodes": [{"id": "a'),
        "RM160",
        "langgraph/library.json:1:19",
        "unterminated string",
    ),
    "json_nested_deep": Case(
        "autogen",
        CHAT,
        put("", '{"provider": ' + "[" * 100_000),
        "RM160",
        f"{CHAT}:1:45",
        "nested more than 32 levels deep",
    ),
    "yaml_nested_deep": Case(
        "adk",
        "adk_panel",
        put("chair.yaml", "name: " + "[" * 5000),
        "RM101",
        "chair.yaml:1:38",
        "nested more than 32 levels deep",
    ),
    "json_key_twice": Case(
        "langgraph",
        "langgraph/library.json",
        change("", '"nodes"', '"nodes": [],\n  "nodes"'),
        "RM102",
        "langgraph/library.json:3:3",
        "`nodes` is given a second time, first in line 2",
    ),
    "json_not_a_number": Case(
        "langgraph",
        "langgraph/library.json",
        put("", '{"nodes": NaN}'),
        "RM160",
        "langgraph/library.json:1:11",
        "`NaN` is no value",
    ),
    "a_list": Case(
        "langgraph",
        "langgraph/library.json",
        put("", "[]"),
        "RM161",
        "langgraph/library.json:1:1",
        "should be a mapping",
    ),
    "control_character": Case(
        "autogen",
        CHAT,
        edit("", lambda v: first(v).update(system_message="a\0b")),
        "RM160",
        f"{CHAT}:",
        "holds the character U+0000",
    ),
    "code_that_is_none": Case(
        "crewai",
        "crewai_report",
        change("src/harbour_report/crew.py", "def crew(self)", "def crew(self"),
        "RM160",
        "src/harbour_report/crew.py:",
        "not valid Python",
    ),
    # paths
    "path_upwards": Case(
        "adk",
        "adk_panel",
        change("root_agent.yaml", "chair.yaml", "../adk_story/first_letter.yaml"),
        "RM164",
        "root_agent.yaml:5:5",
        "is not inside of",
    ),
    "absolute_path": Case(
        "adk",
        "adk_panel",
        change("root_agent.yaml", "chair.yaml", "/etc/passwd"),
        "RM164",
        "root_agent.yaml:5:5",
        "no relative path",
    ),
    "path_of_windows": Case(
        "adk",
        "adk_panel",
        change("root_agent.yaml", "chair.yaml", "'C:\\secrets\\chair.yaml'"),
        "RM164",
        "root_agent.yaml:5:5",
        "no relative path",
    ),
    "link_that_leads_outside": Case(
        "adk", "adk_panel", link_outside, "RM164", "root_agent.yaml:5:5", "is not inside of"
    ),
    "agent_with_folders": Case(
        "crewai",
        "crewai_json",
        change("crew.jsonc", '"adviser"]', '"../../crewai_flow/flow"]'),
        "RM164",
        "crew.jsonc:4:45",
        "names no file of the folder",
    ),
    "crew_of_a_flow_outside": Case(
        "crewai",
        "crewai_flow",
        change("flow.yaml", "crews/menu_crew", "../crewai_json"),
        "RM164",
        "flow.yaml:19:7",
        "is not inside of",
    ),
    "missing_sub_agent": Case(
        "adk", "adk_panel", remove("lawyer.yaml"), "RM162", "experts.yaml:5:5", "no file"
    ),
    # names
    "unknown_agent_of_a_task": Case(
        "crewai",
        "crewai_pair",
        change(PAIR_TASKS, "agent: critic", "agent: critics"),
        "RM162",
        f"{PAIR_TASKS}:15:3",
        'names "critics", which is no agent. Did you mean `critic`?',
    ),
    "context_of_a_later_task": Case(
        "crewai",
        "crewai_pair",
        change(PAIR_TASKS, "  agent: planner", "  agent: planner\n  context: [solve]"),
        "RM162",
        f"{PAIR_TASKS}:8:3",
        "`plan` reads `solve`, which is no task before it",
    ),
    "missing_agent_file": Case(
        "crewai",
        "crewai_json",
        remove("agents/adviser.jsonc"),
        "RM162",
        "crew.jsonc:4:45",
        "no agents/adviser.jsonc",
    ),
    "no_tasks": Case(
        "crewai", "crewai_pair", remove(PAIR_TASKS), "RM162", PAIR_TASKS, "no tasks.yaml"
    ),
    "task_without_description": Case(
        "crewai",
        "crewai_json",
        change("crew.jsonc", '"description": "Advise', '"descriptions": "Advise'),
        "RM161",
        "crew.jsonc:",
        "has no `description`",
    ),
    "two_agents_alike": Case(
        "adk",
        "adk_panel",
        change("lawyer.yaml", "name: lawyer", "name: engineer"),
        "RM162",
        "lawyer.yaml:1:1",
        "two agents are called `engineer`",
    ),
    "two_participants_alike": Case(
        "autogen",
        CHAT,
        change("", '"name": "Critic"', '"name": "Poet"'),
        "RM162",
        f"{CHAT}:",
        "two participants are called `Poet`",
    ),
    "edge_to_nobody": Case(
        "autogen",
        GRAPH,
        change("", '"target": "skipper"', '"target": "captain"'),
        "RM162",
        f"{GRAPH}:",
        'names "captain", which is no node',
    ),
    "edge_from_nobody": Case(
        "langgraph",
        "langgraph/library.json",
        change("", '"source": "grade"', '"source": "grades"'),
        "RM162",
        "langgraph/library.json:",
        "Did you mean `grade`?",
    ),
    "prompt_for_nobody": Case(
        "langgraph",
        "langgraph/library.json",
        lambda path: write(path.with_name("other.yaml"), "grader: Be strict.\n"),
        "RM162",
        "langgraph/other.yaml:1:1",
        "Did you mean `grade`?",
        options=("--prompts", "langgraph/other.yaml"),
    ),
    "goto_nowhere": Case(
        "agent-framework",
        WORKFLOW,
        change("workflow.yaml", "actionId: try_it", "actionId: try_this"),
        "RM162",
        "workflow.yaml:52:15",
        "Did you mean `try_it`?",
    ),
    "node_before_its_edge": Case(
        "adk",
        "adk_workflow.yaml",
        change("", "missing: intake", "missing: intakes"),
        "RM162",
        "adk_workflow.yaml:23:7",
        "no node of an edge before it",
    ),
    # orders that are not known before a team runs
    "selector": Case(
        "autogen",
        CHAT,
        change("", "teams.RoundRobinGroupChat", "teams.SelectorGroupChat"),
        "RM163",
        f"{CHAT}:2:3",
        "a model chooses at run time who speaks next",
    ),
    "agent_inside_of_itself": Case(
        "adk",
        "adk_panel",
        change("experts.yaml", "lawyer.yaml", "experts.yaml"),
        "RM163",
        "experts.yaml:5:5",
        "the agent is inside of itself",
    ),
    "agent_by_expression": Case(
        "agent-framework",
        WORKFLOW,
        change("workflow.yaml", "name: PupilAgent", "name: =Local.Next"),
        "RM163",
        "workflow.yaml:18:9",
        "chooses at run time which agent runs",
    ),
    "graph_without_a_beginning": Case(
        "autogen",
        GRAPH,
        edit("", lambda v: v["config"]["graph"].update(default_start_node=None)),
        "RM163",
        f"{GRAPH}:",
        "none can begin",
    ),
    "flow_without_a_beginning": Case(
        "crewai",
        "crewai_flow",
        change("flow.yaml", "start: true", "start: false"),
        "RM163",
        "flow.yaml:9:1",
        "no method begins the flow",
    ),
    # other forms
    "another_class": Case(
        "adk",
        "adk_panel",
        change("experts.yaml", "ParallelAgent", "my.agents.RaceAgent"),
        "RM161",
        "experts.yaml:1:1",
        "`RaceAgent` is no class of agents",
    ),
    "agent_of_code": Case(
        "adk",
        "adk_panel",
        change("root_agent.yaml", "config_path: chair.yaml", "code: panel.agents.chair"),
        "RM161",
        "root_agent.yaml:5:5",
        "made by code",
    ),
    "another_kind": Case(
        "agent-framework",
        WORKFLOW,
        change("workflow.yaml", "kind: Workflow", "kind: Toolbox"),
        "RM161",
        "workflow.yaml:1:1",
        "`kind: Toolbox`",
    ),
    "another_flow": Case(
        "crewai",
        "crewai_flow",
        change("flow.yaml", "crewai.flow/v1", "crewai.flow/v9"),
        "RM161",
        "flow.yaml:1:1",
        "no form of flows",
    ),
    "config_of_langgraph": Case(
        "langgraph",
        "langgraph/library.json",
        put("", '{"graphs": {"agent": "./agent.py:graph"}}'),
        "RM161",
        "langgraph/library.json:1:1",
        "has no `nodes`",
    ),
    "text_for_a_number": Case(
        "adk",
        "adk_story",
        change("polish/loop.yaml", "max_iterations: 3", "max_iterations: three"),
        "RM161",
        "polish/loop.yaml:3:1",
        "should be a whole number above 0",
    ),
    "too_many_agents": Case(
        "langgraph",
        "langgraph/library.json",
        edit("", lambda v: v["nodes"].extend({"id": f"n{i}"} for i in range(80))),
        "RM161",
        "langgraph/library.json:2:3",
        "the team has 84 agents, more than 64",
    ),
}


def first(value: Any) -> Any:
    return value["config"]["participants"][0]["config"]


@pytest.mark.parametrize("name", CASES)
def test_refused_with_code_and_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    team = Path(case.team)
    top = team.parts[0]
    copy = shutil.copytree if (TEAMS / top).is_dir() else shutil.copy
    copy(TEAMS / top, tmp_path / top)
    monkeypatch.chdir(tmp_path)
    case.spoil(team)
    file = {"agent-framework": team / "workflow.yaml"}.get(case.form, team)
    ran = run_recmasc("import", case.form, file, "-o", "out/spec.yaml", *case.options)
    lines = [line for line in ran.stderr.splitlines() if "warning[" not in line]
    assert ran.exit_code == CODES[case.code][0], ran.output
    assert f"error[{case.code}]" in lines[0], ran.output
    assert case.says.lower() in lines[0].lower()
    place = lines[0].split(": error[")[0]
    expected = case.place if case.place.startswith(top) else f"{top}/{case.place}"
    assert place == expected or (expected.endswith(":") and place.startswith(expected)), lines[0]
    assert "Traceback" not in ran.output
    assert not Path("out").exists()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25
