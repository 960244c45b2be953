"""Declarative files of the Microsoft Agent Framework: `kind: Prompt`, and `kind: Workflow`.

A workflow's actions are a graph: those that invoke agents stay, variables, activities and
conditions are left out, and a `GotoAction` that leads back closes a loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recmas_compiler.importers.arrange import has_loop, order_from, without
from recmas_compiler.importers.readers.prompts_file import Prompts
from recmas_compiler.importers.source_files import (
    ONLY_ANSWERS,
    Node,
    TeamFiles,
    check_number,
    take_sampling,
    unknown,
)
from recmas_compiler.importers.team import (
    Blank,
    Field,
    Message,
    Part,
    Sampling,
    Team,
    TeamAgent,
    Text,
    Tools,
    free_slug,
    slug,
    tools_named,
)
from recmas_compiler.importers.texts import DOTTED_BRACES, SINGLE_BRACES, parse_text
from recmas_compiler.importers.texts import field as field_named
from recmas_compiler.spec.document.places import SourcePosition
from recmas_runtime.core.errors import RecmasError

_ENDS: Final = (
    "EndWorkflow",
    "EndDialog",
    "EndConversation",
    "CancelDialog",
    "CancelAllDialogs",
)
_SAMPLING: Final = {
    "temperature": "temperature",
    "maxOutputTokens": "max_new_tokens",
    "topP": "top_p",
    "topK": "top_k",
    "seed": "seed",
    "stopSequences": "stop",
}
_EXPRESSION: Final = "expressions are not computed"
_NO_MODEL: Final = "it invokes no agent; who comes after it goes on"
_REASONS: Final[Mapping[str, str]] = {
    "displayName": "labels have no meaning here",
    "description": "labels have no meaning here",
    "metadata": "labels have no meaning here",
    "id": "the model is that of --backbone",
    "model": "the model is that of --backbone",
    "inputSchema": "records and answers are text",
    "outputSchema": "records and answers are text",
    "template": "prompts have fields and slots, and no logic",
    "conversationId": "an agent reads the question and the messages of its links",
    "arguments": _EXPRESSION,
    "messages": _EXPRESSION,
    "externalLoop": "there is no review between agents",
    "autoSend": "only the answer is shown",
    "responseObject": "messages are vectors, rows or text, and no objects",
    "condition": "links have no conditions: who stands behind one runs in every round",
    "activity": "only the answer is shown",
    "variable": _EXPRESSION,
    "value": _EXPRESSION,
    "maxTurns": "a system ends after its rounds",
}
_MOST_ACTIONS: Final = 1000
# `Local.TurnCount < 4`: how often a loop goes on; the other way round, when it ends.
_BOUND: Final = re.compile(r"([A-Za-z]+\.[A-Za-z0-9_]+)\s*(<=|>=|<|>)\s*([0-9]{1,4})\b")
_UP: Final = re.compile(r"=\s*([A-Za-z]+\.[A-Za-z0-9_]+)\s*\+\s*1\s*")
_MESSAGE: Final = re.compile(r'=\s*UserMessage\(\s*"(.*)"\s*\)\s*', re.DOTALL)
_VARIABLE: Final = re.compile(
    r"=?\s*(?:UserMessage|MessageText|Last)?\(?\s*([A-Za-z]+\.[\w.]+)\s*\)?\s*"
)
_CALL: Final = re.compile(r"[A-Za-z]+\((.*)\)")
_QUESTIONS: Final = ("System.LastMessage", "System.LastMessage.Text", "Workflow.Inputs")


def read(path: Path, *, prompts: Path | None = None) -> Team:
    """Read an agent or a workflow.

    Args:
        prompts: YAML, a text or `{system, prompt, expected}` by the name of the agent.

    Raises:
        RecmasError: RM100 to RM102, RM160 to RM164 with the place.
    """
    files = TeamFiles(root=path.parent)
    root = files.open(path)
    kind = root.need("kind")
    texts = Prompts.of(prompts)
    match kind.text():
        case "Prompt":
            return _Reader(files, root, texts, path).single()
        case "Workflow":
            return _Reader(files, root, texts, path).team()
    message = f"`kind: {kind.value}` is none that can be imported."
    raise kind.refuse("RM161", message, "Known here: Prompt and Workflow.")


@dataclass(kw_only=True)
class _Action:
    """An action, and the actions that may come after it."""

    node: Node
    kind: str
    agent: str = ""
    after: list[int] = field(default_factory=list)


@dataclass
class _Reader:
    files: TeamFiles
    root: Node
    prompts: Prompts
    path: Path
    actions: list[_Action] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    jumps: list[tuple[int, Node]] = field(default_factory=list)
    variables: dict[str, Part] = field(default_factory=dict)
    counters: set[str] = field(default_factory=set)
    bounds: list[tuple[str, int]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # invocation -> name here
    definitions: dict[str, Node] = field(default_factory=dict)

    def single(self) -> Team:
        """Read a file that is one agent."""
        own = slug(self.root.text_at("name") or self.path.stem)
        agent = self._defined(self.root, own, (self.root.need("kind").place,))
        tools, sampling = self._settings([(self.root, True)])
        return self._team([agent], [], own, "an agent", tools, sampling, None)

    def _team(
        self,
        agents: list[TeamAgent],
        edges: list[tuple[str, str]],
        answer: str,
        form: str,
        tools: Tools,
        sampling: Sampling,
        rounds: int | None,
    ) -> Team:
        name = slug(self._name())
        num_carried, left_out = self.files.account(_REASONS)
        return Team(
            name=name,
            form=f"{form} of the Microsoft Agent Framework",
            files=(*self.files.names, *self.prompts.file),
            agents=tuple(agents),
            edges=tuple(edges),
            answer=answer,
            rounds=rounds,
            tools=tools,
            sampling=sampling,
            num_carried=num_carried + self.prompts.num_carried,
            left_out=left_out,
            remarks=tuple(self.files.remarks),
        )

    def _name(self) -> str:
        trigger = self.root.get("trigger")
        found = "" if trigger is None else trigger.text_at("id")
        return self.root.text_at("name") or found or self.path.stem

    def team(self) -> Team:
        """Read a workflow."""
        holder = self.root
        if (
            trigger := self.root.get("trigger")
        ) is not None and "actions" not in self.root.mapping():
            holder = trigger
            trigger.text_at("kind")
        self._walk(holder.need("actions").items(), [])
        for source, node in self.jumps:
            if node.text() not in self.ids:
                raise unknown(node, "action", node.text(), self.ids)
            self.actions[source].after.append(self.ids[node.text()])
        number = {i: f"{i}" for i in range(len(self.actions))}
        edges = [(number[i], number[j]) for i, a in enumerate(self.actions) for j in a.after]
        edges.append(("start", "0"))
        invoking = [i for i, action in enumerate(self.actions) if action.agent]
        check_number(holder.need("actions").place, len(invoking))
        passive = [number[i] for i in number if i not in invoking]
        edges = without(passive, edges)
        starts = [t for s, t in edges if s == "start"]
        edges = [(s, t) for s, t in edges if s != "start"]
        found = order_from(starts, [number[i] for i in invoking], edges)
        order = [int(text) for text in found]
        pairs = [(int(s), int(t)) for s, t in edges if s in found and t in found]
        return self._assemble(order, pairs)

    def _assemble(self, order: list[int], pairs: list[tuple[int, int]]) -> Team:
        often = [self.actions[i].agent for i in order]
        for i in order:
            action = self.actions[i]
            wanted = action.agent
            if often.count(wanted) > 1 and (own := action.node.get("id")) is not None:
                wanted = f"{wanted}_{own.value}"
            self.names[i] = free_slug(wanted, list(self.names.values()))
        self._outputs(order)
        names = [self.names[i] for i in order]
        edges = [(self.names[s], self.names[t]) for s, t in pairs]
        sources = {s for s, t in pairs if s != t}
        ends = [i for i in order if i not in sources or self._may_end(i)]
        answer = (ends or order)[-1]
        place = self.actions[answer].node.place
        edges = self.files.join_ends(names, edges, self.names[answer], place)
        self._define()
        agents = [self._agent(i) for i in order]
        self.prompts.check_used({self.actions[i].agent: i for i in order})
        last = self.actions[answer].agent
        used = dict.fromkeys(self.actions[i].agent for i in order)
        uses = [(self.definitions[name], name == last) for name in used if name in self.definitions]
        tools, sampling = self._settings(uses)
        rounds = None
        if has_loop(names, edges):
            rounds = self._rounds()
        return self._team(agents, edges, self.names[answer], "a workflow", tools, sampling, rounds)

    def _may_end(self, invocation: int) -> bool:
        """Tell whether the workflow may end behind an agent before another one runs."""
        seen, waiting = set[int](), [invocation]
        while waiting:
            action = self.actions[waiting.pop()]
            if action.kind in _ENDS or not action.after:
                return True
            new = [i for i in action.after if i not in seen and not self.actions[i].agent]
            seen |= set(new)
            waiting += new
        return False

    def _rounds(self) -> int | None:
        """Return how often a loop runs, as a counter bounds it."""
        found = [bound for name, bound in self.bounds if name in self.counters]
        if found:
            return max(found)
        message = "nothing bounds the loop; `rounds` is 2, or what --rounds says"
        self.files.remark(self.root.place, message)
        return None

    def _walk(self, items: list[Node], before: list[int]) -> list[int]:
        """Add actions one behind the other; returns those that go on behind the last one."""
        for node in items:
            kind = node.need("kind").text()
            index = len(self.actions)
            if index >= _MOST_ACTIONS:
                raise node.refuse("RM161", f"more than {_MOST_ACTIONS} actions.", "Split it.")
            self.actions.append(_Action(node=node, kind=kind))
            if (own := node.get("id")) is not None:
                if own.text() in self.ids:
                    message = f"two actions are called `{own.value}`."
                    raise own.refuse("RM162", message, "Give every action an `id` of its own.")
                self.ids[own.text()] = index
            for earlier in before:
                self.actions[earlier].after.append(index)
            before = self._act(index, node, kind)
        return before

    def _act(self, index: int, node: Node, kind: str) -> list[int]:
        """Read an action; returns the actions behind which the next one comes."""
        if kind == "InvokeAzureAgent":
            self.actions[index].agent = self._invoked(node)
        elif kind == "GotoAction":
            target = node.get("actionId") or node.get("target") or node.need("actionId")
            self.jumps.append((index, target))
            return []
        elif kind in _ENDS:
            return []
        elif kind in ("ConditionGroup", "If"):
            return self._branches(index, node)
        elif kind == "Foreach":
            ends = self._walk(node.need("actions").items(), [index])
            for end in ends:
                self.actions[end].after.append(index)
            node.need("source").leave(_EXPRESSION)
        elif kind in ("BreakLoop", "ContinueLoop"):
            message = f"`{kind}` leaves a loop at run time."
            raise node.refuse("RM163", message, "Write the loop with a GotoAction and a counter.")
        else:
            self._variable(node)
            node.need("kind").carry()
        return [index]

    def _branches(self, index: int, node: Node) -> list[int]:
        ends: list[int] = []
        otherwise = node.get("elseActions") or node.get("else")
        if node.value.get("kind") == "If":  # type: ignore[union-attr]  # it has a kind
            branches = [(node, node.get("then") or node.get("actions"))]
        else:
            branches = [(item, item.get("actions")) for item in node.need("conditions").items()]
        for holder, actions in branches:
            if (condition := holder.get("condition")) is not None:
                self._bound(condition, goes_on=_has_jump(actions))
            if holder is not node and (own := holder.get("id")) is not None:
                own.carry()
            ends += [index] if actions is None else self._walk(actions.items(), [index])
        ends += [index] if otherwise is None else self._walk(otherwise.items(), [index])
        return list(dict.fromkeys(ends))

    def _bound(self, condition: Node, *, goes_on: bool) -> None:
        """Take the bound of a counter from a condition, if it has one."""
        for found in _BOUND.finditer(str(condition.value)):
            name, sign, number = found.group(1), found.group(2), int(found.group(3))
            is_upper = sign.startswith("<")
            if is_upper == goes_on:
                self.bounds.append((name, max(1, number + (sign in ("<=", ">")))))
                condition.carry()
                return

    def _invoked(self, node: Node) -> str:
        found = node.get("agent") or node.get("agentName") or node.need("agent")
        key = found if isinstance(found.value, str) else found.need("name")
        name = key.text()
        if name.startswith("="):
            message = "an expression chooses at run time which agent runs."
            raise key.refuse("RM163", message, "Name the agent.")
        return name

    def _variable(self, node: Node) -> None:
        """Take what a variable stands for, as far as it is the question or a counter."""
        target, value = node.get("variable") or node.get("path"), node.get("value")
        if target is None or not isinstance(target.value, str):
            return
        text = "" if value is None else str(value.value)
        if up := _UP.fullmatch(text):
            if up.group(1) == target.value:
                self.counters.add(up.group(1))
                target.carry()
                assert value is not None
                value.carry()
        elif (shown := _VARIABLE.fullmatch(text)) and value is not None:
            part = self._part(shown.group(1))
            if part is not None:
                self.variables[target.value] = part
                target.carry()
                value.carry()

    def _part(self, name: str) -> Part | None:
        """Return what a variable stands for; None if that is not known."""
        while call := _CALL.fullmatch(name):
            name = call.group(1)
        if name in _QUESTIONS:
            return Field("question")
        if name.startswith("Workflow.Inputs."):
            return field_named(name)
        return self.variables.get(name) or self.variables.get(name.rpartition(".")[0])

    def _outputs(self, order: list[int]) -> None:
        """Let variables that agents write stand for their messages."""
        written: dict[str, list[str]] = {}
        for i in order:
            output = self.actions[i].node.get("output")
            for key in () if output is None else ("messages", "responseObject", "property"):
                if (found := output.get(key)) is not None:  # type: ignore[union-attr]
                    written.setdefault(found.text(), []).append(self.names[i])
            if (found := self.actions[i].node.get("resultProperty")) is not None:
                written.setdefault(found.text(), []).append(self.names[i])
        for name, agents in written.items():
            self.variables[name] = Message(tuple(agents))

    def _define(self) -> None:
        """Find agents that the workflow has in itself, and those in files beside it."""
        wanted = {action.agent for action in self.actions if action.agent}
        inline = self.root.get("agents")
        for name, node in ({} if inline is None else inline.mapping()).items():
            if name not in wanted:
                node.leave("no action invokes this agent")
            elif "file" in node.mapping():
                reference = node.need("file")
                path = self.files.beside(reference, reference.text())
                self.definitions[name] = self.files.open(path)
            else:
                self.definitions[name] = node
        for path in sorted([*self.path.parent.glob("*.yaml"), *self.path.parent.glob("*.yml")]):
            name = "" if path == self.path else self._prompt_in(path)
            if name in wanted:
                self.definitions.setdefault(name, self.files.open(path))

    def _prompt_in(self, path: Path) -> str:
        """Return the name of the agent that a file beside defines; other files are no concern."""
        try:
            value = TeamFiles(self.files.root).open(path).value
        except RecmasError:
            return ""
        is_prompt = isinstance(value, dict) and value.get("kind") == "Prompt"
        name = value.get("name") if is_prompt and isinstance(value, dict) else None
        return name if isinstance(name, str) else ""

    def _agent(self, invocation: int) -> TeamAgent:
        action, own = self.actions[invocation], self.names[invocation]
        place = action.node.place
        given = self.prompts.agent(action.agent, own, resolve=field_named, place=place)
        if given is not None:
            return given
        said = self._said(action.node)
        if action.agent not in self.definitions:
            return TeamAgent(name=own, places=(place,), task=said or (Blank(own),))
        node = self.definitions[action.agent]
        defined = self._defined(node, own, (place, node.need("kind").place))
        if said:
            return TeamAgent(name=own, places=defined.places, system=defined.system, task=said)
        return defined

    def _said(self, node: Node) -> Text:
        """Return what an action says to its agent, where that is a text."""
        given = node.get("input")
        messages = None if given is None else given.get("messages")
        if messages is None or not isinstance(messages.value, str):
            return ()
        if found := _MESSAGE.fullmatch(messages.value):
            text = found.group(1).replace('""', '"')
        elif not messages.value.lstrip().startswith("="):
            text = messages.value
        else:
            variable = _VARIABLE.fullmatch(messages.value)
            part = None if variable is None else self._part(variable.group(1))
            if part is not None:
                messages.carry()
            return (part,) if isinstance(part, Message) else ()
        messages.carry()
        return parse_text(text, DOTTED_BRACES, self._part)

    def _defined(self, node: Node, own: str, places: tuple[SourcePosition, ...]) -> TeamAgent:
        node.text_at("name")
        texts = [
            parse_text(node.text_at(key), SINGLE_BRACES, lambda _: None)
            for key in ("instructions", "additionalInstructions")
        ]
        system = tuple(part for text in texts for part in ((*text, "\n") if text else ()))
        node.need("kind").carry()
        return TeamAgent(
            name=own,
            places=places,
            system=parse_text("".join(map(str, system)), SINGLE_BRACES, lambda _: None),
            task=() if system else (Blank(own),),
        )

    def _settings(self, uses: list[tuple[Node, bool]]) -> tuple[Tools, Sampling]:
        tools = Tools()
        sampling: Sampling = {}
        for node, answers in uses:
            model = node.get("model")
            options = (
                model.get("options")
                if model is not None and isinstance(model.value, dict)
                else None
            )
            sampling = take_sampling(options, _SAMPLING, answers=answers) or sampling
            named = []
            found = node.get("tools")
            for item in [] if found is None else found.items():
                if not answers:
                    item.leave(ONLY_ANSWERS)
                    continue
                item.text_at("kind")
                key = item.get("name") or item.need("kind")
                named.append(key.text())
            tools = tools_named(named) if named else tools
        return tools, sampling


def _has_jump(actions: Node | None) -> bool:
    """Tell whether a branch goes back somewhere."""
    return actions is not None and any(kind == "GotoAction" for kind in _kinds(actions.value))


def _kinds(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield value.get("kind")
        for item in value.values():
            yield from _kinds(item)
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item)
