"""The race on a tiny bundle alone: what is asked, kept, gone on with and shown. Never how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.bundles import BuildTiny
from kit.peer_race import PROMPT, STEPS
from kit.specs import SEQUENTIAL

import contenders  # isort: skip
import peer_race  # isort: skip
import peer_table  # isort: skip
import peer_turns  # isort: skip
import peer_worker  # isort: skip
import recmas_peer  # isort: skip

CELLS = [
    contenders.Cell(name="prompt-128", request=PROMPT),
    contenders.Cell(name="rows-1", request={**STEPS, "rows": 1}, rows=1),
]


@pytest.fixture(scope="module")
def bundle(build_tiny: BuildTiny) -> Path:
    return build_tiny(SEQUENTIAL).bundle


def race_of(bundle: Path, folder: Path, turns: int) -> peer_turns.Race:
    models = contenders.Models(folder=folder, source=folder / "none.gguf", own_type="F32")
    (own, *_) = contenders.contenders_of(models, {"float32": bundle}, threads=1)
    return peer_turns.Race(
        contenders=[own], environments=folder, folder=folder / "out", threads=1, turns=turns
    )


def test_a_bundle_answers_every_request(bundle: Path, tmp_path: Path) -> None:
    model = recmas_peer.Model(bundle=str(bundle), threads=1)
    asked = peer_worker.Asked(model)
    for _ in range(2):  # the second time behind rows that were filled
        assert asked.steps(rows=2, used=12, count=3)["head_s"] > 0
    assert asked.prompt(positions=12)["seconds"] > 0
    assert asked.text(used=12, count=4)["seconds"] > 0
    ids = list(range(5, 17))
    asked.logits(ids=ids, to=str(tmp_path / "logits.npy"))
    logits = np.load(tmp_path / "logits.npy")
    assert logits.shape == (12, model.about.vocabulary)
    wide = logits[:-1].astype(np.float64)
    expected = np.log(np.exp(wide).sum(-1)) - wide[np.arange(11), ids[1:]]
    found = asked.losses(texts=[ids])
    assert found == {"loss": pytest.approx(expected.mean(), rel=1e-5), "tokens": 11}
    # A text token by token is the same text.
    one_by_one = [model.logits(ids[: n + 1])[-1] for n in range(12)]
    np.testing.assert_allclose(one_by_one, logits, atol=1e-4)
    asked.drop()


def test_a_race_goes_on_with_the_turns_that_are_missing(bundle: Path, tmp_path: Path) -> None:
    race = race_of(bundle, tmp_path, turns=1)
    race.losses([[5, 6, 7]], {"recmas float32": "a key"})
    race.run(CELLS[:1])
    first = race.rows("prompt-128")
    assert len(first) == len(race.rows("load")) == 1
    race.run(CELLS)
    assert race.rows("prompt-128") == first, "a cell that was there ran again"
    (step,) = race.rows("rows-1")
    assert set(step["recmas float32"]) == {"seconds", "head_s", "floor_s"}
    facts = peer_turns.read(tmp_path / "out/files/recmas float32.json")
    assert facts["tokens"] == 2
    assert facts["step_bytes"] > 0
    assert race.unknown_errors({"recmas float32": "x"}) == list(race.contenders)


def reply(seconds: float, **more: float) -> dict[str, float]:
    return {"seconds": seconds, **more}


OURS, THEIRS = "recmas int8", "llama.cpp Q8_0"
FIGURES: dict[str, Any] = {
    "date": "2026-01-02",
    "threads": 2,
    "machine": {"cpu": "A processor", "packages": {"onnxruntime": "1.0"}},
    "texts": {"name": "some.jsonl", "number": 3, "tokens": 90, "longer_than_read": 1},
    "contenders": {
        OURS: {
            "peer": "recmas",
            "precision": "int8",
            "made": "recmasc build",
            "file_mib": 200.0,
            "version": "recmas 0.1.0",
            "head_in_prompt": False,
            "head_in_step": False,
            "loss": 2.5,
            "step_loss": 2.6,
            "step_bytes": 120_000_000,
            "memory_mib": 310.0,
        },
        THEIRS: {
            "peer": "llama.cpp",
            "precision": "int8",
            "made": "a quantizer, Q8_0",
            "file_mib": 137.0,
            "version": "llama 1",
            "head_in_prompt": True,
            "head_in_step": True,
        },
    },
    "cells": {
        "prompt-128": {
            "request": {"do": "prompt"},
            "others": 0.0,
            "turns": [{OURS: reply(0.06, head_s=0.02), THEIRS: reply(0.16)}] * 2,
        },
        "rows-1": {
            "request": {"do": "steps"},
            "others": 0.0,
            "turns": [
                {
                    OURS: reply(0.003, head_s=0.001, floor_s=0.0015),
                    THEIRS: reply(0.006, floor_s=0.002),
                },
                {
                    OURS: reply(0.004, head_s=0.001, floor_s=0.0015),
                    THEIRS: reply(0.010, floor_s=0.002),
                },
                {
                    OURS: reply(0.003, head_s=0.001, floor_s=0.0030),
                    THEIRS: reply(0.012, floor_s=0.002),
                },
            ],
        },
    },
}


def test_ratios_are_of_turns_and_count_the_head_on_both_sides() -> None:
    facts = FIGURES["contenders"][THEIRS]
    cells = FIGURES["cells"]
    assert peer_table.ratios(cells["rows-1"], facts, THEIRS, OURS) == pytest.approx([1.5, 2.0, 3.0])
    assert peer_table.ratios(cells["prompt-128"], facts, THEIRS, OURS) == pytest.approx([2.0, 2.0])
    without = {**facts, "head_in_step": False}
    assert peer_table.ratios(cells["rows-1"], without, THEIRS, OURS)[0] == pytest.approx(2.0)


def test_tables(golden: Any) -> None:
    golden(peer_table.section(FIGURES) + "\n")


def test_a_busy_machine_is_called_busy() -> None:
    busy = {**FIGURES["cells"]["rows-1"], "others": 0.4}
    text = peer_table.section({**FIGURES, "cells": {"rows-1": busy}})
    assert "**The machine was busy**: others had 0.40 of a processor" in text


def test_the_committed_section_is_that_of_the_committed_figures() -> None:
    page = peer_table.PAGE.read_text(encoding="utf-8")
    assert peer_table.with_section(page, peer_table.committed()) == page


def test_a_page_without_a_section_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no section between"):
        peer_table.with_section(page.read_text(encoding="utf-8"), "text")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--int8", "x"], "--float32 is missing"),
        (["--table-only", "--out", "nowhere"], "nowhere has no cells"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["peer_race", *arguments])
    with pytest.raises(SystemExit, match=said):
        peer_race.main()


def test_unknown_peers_are_refused() -> None:
    with pytest.raises(SystemExit, match="there is no peer 'vllm'"):
        peer_race.names_of("llama.cpp,vllm")
