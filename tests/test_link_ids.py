"""Ids of links are made and read in one module; nothing else spells them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from recmas_runtime.formats.ids import (
    canonical_link_name,
    inner_link_id,
    is_inner,
    link_ends,
    link_file_name,
    link_name,
    outer_link_id,
)
from test_structure import MODULES

IDS = "recmas_runtime.formats.ids"

# What is no id: module -> its literals.
OTHER_ARROWS = {
    "recmas_cli.train": {" -> "},  # a figure before and after
    "recmas_compiler.analysis.draw": {
        "-->",
        "-.->",
        "-. next round .->",
        "-. reuses cache .->",
    },  # arrows of Mermaid
    "recmas_compiler.ir.printer": {"->"},  # widths
    "recmas_compiler.trackers.mlflow_store": {"->"},  # not in names of metrics there
    "recmas_compiler.spec.schema.declared": {
        "Write `source -> target` with the names of two agents."
    },
    "recmas_compiler.spec.schema.json_schema": {
        "(<!-- codes -->\\n).*?(<!-- end of codes -->)",
        "(<!-- keys of (\\S+) -->\\n).*?(<!-- end of keys -->)",
    },
    "recmas_compiler.spec.document.yaml_source": {
        ")?( (->|"
    },  # plain text that may be a link's name
    "recmas_runtime.cli.inspect": {" -> "},  # widths, and who sends to whom
    "recmas_runtime.serve.mcp": {" -> "},  # who sends to whom, in words
}


def literals(path: Path) -> Iterator[str]:
    """Yield every literal of a file, the parts of f-strings among them, but no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def spelled(module: str) -> set[str]:
    found = {text for text in literals(MODULES[module]) if "->" in text or ".inner" in text}
    return found - OTHER_ARROWS.get(module, set())


@pytest.mark.parametrize("module", sorted(set(MODULES) - {IDS}))
def test_ids_are_spelled_in_one_place(module: str) -> None:
    assert not spelled(module)


def test_exceptions_are_needed() -> None:
    for module, allowed in OTHER_ARROWS.items():
        assert allowed <= set(literals(MODULES[module]))


def test_ids_are_read_back() -> None:
    assert (outer_link_id("a", "b-c"), inner_link_id("a")) == ("a->b-c", "a.inner")
    assert link_ends("a->b-c") == link_ends("a -> b-c") == ("a", "b-c")
    assert link_ends("a.inner") == ("a", "a")
    assert is_inner("a.inner")
    assert not is_inner("inner->inner")
    assert link_file_name("inner->b") == "outer.inner.b.safetensors"
    assert link_file_name("outer.inner") == "inner.outer.safetensors"


@pytest.mark.parametrize("written", ["a->b", " a  ->b ", "a -> b", "a\t->\tb"])
def test_names_have_one_form(written: str) -> None:
    assert canonical_link_name(written) == link_name("a", "b") == "a -> b"


@pytest.mark.parametrize("written", ["a", "a -> ", "-> b", "a -> b -> c", "A -> b", "a.inner"])
def test_other_texts_are_no_names(written: str) -> None:
    assert canonical_link_name(written) is None
