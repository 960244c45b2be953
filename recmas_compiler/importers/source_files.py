"""The files of a team: opened inside of one folder, read key by key, and every key accounted for.

A reader takes what has a meaning here from `Node`s. What nobody took is listed at the end, so that
nothing is left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from pydantic import ValidationError

from recmas_compiler.importers.arrange import Edge, ends_of
from recmas_compiler.importers.json_source import parse_json
from recmas_compiler.importers.team import LeftOut, Sampling
from recmas_compiler.spec.document.places import Loc, SourcePosition, is_file
from recmas_compiler.spec.document.problems import Language, did_you_mean, problem_at, show
from recmas_compiler.spec.document.yaml_source import Source, Value, parse_yaml, read_text
from recmas_compiler.spec.schema.sections import MAX_AGENTS, AnswerSection
from recmas_runtime.core.errors import RecmasError

TEAM_FILE: Final = Language(
    noun="team file",
    start_hint="docs/importing.md says which files can be imported.",
    file_hint="Give the path of a team's file.",
    code="RM160",
)
MAX_FILES: Final = 256
YAML_SUFFIXES: Final = (".yaml", ".yml")
_LONGEST_TEXT: Final = 60_000
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_NO_MEANING: Final = "it has no meaning here"


def refuse(place: SourcePosition, code: str, message: str, hint: str) -> RecmasError:
    """Return the error for a place of a team's file, for `raise`."""
    return RecmasError(problem_at(place, code, message, hint=hint))


@dataclass(frozen=True, eq=False)
class Node:
    """A value of a file, and where it stands."""

    files: TeamFiles
    source: Source
    loc: Loc
    value: Value

    @property
    def place(self) -> SourcePosition:
        """Where its key stands, or else it."""
        return self.source.places.key(self.loc)

    @property
    def file(self) -> str:
        """The file, as messages name it."""
        return self.source.places.file

    @property
    def key(self) -> str:
        """The path to it, such as `researcher.tools`."""
        return ".".join(map(str, self.loc)) or "the file"

    def inside(self, piece: str) -> SourcePosition:
        """Return where a piece of this text stands."""
        text = str(self.value)
        return self.source.places.inside(self.loc, text, max(0, text.find(piece)), len(piece))

    def carry(self) -> Node:
        """Count this key, and those around it, as carried over."""
        self.files.carried.add((self.file, self.loc))
        return self

    def carry_all(self) -> Node:
        """Count this key and all below it as carried over."""
        self.carry()
        for child in self._children():
            child.carry_all()
        return self

    def leave(self, reason: str) -> None:
        """List this key, and what is below it, as not carried over."""
        self.files.left.setdefault((self.file, self.loc), reason)

    def refuse(self, code: str, message: str, hint: str) -> RecmasError:
        """Return an error about this value, for `raise`."""
        return refuse(self.place, code, message, hint)

    def _wrong(self, wanted: str) -> RecmasError:
        message = f"`{self.key}` should be {wanted}, is {show(self.value)}."
        return self.refuse("RM161", message, "docs/importing.md says which files can be imported.")

    def _child(self, key: str | int, value: Value) -> Node:
        return Node(self.files, self.source, (*self.loc, key), value)

    def _children(self) -> Iterator[Node]:
        if isinstance(self.value, dict):
            yield from (self._child(key, item) for key, item in self.value.items())
        elif isinstance(self.value, list):
            yield from (self._child(i, item) for i, item in enumerate(self.value))

    def mapping(self) -> dict[str, Node]:
        """Return the entries of a mapping."""
        if not isinstance(self.value, dict):
            raise self._wrong("a mapping")
        return {key: self._child(key, item) for key, item in self.value.items()}

    def items(self) -> list[Node]:
        """Return the entries of a list."""
        if not isinstance(self.value, list):
            raise self._wrong("a list")
        return list(self._children())

    def get(self, key: str) -> Node | None:
        """Return an entry of a mapping; None if it is not there, or says nothing."""
        found = self.mapping().get(key)
        if found is not None and found.value in (None, [], {}):
            found.carry()
            return None
        return found

    def need(self, key: str) -> Node:
        """Return an entry that has to be there."""
        found = self.mapping().get(key)
        if found is None:
            message = f"{f'`{self.key}`' if self.loc else 'the file'} has no `{key}`."
            raise self.refuse("RM161", message, f"Add `{key}`, or give the team's own file.")
        return found

    def text(self) -> str:
        """Return a text, carried over."""
        if not isinstance(self.value, str):
            raise self._wrong("text")
        if found := _CONTROL.search(self.value):
            message = f"`{self.key}` holds the character U+{ord(found.group()):04X}."
            raise self.refuse("RM160", message, "Remove it: prompts are plain text.")
        if len(self.value) > _LONGEST_TEXT:
            message = f"`{self.key}` has {len(self.value)} characters, more than {_LONGEST_TEXT}."
            raise self.refuse("RM161", message, "Shorten it: prompts are read in every run.")
        self.carry()
        return self.value

    def text_at(self, key: str) -> str:
        """Return a text that may be missing, then empty, carried over."""
        found = self.get(key)
        return "" if found is None else found.text()

    def whole_number(self) -> int:
        """Return a whole number above 0, carried over."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 1:
            raise self._wrong("a whole number above 0")
        self.carry()
        return self.value

    def is_true(self, key: str) -> bool:
        """Tell whether a setting is on; one that is off is its default and carried over."""
        found = self.get(key)
        if found is None or found.value is False:
            if found is not None:
                found.carry()
            return False
        return found.value is True


@dataclass
class TeamFiles:
    """The folder of a team: what was opened, and which keys were taken.

    Attributes:
        root: No file outside of it is read.
        carried: Keys that were taken, by file and path.
        left: Keys that are listed, with the reason.
    """

    root: Path
    opened: dict[Path, Node] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    carried: set[tuple[str, Loc]] = field(default_factory=set)
    left: dict[tuple[str, Loc], str] = field(default_factory=dict)
    remarks: list[tuple[SourcePosition, str]] = field(default_factory=list)
    num_carried_in_code: int = 0
    left_in_code: list[LeftOut] = field(default_factory=list)

    def shown(self, path: Path) -> str:
        """Return how messages name a file."""
        return str(path)

    def read(self, path: Path) -> str:
        """Return the text of a file of the team."""
        self._check_inside(path, SourcePosition(file=str(path), line=1, column=1))
        if len(self.names) >= MAX_FILES:
            message = f"a team of more than {MAX_FILES} files."
            raise refuse(self._start(path), "RM161", message, "Give the folder of one team.")
        text = read_text(path, file=self.shown(path), language=TEAM_FILE)
        self.names.append(self.shown(path))
        return text

    def open(self, path: Path, *, comments: bool = False) -> Node:
        """Return what a YAML or JSON file holds; each file is read once.

        Args:
            comments: Whether JSON may have comments.

        Raises:
            RecmasError: RM100 to RM102, RM160, RM164.
        """
        key = path.resolve()
        if key not in self.opened:
            text, file = self.read(path), self.shown(path)
            if path.suffix.lower() in YAML_SUFFIXES:
                source = parse_yaml(text, file=file, language=TEAM_FILE)
            else:
                source = parse_json(text, file=file, comments=comments)
            if source.problems:
                raise RecmasError(source.problems)
            self.opened[key] = Node(self, source, (), source.value)
            self.opened[key].mapping()
        return self.opened[key]

    def beside(self, node: Node, name: str, *, inside: Sequence[str] = ()) -> Path:
        """Return the path of a file that `node` names, relative to its own file.

        Args:
            inside: Names that the file may have in the folder that is named instead.

        Raises:
            RecmasError: RM164 if it leaves the folder of the team; RM162 if it is not there.
        """
        place = node.place
        windows = PureWindowsPath(name)
        is_absolute = PurePosixPath(name).is_absolute() or windows.drive or windows.root
        if is_absolute or name.startswith("~") or "\\" in name or "\0" in name:
            message = f"{show(name)} is no relative path with `/`."
            raise refuse(place, "RM164", message, "Name a file inside of the team's folder.")
        path = Path(node.file).parent / name
        path = next((path / own for own in inside if (path / own).is_file()), path)
        self._check_inside(path, place)
        if not is_file(path):
            message = f"there is no file {show(name)} beside {node.file}."
            raise refuse(place, "RM162", message, "Check the name, or copy the file there.")
        return path

    def _check_inside(self, path: Path, place: SourcePosition) -> None:
        try:
            is_inside = path.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError, ValueError):  # a loop of links, or no name of a file
            is_inside = False
        if not is_inside:
            message = f"{show(str(path))} is not inside of {self.root}."
            hint = "Files of a team lie in its folder: copy it there."
            raise refuse(place, "RM164", message, hint)

    def _start(self, path: Path) -> SourcePosition:
        return SourcePosition(file=self.shown(path), line=1, column=1)

    def remark(self, place: SourcePosition, message: str) -> None:
        """Note what is read otherwise than it runs where it comes from."""
        if (place, message) not in self.remarks:
            self.remarks.append((place, message))

    def join_ends(
        self, order: Sequence[str], edges: Sequence[Edge], answer: str, place: SourcePosition
    ) -> list[Edge]:
        """Return the edges, and one from every other end to the agent that answers.

        Who is read by nobody would think in vain.
        """
        others = [end for end in ends_of(order, edges) if end != answer]
        for end in others:
            message = f"`{end}` ends the team beside `{answer}`, which reads it and answers"
            self.remark(place, message)
        return [*edges, *((end, answer) for end in others)]

    def account(self, reasons: Mapping[str, str]) -> tuple[int, tuple[LeftOut, ...]]:
        """Return how many keys were carried over, and every other key with the reason.

        A key that is listed stands for all below it.

        Args:
            reasons: For keys that no reader took, by their name.
        """
        count, listed = self.num_carried_in_code, list(self.left_in_code)
        around = {(file, loc[:i]) for file, loc in self.carried for i in range(len(loc))}
        for root in self.opened.values():
            waiting = [root]
            while waiting:
                node = waiting.pop()
                entry = (node.file, node.loc)
                is_key = bool(node.loc) and isinstance(node.loc[-1], str)
                if entry in self.left:
                    listed.append(LeftOut(key=node.key, place=node.place, reason=self.left[entry]))
                    continue
                if is_key and entry not in self.carried and entry not in around:
                    reason = reasons.get(str(node.loc[-1]), _NO_MEANING)
                    listed.append(LeftOut(key=node.key, place=node.place, reason=reason))
                    continue
                count += is_key
                waiting += reversed(list(node._children()))
        order = {name: i for i, name in enumerate(self.names)}
        listed.sort(key=lambda left: (order.get(left.place.file, -1), left.place))
        return count, tuple(listed)


def check_number(place: SourcePosition, number: int) -> None:
    """Refuse a team without agents, or with more than the language allows."""
    if number == 0:
        raise refuse(place, "RM161", "the team has no agents.", "Give a team with agents.")
    if number > MAX_AGENTS:
        message = f"the team has {number} agents, more than {MAX_AGENTS}."
        raise refuse(place, "RM161", message, "Import a part of it.")


def unknown(node: Node, what: str, name: str, known: Mapping[str, object]) -> RecmasError:
    """Return the error for a name of something that is not there, for `raise`."""
    message = f"`{node.key}` names {show(name)}, which is no {what}."
    return node.refuse("RM162", message, did_you_mean(name, known))


ONLY_ANSWERS: Final = "only the agent that answers calls tools"
# Names in requests of OpenAI's form, which most frameworks hand on, and those of `answer`.
OPENAI_SAMPLING: Final = {
    "temperature": "temperature",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
}
ONLY_SAMPLES: Final = "only the agent that answers samples tokens"


def take_sampling(node: Node | None, keys: Mapping[str, str], *, answers: bool) -> Sampling:
    """Return the settings of `answer` that a mapping has, carried over if its agent answers.

    Args:
        keys: Their names there, and those of the language.
    """
    taken: Sampling = {}
    for theirs, ours in keys.items():
        found = None if node is None else node.get(theirs)
        if found is None:
            continue
        if not answers:
            found.leave(ONLY_SAMPLES)
            continue
        value = found.value
        if isinstance(value, list):
            value = tuple(item.text() for item in found.items())  # type: ignore[assignment]
        try:
            section = AnswerSection.model_validate({"agent": "a", ours: value})
        except ValidationError:
            found.leave(f"{show(found.value)} is no value for `answer.{ours}`")
            continue
        taken[ours] = getattr(section, ours)
        found.carry_all()
    return taken
