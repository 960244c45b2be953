"""JSON to typed structs and back: the one reader of manifests and plans.

Reading is strict, because a bundle may come from anywhere: unknown keys, duplicate keys, wrong
types, NaN and numbers that no real bundle has are refused with the file, the path of the key and
the value. msgspec does the checking; a field's bounds stand where the field is declared.
"""

from __future__ import annotations

import json
import math
import re
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, TypeVar

import msgspec
from msgspec import Meta, inspect

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import open_regular

T = TypeVar("T")

# Larger than any manifest or plan: a thousand agents of 64 rounds take a few MiB.
MAX_JSON_BYTES: Final = 64 * 2**20

# Bounds of the formats' numbers. They follow the specs' own bounds where there are any and
# otherwise stop only what would exhaust memory or never end.
Size = Annotated[int, Meta(ge=0, le=2**50)]
Dim = Annotated[int, Meta(ge=1, le=2**20)]
Count = Annotated[int, Meta(ge=1, le=2**24)]
Whole = Annotated[int, Meta(ge=-(2**53), le=2**53)]
# msgspec takes an infinity for a float; JSON has none.
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]


class StrictStruct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that is stored as JSON; a key that has a default may be left out.

    Files that have a `version` name the newest one that this runtime reads.
    """

    newest_version: ClassVar[int | None] = None


def to_json(value: object) -> Any:
    """Return the form of a struct, or of a collection of structs, that `json.dumps` takes."""
    return msgspec.to_builtins(value)


def from_json(cls: type[T], data: object, *, file: str) -> T:
    """Build `cls` from parsed JSON, which messages say is from `file`.

    Raises:
        RecmasError: RM403 for another format version, RM404 for anything malformed.
    """
    # First, because a newer version may well have keys that this one does not know.
    newest = getattr(cls, "newest_version", None)
    if newest is not None and isinstance(data, dict):
        _check_version(data.get("version"), newest, file)
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise malformed(file, _explained(cls, data, str(error))) from None
    except UnicodeEncodeError as error:  # msgspec's, of a text where something else belongs
        half = error.object[error.start]
        raise malformed(file, f"a text holds {half!r}, half of a surrogate pair") from None


def parse_json(raw: bytes, *, file: str) -> object:
    """Parse JSON as its standard has it: no NaN, no duplicate keys.

    Raises:
        RecmasError: RM404.
    """
    # Not by msgspec, which keeps the last of several equal keys.
    try:
        return json.loads(
            raw.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=_unique_keys
        )
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError as error:  # from the two hooks, and integers of thousands of digits
        reason = str(error)
    raise malformed(file, f"not valid JSON: {reason}")


def read_json_file(cls: type[T], path: Path, *, file: str) -> T:
    """Read a struct from a file; see `from_json` and `parse_json` for what is refused."""
    with open_regular(path, file=file) as stream:
        raw = stream.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise malformed(file, f"larger than {MAX_JSON_BYTES} bytes")
    return from_json(cls, parse_json(raw, file=file), file=file)


def malformed(file: str | None, message: str) -> RecmasError:
    """Return RM404 for a file of a bundle."""
    return fail("RM404", message, file=file, hint="Build the bundle again, or copy it afresh.")


def refuse_constant(name: str) -> object:
    """Refuse NaN and infinities, as `parse_constant` of `json.loads`."""
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"duplicate key {key[:60]!r}")
        table[key] = value
    return table


def _check_version(version: object, newest: int, file: str) -> None:
    if type(version) is not int or version < 1:
        raise malformed(file, f"version: expected a format version, found {_shown(version)}")
    if version < newest:
        raise fail(
            "RM403",
            f"format version {version}; this runtime reads version {newest}",
            hint="Build it again: recmasc build BUNDLE/spec.yaml --out BUNDLE, or from the spec it "
            "came from, if that names files beside itself.",
            file=file,
        )
    if version > newest:
        raise fail(
            "RM403",
            f"format version {_shown(version)}; this runtime reads up to version {newest}",
            hint="Install a newer recmas, or build the bundle with this one.",
            file=file,
        )


# Where msgspec's messages say a value stands, such as `$.agents[...].then[0].kind`.
_PLACE: Final = re.compile(r"(?P<what>.*) - at `\$(?P<path>(?:\.\w+|\[\d+\]|\[\.\.\.\])+)`", re.S)
_STEP: Final = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_KEY: Final = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.S)


def _explained(cls: Any, data: object, refusal: str) -> str:
    """Put a refusal of msgspec, which shows no values, in our words: path, expected, found."""
    place = _PLACE.fullmatch(refusal)
    what, path = (place["what"], place["path"]) if place else (refusal, "")
    try:
        keys, node, value = _follow(cls, data, path, refusal)
    except (LookupError, TypeError, ValueError, StopIteration):
        return _cut(refusal)  # an unknown key that looks like a place
    if isinstance(node, inspect.UnionType) and isinstance(value, dict):
        structs = [kind for kind in node.types if isinstance(kind, inspect.StructType)]
        wanted = ", ".join(str(kind.tag) for kind in structs)
        tag = str(structs[0].tag_field)
        found = _shown(value.get(tag))
        return f"{_joined([*keys, tag])}: expected one of {wanted}, found {found}"
    if key := _KEY.fullmatch(what):
        how = "missing" if key[1].startswith("missing") else "unknown key"
        return f"{_joined([*keys, key[2]])}: {how}"
    complaint = _complaint(node, value)
    return f"{_joined(keys)}: {complaint}" if keys else complaint


def _follow(
    cls: Any, data: object, path: str, refusal: str
) -> tuple[list[str | int], inspect.Type, object]:
    """Return the keys of a path, and the type and the value at its end."""
    keys: list[str | int] = []
    value: Any = data
    node = _chosen(inspect.type_info(cls), value)
    for name, index in _STEP.findall(path):
        match node:
            case inspect.StructType():
                keys.append(name)
                node = next(field.type for field in node.fields if field.name == name)
            case inspect.VarTupleType():
                keys.append(int(index))
                node = node.item_type
            case inspect.DictType():
                keys.append(_key_at_fault(cls, data, keys, value, refusal))
                node = node.value_type
            case _:  # a union of structs, whose tag is at fault
                break
        value = value[keys[-1]]
        node = _chosen(node, value)
    return keys, node, value


def _key_at_fault(
    cls: Any, data: object, keys: list[str | int], table: dict[str, object], refusal: str
) -> str:
    """Return the key whose value msgspec refuses: the last of the shortest part refused alike."""
    names = list(table)

    def is_refused(last: int) -> bool:
        part = {name: table[name] for name in names[: last + 1]}
        try:
            msgspec.convert(_with(data, keys, part), cls)
        except msgspec.ValidationError as error:
            return str(error) == refusal
        return False

    return names[bisect_left(range(len(names)), True, key=is_refused)]


def _with(data: Any, keys: list[str | int], value: object) -> Any:
    """Return parsed JSON with the value at `keys` replaced."""
    if not keys:
        return value
    copy = data.copy()
    copy[keys[0]] = _with(data[keys[0]], keys[1:], value)
    return copy


_KINDS: Final[dict[type, type[inspect.Type]]] = {
    bool: inspect.BoolType,
    int: inspect.IntType,
    float: inspect.FloatType,
    str: inspect.StrType,
}
_WORDS: Final[dict[type[inspect.Type], str]] = {
    inspect.BoolType: "true or false",
    inspect.IntType: "an integer",
    inspect.FloatType: "a number",
    inspect.StrType: "a string",
    inspect.VarTupleType: "a list",
    inspect.DictType: "a table",
    inspect.StructType: "a table",
}


def _chosen(node: inspect.Type, value: object) -> inspect.Type:
    """Return the one member of a union that a value can be meant for, or else the union."""
    if not isinstance(node, inspect.UnionType):
        return node
    kinds = [kind for kind in node.types if not isinstance(kind, inspect.NoneType)]
    for kind in kinds:
        if isinstance(kind, inspect.StructType) and isinstance(value, dict):
            if kind.tag_field is not None and value.get(kind.tag_field) == kind.tag:
                return kind
        elif type(kind) is _KINDS.get(type(value)):
            return kind
    return kinds[0] if len(kinds) == 1 else node


def _complaint(node: inspect.Type, value: Any) -> str:
    found = _shown(value)
    match node:
        case inspect.IntType() if type(value) is int:
            return f"{found} is out of bounds, {node.ge} to {node.le}"
        case inspect.FloatType() if type(value) in (int, float):
            if not _is_finite(value):
                return f"{found} is not a finite number"
            if node.gt is not None:
                return f"{found} is not above {node.gt:g} and at most {node.le:g}"
            return f"{found} is not between {node.ge:g} and {node.le:g}"
        case inspect.LiteralType():
            wanted = " or ".join(repr(choice) for choice in node.values)
        case inspect.UnionType() if inspect.StructType in map(type, node.types):
            wanted = "a table"
        case inspect.UnionType():
            wanted = " or ".join(_WORDS[type(kind)] for kind in node.types)
        case _:
            wanted = _WORDS[type(node)]
    return f"expected {wanted}, found {found}"


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond every float
        return False


def _shown(data: object) -> str:
    if isinstance(data, dict):
        return "a table"
    if isinstance(data, list):
        return "a list"
    if data is None:
        return "nothing"
    return _cut(json.dumps(data))


def _joined(keys: list[str | int]) -> str:
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        else:
            path += f".{_cut(key)}" if path else _cut(key)
    return path


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
