"""Which code of a text is the answer, and which names a program asks for."""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from textwrap import dedent
from typing import Final

# A fence, also as the first thing of a list item or quotation.
_FENCE: Final = re.compile(
    r"(?P<before>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<fence>```+|~~~+)(?P<info>[^`\n]*)$"
)
_PYTHON: Final = ("", "python", "python3", "py", "py3")
_BUILTINS: Final = frozenset(dir(builtins))
READS_INPUT: Final = re.compile(r"\binput\b|\bstdin\b|\bopen\(0")


_CODE_LINE: Final = re.compile(r"(?:async def|def|class|import|from)\s+\w|@\w")
_MAX_PROSE_LINES: Final = 200  # behind the code; each is tried


@dataclass
class _Block:
    fence: str
    language: str
    indent: int
    is_quoted: bool
    lines: list[str] = field(default_factory=list)

    def is_closed_by(self, found: re.Match[str]) -> bool:
        """Tell whether a fence ends the block; one that is further in is part of its text."""
        indent = len(found["before"].expandtabs(4))
        return found["fence"].startswith(self.fence) and indent <= self.indent + 3

    @property
    def code(self) -> str:
        """The block without the indentation of its fence, and without what all lines share."""
        lines = [re.sub(r"^[ \t]*> ?", "", line) for line in self.lines] if self.is_quoted else None
        bare = [_outdented(line, self.indent) for line in lines or self.lines]
        text = "\n".join(bare)
        return text if parses(text) else dedent(text)


def extract_code(text: str, names: Collection[str] = (), *, is_script: bool = False) -> str | None:
    """Return the Python code of a model's text; None if there is none.

    Of several blocks the last one that defines one of the names that are asked for counts (for a
    script: that reads input), if one does; else the last one that defines something; else the last.
    Blocks that define what that block lacks come along. A fence that was never closed, because the
    text was cut off, reaches to the end, and counts where no other does. A text without blocks
    counts if all of it is code, or its part that defines one of the names.
    """
    blocks = [code for code in _blocks(text) if code.strip()]
    if not blocks:
        return text.strip("\n") if is_code(text) else _among_prose(text, names)
    chosen = _chosen(blocks, names, is_script=is_script)
    return _with_missing(chosen, blocks, names).strip("\n")


def parses(code: str) -> bool:
    """Tell whether a text is Python."""
    return _tree(code) is not None


def is_code(text: str) -> bool:
    """Tell whether a text is Python that does something, also as a function's body."""
    trees = (_tree(text), _tree(f"def f():\n{text}"))
    tree = next((tree for tree in trees if tree is not None), None)
    # "forty" and "Yes" parse too.
    return tree is not None and any(not isinstance(node, ast.Expr) for node in tree.body)


def defines(code: str, name: str) -> bool:
    """Tell whether code defines a function, a class or a variable of a name, at any depth."""
    return bool(
        re.search(
            rf"^\s*(?:(?:async\s+)?def\s+{re.escape(name)}\b|class\s+{re.escape(name)}\b"
            rf"|{re.escape(name)}\s*(?::[^=\n]+)?=[^=])",
            code,
            re.MULTILINE,
        )
    )


@lru_cache(maxsize=1024)  # tests are read for every answer, and may be megabytes
def undefined_names(code: str) -> frozenset[str]:
    """Return the names that code uses and neither defines nor finds among the built-in ones."""
    tree = _tree(code)
    if tree is None:
        return frozenset()
    used = {node.id for node in _names(tree) if isinstance(node.ctx, ast.Load)}
    return frozenset(used - _defined(tree) - _BUILTINS)


@lru_cache(maxsize=1024)
def imported_packages(code: str) -> frozenset[str]:
    """Return the packages outside of the standard library that code imports, at any depth."""
    tree = _tree(code)
    if tree is None:
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return frozenset(found - sys.stdlib_module_names - {"__main__"})


def _among_prose(text: str, names: Collection[str]) -> str | None:
    """Return the lines of a text without blocks that are Python and define one of the names."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _CODE_LINE.match(line)]
    if not starts or not any(defines(text, name) for name in names):
        return None
    for end in range(len(lines), max(starts[0], len(lines) - _MAX_PROSE_LINES), -1):
        code = "\n".join(lines[starts[0] : end])
        if parses(code) and any(defines(code, name) for name in names):
            return code.strip("\n")
    return None


def _chosen(blocks: Sequence[str], names: Collection[str], *, is_script: bool) -> str:
    asked = [block for block in blocks if any(defines(block, name) for name in names)]
    if is_script:
        asked = [block for block in blocks if READS_INPUT.search(block)]
    if asked:
        return ([block for block in asked if parses(block)] or asked)[-1]
    if names:  # what only uses them is an example or a test
        unused = [b for b in blocks if not any(re.search(rf"\b{re.escape(n)}\b", b) for n in names)]
        blocks = unused or blocks
    defining = [b for b in blocks if re.search(r"^\s*(?:async def|def|class) ", b, re.MULTILINE)]
    return (defining or blocks)[-1]


def _with_missing(chosen: str, blocks: Sequence[str], names: Collection[str]) -> str:
    """Return the chosen block behind those that define what it uses and does not define."""
    parts = [chosen]
    missing = set(undefined_names(chosen))
    for block in reversed(blocks):
        tree = _tree(block)
        if tree is None or block == chosen or any(defines(block, name) for name in names):
            continue
        if (found := _defined(tree)) & missing:
            parts.insert(0, block.strip("\n"))
            missing = (missing - found) | undefined_names(block)
    return "\n".join(parts)


def _blocks(text: str) -> list[str]:
    """Return the Python blocks; one that is not closed only where no other one is there."""
    closed: list[str] = []
    block: _Block | None = None
    for line in text.splitlines():
        found = _FENCE.match(line)
        info = found["info"].strip() if found else ""
        if block is None or (found and info and found["fence"][0] == block.fence[0]):
            if found:
                block = _opened(found, info)
        elif found and not info and block.is_closed_by(found):
            if block.language in _PYTHON:
                closed.append(block.code)
            block = None
        elif line.rstrip().endswith(block.fence) and not found:  # behind the last line of code
            block.lines.append(line.rstrip().removesuffix(block.fence))
            if block.language in _PYTHON:
                closed.append(block.code)
            block = None
        else:
            block.lines.append(line)
    if not closed and block is not None and block.language in _PYTHON:
        return [block.code]
    return closed


def _opened(found: re.Match[str], info: str) -> _Block:
    language = re.match(r"\{?\.?(\w*)", info)
    return _Block(
        fence=found["fence"],
        language=language.group(1).lower() if language else "",
        indent=len(found["before"].expandtabs(4)),
        is_quoted=">" in found["before"],
    )


def _outdented(line: str, indent: int) -> str:
    line = line.expandtabs(4) if line.startswith("\t") and indent else line
    return line[min(indent, len(line) - len(line.lstrip(" "))) :]


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _names(tree: ast.Module) -> Iterator[ast.Name]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Name))


def _defined(tree: ast.Module) -> set[str]:
    found = {node.id for node in _names(tree) if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name):
                found.add(name)
            case ast.arg(arg=name):
                found.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                found |= {a.asname or a.name.partition(".")[0] for a in aliases}
            case ast.ExceptHandler(name=str(name)):
                found.add(name)
            case _:
                pass
    return found
