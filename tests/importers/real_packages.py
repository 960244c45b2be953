"""Real packages beside the readers: each loads the teams of this folder, and writes one of its own.

Runs in an environment of its own (`make test-importers`), without recmas: `python real_packages.py
FRAMEWORK TEAMS OUT`. What it writes lands in OUT; test_real_packages.py imports that.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

os.environ |= {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TRACKING": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_DMN": "true",  # asks nothing
    "OTEL_SDK_DISABLED": "true",
    "OPENAI_API_KEY": "none",
}


def crewai(teams: Path, out: Path) -> None:
    from crewai.flow.flow_definition import FlowDefinition
    from crewai.project.json_loader import load_json_crew_project, load_jsonc_file
    from crewai_cli.create_crew import create_crew
    from crewai_cli.create_flow import create_flow
    from crewai_cli.create_json_crew import create_json_crew

    FlowDefinition.from_declaration(path=teams / "crewai_flow" / "flow.yaml")
    load_json_crew_project(teams / "crewai_flow" / "crews" / "menu_crew" / "crew.jsonc")
    for file in (teams / "crewai_json").rglob("*.jsonc"):  # its tools are not installed
        load_jsonc_file(file)
    os.chdir(out)
    create_crew("classic", skip_provider=True)
    create_json_crew("modern", skip_provider=True)
    create_flow("flowing")


def adk(teams: Path, out: Path) -> None:
    from google.adk.agents.config_agent_utils import from_config

    # code of the teams, which only its owners have
    for name in ("letter_room.tools", "letter_room.callbacks", "claims_desk.store"):
        module = types.ModuleType(name)
        for function in ("count_words", "log_remarks", "save_letter"):
            setattr(module, function, lambda *given, **named: None)
        sys.modules[name.partition(".")[0]] = types.ModuleType(name.partition(".")[0])
        sys.modules[name] = module
    from pydantic import BaseModel

    sys.modules["claims_desk.schemas"] = types.ModuleType("claims_desk.schemas")
    sys.modules["claims_desk.schemas"].Decision = type("Decision", (BaseModel,), {})
    for file in ("adk_story/root_agent.yaml", "adk_panel/root_agent.yaml", "adk_workflow.yaml"):
        agent = from_config(str(teams / file))
        print(file, type(agent).__name__, agent.name)


def autogen(teams: Path, out: Path) -> None:
    from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
    from autogen_agentchat.base import Team
    from autogen_agentchat.conditions import MaxMessageTermination
    from autogen_agentchat.teams import DiGraphBuilder, GraphFlow, RoundRobinGroupChat
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    for file in ("autogen_round_robin.json", "autogen_graph.json"):
        Team.load_component(json.loads((teams / file).read_text()))
    client = OpenAIChatCompletionClient(model="gpt-4o-mini", api_key="none", temperature=0.5)

    def agent(name: str) -> AssistantAgent:
        return AssistantAgent(name, model_client=client, system_message=f"You are the {name}.")

    one, two, three = agent("one"), agent("two"), agent("three")
    chat = RoundRobinGroupChat([one, UserProxyAgent("human"), two], max_turns=6)
    graph = DiGraphBuilder()
    for node in (one, two, three):
        graph.add_node(node)
    graph.add_edge(one, two).add_edge(one, three)
    graph.add_edge(two, three, activation_group="both", activation_condition="any")
    flow = GraphFlow(
        [one, two, three], graph=graph.build(), termination_condition=MaxMessageTermination(5)
    )
    for name, team in (("chat", chat), ("flow", flow)):
        (out / f"{name}.json").write_text(team.dump_component().model_dump_json())


def langgraph(teams: Path, out: Path) -> None:
    from typing import TypedDict

    from langgraph.graph import END, START, StateGraph

    class State(TypedDict):
        question: str

    def node(state: State) -> State:
        return state

    inner = StateGraph(State)
    for name in ("look", "choose"):
        inner.add_node(name, node)
    inner.add_edge(START, "look")
    inner.add_edge("look", "choose")
    inner.add_conditional_edges("choose", lambda state: END, {"again": "look", END: END})
    outer = StateGraph(State)
    outer.add_node("inner", inner.compile())
    outer.add_node("write", node)
    outer.add_edge(START, "inner")
    outer.add_edge("inner", "write")
    outer.add_edge("write", END)
    drawn = outer.compile().get_graph(xray=True)
    (out / "graph.json").write_text(json.dumps(drawn.to_json()))


def agent_framework(teams: Path, out: Path) -> None:
    from agent_framework import Agent
    from agent_framework.declarative import WorkflowFactory

    folder = teams / "agent_framework_tutor"
    agents = {name: Agent(client=object(), name=name) for name in ("PupilAgent", "TutorAgent")}
    workflow = WorkflowFactory(agents=agents).create_workflow_from_yaml_path(
        folder / "workflow.yaml"
    )
    print(workflow.name)


FRAMEWORKS = {
    "crewai": crewai,
    "adk": adk,
    "autogen": autogen,
    "langgraph": langgraph,
    "agent-framework": agent_framework,
}

if __name__ == "__main__":
    framework, teams, out = sys.argv[1:]
    FRAMEWORKS[framework](Path(teams).absolute(), Path(out).absolute())
