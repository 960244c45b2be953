"""Evaluations of tiny systems, on records that the tests write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from kit.files import WriteRecords, lines
from kit.fixtures import exports_once, one_thread
from recmas_compiler.evaluation.data.data_file import Question
from recmas_runtime.running.records import Record

__all__ = ["exports_once", "one_thread"]


@pytest.fixture(scope="session")
def tiny_bundle(project: Path) -> Path:
    """A bundle of three agents on a tiny backbone."""
    return project / "bundle"


@pytest.fixture
def write_records(tmp_path: Path) -> WriteRecords:
    """Write records as JSON lines."""

    def write(records: Sequence[Mapping[str, object]]) -> Path:
        path = tmp_path / "records.jsonl"
        path.write_text(lines(*records))
        return path

    return write


@pytest.fixture
def ask() -> Callable[..., Question]:
    """Make a question of its right answer and, perhaps, choices and tests."""

    def make(
        answer: object = None, *, choices: list[str] | None = None, **gold: object
    ) -> Question:
        fields: dict[str, object] = {"id": "q", "question": "?"}
        if choices is not None:
            fields["choices"] = choices
        record = Record(id="q", fields=fields)
        return Question(
            record=record, gold={**gold, "answer": answer} if answer is not None else gold
        )

    return make
