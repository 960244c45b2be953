"""Dataclasses to JSON and back, by their type hints: the one reader of manifests and plans.

Reading is strict, because a bundle may come from anywhere: unknown and missing keys, wrong types,
NaN and numbers that no real bundle has are refused with the file and the path of the key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.regular_file import open_regular
from recmas_runtime.formats.manifest import (
    MANIFEST_VERSION,
    BackboneEntry,
    FileEntry,
    LinkEntry,
    LossEntry,
    Manifest,
    ParityEntry,
)
from recmas_runtime.formats.plan import (
    PLAN_VERSION,
    AgentPlan,
    CachePlan,
    DecodeStep,
    Limits,
    Message,
    Plan,
    PrefillStep,
    PythonPlan,
    SamplingPlan,
    SearchPlan,
    SendStep,
    SentMessage,
    ThinkStep,
    ToolsPlan,
    WriteStep,
)

T = TypeVar("T")

# Larger than any manifest or plan: a thousand agents of 64 rounds take a few MiB.
MAX_JSON_BYTES: Final = 64 * 2**20

VERSIONS: Final[dict[type, int]] = {Manifest: MANIFEST_VERSION, Plan: PLAN_VERSION}

_ROUND: Final = (1, 64)
_DIM: Final = (1, 2**20)
_BYTES: Final = (0, 2**50)

# Inclusive bounds of every integer in the formats. They follow the specs' own bounds where there
# are any and otherwise stop only what would exhaust memory or never end.
BOUNDS: Final[dict[tuple[type, str], tuple[int, int]]] = {
    (FileEntry, "size_bytes"): _BYTES,
    (BackboneEntry, "width"): _DIM,
    (BackboneEntry, "num_layers"): (1, 4096),
    (BackboneEntry, "num_kv_heads"): (1, 2**16),
    (BackboneEntry, "head_dim"): (1, 2**16),
    (BackboneEntry, "vocab_size"): (1, 2**24),
    (BackboneEntry, "max_positions"): (1, 2**31),
    (BackboneEntry, "eos_token_ids"): (0, 2**24),
    (LossEntry, "num_tokens"): (1, 2**32),
    (LinkEntry, "in_dim"): _DIM,
    (LinkEntry, "out_dim"): _DIM,
    (AgentPlan, "latent_steps"): (0, 4096),
    (CachePlan, "capacity"): (64, 2**24),
    (CachePlan, "bytes_per_sample"): _BYTES,
    (SentMessage, "round"): _ROUND,
    (Message, "round"): _ROUND,
    (PrefillStep, "round"): _ROUND,
    (ThinkStep, "round"): _ROUND,
    (SendStep, "round"): _ROUND,
    (WriteStep, "round"): _ROUND,
    (WriteStep, "max_new_tokens"): (1, 2**24),
    (DecodeStep, "round"): _ROUND,
    (SamplingPlan, "max_new_tokens"): (1, 2**24),
    (SamplingPlan, "top_k"): (0, 2**31),
    (SamplingPlan, "seed"): (0, 2**63 - 1),
    (SearchPlan, "top_k"): (1, 1000),
    (PythonPlan, "memory_mb"): (16, 2**20),
    (ToolsPlan, "max_calls"): (1, 1000),
    (ToolsPlan, "max_result_chars"): (1, 2**24),
    (Limits, "max_prompt_tokens"): (1, 2**24),
    (Limits, "max_batch"): (1, 2**16),
    (Plan, "rounds"): _ROUND,
}
_ANY_INTEGER: Final = (-(2**53), 2**53)

# Keys that bundles of this version may lack, because they were written before there was a choice;
# the fields' defaults say what those bundles are.
_LATER_KEYS: Final[frozenset[tuple[type, str]]] = frozenset(
    {
        (BackboneEntry, "precision"),
        (BackboneEntry, "cpu_decoder"),
        (ParityEntry, "loss"),
        (PrefillStep, "prefix_from"),
        (Plan, "stop_when"),
        (Plan, "tools"),
    }
)


def to_json(value: object) -> Any:
    """Return the form of a format dataclass that `json.dumps` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} in a format"
    return value


def from_json(cls: type[T], data: object, *, file: str) -> T:
    """Build `cls` from parsed JSON.

    Args:
        cls: A dataclass of `manifest` or `plan`.
        data: What `parse_json` returned.
        file: How messages name the file that `data` came from.

    Raises:
        RecmasError: RM403 for another format version, RM404 for anything malformed.
    """
    return cast("T", _Reader(file).read(cls, data, path="", bounds=_ANY_INTEGER))


def parse_json(raw: bytes, *, file: str) -> object:
    """Parse JSON as its standard has it: no NaN, no duplicate keys.

    Raises:
        RecmasError: RM404.
    """
    try:
        return json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError as error:  # from the two hooks, and integers of thousands of digits
        reason = str(error)
    raise _malformed(file, f"not valid JSON: {reason}")


def read_json_file(cls: type[T], path: Path, *, file: str) -> T:
    """Read a format dataclass from a file; see `from_json` and `parse_json` for what is refused."""
    with open_regular(path, file=file) as stream:
        raw = stream.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise _malformed(file, f"larger than {MAX_JSON_BYTES} bytes")
    return from_json(cls, parse_json(raw, file=file), file=file)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads values of one file; `path` is where in it a value stands, such as `agents.solver`."""

    file: str

    def read(self, hint: Any, data: object, *, path: str, bounds: tuple[int, int]) -> object:
        origin = get_origin(hint)
        if hint in _SCALARS:
            return self._scalar(hint, data, path, bounds)
        if origin is Literal:
            if not any(type(data) is type(choice) and data == choice for choice in get_args(hint)):
                wanted = " or ".join(repr(choice) for choice in get_args(hint))
                raise self._wrong(path, f"expected {wanted}, found {_describe(data)}")
            return data
        if origin is Union or origin is types.UnionType:
            return self._union(get_args(hint), data, path, bounds)
        if origin is tuple:
            if not isinstance(data, list):
                raise self._wrong(path, f"expected a list, found {_describe(data)}")
            (item_hint, _) = get_args(hint)
            return tuple(
                self.read(item_hint, item, path=f"{path}[{i}]", bounds=bounds)
                for i, item in enumerate(data)
            )
        if origin is dict:
            table = self._table(data, path)
            (_, item_hint) = get_args(hint)
            return {
                key: self.read(item_hint, item, path=_join(path, key), bounds=bounds)
                for key, item in table.items()
            }
        return self._dataclass(hint, data, path)

    def _scalar(self, hint: type, data: object, path: str, bounds: tuple[int, int]) -> object:
        if hint is float and type(data) in (int, float):
            value = _finite(cast("float", data))
            if value is None:
                raise self._wrong(path, f"{_describe(data)} is not a finite number")
            return value
        if type(data) is not hint:  # exact: True is no integer here
            raise self._wrong(path, f"expected {_SCALARS[hint]}, found {_describe(data)}")
        if hint is int and not bounds[0] <= cast("int", data) <= bounds[1]:
            raise self._wrong(
                path, f"{_describe(data)} is out of bounds, {bounds[0]} to {bounds[1]}"
            )
        return data

    def _union(
        self, hints: tuple[Any, ...], data: object, path: str, bounds: tuple[int, int]
    ) -> object:
        if data is None and types.NoneType in hints:
            return None
        hints = tuple(hint for hint in hints if hint is not types.NoneType)
        if len(hints) == 1:
            return self.read(hints[0], data, path=path, bounds=bounds)
        if all(hint in _SCALARS for hint in hints):
            exact = [hint for hint in hints if type(data) is hint]
            if not exact:
                wanted = " or ".join(_SCALARS[hint] for hint in hints)
                raise self._wrong(path, f"expected {wanted}, found {_describe(data)}")
            return self._scalar(exact[0], data, path, bounds)
        by_op = {_op_of(hint): hint for hint in hints}
        op = self._table(data, path).get("op")
        if not isinstance(op, str) or op not in by_op:
            wanted = ", ".join(by_op)
            raise self._wrong(_join(path, "op"), f"expected one of {wanted}, found {_describe(op)}")
        return self._dataclass(by_op[op], data, path)

    def _dataclass(self, cls: Any, data: object, path: str) -> object:
        table = self._table(data, path)
        if cls in VERSIONS:
            self._check_version(table, VERSIONS[cls])
        hints = _field_hints(cls)
        for key in sorted(table.keys() - hints.keys()):
            raise self._wrong(_join(path, key), "unknown key")
        for key in hints:
            if key not in table and (cls, key) not in _LATER_KEYS:
                raise self._wrong(_join(path, key), "missing")
        values = {
            key: self.read(
                hint,
                table[key],
                path=_join(path, key),
                bounds=BOUNDS.get((cls, key), _ANY_INTEGER),
            )
            for key, hint in hints.items()
            if key in table
        }
        return cast("Callable[..., object]", cls)(**values)

    def _table(self, data: object, path: str) -> dict[str, object]:
        if not isinstance(data, dict):
            raise self._wrong(path, f"expected a table, found {_describe(data)}")
        return data

    def _check_version(self, table: dict[str, object], known: int) -> None:
        version = table.get("version")
        if type(version) is not int or version < 1:
            raise self._wrong("version", f"expected a format version, found {_describe(version)}")
        if version < known:
            raise fail(
                "RM403",
                f"format version {version}; this runtime reads version {known}",
                hint="Build it again: recmasc build BUNDLE/spec.yaml --out BUNDLE, or from the "
                "spec it came from, if that names files beside itself.",
                file=self.file,
            )
        if version > known:
            raise fail(
                "RM403",
                f"format version {_describe(version)}; this runtime reads up to version {known}",
                hint="Install a newer recmas, or build the bundle with this one.",
                file=self.file,
            )

    def _wrong(self, path: str, message: str) -> RecmasError:
        return _malformed(self.file, f"{path}: {message}" if path else message)


_SCALARS: Final[dict[Any, str]] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


@cache
def _field_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _op_of(cls: type) -> str:
    (op,) = get_args(_field_hints(cls)["op"])
    return str(op)


def _finite(number: float) -> float | None:
    try:
        value = float(number)
    except OverflowError:  # an integer beyond every float
        return None
    return value if math.isfinite(value) else None


def _describe(data: object) -> str:
    if isinstance(data, dict):
        return "a table"
    if isinstance(data, list):
        return "a list"
    if data is None:
        return "nothing"
    shown = json.dumps(data)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _join(path: str, key: str) -> str:
    key = key if len(key) <= 60 else f"{key[:57]}..."
    return f"{path}.{key}" if path else key


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table: dict[str, object] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"duplicate key {key[:60]!r}")
        table[key] = value
    return table


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _malformed(file: str, message: str) -> RecmasError:
    return fail("RM404", message, file=file, hint="Build the bundle again, or copy it afresh.")
