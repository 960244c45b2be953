"""YAML text to plain values, with the place of every key and value.

PyYAML's C parser supplies events; what they mean is decided here: YAML 1.2 scalars, no tags, no
duplicate keys, and bounds on size, depth and aliases so that no text can exhaust the compiler.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from recmas_compiler.spec.document.places import Loc, Places, position_of
from recmas_compiler.spec.document.position import SourcePosition
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.document.scalars import Scalar, resolve
from recmas_runtime.core.errors import Problem, RecmasError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 20_000

Value = Scalar | list["Value"] | dict[str, "Value"]

_NOT_IN_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_START_HINT = "`recmasc init sequential` writes a spec to begin with."


@dataclass(frozen=True)
class Source:
    """A parsed YAML document.

    Attributes:
        value: The root; mappings keep the order of the file.
        places: Where everything in it stands.
        problems: Duplicate keys; the first one counts.
    """

    value: Value
    places: Places
    problems: tuple[Problem, ...]


def read_text(path: Path, *, file: str) -> str:
    """Return the text of a spec file.

    Raises:
        RecmasError: RM100: not there, not a file, too large, not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        message = f"cannot read the spec: {reason[:1].lower()}{reason[1:]}."
        hint = f"Give the path of a YAML file; {_START_HINT}"
        raise RecmasError(Problem(code="RM100", message=message, hint=hint, file=file)) from error
    if len(raw) > MAX_BYTES:
        raise _too_large(file)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        place = position_of(before, len(before), file)
        message = (
            f"the spec is not UTF-8: byte 0x{raw[error.start]:02x} is not part of a character."
        )
        hint = "Save the file as UTF-8."
        raise RecmasError(problem_at(place, "RM100", message, hint=hint)) from error


def parse_yaml(text: str, *, file: str) -> Source:
    """Parse one YAML document.

    Raises:
        RecmasError: RM100 or RM101: characters that YAML forbids, an empty file, invalid YAML,
            tags, several documents, YAML over the bounds.
    """
    # YAML reads every line break as "\n"; doing so first keeps all positions simple.
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > MAX_BYTES:
        raise _too_large(file)
    forbidden = _NOT_IN_YAML.search(text)
    if forbidden:
        place = position_of(text, forbidden.start(), file)
        message = f"the character U+{ord(forbidden.group()):04X} is not allowed in YAML."
        hint = "Remove it, or write it as an escape inside of double quotes."
        raise RecmasError(problem_at(place, "RM100", message, hint=hint))
    root = _Composer(text, file).compose()
    places = Places(file=file, source=text)
    problems: list[Problem] = []
    value = _plain(root, (), places, problems)
    return Source(value=value, places=places, problems=tuple(problems))


def _too_large(file: str) -> RecmasError:
    start = SourcePosition(file=file, line=1, column=1)
    hint = "Specs are small texts: is this the right file?"
    return RecmasError(
        problem_at(start, "RM100", f"the spec is larger than {MAX_BYTES} bytes.", hint=hint)
    )


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A YAML node. `size` and `height` count an aliased node each time it is used."""

    place: SourcePosition
    size: int = 1
    height: int = 1


@dataclass(frozen=True, kw_only=True)
class _ScalarNode(_Node):
    value: Scalar
    text: str
    span: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class _SequenceNode(_Node):
    items: tuple[_Node, ...]


@dataclass(frozen=True, kw_only=True)
class _MappingNode(_Node):
    pairs: tuple[tuple[_Node, _Node], ...]


@dataclass
class _Open:
    """A sequence or mapping whose end has not been read yet."""

    event: yaml.CollectionStartEvent
    children: list[_Node] = field(default_factory=list)
    size: int = 1
    height: int = 1

    def close(self, place: SourcePosition) -> _Node:
        if isinstance(self.event, yaml.SequenceStartEvent):
            items = tuple(self.children)
            return _SequenceNode(place=place, size=self.size, height=self.height, items=items)
        pairs = tuple(zip(self.children[::2], self.children[1::2], strict=True))
        return _MappingNode(place=place, size=self.size, height=self.height, pairs=pairs)


class _Composer:
    """Builds the node graph from the parser's events, without recursion."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._open: list[_Open] = []
        self._anchors: dict[str, _Node | None] = {}  # None while its node is still open
        self._root: _Node | None = None

    def compose(self) -> _Node:
        try:
            for event in yaml.parse(self._text, Loader=yaml.CSafeLoader):
                self._take(event)
        except yaml.MarkedYAMLError as error:
            raise self._invalid(error) from error
        root = self._root
        if root is None or (isinstance(root, _ScalarNode) and root.value is None):
            raise RecmasError(
                problem_at(self._at(0, 0), "RM100", "the spec is empty.", hint=_START_HINT)
            )
        return root

    def _take(self, event: yaml.Event) -> None:
        match event:
            case yaml.AliasEvent():
                self._add(self._aliased(event))
            case yaml.ScalarEvent():
                self._refuse_tag(event)
                scalar = self._scalar(event)
                self._define(event, scalar)
                self._add(scalar)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._refuse_tag(event)
                self._define(event, None)
                self._open.append(_Open(event))
                if len(self._open) > MAX_DEPTH:
                    raise self._too_deep(event)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                closed = self._open.pop()
                node = closed.close(self._place(closed.event))
                self._define(closed.event, node)
                self._add(node)
            case yaml.DocumentStartEvent() if self._root is not None:
                message = "a second YAML document begins here."
                hint = "A spec is one document: remove everything from this `---` on."
                raise self._error(event, message, hint=hint)

    def _scalar(self, event: yaml.ScalarEvent) -> _ScalarNode:
        assert event.start_mark is not None
        assert event.end_mark is not None
        return _ScalarNode(
            place=self._place(event),
            value=event.value if event.style else resolve(event.value),
            text=event.value,
            span=(event.start_mark.index, event.end_mark.index),
        )

    def _at(self, line: int, column: int) -> SourcePosition:
        return SourcePosition(file=self._file, line=line + 1, column=column + 1)

    def _place(self, event: yaml.Event) -> SourcePosition:
        assert event.start_mark is not None, "the parser marks every event"
        return self._at(event.start_mark.line, event.start_mark.column)

    def _add(self, node: _Node) -> None:
        if not self._open:
            self._root = node
            return
        top = self._open[-1]
        top.children.append(node)
        top.size += node.size
        top.height = max(top.height, node.height + 1)
        if top.size > MAX_NODES:
            message = f"more than {MAX_NODES} keys and values, counting aliases each time."
            raise self._error(top.event, message, hint="Specs are small: use fewer aliases.")
        if len(self._open) + node.height > MAX_DEPTH + 1:
            raise self._too_deep(top.event)

    def _aliased(self, event: yaml.AliasEvent) -> _Node:
        name = event.anchor
        if name not in self._anchors:
            message = f"the alias `*{name}` has no anchor `&{name}` before it."
            raise self._error(event, message, hint="Define the anchor first, or write the value.")
        node = self._anchors[name]
        if node is None:
            message = f"the alias `*{name}` stands inside of its own anchor."
            raise self._error(event, message, hint="Write the value out instead.")
        return replace(node, place=self._place(event))

    def _define(self, event: yaml.NodeEvent, node: _Node | None) -> None:
        if event.anchor is not None:
            self._anchors[event.anchor] = node

    def _refuse_tag(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.tag is not None:
            shown = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the tag `{shown}` is refused: specs are plain data."
            raise self._error(event, message, hint="Remove the tag.")

    def _too_deep(self, event: yaml.Event) -> RecmasError:
        message = f"nested more than {MAX_DEPTH} levels deep."
        return self._error(
            event, message, hint="No part of a spec is that deep: check the brackets."
        )

    def _error(self, event: yaml.Event, message: str, *, hint: str) -> RecmasError:
        return RecmasError(problem_at(self._place(event), "RM101", message, hint=hint))

    def _invalid(self, error: yaml.MarkedYAMLError) -> RecmasError:
        begun, found = error.context_mark, error.problem_mark
        problem, context = error.problem or "unreadable", error.context or ""
        # what is never closed is found missing at the end of the file, but mended where it begins
        is_unclosed = begun is not None and "end of stream" in problem
        mark = begun if is_unclosed else found or begun
        place = self._at(mark.line, mark.column) if mark else self._at(0, 0)
        if begun and begun.line + 1 != place.line:
            context += f" that begins in line {begun.line + 1}"
        line = self._text.split("\n")[place.line - 1 : place.line]
        message = f"not valid YAML{' ' if context else ''}{context}: {problem}."
        hint = _advice("".join(line), problem)
        return RecmasError(problem_at(place, "RM101", message, hint=hint))


def _advice(line: str, problem: str) -> str:
    if re.search(r"[:-]\s+\{[{%#]", line):
        return "Put text that begins with `{` into quotes, or into a block that begins with `|`."
    if "\\t" in problem or line.lstrip(" ").startswith("\t"):
        return "Indent with spaces: YAML does not allow tabs there."
    if re.search(r":\s+\S.*:(\s|$)", line):
        return "Put a value that contains `: ` into quotes."
    return "Check the indentation, the quotes and the brackets up to this place."


def _plain(node: _Node, loc: Loc, places: Places, problems: list[Problem]) -> Value:
    """Turn a node into plain values; its depth and size are bounded by the composer."""
    places.values[loc] = node.place
    match node:
        case _ScalarNode():
            places.spans[loc] = node.span
            return node.value
        case _SequenceNode():
            items = enumerate(node.items)
            return [_plain(item, (*loc, i), places, problems) for i, item in items]
        case _MappingNode():
            return _plain_mapping(node, loc, places, problems)
    raise AssertionError(f"not a node: {node!r}")


def _plain_mapping(
    node: _MappingNode, loc: Loc, places: Places, problems: list[Problem]
) -> dict[str, Value]:
    mapping: dict[str, Value] = {}
    for key, item in node.pairs:
        if not isinstance(key, _ScalarNode):
            message = "a key must be a plain word, and this is a mapping or a list."
            hint = "Put text that begins with `{` or `[` into quotes, or into a block (`|`)."
            raise RecmasError(problem_at(key.place, "RM101", message, hint=hint))
        if key.text in mapping:
            first = places.keys[(*loc, key.text)]
            message = f"`{key.text}` is given a second time, first in line {first.line}."
            hint = "Remove one of the two."
            problems.append(problem_at(key.place, "RM102", message, hint=hint))
            continue
        places.keys[(*loc, key.text)] = key.place
        mapping[key.text] = _plain(item, (*loc, key.text), places, problems)
    return mapping
