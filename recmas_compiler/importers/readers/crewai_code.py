"""What `crew.py` says of a crew of CrewAI: read as a syntax tree, never run.

Only what stands there literally is found: decorated methods in their order, the keys of the YAML
files that they name, tools by the names of their classes, tasks named as context, the process.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from recmas_compiler.importers.team import LeftOut
from recmas_compiler.spec.document.places import SourcePosition
from recmas_runtime.core.errors import fail

_DECORATORS: Final = ("agent", "task", "crew")
_CODE: Final = "only names that stand in crew.py can be read, and it is never run"


@dataclass(frozen=True, kw_only=True)
class CodeKey:
    """An argument in the code that a reader may carry over."""

    owner: str
    name: str
    place: SourcePosition
    names: tuple[str, ...]

    @property
    def path(self) -> str:
        """How messages name it."""
        return f"{self.owner}.{self.name}"


@dataclass(kw_only=True)
class Method:
    """A method that makes an agent, a task or the crew.

    Attributes:
        config: The key of the YAML file that it names; its own name otherwise.
        keys: Arguments whose values are names: `tools`, `context`, `agent`, `process` and so on.
        texts: Arguments whose values are texts, such as `role`.
    """

    name: str
    place: SourcePosition
    config: str
    keys: dict[str, CodeKey] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class CrewCode:
    """What the class of a crew says."""

    name: str = ""
    agents_config: str = "config/agents.yaml"
    tasks_config: str = "config/tasks.yaml"
    agents: dict[str, Method] = field(default_factory=dict)
    tasks: dict[str, Method] = field(default_factory=dict)
    crew: Method | None = None
    num_carried: int = 0
    left: list[LeftOut] = field(default_factory=list)


def read_code(text: str, *, file: str) -> CrewCode:
    """Read the first class that is decorated with `@CrewBase`, or has a method `@crew`.

    Raises:
        RecmasError: RM160 if it is no Python.
    """
    try:
        tree = ast.parse(text, filename=file)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        column = getattr(error, "offset", None)
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        message = f"not valid Python: {reason}"
        hint = "Correct it, or remove it: the order of tasks.yaml is taken then."
        raise fail("RM160", message, hint=hint, file=file, line=line, column=column) from error
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and _is_crew(node):
            return _Class(file).read(node)
    return CrewCode()


def _is_crew(node: ast.ClassDef) -> bool:
    named = {_last_name(decorator) for decorator in node.decorator_list}
    methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
    return "CrewBase" in named or any(_role(method) == "crew" for method in methods)


def _role(method: ast.FunctionDef) -> str | None:
    named = [_last_name(decorator) for decorator in method.decorator_list]
    return next((name for name in named if name in _DECORATORS), None)


def _last_name(node: ast.AST) -> str:
    """Return the name of what is named, called or taken from something."""
    match node:
        case ast.Call():
            return _last_name(node.func)
        case ast.Attribute():
            return node.attr
        case ast.Name():
            return node.id
        case ast.Constant(value=str()):
            return str(node.value)
    return ""


class _Class:
    def __init__(self, file: str) -> None:
        self.file = file
        self.code = CrewCode()

    def _place(self, node: ast.expr | ast.stmt | ast.keyword) -> SourcePosition:
        return SourcePosition(file=self.file, line=node.lineno, column=node.col_offset + 1)

    def read(self, node: ast.ClassDef) -> CrewCode:
        self.code.name = node.name
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and (role := _role(child)):
                self._method(child, role)
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                self._assignment(child)
        return self.code

    def _assignment(self, node: ast.Assign | ast.AnnAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            name = _last_name(target)
            if name in ("agents_config", "tasks_config") and node.value is not None:
                if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                    setattr(self.code, name, node.value.value)
                    self.code.num_carried += 1
                else:
                    self._leave(node, name)

    def _leave(self, node: ast.expr | ast.stmt | ast.keyword, key: str, why: str = _CODE) -> None:
        self.code.left.append(LeftOut(key=key, place=self._place(node), reason=why))

    def _method(self, node: ast.FunctionDef, role: str) -> None:
        name = node.name
        method = Method(name=name, place=self._place(node), config=name)
        wanted = {"agent": "Agent", "task": "Task", "crew": "Crew"}[role]
        for call in self._calls(node, wanted):
            for keyword in call.keywords:
                self._keyword(method, keyword)
        if role == "crew":
            self.code.crew = method
        else:
            (self.code.agents if role == "agent" else self.code.tasks)[name] = method

    def _calls(self, node: ast.FunctionDef, wanted: str) -> Iterator[ast.Call]:
        calls = [child for child in ast.walk(node) if isinstance(child, ast.Call)]
        named = [call for call in calls if _last_name(call.func).endswith(wanted)]
        yield from named[:1]
        for call in named[1:]:
            self._leave(call, f"{node.name}.{wanted}", "a method makes one; the first one is taken")

    def _keyword(self, method: Method, keyword: ast.keyword) -> None:
        value, place = keyword.value, self._place(keyword)
        key = keyword.arg
        if key is None:
            self._leave(keyword, f"{method.name}.**")
        elif key == "config":
            index = value.slice if isinstance(value, ast.Subscript) else None
            if isinstance(index, ast.Constant) and isinstance(index.value, str):
                method.config = index.value
                self.code.num_carried += 1
            else:
                self._leave(keyword, f"{method.name}.config")
        elif isinstance(value, ast.Constant) and isinstance(value.value, str):
            method.texts[key] = value.value
            method.keys[key] = CodeKey(
                owner=method.name, name=key, place=place, names=(value.value,)
            )
        elif isinstance(value, ast.List | ast.Tuple):
            names = tuple(_last_name(item) for item in value.elts)
            if all(names):
                method.keys[key] = CodeKey(owner=method.name, name=key, place=place, names=names)
            else:
                self._leave(keyword, f"{method.name}.{key}")
        elif isinstance(value, ast.Constant):
            method.keys[key] = CodeKey(
                owner=method.name, name=key, place=place, names=(str(value.value),)
            )
        elif name := _last_name(value):
            method.keys[key] = CodeKey(owner=method.name, name=key, place=place, names=(name,))
        else:
            self._leave(keyword, f"{method.name}.{key}")
