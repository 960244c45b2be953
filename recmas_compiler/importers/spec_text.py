"""A team to the text of a spec, formatted and commented like those that are written by hand.

Prompts have the layout of the patterns' own: the question, what is asked, how to call tools, one
line with the messages, the form of the answer. Slots of caches stand first and show nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from recmas_compiler.importers.arrange import Edge
from recmas_compiler.importers.team import (
    Blank,
    Field,
    Message,
    Part,
    Team,
    TeamAgent,
    Text,
    Tools,
)
from recmas_compiler.importers.texts import fields_of, joined, tidy
from recmas_compiler.spec.document.places import SourcePosition
from recmas_compiler.spec.patterns.layouts import calls_text, links_of_rows
from recmas_compiler.spec.patterns.starter_specs import schema_line
from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE
from recmas_compiler.spec.schema.sections import DEFAULT_MAX_TOKENS, ToolsSection
from recmas_compiler.spec.spec import SpecError, parse_spec
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.terminal import harmless
from recmas_runtime.core.text import aligned, listed
from recmas_runtime.formats.ids import link_name
from recmas_runtime.formats.messages import Carries
from recmas_runtime.formats.plan import MAX_ROUNDS

DEFAULT_BACKBONE: Final = "builtin:smollm2-135m-instruct"
QUESTION: Final = "question"
_ROUNDS_OF_A_LOOP: Final = 2
_WIDTH: Final = 100
_FILL_IN: Final = re.compile(r"\{\{ fill in: what [a-z0-9_-]+ is asked \}\}")
_QUESTION: Final[Text] = ("Question: ", Field(QUESTION))
# Opens something in prompts of recmas, and is text here.
_OPENING: Final = re.compile(r"\{\{|\{%|\{#")
# A guess that is rather too high: a prompt over the limit is refused.
_CHARACTERS_PER_TOKEN: Final = 3
_TOKENS_OF_A_FIELD: Final = 96
_TOKENS_OF_A_TEMPLATE: Final = 48
_FEWEST_PROMPT_TOKENS: Final = 512
_STEP_OF_PROMPT_TOKENS: Final = 256
# What the default backbone holds, 8192 positions, without room for thoughts and an answer.
_MOST_PROMPT_TOKENS: Final = 7680
_ABOUT: Final[Mapping[Carries, str]] = {
    "thoughts": "vectors that agents have thought: train it first, untrained they mislead who "
    "answers",
    "context": "vectors of what agents have read: train it first, untrained they mislead who "
    "answers",
    "written": "vectors of what agents write: train it first, untrained they mislead who answers",
    "text": "what agents write, as text",
    "cache": "rows of key/value caches, of use untrained",
}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What teams of texts do not have.

    Attributes:
        backbone: The source of the one backbone.
        rounds: None takes what the team's files say.
    """

    backbone: str = DEFAULT_BACKBONE
    latent_steps: int = 16
    carries: Carries = "cache"
    rounds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    """A spec that was written for a team.

    Attributes:
        warnings: What `recmasc check` says as well.
        to_fill: Where prompts stand to be filled in.
        fields: What a record needs.
    """

    text: str
    rounds: int
    num_links: int
    fields: tuple[str, ...]
    to_fill: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def write_spec(team: Team, options: ImportOptions, *, out: Path) -> Written:
    """Return the spec for a team, checked but for the prompts that are to be filled in.

    Args:
        out: Where it will be; paths in messages and of backbones start there.

    Raises:
        RecmasError: RM1xx: options that no spec can have, such as too many latent steps.
    """
    writer = _Writer(team, options)
    text = writer.text()
    to_fill = tuple(_to_fill(text, str(out)))
    try:
        warnings = parse_spec(text, file=str(out), base_dir=out.parent).warnings
    except SpecError as error:
        left = {(problem.line, problem.column) for problem in to_fill}
        others = [p for p in error.problems if (p.line, p.column) not in left]
        if others or not to_fill:
            raise RecmasError(others or error.problems) from error
        warnings = ()
    return Written(
        text=text,
        rounds=writer.rounds,
        num_links=len(writer.forward) + len(writer.feedback),
        fields=tuple(writer.fields),
        to_fill=to_fill,
        warnings=(*warnings, *writer.shortened(str(out))),
    )


def _to_fill(text: str, file: str) -> Iterator[Problem]:
    for number, line in enumerate(text.split("\n"), start=1):
        if found := _FILL_IN.search(line):
            message = f"`{found.group()}` stands for a text that the team's files do not have."
            hint = "Write there what the agent is asked; `recmasc check` refuses the spec until "
            hint += "then."
            yield Problem(
                code="RM166",
                severity="warning",
                message=message,
                hint=hint,
                file=file,
                line=number,
                column=found.start() + 1,
            )


class _Writer:
    def __init__(self, team: Team, options: ImportOptions) -> None:
        self.team, self.options = team, options
        self.carries = options.carries
        self.agents = [_without_slots_in_system(agent) for agent in team.agents]
        shown = fields_of(text for agent in self.agents for text in agent.texts)
        self.asks = team.asks_question or not shown
        self.fields = list(dict.fromkeys([*([QUESTION] if self.asks else []), *shown]))
        self.forward, self.feedback, self.rounds = self._links()

    def _links(self) -> tuple[list[Edge], list[Edge], int]:
        team = self.team
        forward, feedback = team.split_edges()
        rounds = self.options.rounds or team.rounds or (_ROUNDS_OF_A_LOOP if feedback else 1)
        if not feedback:
            # As in the patterns: with more rounds the answer goes back to where it began.
            fed = {target for _, target in forward}
            feedback = [(team.answer, a.name) for a in self.agents if a.name not in fed]
        if self.carries == "cache":
            forward = list(links_of_rows([a.name for a in self.agents], forward))
        return forward, feedback, min(rounds, MAX_ROUNDS)

    def text(self) -> str:
        """Return the whole file."""
        sections = [
            schema_line(SCHEMA_FILE) + self._head(),
            self._settings(),
            self._agents(),
            self._links_section(),
            self._answer(),
            self._build(),
            self._left_out(),
        ]
        return "\n".join(section for section in sections if section)

    def _head(self) -> str:
        team = self.team
        loops = "" if self.rounds == 1 else f" in {self.rounds} rounds"
        about = (
            f"{team.form[:1].upper()}{team.form[1:]}, imported from {listed(team.files)}. Its "
            f"links carry {_ABOUT[self.carries]}. `{team.answer}` writes the answer{loops}."
        )
        lines = [*_comment(about)]
        record = {name: team.examples.get(name, "...") for name in self.fields}
        if record.keys() != {QUESTION}:
            pairs = ", ".join(f"{_quoted(name)}: {_quoted(v)}" for name, v in record.items())
            lines += ["#", *_comment(f"A record has these fields: {{{pairs}}}")]
        if len(self.fields) > 1 and QUESTION not in self.fields:
            field = self.fields[0]
            lines += _comment(
                f"To serve it, say which one is the question, such as `serve: {{{field}: "
                "last_user}`."
            )
        fields = " ".join(f"--field {name}=TEXT" for name in self.fields)
        is_asked = self.fields == [QUESTION]
        run = 'recmas run DIR "QUESTION"' if is_asked else f"recmas run DIR {fields}"
        commands = {
            "recmasc check FILE": "is everything in order?",
            "recmasc explain FILE": "what does the compiler make of it?",
            "recmasc build FILE --out DIR": "write a bundle",
            run: "use it, also where torch is not installed",
        }
        lines.append("#")
        lines += [f"#   {line}" for line in aligned(commands.items())]
        return "\n".join(lines) + "\n"

    def _settings(self) -> str:
        options = self.options
        name = "smol" if "smollm2" in options.backbone.lower() else "base"
        self.backbone = name
        steps = "thoughts per message, where links carry thoughts"
        return (
            "recmas: 1                 # version of this language\n"
            f"name: {_name(self.team.name)}\n"
            f"{f'rounds: {self.rounds}':<25} # passes over the agents\n"
            f"{f'latent_steps: {options.latent_steps}':<25} # {steps}\n"
            "\nbackbones:\n"
            f"  {name}:\n"
            "    # Or a model of the Hugging Face hub, hf:ORG/NAME@REVISION, or a folder relative "
            "to this file.\n"
            f"    source: {_scalar(options.backbone)}\n"
        )

    def _agents(self) -> str:
        return "agents:\n" + "\n".join(self._agent(agent) for agent in self.agents)

    def _agent(self, agent: TeamAgent) -> str:
        places = listed(_place(place) for place in agent.places)
        head = f"  {_name(agent.name)}:"
        line = f"{head:<25} # {places}"
        lines = [line] if len(line) <= _WIDTH else [f"  # {places}", head]
        lines.append(f"    backbone: {self.backbone}")
        if agent.system:
            lines += _block("system", _shown(agent.system), indent=4)
        senders, waiting = self._senders(agent.name)
        with_all = self._prompt(agent, [*senders, *waiting])
        if waiting:
            lines.append("    prompt:")
            lines += _block("first", self._prompt(agent, senders), indent=6)
            lines += _block("then", with_all, indent=6)
        else:
            lines += _block("prompt", with_all, indent=4)
        return "\n".join(lines) + "\n"

    def _senders(self, name: str) -> tuple[list[str], list[str]]:
        """Return whose messages an agent gets within a round, and only from the next one on."""
        now = [source for source, target in self.forward if target == name]
        later = [source for source, target in self.feedback if target == name]
        return now, later

    def _prompt(self, agent: TeamAgent, senders: Sequence[str]) -> str:
        """Return a prompt as it stands in the spec, with slots for some senders."""
        calls: Text = ()
        if agent.name == self.team.answer and self.team.tools:
            calls = (calls_text(_section(self.team.tools)),)
        expected = joined(("Expected output:",), agent.expected, by=" ") if agent.expected else ()
        if self.carries == "cache":
            rest = joined(agent.task, calls, expected, by="\n")
            slots = " ".join(f"{{{{ latent.{sender} }}}}" for sender in senders)
            whole = self._whole(agent, rest, senders)
            return f"{slots}\n{whole}" if slots else whole
        inline = agent.shown_senders
        messages = _messages([sender for sender in senders if sender not in inline])
        # What changes from round to round stands behind all that does not.
        ends = [expected, messages] if fields_of([expected]) else [messages, expected]
        return self._whole(agent, joined(agent.task, calls, *ends, by="\n"), senders)

    def _whole(self, agent: TeamAgent, rest: Text, senders: Sequence[str]) -> str:
        if not (rest or self.asks):
            rest = (Blank(agent.name),)
        text = joined(_QUESTION, rest, by="\n\n") if self.asks else rest
        return _shown(text, senders=senders, is_cache=self.carries == "cache")

    def _links_section(self) -> str:
        settings = [] if self.carries == "thoughts" else [f"carries: {self.carries}"]
        lines = []
        for source, target in self.forward:
            lines.append(f"  {link_name(source, target)}: {{{', '.join(settings)}}}")
        for source, target in self.feedback:
            inside = ", ".join([*settings, "feedback: true"])
            line = f"  {link_name(source, target)}: {{{inside}}}"
            lines.append(f"{line:<54} # seen in the next round")
        return "\n".join(["links:                    # who hands over to whom", *lines]) + "\n"

    def _answer(self) -> str:
        sampling = {"max_new_tokens": 128, "temperature": 0.0} | dict(self.team.sampling)
        lines = ["answer:", f"  agent: {_name(self.team.answer)}"]
        for key, value in sampling.items():
            if isinstance(value, tuple):
                lines.append(f"  {key}: [{', '.join(map(_quoted, value))}]")
                continue
            note = "   # always the likeliest token" if (key, value) == ("temperature", 0.0) else ""
            lines.append(f"{f'  {key}: {value}':<23}{note}".rstrip())
        tools = self.team.tools
        if tools:
            lines.append("  tools:                  # its prompt says how to call them")
            if tools.python:
                lines.append("    python: {}            # in a sandbox")
            if tools.ask:
                lines.append("    ask: true             # a human answers")
            if tools.functions:
                names = ", ".join(map(_name, tools.functions))
                lines.append("    # given to the runtime by the Python program that calls it")
                lines.append(f"    functions: [{names}]")
        return "\n".join(lines) + "\n"

    def _build(self) -> str:
        limit = f"  max_prompt_tokens: {self._limit()}"
        return (
            "build:\n"
            "  target: onnx\n"
            "  precision: float32\n"
            f"{limit:<25} # longer prompts are refused, never cut\n"
            "  max_batch: 8\n"
        )

    def _prompt_tokens(self) -> int:
        """Return how many positions the longest prompt may take, messages included; a guess."""
        own = {agent.name: self._own_tokens(agent) for agent in self.agents}
        most = 0
        for agent in self.agents:
            senders = [sender for group in self._senders(agent.name) for sender in group]
            taken = sum(self._message_tokens(own[sender]) for sender in senders)
            most = max(most, own[agent.name] + taken)
        steps = math.ceil(most / _STEP_OF_PROMPT_TOKENS)
        return max(_FEWEST_PROMPT_TOKENS, steps * _STEP_OF_PROMPT_TOKENS)

    def _limit(self) -> int:
        tokens = self._prompt_tokens()
        is_default = self.options.backbone == DEFAULT_BACKBONE
        return min(tokens, _MOST_PROMPT_TOKENS) if is_default else tokens

    def shortened(self, file: str) -> list[Problem]:
        """Return a warning where prompts may be too long for the default backbone."""
        if self._limit() == self._prompt_tokens():
            return []
        message = (
            f"a prompt may take {self._prompt_tokens()} positions with its messages, and this "
            "backbone holds 8192: a record whose prompt is longer is refused."
        )
        hint = "Choose a --backbone for longer texts, or let links carry `text`."
        found = Problem(code="RM167", severity="warning", message=message, hint=hint, file=file)
        return [found]

    def _own_tokens(self, agent: TeamAgent) -> int:
        texts = [*agent.texts, _QUESTION if self.asks else ()]
        written = sum(len(part) for text in texts for part in text if isinstance(part, str))
        shown = sum(isinstance(part, Field) for text in texts for part in text)
        tokens = written // _CHARACTERS_PER_TOKEN + _TOKENS_OF_A_FIELD * shown
        return tokens + _TOKENS_OF_A_TEMPLATE

    def _message_tokens(self, prompt_tokens: int) -> int:
        match self.carries:
            case "cache" | "context":
                return prompt_tokens
            case "text" | "written":
                return DEFAULT_MAX_TOKENS
        return self.options.latent_steps

    def _left_out(self) -> str:
        team = self.team
        lines = []
        if team.remarks:
            lines.append("# Read otherwise than it ran:")
            lines += [f"#   {_place(place)}: {_line(text)}" for place, text in team.remarks]
        if team.left_out:
            lines.append("# Not carried over:")
            lines += [
                f"#   {_place(left.place)}: `{_line(left.key)}`: {_line(left.reason)}"
                for left in team.left_out
            ]
        return "\n".join(lines) + "\n" if lines else ""


def _without_slots_in_system(agent: TeamAgent) -> TeamAgent:
    """Return an agent whose system text shows no messages, which the language has in prompts."""
    if not any(isinstance(part, Message) for part in agent.system):
        return agent
    return replace(agent, system=(), task=joined(agent.system, agent.task, by="\n\n"))


def _messages(senders: Sequence[str]) -> Text:
    """Return the line with the slots that no text names; several say whose they are."""
    if not senders:
        return ()
    parts: list[Part] = ["Handed over: "]
    for i, sender in enumerate(senders):
        if len(senders) > 1:
            parts.append(f"{', ' if i else ''}{sender} ")
        parts.append(Message((sender,)))
    return tidy(parts)


def _shown(text: Text, *, senders: Sequence[str] = (), is_cache: bool = False) -> str:
    """Return a text in the language of prompts."""
    pieces = []
    for part in text:
        match part:
            case Field():
                pieces.append(f"{{{{ {part.name} }}}}")
            case Message():
                there = [agent for agent in part.agents if agent in senders]
                if not there:
                    pieces.append("(nothing yet)")
                elif is_cache:
                    pieces.append("(see above)")
                else:
                    pieces.append(" ".join(f"{{{{ latent.{agent} }}}}" for agent in there))
            case Blank():
                pieces.append(f"{{{{ fill in: what {part.agent} is asked }}}}")
            case _:
                pieces.append(_OPENING.sub(lambda found: f'{{{{ "{found.group()}" }}}}', part))
    return "".join(pieces)


def _section(tools: Tools) -> ToolsSection:
    given: dict[str, object] = {"ask": tools.ask, "functions": list(tools.functions)}
    return ToolsSection.model_validate(given | ({"python": {}} if tools.python else {}))


def _block(key: str, text: str, *, indent: int) -> list[str]:
    """Return a text as a block of YAML."""
    space = " " * indent
    lines = [f"{space}  {line}".rstrip() for line in text.split("\n")]
    return [f"{space}{key}: |", *lines]


def _comment(text: str) -> Iterable[str]:
    """Wrap a text into comment lines."""
    line = "#"
    for word in _line(text).split(" "):
        if len(line) + 1 + len(word) > _WIDTH and line != "#":
            yield line
            line = "#"
        line += f" {word}"
    yield line


def _line(text: str) -> str:
    return harmless(" ".join(text.split()))


def _place(place: SourcePosition) -> str:
    return _line(str(place))


def _quoted(text: str) -> str:
    """Return a text in double quotes, as YAML and JSON read it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\t", "\\t") + '"'


def _scalar(text: str) -> str:
    is_plain = re.fullmatch(r"[A-Za-z.][A-Za-z0-9_./@-]*(:[A-Za-z0-9_./@-]+)*", text)
    return text if is_plain else _quoted(text)


# Names that YAML, of one version or another, takes for something else than text.
_NOT_TEXT: Final = re.compile(r"[0-9].*|true|false|null|y|n|yes|no|on|off", re.IGNORECASE)


def _name(name: str) -> str:
    return f'"{name}"' if _NOT_TEXT.fullmatch(name) else name
