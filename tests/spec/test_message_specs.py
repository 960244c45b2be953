"""Specs that docs/training_results.md names: they load, and are checked, as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from recmas_compiler.spec.spec import load_spec

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "benchmarks" / "messages"
SMOL = "builtin:smollm2-135m-instruct"
# What `recmasc train notes.yaml --method lora` leaves.
LEARNED = "out/notes/lora/model"


def test_they_are_there() -> None:
    assert len(list(SPECS.glob("*.yaml"))) >= 2


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_spec_is_sound_and_named(path: Path) -> None:
    spec = load_spec(path)
    assert spec.warnings == ()
    assert {b.source for b in spec.document.backbones.values()} <= {SMOL, LEARNED}
    assert path.name in (ROOT / "docs" / "training_results.md").read_text(encoding="utf-8")
