"""The team as a LangGraph graph: a node for each agent, a conditional edge for the next round."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypedDict

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from lockstep import Agent, Ask, Settings, answer_questions


class State(TypedDict):
    """What the nodes share."""

    question: str
    text: str | None
    round: int


def make(settings: Settings) -> Ask:
    """Return the compiled graph as a function of the question."""
    model = ChatOpenAI(
        base_url=settings.url,
        model=settings.model,
        api_key="none",
        temperature=0,
        max_tokens=settings.max_tokens,
        max_retries=0,
    )

    def node(agent: Agent) -> Any:
        def run(state: State) -> dict[str, object]:
            prompt = agent.prompt(state["question"], state["text"])
            reply = model.invoke([SystemMessage(settings.system), HumanMessage(prompt)])
            is_last = agent is settings.agents[-1]
            return {"text": reply.content, "round": state["round"] + is_last}

        return run

    graph = StateGraph(State)
    names = [agent.name for agent in settings.agents]
    for agent in settings.agents:
        graph.add_node(agent.name, node(agent))
    graph.add_edge(START, names[0])
    for source, target in pairwise(names):
        graph.add_edge(source, target)
    graph.add_conditional_edges(
        names[-1],
        lambda state: "again" if state["round"] < settings.rounds else "done",
        {"again": names[0], "done": END},
    )
    team = graph.compile()
    limit = {"recursion_limit": 4 * len(names) * settings.rounds}

    def ask(question: str) -> dict[str, object]:
        end = team.invoke({"question": question, "text": None, "round": 0}, limit)
        return {"answer": end["text"]}

    return ask


if __name__ == "__main__":
    answer_questions(make)
