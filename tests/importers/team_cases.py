"""The teams of this folder, and the table of what became of their keys.

`python tests/importers/team_cases.py` writes the table of docs/importing.md anew.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEAMS = Path(__file__).parent / "teams"
PAGE = ROOT / "docs" / "importing.md"
_TABLE = re.compile(r"(<!-- teams -->\n).*?(<!-- end of teams -->)", re.DOTALL)


@dataclass(frozen=True)
class TeamCase:
    """A team of the folder.

    Attributes:
        arguments: Of `recmasc import`, with `teams` as the working folder.
        about: What it is, for the table.
        has_prompts: Whether the import is whole, or leaves prompts to be filled in.
    """

    arguments: tuple[str, ...]
    about: str
    has_prompts: bool = True


CASES = {
    "crewai_pair": TeamCase(("crewai", "crewai_pair"), "CrewAI, two YAML files: a chain"),
    "crewai_report": TeamCase(
        ("crewai", "crewai_report"), "CrewAI, a project with `crew.py`: `context`, tools"
    ),
    "crewai_json": TeamCase(
        ("crewai", "crewai_json"), "CrewAI, `crew.jsonc`: two side by side, one reads both"
    ),
    "crewai_flow": TeamCase(
        ("crewai", "crewai_flow"), "CrewAI, `flow.yaml`: a crew, a router, an agent"
    ),
    "adk_story": TeamCase(("adk", "adk_story"), "ADK: a chain with a loop inside, `output_key`"),
    "adk_panel": TeamCase(("adk", "adk_panel"), "ADK: three side by side, one reads all"),
    "adk_workflow": TeamCase(
        ("adk", "adk_workflow.yaml"), "ADK 2, a workflow: fan-out, join, routes, a loop"
    ),
    "autogen_round_robin": TeamCase(
        ("autogen", "autogen_round_robin.json"), "AutoGen, a round robin of two"
    ),
    "autogen_graph": TeamCase(
        ("autogen", "autogen_graph.json"), "AutoGen, a graph with conditions and tools"
    ),
    "langgraph": TeamCase(
        ("langgraph", "langgraph/library.json", "--prompts", "langgraph/prompts.yaml"),
        "LangGraph with a file of prompts: a loop, a node of tools",
    ),
    "agent_framework": TeamCase(
        ("agent-framework", "agent_framework_tutor/workflow.yaml"),
        "Agent Framework: `GotoAction` with a counter, two `kind: Prompt`",
    ),
    "langgraph_bare": TeamCase(
        ("langgraph", "langgraph/library.json"), "LangGraph without prompts", has_prompts=False
    ),
}


def table() -> str:
    """Return the table of docs/importing.md."""
    from recmas_compiler.importers.readers import adk, agent_framework, autogen, crewai, langgraph
    from recmas_compiler.importers.spec_text import ImportOptions, write_spec
    from recmas_runtime.core.text import markdown_table

    readers = {
        "crewai": crewai.read,
        "adk": adk.read,
        "autogen": autogen.read,
        "langgraph": langgraph.read,
        "agent-framework": agent_framework.read,
    }
    rows = []
    for case in CASES.values():
        form, file, *rest = case.arguments
        options = {"prompts": Path(rest[1])} if rest else {}
        before = Path.cwd()
        os.chdir(TEAMS)
        try:
            team = readers[form](Path(file), **options)  # type: ignore[operator]
        finally:
            os.chdir(before)
        spec = write_spec(team, ImportOptions(), out=Path("spec.yaml"))
        sizes = (len(team.agents), spec.num_links, spec.rounds)
        keys = (team.num_carried, len(team.left_out), len(spec.to_fill))
        rows.append((case.about, *map(str, sizes), *map(str, keys)))
    head = ("team", "agents", "links", "rounds", "keys carried", "keys listed", "to fill in")
    return markdown_table(head, rows)


def with_table(page: str) -> str:
    """Return the page with the table as it is now."""
    return _TABLE.sub(lambda found: f"{found.group(1)}{table()}\n{found.group(2)}", page)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
