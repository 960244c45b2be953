"""The driver's order and the table, on figures written by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cells
import pytest
import race_table

import race
from kit.race import QUESTIONS


def answered(id_: str, seconds: float, answer: str, **more: Any) -> dict[str, Any]:
    said = {"role": "user", "content": f"{id_}?"}
    row = {"id": id_, "seconds": seconds, "processor_s": 0.5, "peak_kib": 2048, "outside": []}
    row |= {"answer": answer, "calls": 3, "prompt_tokens": 30, "written_tokens": 60}
    return row | {"asked": [{"messages": [said]}]} | more


def cell(system: str, endpoint: str, *rows: dict[str, Any], block: int = 0) -> dict[str, Any]:
    where = {"system": system, "endpoint": endpoint, "rounds": 1, "block": block, "at_once": 1}
    return {"cell": where, "rows": list(rows)}


CELLS = [
    cell("langgraph", "llama.cpp", answered("0", 6.0, "It is 7."), answered("1", 2.0, "8")),
    cell("crewai", "llama.cpp", answered("0", 8.0, "It is 7.", outside=["a.example"])),
    cell("crewai", "llama.cpp", answered("1", 4.0, "9"), block=1),
    cell("latent", "in process", answered("0", 1.0, "7", written_tokens=6, latent_steps=32)),
]


def test_rows_compare_on_the_questions_that_both_answered() -> None:
    langgraph, crewai, latent = race_table.rows_of(CELLS, {"0": "7", "1": "8"})
    assert (langgraph.system, langgraph.seconds, langgraph.right) == ("langgraph", 4.0, 2)
    assert (langgraph.times_as_fast, langgraph.saved) == (1.0, 0.0)
    assert (crewai.questions, crewai.seconds, crewai.right) == (2, 6.0, 1)
    assert (crewai.same_messages, crewai.same_answers) == (2, 1)
    assert crewai.times_as_fast == pytest.approx(8 / 12)
    assert crewai.outside == ("a.example",)
    assert (latent.times_as_fast, latent.saved) == (6.0, 0.9)
    assert latent.same_answers is None


def test_texts_of_recmas_are_held_against_its_own_endpoint() -> None:
    rows = race_table.rows_of(
        [
            cell("crewai", "llama.cpp", answered("0", 8.0, "7"), answered("1", 8.0, "8")),
            cell("crewai", "recmas serve", answered("0", 9.0, "seven"), answered("1", 9.0, "8")),
            cell("text", "in process", answered("0", 4.0, "seven"), answered("1", 4.0, "9")),
        ],
        {"0": "7", "1": "8"},
    )
    text = rows[-1]
    assert (text.same_messages, text.same_answers, text.times_as_fast) == (None, 1, 2.0)
    last = race_table.table_of(rows).splitlines()[-1]
    assert [word.strip() for word in last.split("|")[-3:-1]] == ["0/2", "1"]


def test_report_holds_every_row(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    for number, one in enumerate(CELLS):
        (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(one))
    settings = {"precision": "int4", "threads": 2, "cpu": "one", "max_tokens": 96}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    questions = [{"id": "0", "answer": "7"}, {"id": "1", "answer": "8"}]
    table = race_table.write_report(tmp_path, questions)
    assert table == (tmp_path / "race.md").read_text().strip()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "LangGraph",
        "CrewAI",
        "recmas, latent",
    ]
    assert len(json.loads((tmp_path / "race.json").read_text())["rows"]) == 3
    assert (tmp_path / "race.png").stat().st_size > 10_000


def test_plan_takes_turns_and_runs_what_has_no_endpoint_once() -> None:
    planned = cells.plan(["plain", "latent"], cells.ENDPOINTS, {3: 4, 1: 2}, block=2)
    assert [(c.block, c.rounds, c.system) for c in planned] == [
        *[(0, 3, "latent"), (0, 3, "plain"), (0, 3, "plain")],
        *[(0, 1, "latent"), (0, 1, "plain"), (0, 1, "plain")],
        *[(1, 3, "plain"), (1, 3, "plain"), (1, 3, "latent")],
    ]
    assert len({c.name for c in planned}) == len(planned)
    together = cells.plan(["plain", "avp"], ["llama.cpp"], {2: 1}, block=2, at_once=(1, 8))
    assert [(c.system, c.at_once) for c in together] == [("plain", 1), ("plain", 8), ("avp", 1)]


def test_rounds_and_their_questions() -> None:
    assert race.read_rounds("3:20,1", 5) == {3: 20, 1: 5}
    for wrong in ("4", "0", "x", "3:", "3:none"):
        if wrong == "3:":
            assert race.read_rounds(wrong, 5) == {3: 5}
            continue
        with pytest.raises(SystemExit, match="--rounds"):
            race.read_rounds(wrong, 5)


def test_cells_of_other_settings_are_refused(tmp_path: Path) -> None:
    given = {"precision": "int4", "max_tokens": 96, "latent_steps": 16, "block": 10, "threads": 2}
    race.keep_settings(tmp_path, argparse.Namespace(**given), QUESTIONS)
    race.keep_settings(tmp_path, argparse.Namespace(**given), QUESTIONS)
    with pytest.raises(SystemExit, match="cells of another max_tokens: take another --out"):
        race.keep_settings(tmp_path, argparse.Namespace(**given | {"max_tokens": 8}), QUESTIONS)


def test_too_few_questions_are_told(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    with pytest.raises(SystemExit, match="1 questions, 2 are asked for"):
        race.read_questions(tmp_path / "q.jsonl", 2)
    with pytest.raises(SystemExit, match="there is no such file"):
        race.read_questions(tmp_path / "none.jsonl", 2)
