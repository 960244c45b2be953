"""YAML text to plain values, with the place of every key and value; and values back to text.

PyYAML composes the nodes from the events of its C parser; what they mean is decided here: YAML 1.2
scalars, merge keys, no tags, no duplicate keys, and bounds on size, depth and aliases so that no
text can exhaust the compiler.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer, ComposerError

from recmas_compiler.spec.document.places import Loc, Places, SourcePosition, position_of
from recmas_compiler.spec.document.problems import Language, problem_at, show
from recmas_runtime.core.errors import Problem, RecmasError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 20_000

Scalar = None | bool | int | float | str
Value = Scalar | list["Value"] | dict[str, "Value"]
_Mark = Any  # a place of PyYAML's, whose own class and the C parser's are not related

_NOT_IN_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VALUE = Language(noun="value")
_MERGE = "<<"  # of YAML 1.1; YAML 1.2 leaves such a key to the program

# Plain words of the core schema of YAML 1.2.2, chapter 10.3.2. It differs from what PyYAML resolves
# by itself (YAML 1.1): `no` and `on` are text, `5e-4` is a number, `0o17` is octal and `017` is
# seventeen.
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_DECIMAL = re.compile(r"[-+]?[0-9]+\Z")
_WITH_BASE = re.compile(r"0(o[0-7]+|x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z")

# Python refuses to parse integers of thousands of digits. Numbers this long are out of every bound
# anyway, and as a float they still compare correctly with the bounds.
_LONGEST_INTEGER = 100

# Plain text that every YAML reader takes as text: words without indicators, or a link's name.
_WORD = "[A-Za-z0-9_./@:-]*[A-Za-z0-9_./@-]"
_PLAIN = re.compile(rf"[A-Za-z]({_WORD})?( (->|{_WORD}))*\Z")
# Words that readers of YAML 1.1 take for something else; quoted so that all readers agree.
_YAML_1_1_WORDS = frozenset({"y", "n", "yes", "no", "on", "off"})
# Line breaks of YAML 1.1 and the byte order mark, which do not come back out of a block.
_NOT_IN_BLOCKS = re.compile("[\x85\u2028\u2029\ufeff]")


@dataclass(frozen=True)
class Source:
    """A parsed YAML document.

    Attributes:
        value: The root; mappings keep the order of the file.
        problems: Duplicate keys, of which the first one counts, and what cannot be merged.
    """

    value: Value
    places: Places
    problems: tuple[Problem, ...]


def read_text(path: Path, *, file: str, language: Language) -> str:
    """Return the text of a file.

    Raises:
        RecmasError: RM100: not there, not a file, too large, not UTF-8.
    """
    code = language.code or "RM100"
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        message = f"cannot read the {language.noun}: {reason[:1].lower()}{reason[1:]}."
        problem = Problem(code=code, message=message, hint=language.file_hint, file=file)
        raise RecmasError(problem) from error
    if len(raw) > MAX_BYTES:
        raise _too_large(file, language)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        place = position_of(before, len(before), file)
        byte = f"byte 0x{raw[error.start]:02x}"
        message = f"the {language.noun} is not UTF-8: {byte} is not part of a character."
        hint = "Save the file as UTF-8."
        raise RecmasError(problem_at(place, code, message, hint=hint)) from error


def parse_mapping(
    text: str, *, file: str, language: Language
) -> tuple[dict[str, Value], Places, list[Problem]]:
    """Parse one YAML document that is a mapping.

    Returns:
        The mapping, its places, and the problems of its keys.

    Raises:
        RecmasError: As `parse_yaml`; RM105 for anything but a mapping.
    """
    source = parse_yaml(text, file=file, language=language)
    if not isinstance(source.value, dict):
        message = f"a {language.noun} is a mapping of sections, this is {show(source.value)}."
        place = source.places.value(())
        raise RecmasError(language.problem(place, "RM105", message, language.start_hint))
    return source.value, source.places, list(source.problems)


def parse_yaml(text: str, *, file: str, language: Language = _VALUE) -> Source:
    """Parse one YAML document.

    Raises:
        RecmasError: RM100 or RM101: characters that YAML forbids, an empty file, invalid YAML,
            tags, several documents, YAML over the bounds.
    """
    # YAML reads every line break as "\n"; doing so first keeps all positions simple.
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > MAX_BYTES:
        raise _too_large(file, language)
    forbidden = _NOT_IN_YAML.search(text)
    if forbidden:
        place = position_of(text, forbidden.start(), file)
        message = f"the character U+{ord(forbidden.group()):04X} is not allowed in YAML."
        hint = "Remove it, or write it as an escape inside of double quotes."
        raise RecmasError(problem_at(place, "RM100", message, hint=hint))
    root = _compose(text, file, language)
    places = Places(file=file, source=text)
    problems: list[Problem] = []
    value = None if root is None else _plain(root, (), places, problems)
    if value is None:
        message = f"the {language.noun} is empty."
        raise RecmasError(
            language.problem(_place(None, file), "RM100", message, language.start_hint)
        )
    return Source(value=value, places=places, problems=tuple(problems))


def _too_large(file: str, language: Language) -> RecmasError:
    message = f"the {language.noun} is larger than {MAX_BYTES} bytes."
    hint = f"{language.noun.capitalize()}s are small texts: is this the right file?"
    return RecmasError(language.problem(_place(None, file), "RM100", message, hint))


class _Loader(Composer, yaml.CSafeLoader):
    """PyYAML's composer over the events of libyaml, without tags and with bounds.

    An alias becomes a node of its own, whose value is the node that it stands for: so its place is
    known, and what it stands for counts each time.
    """

    def __init__(self, text: str, file: str, noun: str) -> None:
        yaml.CSafeLoader.__init__(self, text)
        Composer.__init__(self)
        self._file = file
        self._noun = noun
        self._depth = 0  # sequences and mappings that are still open
        self._height = 0  # levels of the highest node so far inside of the innermost of them
        self._num_nodes = 0
        # by anchor: its node, how many nodes and levels that is; None while the node is still open
        self._anchored: dict[str, tuple[yaml.Node, int, int] | None] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        assert isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.AliasEvent):
            return self._compose_alias(event)
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag is not None:
            shown = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the tag `{shown}` is refused: {self._noun}s are plain data."
            raise _refused(event.start_mark, self._file, message, "Remove the tag.")
        is_collection = isinstance(event, yaml.CollectionStartEvent)
        nodes_before, height_before = self._num_nodes, self._height
        self._count(event, num_nodes=1, height=int(is_collection))
        self._depth += is_collection
        self._height = 0
        if event.anchor is not None:
            self._anchored[event.anchor] = None
            # YAML lets an anchor take the name of an earlier one; PyYAML by itself does not
            self.anchors.clear()
        node = super().compose_node(parent, index)
        self._depth -= is_collection
        height = self._height + is_collection
        self._height = max(height_before, height)
        if event.anchor is not None and node is not None:
            self._anchored[event.anchor] = (node, self._num_nodes - nodes_before, height)
        return node

    def _compose_alias(self, event: yaml.AliasEvent) -> yaml.Node:
        self.get_event()
        name = event.anchor
        if name not in self._anchored:
            message = f"the alias `*{name}` has no anchor `&{name}` before it."
            hint = "Define the anchor first, or write the value."
            raise _refused(event.start_mark, self._file, message, hint)
        anchored = self._anchored[name]
        if anchored is None:
            message = f"the alias `*{name}` stands inside of its own anchor."
            raise _refused(event.start_mark, self._file, message, "Write the value out instead.")
        node, num_nodes, height = anchored
        self._count(event, num_nodes=num_nodes, height=height)
        self._height = max(self._height, height)
        mark: _Mark = event.start_mark
        return yaml.Node("alias", node, mark, mark)

    def _count(self, event: yaml.NodeEvent, *, num_nodes: int, height: int) -> None:
        if self._depth + height > MAX_DEPTH:
            message = f"nested more than {MAX_DEPTH} levels deep."
            hint = f"No part of a {self._noun} is that deep: check the brackets."
            raise _refused(event.start_mark, self._file, message, hint)
        self._num_nodes += num_nodes
        if self._num_nodes > MAX_NODES:
            message = f"more than {MAX_NODES} keys and values, counting aliases each time."
            hint = f"{self._noun.capitalize()}s are small: use fewer aliases."
            raise _refused(event.start_mark, self._file, message, hint)


def _compose(text: str, file: str, language: Language) -> yaml.Node | None:
    try:
        return _Loader(text, file, language.noun).get_single_node()
    except ComposerError as error:
        message = "a second YAML document begins here."
        hint = f"A {language.noun} is one document: remove everything from this `---` on."
        raise _refused(error.problem_mark, file, message, hint) from error
    except yaml.MarkedYAMLError as error:
        raise _invalid(error, text, file) from error


def _place(mark: _Mark, file: str) -> SourcePosition:
    line, column = (mark.line, mark.column) if mark else (0, 0)
    return SourcePosition(file=file, line=line + 1, column=column + 1)


def _refused(mark: _Mark, file: str, message: str, hint: str) -> RecmasError:
    return RecmasError(problem_at(_place(mark, file), "RM101", message, hint=hint))


def _invalid(error: yaml.MarkedYAMLError, text: str, file: str) -> RecmasError:
    begun, found = error.context_mark, error.problem_mark
    problem, context = error.problem or "unreadable", error.context or ""
    # what is never closed is found missing at the end of the file, but fixed where it begins
    is_unclosed = begun is not None and "end of stream" in problem
    mark = begun if is_unclosed else found or begun
    place = _place(mark, file)
    if begun and begun.line + 1 != place.line:
        context += f" that begins in line {begun.line + 1}"
    line = text.split("\n")[place.line - 1 : place.line]
    message = f"not valid YAML{' ' if context else ''}{context}: {problem}."
    return _refused(mark, file, message, _advice("".join(line), problem))


def _advice(line: str, problem: str) -> str:
    if re.search(r"[:-]\s+\{[{%#]", line):
        return "Put text that begins with `{` into quotes, or into a block that begins with `|`."
    if "\\t" in problem or line.lstrip(" ").startswith("\t"):
        return "Indent with spaces: YAML does not allow tabs there."
    if re.search(r":\s+\S.*:(\s|$)", line):
        return "Put a value that contains `: ` into quotes."
    return "Check the indentation, the quotes and the brackets up to this place."


def _plain(node: yaml.Node, loc: Loc, places: Places, problems: list[Problem]) -> Value:
    """Return what a node says, and enter the places of it; an alias stands where it is used.

    Depth and size are bounded by the loader, aliases included.
    """
    places.values[loc] = _place(node.start_mark, places.file)
    node = _aliased(node)
    if isinstance(node, yaml.ScalarNode):
        places.spans[loc] = (node.start_mark.index, node.end_mark.index)
        text: str = node.value
        return text if node.style else resolve(text)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*loc, i), places, problems) for i, item in enumerate(node.value)]
    mapping: dict[str, Value] = {}
    for name, (key, item) in _entries(node, places.file, problems).items():
        item_loc = (*loc, name)
        places.keys[item_loc] = _place(key.start_mark, places.file)
        mapping[name] = _plain(item, item_loc, places, problems)
    return mapping


def _entries(
    node: yaml.Node, file: str, problems: list[Problem]
) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Return key and value nodes of a mapping by name, those that it merges (`<<`) included.

    As YAML 1.1 has it, the mapping's own keys win, then those of the first mapping merged.
    """
    own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    merged_at: yaml.Node | None = None
    for key, item in node.value:
        name = _aliased(key)
        if not isinstance(name, yaml.ScalarNode):
            message = "a key must be a plain word, and this is a mapping or a list."
            hint = "Put text that begins with `{` or `[` into quotes, or into a block (`|`)."
            raise _refused(key.start_mark, file, message, hint)
        is_merge = name.value == _MERGE and not name.style
        earlier = merged_at if is_merge else own.get(name.value, (None,))[0]
        if earlier is not None:
            message = f"`{name.value}` is given a second time, first in line "
            message += f"{_place(earlier.start_mark, file).line}."
            hint = "Merge a list: `<<: [*one, *other]`." if is_merge else "Remove one of the two."
            place = _place(key.start_mark, file)
            problems.append(problem_at(place, "RM102", message, hint=hint))
        elif is_merge:
            merged_at = key
            for mapping in _mappings(item, file, problems):
                for inner, entry in _entries(mapping, file, problems).items():
                    merged.setdefault(inner, entry)
        else:
            own[name.value] = (key, item)
    return merged | own


def _mappings(node: yaml.Node, file: str, problems: list[Problem]) -> list[yaml.Node]:
    """Return the mappings that stand behind a merge key: one, or a list of them."""
    named = _aliased(node)
    items: list[yaml.Node] = named.value if isinstance(named, yaml.SequenceNode) else [node]
    found: list[yaml.Node] = []
    for item in items:
        mapping = _aliased(item)
        if isinstance(mapping, yaml.MappingNode):
            found.append(mapping)
            continue
        message = "`<<` merges mappings, and this is none."
        hint = 'Write `<<: *anchor`; a key of that name is written `"<<"`.'
        problems.append(problem_at(_place(item.start_mark, file), "RM101", message, hint=hint))
    return found


def _aliased(node: yaml.Node) -> yaml.Node:
    is_alias = not isinstance(node, yaml.ScalarNode | yaml.CollectionNode)
    return node.value if is_alias else node


def resolve(text: str) -> Scalar:
    """Return the value of a plain scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _DECIMAL.match(text):
        return int(text) if len(text) <= _LONGEST_INTEGER else float(text)
    if _WITH_BASE.match(text):
        return int(text, base=0) if len(text) <= _LONGEST_INTEGER else math.inf
    if _FLOAT.match(text):
        return float(text)
    if _INFINITE.match(text):
        return float(text.replace(".", "").lower())
    return text


def write_yaml(values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML 1.2, without its empty lists and mappings.

    The text is deterministic, and reads back to equal values.
    """
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, width=math.inf)


class _Dumper(yaml.BaseDumper):
    """PyYAML's emitter with the styles of a spec written by hand.

    Every scalar goes out as text, in a style that reads back as what it was; so no tag is written.
    """

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_data(self, data: Any) -> yaml.Node:
        match data:
            case Mapping():
                items = [(key, value) for key, value in data.items() if value not in ({}, ())]
                return self.represent_mapping("tag:yaml.org,2002:map", items, flow_style=False)
            case str():
                return self._text(data, _style_of(data))
            case Sequence():
                node = self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
                # flow collections give `,` and brackets a meaning; quoted text is safe from it
                for value, item in zip(data, node.value, strict=True):
                    item.style = '"' if isinstance(value, str) else None
                return node
            case None | bool():
                return self._text(json.dumps(data))
        return self._text(repr(data))

    def _text(self, text: str, style: str | None = None) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _style_of(text: str) -> str | None:
    """Return the indicator of the style in which `text` stays what it is; None is plain."""
    is_plain = _PLAIN.match(text) and text.lower() not in _YAML_1_1_WORDS
    if is_plain and resolve(text) == text:
        return None
    is_block = "\n" in text and text[0] not in " \n" and not _NOT_IN_BLOCKS.search(text)
    return "|" if is_block else '"'
