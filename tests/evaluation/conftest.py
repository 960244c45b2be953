"""Evaluations of tiny systems, on records that the tests write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from recmas_compiler.evaluation.data.data_file import Question
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import parse_spec
from recmas_export.build import build
from recmas_runtime.running.records import Record
from record_files import WriteRecords
from tiny_models import write_tiny_backbone
from tiny_specs import SEQUENTIAL
from torch_fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three agents on a tiny backbone."""
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_backbone(root / "llama", "llama", seed=0)
    spec = parse_spec(SEQUENTIAL, file=str(root / "spec.yaml"), base_dir=root)
    build(run_pipeline(build_topology(spec)), spec=spec, out=root / "bundle")
    return root / "bundle"


@pytest.fixture
def write_records(tmp_path: Path) -> WriteRecords:
    """Write records as JSON lines."""

    def write(records: Sequence[Mapping[str, object]]) -> Path:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
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
