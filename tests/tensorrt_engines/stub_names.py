"""The names and parameters in a stub file, and those of a module, in the same form."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

# None for what is no function, otherwise its parameters, one tuple for each overload
Parameters = list[list[str]] | None


def stubbed(source: str) -> dict[str, Parameters]:
    """Return the names of a stub file, such as `Builder.create_network`, with their parameters."""
    return dict(_stubbed(ast.parse(source).body, ""))


def _stubbed(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Parameters]]:
    for node in body:
        match node:
            case ast.ClassDef(name=name, body=inner):
                yield prefix + name, None
                yield from _stubbed(inner, f"{prefix}{name}.")
            case ast.FunctionDef(name=name, args=arguments) if name != "__buffer__":
                yield prefix + name, [[a.arg for a in arguments.args if a.arg != "self"]]
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                yield prefix + name, None


def published(module: Any, names: list[str]) -> dict[str, Parameters]:
    """Return those of the names that a module has, with their parameters."""
    found: dict[str, Parameters] = {}
    for name in names:
        value: Any = module
        for part in name.split("."):
            value = getattr(value, part, _MISSING)
        if value is _MISSING:
            continue
        is_function = callable(value) and not isinstance(value, type)
        found[name] = _parameters(value, name.rpartition(".")[2]) if is_function else None
    return found


_MISSING: Any = object()


def _parameters(function: Any, name: str) -> list[list[str]]:
    """Return the parameters of every overload: of pybind11 from its documentation string."""
    signatures = re.findall(rf"\b{name}\((self: .*)\) -> ", function.__doc__ or "")
    if not signatures:
        named = inspect.signature(function).parameters
        return [[parameter for parameter in named if parameter != "self"]]
    return [
        [part for part in re.findall(r"(?:^|, )(\w+): ", text) if part != "self"]
        for text in signatures
    ]


def disagreements(stub: dict[str, Parameters], module: dict[str, Parameters]) -> list[str]:
    """Return what a stub says that is not so: missing names, other parameters, another order.

    A stub may leave out parameters at the end, which then have defaults.
    """
    wrong = []
    for name, overloads in stub.items():
        if name not in module:
            wrong.append(f"{name} does not exist")
        elif overloads is not None:
            (wanted,) = overloads
            there = module[name]
            if there is None or all(wanted != o[: len(wanted)] for o in there):
                wrong.append(f"{name}({', '.join(wanted)}) is {there}")
    return wrong
