"""Every kind of message: engines, reference and the naive form agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.bundles import BuildTiny, Built, tiny_builder
from kit.files import MadeOnce
from kit.message_specs import EVERY_KIND, RECORDS, SPECS
from kit.models import write_mixed_backbones
from kit.traced import assert_messages_agree, run_shared, run_traced
from kit.zoo import write_zoo_model
from recmas_runtime.cli.inspect import bundle_text, form_text
from recmas_runtime.cli.thoughts import handover_texts
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.running.run_trace import RECORDS_NAME


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, families: Path) -> Path:
    """A folder with the tiny families, and `state` of gated DeltaNet."""
    root = tmp_path_factory.mktemp("messages")
    write_zoo_model(root / "state", "qwen3_5_text")
    for family in families.iterdir():
        (root / family.name).symlink_to(family)
    return root


# The longest of them, three rounds of two senders on a backbone with windows, is behind the mark.
FAST = [name for name in SPECS if name != "senders of rows"]


@pytest.mark.parametrize(
    "name", [*FAST, pytest.param("senders of rows", marks=pytest.mark.families)]
)
def test_engines_and_reference_agree(
    name: str, build_tiny: BuildTiny, folder: Path, tmp_path: Path
) -> None:
    built = build_tiny(SPECS[name], base_dir=folder)
    rounds = assert_all_forms_agree(built, tmp_path)
    assert (min(rounds) < built.system.plan.rounds) == (name == "an early end")
    shown = bundle_text(open_bundle(built.bundle))
    assert all(form_text(link) in shown for link in built.system.plan.links.values())


@pytest.mark.families
def test_backbones_of_different_widths(
    made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed_backbones(folder)
    build = tiny_builder(folder, made_once, lambda: tmp_path_factory.mktemp("bundles") / "bundle")
    assert_all_forms_agree(build(EVERY_KIND), tmp_path)


def assert_all_forms_agree(built: Built, folder: Path) -> list[int]:
    """Compare engines, one by one and together, with both other forms; returns rounds."""
    single, messages = run_traced(built.system, folder / "one", RECORDS, batch=1)
    ragged, others = run_traced(built.system, folder / "many", RECORDS, batch=len(RECORDS))
    shared, exchanged = run_shared(built.system, folder / "shared", RECORDS, chunk=5)
    reference, naive = built.reference(RECORDS), built.naive(RECORDS)
    texts = [answer.answer for answer in single]
    assert texts == [answer.answer for answer in ragged]
    assert texts == [answer.answer for answer in shared]
    assert [a.usage for a in single] == [a.usage for a in ragged] == [a.usage for a in shared]
    assert len(set(texts)) > 1, "texts that prove nothing"
    for result in (reference, naive):
        assert texts == result.texts
        assert [answer.rounds for answer in single] == result.rounds
        assert_messages_agree(messages, result)
        assert_messages_agree(others, result)
        assert_messages_agree(exchanged, result)
    for found, expected in zip(reference.handover_texts, naive.handover_texts, strict=True):
        assert found == {name: expected[name] for name in found}
    alone, together = read_trace(folder / "one"), read_trace(folder / "many")
    for line, found in zip(alone, reference.handover_texts, strict=True):
        texts = handover_texts(line)
        for message, text in found.items():
            link, _, round_ = message.partition("@")
            assert texts[int(round_), link.partition("->")[0]] == text
    assert [handover_texts(line) for line in alone] == [handover_texts(line) for line in together]
    hands = any(link.carries == "cache" for link in built.system.plan.links.values())
    assert all(bool(rows_of(line)) == hands for line in (*alone, *together))
    return reference.rounds


def read_trace(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORDS_NAME).read_text().splitlines()]


def rows_of(line: dict[str, Any]) -> list[int]:
    """Return how many rows each step handed over that handed over any."""
    return [step["handed_rows"] for step in line["steps"] if step.get("handed_bytes")]
