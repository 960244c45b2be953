"""Agents and tasks of a crew to agents of a spec, whatever file they stand in.

A task becomes an agent: who does it is the system text, what is asked the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from recmas_compiler.importers.readers.crewai_code import CodeKey, CrewCode, Method
from recmas_compiler.importers.source_files import (
    ONLY_ANSWERS,
    OPENAI_SAMPLING,
    Node,
    TeamFiles,
    check_number,
    take_sampling,
    unknown,
)
from recmas_compiler.importers.team import (
    Blank,
    LeftOut,
    Sampling,
    Team,
    TeamAgent,
    Text,
    Tools,
    free_slug,
    slug,
    tools_named,
)
from recmas_compiler.importers.texts import SINGLE_BRACES, Resolve, joined, parse_text
from recmas_compiler.importers.texts import field as field_named
from recmas_compiler.spec.document.places import SourcePosition

CREW_FILES: Final = ("crew.jsonc", "crew.json")
_ONE_SETTING: Final = "the model is that of --backbone"
_REVIEW: Final = "there is no review between agents; `answer.tools.ask` lets the answer agent ask"
_LOOPS: Final = "an agent has its latent steps, and no loop of its own"
REASONS: Final[Mapping[str, str]] = {
    "llm": _ONE_SETTING,
    "function_calling_llm": _ONE_SETTING,
    "manager_llm": "no manager hands out tasks: all run in their order",
    "manager_agent": "no manager hands out tasks: all run in their order",
    "planning_llm": _ONE_SETTING,
    "chat_llm": _ONE_SETTING,
    "provider": _ONE_SETTING,
    "model": _ONE_SETTING,
    "inputs": "a record gives the fields",
    "allow_delegation": "the order of agents is fixed when a system is built",
    "memory": "there is no memory between records",
    "knowledge_sources": "give what is to be known as a field, or by `answer.tools.search`",
    "embedder": "give what is to be known as a field, or by `answer.tools.search`",
    "verbose": "see `recmas run --trace`",
    "tracing": "see `recmas run --trace`",
    "stream": "how a text arrives is the caller's choice",
    "cache": "what is reused is settled when a system is built",
    "max_iter": _LOOPS,
    "max_rpm": "nothing is asked over a network",
    "max_execution_time": "see `recmas serve --help` for the limits of requests",
    "max_retry_limit": "nothing is tried again",
    "respect_context_window": "prompts over `build.max_prompt_tokens` are refused, never cut",
    "use_system_prompt": "the chat template decides",
    "reasoning": "see `latent_steps`",
    "planning": "see `latent_steps`",
    "planning_config": "see `latent_steps`",
    "max_reasoning_attempts": "see `latent_steps`",
    "guardrail": "nothing looks at an answer and asks again",
    "guardrails": "nothing looks at an answer and asks again",
    "guardrail_max_retries": "nothing looks at an answer and asks again",
    "human_input": _REVIEW,
    "async_execution": "who runs beside whom follows from the links",
    "output_file": "see `recmas run --output`",
    "create_directory": "see `recmas run --output`",
    "output_json": "answers are text",
    "output_pydantic": "answers are text",
    "response_model": "answers are text",
    "markdown": "say the form of the answer in the prompt",
    "callback": "code has no meaning here",
    "callbacks": "code has no meaning here",
    "step_callback": "code has no meaning here",
    "task_callback": "code has no meaning here",
    "condition": "every agent runs in every round",
    "allow_code_execution": "only the agent that answers runs code",
    "code_execution_mode": "code of a model runs in a sandbox, or not at all",
    "inject_date": "see the key `date` of the language",
    "date_format": "see the key `date` of the language",
    "output_log_file": "see `recmas run --trace`",
}


@dataclass
class _Use:
    """A tool or setting, and the agents of the spec that have it."""

    name: str
    node: Node | CodeKey
    owners: set[str] = field(default_factory=set)


@dataclass
class Members:
    """The agents of a spec while a crew, or the crews of a flow, are read."""

    files: TeamFiles
    agents: list[TeamAgent] = field(default_factory=list)
    edges: list[tuple[str, str]] = field(default_factory=list)
    tools: list[_Use] = field(default_factory=list)
    settings: list[_Use] = field(default_factory=list)

    def name(self, wanted: str) -> str:
        """Return a free name."""
        return free_slug(wanted, [agent.name for agent in self.agents])

    def add_tools(self, node: Node | CodeKey, names: list[str], owners: set[str]) -> None:
        """Remember tools until it is known who answers."""
        self.tools += [_Use(name, node, owners) for name in names]

    def leave(self, node: Node | CodeKey, reason: str) -> None:
        """List a key of a file, or an argument in code, as not carried over."""
        if isinstance(node, Node):
            node.leave(reason)
        else:
            left = LeftOut(key=node.path, place=node.place, reason=reason)
            if left not in self.files.left_in_code:
                self.files.left_in_code.append(left)

    def _settle(self, answer: str) -> tuple[Tools, Sampling]:
        named: list[str] = []
        sampling: Sampling = {}
        for use in self.tools:
            if answer not in use.owners:
                self.leave(use.node, ONLY_ANSWERS)
                continue
            named.append(use.name)
            if isinstance(use.node, Node):
                use.node.carry_all()
            else:
                self.files.num_carried_in_code += 1
        for use in self.settings:
            assert isinstance(use.node, Node)
            taken = take_sampling(use.node, OPENAI_SAMPLING, answers=answer in use.owners)
            sampling.update(taken)
        return tools_named(named), sampling

    def team(self, *, name: str, form: str, answer: str, examples: Mapping[str, str]) -> Team:
        """Return the team, once all is read."""
        order = [agent.name for agent in self.agents]
        place = next(agent.places[0] for agent in self.agents if agent.name == answer)
        edges = self.files.join_ends(order, self.edges, answer, place)
        tools, sampling = self._settle(answer)
        num_carried, left_out = self.files.account(REASONS)
        return Team(
            name=slug(name),
            form=form,
            files=tuple(self.files.names),
            agents=tuple(self.agents),
            edges=tuple(edges),
            answer=answer,
            asks_question=False,
            tools=tools,
            sampling=sampling,
            examples=examples,
            num_carried=num_carried,
            left_out=left_out,
            remarks=tuple(self.files.remarks),
        )


@dataclass(kw_only=True)
class CrewTask:
    """A task, who does it, and which tasks it reads; None reads all before it."""

    name: str
    node: Node
    agent: str | None
    context: list[str] | None
    places: tuple[SourcePosition, ...]


def read_crew(members: Members, node: Node, folder: Path, *, resolve: Resolve = field_named) -> str:
    """Add the crew of a JSON file, or of a flow, to the members; returns who has its last word.

    Args:
        folder: Where its `agents/` are, if it names them.
        resolve: What `{topic}` stands for.
    """
    agents: dict[str, Node] = {}
    given = node.need("agents")
    if isinstance(given.value, dict):
        agents = given.mapping()
    else:
        for item in given.items():
            agents[item.text()] = _agent_file(members.files, item, folder)
    tasks = []
    for i, item in enumerate(node.need("tasks").items()):
        own = item.text_at("name") or f"task_{i + 1}"
        tasks.append(read_task(own, item))
    _check_process(members.files, node.get("process"))
    return add_tasks(members, agents, tasks, given.place, resolve=resolve, code=CrewCode())


def _agent_file(files: TeamFiles, item: Node, folder: Path) -> Node:
    name = item.text()
    if not re.fullmatch(r"[\w .-]+", name) or name.startswith("."):
        message = f"`{name}` names no file of the folder `agents`."
        raise item.refuse("RM164", message, "Agents are named as their files are, without folders.")
    for suffix in (".jsonc", ".json"):
        path = folder / "agents" / f"{name}{suffix}"
        if path.is_file():
            return files.open(path, comments=True)
    message = f"there is no agents/{name}.jsonc beside {item.file}."
    raise item.refuse("RM162", message, "Write the agent's file, or leave the agent out.")


def _check_process(files: TeamFiles, node: Node | None) -> None:
    if node is None:
        return
    if node.text() == "sequential":
        return
    files.remark(node.place, "no manager hands out tasks: they run in their order")
    node.leave("tasks run in their order, each behind those before it")


def read_task(name: str, node: Node) -> CrewTask:
    """Return a task as its file has it."""
    agent = node.get("agent")
    context = node.get("context")
    names = None if context is None else [item.text() for item in context.items()]
    if context is not None:
        context.carry()
    elif node.mapping().get("context") is not None and node.mapping()["context"].value == []:
        names = []
    return CrewTask(
        name=name,
        node=node,
        agent=None if agent is None else agent.text(),
        context=names,
        places=(node.place,),
    )


def add_tasks(
    members: Members,
    agents: dict[str, Node],
    tasks: list[CrewTask],
    place: SourcePosition,
    *,
    resolve: Resolve,
    code: CrewCode,
) -> str:
    """Add an agent of the spec for every task; returns the last one.

    Raises:
        RecmasError: RM161, RM162 with the place.
    """
    check_number(place, len(members.agents) + len(tasks))
    doing: dict[str | None, list[CrewTask]] = {}
    for task in tasks:
        if task.agent is not None and task.agent not in agents:
            raise unknown(task.node.need("agent"), "agent", task.agent, agents)
        doing.setdefault(task.agent, []).append(task)
    for name, node in agents.items():
        if name not in doing:
            node.leave("no task names this agent")
    names: dict[str, str] = {}
    for task in tasks:
        if task.name in names:
            message = f"two tasks are called `{task.name}`."
            raise task.node.refuse("RM162", message, "Give every task a name of its own.")
        is_alone = task.agent is not None and len(doing[task.agent]) == 1
        name = members.name(task.agent if is_alone and task.agent else task.name)
        before = _before(task, names)
        names[task.name] = name
        members.edges += [(source, name) for source in before]
        members.agents.append(_member(members, task, name, agents, resolve, code))
    return names[tasks[-1].name]


def _before(task: CrewTask, names: Mapping[str, str]) -> list[str]:
    """Return whose results a task reads."""
    if task.context is None:
        return list(names.values())
    found = []
    for other in task.context:
        if other not in names:
            node = task.node.get("context") or task.node
            message = f"`{task.name}` reads `{other}`, which is no task before it."
            raise node.refuse("RM162", message, "`context` names tasks that come earlier.")
        found.append(names[other])
    return found


def _member(
    members: Members,
    task: CrewTask,
    name: str,
    agents: Mapping[str, Node],
    resolve: Resolve,
    code: CrewCode,
) -> TeamAgent:
    node = task.node
    system: Text = ()
    places = task.places
    if task.agent is None:
        members.files.remark(node.place, f"nobody is named for the task `{task.name}`")
    else:
        agent = agents[task.agent]
        system = agent_text(agent, resolve)
        places = (agent.place if agent.loc else replace(agent.place, line=1, column=1), *places)
        _uses(members, agent, name)
    _uses(members, node, name)
    methods = [code.agents.get(_method_of(code.agents, task.agent)), code.tasks.get(task.name)]
    for method in methods:
        if method is not None and (key := method.keys.get("tools")):
            members.add_tools(key, list(key.names), {name})
    task_text = parse_text(node.need("description").text(), SINGLE_BRACES, resolve)
    return TeamAgent(
        name=name,
        places=places,
        system=system,
        task=task_text or (Blank(name),),
        expected=parse_text(node.text_at("expected_output"), SINGLE_BRACES, resolve),
    )


def _method_of(methods: Mapping[str, Method], config: str | None) -> str:
    return next((name for name, method in methods.items() if method.config == config), "")


def agent_text(agent: Node, resolve: Resolve) -> Text:
    """Return the system text of an agent: its role, goal and background."""
    lines = []
    for key, title in (("role", "Role"), ("goal", "Goal"), ("backstory", "Background")):
        text = parse_text(agent.text_at(key), SINGLE_BRACES, resolve)
        if text:
            lines.append(joined((f"{title}:",), text, by=" "))
    return joined(*lines, by="\n")


def _uses(members: Members, node: Node, owner: str) -> None:
    """Remember tools and sampling of an agent or a task until it is known who answers."""
    if (tools := node.get("tools")) is not None:
        same = [use for use in members.tools if use.node is tools or _same(use.node, tools)]
        for use in same:
            use.owners.add(owner)
        if not same:
            members.add_tools(tools, [_tool_name(item) for item in tools.items()], {owner})
    code = node.get("allow_code_execution")
    if code is not None and code.value is True:
        members.add_tools(code, ["code_interpreter"], {owner})
    settings = [node.get("llm"), node.get("settings")]
    for found in settings:
        if found is None or not isinstance(found.value, dict):
            continue
        same = [use for use in members.settings if _same(use.node, found)]
        for use in same:
            use.owners.add(owner)
        if not same:
            members.settings.append(_Use("", found, {owner}))


def _same(one: Node | CodeKey, other: Node) -> bool:
    return isinstance(one, Node) and (one.file, one.loc) == (other.file, other.loc)


def _tool_name(item: Node) -> str:
    if isinstance(item.value, dict):
        named = item.get("name") or item.get("type") or item.get("ref") or item.need("name")
        return named.text()
    return item.text()


def examples_of(node: Node | None) -> dict[str, str]:
    """Return values that fields have by default, carried as an example of a record."""
    values = {}
    for key, item in ({} if node is None else node.mapping()).items():
        if isinstance(item.value, str | int | float):
            values[field_named(key).name] = str(item.value)
            item.carry()
    return values
