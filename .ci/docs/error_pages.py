"""The page of error codes: the registry, and what the source says under each code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import CODES, Exit

PACKAGES: Final = ("recmas_compiler", "runtime/recmas_runtime", "export")
FAMILIES: Final = {
    "RM1": "The spec",
    "RM2": "Backbones, and what is installed",
    "RM3": "Building",
    "RM4": "Bundles",
    "RM5": "Running and serving",
    "RM6": "Evaluating",
    "RM7": "Training",
}
_STATUSES: Final = {
    Exit.OK: "done",
    Exit.RUN_FAILED: "the run failed, or a part of it",
    Exit.USAGE: "the command line or a setting cannot be used",
    Exit.SPEC_INVALID: "the spec is invalid",
    Exit.ENVIRONMENT: "something is missing on this machine",
    Exit.VERIFICATION: "what was checked is not as it should be",
    Exit.INTERRUPTED: "interrupted; what was finished is kept",
}
_CODE = re.compile(r"RM\d{3}$")

Said = tuple[str, str]  # a message and what to do, with names in the place of values


def page(written: str, *, root: Path) -> str:
    """Return the page; its first paragraph is that of `written`, the table in the repository."""
    first = written.split("\n| ")[0].strip()
    lines = [first, "", *_INTRODUCTION, "## Exit statuses", "", "| status | meaning |", "|---|---|"]
    lines += [f"| {int(status)} | {meaning} |" for status, meaning in _STATUSES.items()]
    said = messages(root)
    family = ""
    for code, (status, meaning) in CODES.items():
        if code[:3] != family:
            family = code[:3]
            lines += ["", f"## {family}xx: {FAMILIES.get(family, 'other').lower()}", ""]
        lines += [f"(error-{code.lower()})=", f"### {code}", ""]
        tail = "" if status is Exit.OK else f" Exit status {int(status)}."
        lines += [f"{meaning[0].upper()}{meaning[1:]}.{tail}", ""]
        for message, hint in said.get(code, ()):
            lines += [f"- {_shown(message)}{f'<br>{_shown(hint)}' if hint else ''}"]
        lines.append("")
    return "\n".join(lines)


_INTRODUCTION: Final = """\
A message reads `FILE:LINE:COLUMN: error[CODE]: what is wrong. What to do.` Below stands, for each
code, what it means, and what is said under it as the source has it: words in CAPITALS stand for
values of the case. Find a code with the search, or with your browser's.

""".splitlines()


def messages(root: Path) -> dict[str, list[Said]]:
    """Return what calls with a code say, by code, in the order of the source, each once."""
    found: dict[str, dict[Said, None]] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_text("utf-8")
            if not re.search(r'"RM\d{3}"', text):
                continue
            for scope in ast.walk(ast.parse(text)):
                if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
                    for code, said in _said_in(scope):
                        found.setdefault(code, {})[said] = None
    return {code: list(said) for code, said in found.items()}


def _said_in(scope: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, Said]]:
    for call in ast.walk(scope):
        if not isinstance(call, ast.Call):
            continue
        named = {word.arg: word.value for word in call.keywords if word.arg}
        given = [*call.args]
        if "code" in named:
            code, rest = named["code"], given
        else:
            at = next((i for i, value in enumerate(given) if _is_code(value)), None)
            if at is None:
                continue
            code, rest = given[at], given[at + 1 :]
        if not _is_code(code):
            continue
        assert isinstance(code, ast.Constant)
        message = _text(named.get("message", rest[0] if rest else None), scope, call.lineno)
        hint = _text(named.get("hint", rest[1] if len(rest) > 1 else None), scope, call.lineno)
        if message:
            yield str(code.value), (message, hint or "")


def _is_code(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and bool(_CODE.match(str(value.value)))


def _text(value: ast.expr | None, scope: ast.AST, line: int) -> str | None:
    """Return a text of the source, or None for what only a run would tell."""
    match value:
        case ast.Constant(value=str(constant)):
            return constant
        case ast.JoinedStr():
            return "".join(_part(part) for part in value.values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = (_text(left, scope, line), _text(right, scope, line))
            return None if None in parts else f"{parts[0]}{parts[1]}"
        case ast.Name(id=name):
            before = [
                node
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign)
                and node.lineno <= line
                and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
            ]
            if before:
                last = max(before, key=lambda node: node.lineno)
                if not any(inner is value for inner in ast.walk(last)):
                    text = _text(last.value, scope, last.lineno)
                    return None if text is None else text + _added(name, scope, last.lineno, line)
    return None


def _added(name: str, scope: ast.AST, after: int, before: int) -> str:
    """Return what is put behind a text between two lines, `...` for what only a run tells."""
    added = [
        node
        for node in ast.walk(scope)
        if isinstance(node, ast.AugAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == name
        and after < node.lineno <= before
    ]
    added.sort(key=lambda node: node.lineno)
    return "".join(_text(node.value, scope, node.lineno) or " ..." for node in added)


def _part(part: ast.expr) -> str:
    """Return a piece of an f-string, a name in the place of a value."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    names = [n.attr if isinstance(n, ast.Attribute) else n.id for n in _names(part.value)]
    return re.sub(r"_+", " ", names[0]).strip().upper() if names else "..."


def _names(value: ast.expr) -> list[ast.Attribute | ast.Name]:
    """Return the names of an expression, those of functions last."""
    found = [n for n in ast.walk(value) if isinstance(n, ast.Attribute | ast.Name)]
    called = [n.func for n in ast.walk(value) if isinstance(n, ast.Call)]
    return [n for n in found if n not in called] or found


def _shown(text: str) -> str:
    """Return a message as Markdown: code in backticks stays, other marks are text."""
    parts = re.split(r"(`[^`\n]+`)", " ".join(text.split()))
    return "".join(
        p if p.startswith("`") else re.sub(r"([<>*_\[\]`{}\\])", r"\\\1", p) for p in parts
    )
