"""Templates that write the date get one day for a whole run, which can be given."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.hand_bundle import CHAT_TEMPLATE, edit_json, rehash
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import RecmasError

# The hand-made model answers the prompt's last digit with the letter of that place.
DATED = CHAT_TEMPLATE + "{{ strftime_now('%d') }}"


@pytest.fixture
def dated(own_bundle: Path) -> Path:
    (own_bundle / "backbones/one/chat_template.jinja").write_text(DATED)
    rehash(own_bundle)
    return own_bundle


def answer(bundle: Path, date: str | None = None) -> str:
    with rt.load(bundle, device="cpu", date=date) as system:
        return system.run("What day is it?").answer


def test_a_date_given_at_load_wins_over_the_bundle_s(dated: Path) -> None:
    assert answer(dated, "2026-11-07") == "h"
    edit_json(dated / "plan.json", "date", "2026-11-03")
    rehash(dated)
    assert answer(dated) == "d"
    assert answer(dated, "2026-11-07") == "h"


def test_without_a_date_it_is_that_of_loading(dated: Path) -> None:
    with rt.load(dated, device="cpu") as system:
        before = system.date
        datetime.date.fromisoformat(before)
        assert system.run("What day is it?").answer == "abcdefghij"[int(before[-1])]
        assert system.prompt_day == system.date == before


@pytest.mark.parametrize("date", ["2026-02-30", "tomorrow", "", "20261107"])
def test_a_date_that_is_none_is_refused(dated: Path, date: str) -> None:
    with pytest.raises(RecmasError, match=r"RM506.*YYYY-MM-DD"):
        rt.load(dated, device="cpu", date=date)


def test_a_bundle_with_a_date_that_is_none_is_malformed(dated: Path) -> None:
    edit_json(dated / "plan.json", "date", "2026-02-30")
    rehash(dated)
    with pytest.raises(RecmasError, match="RM404"):
        rt.load(dated, device="cpu")


def test_the_command_line_gives_a_date_and_resumes_with_the_same(
    dated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    question.write_text('{"question": "What day is it?"}\n')
    command = ["run", str(dated), "--device", "cpu", "--input", str(question)]
    command += ["--output", str(out), "--date"]
    assert main([*command, "2026-11-07"]) == 0
    assert json.loads(out.read_text())["answer"] == "h"
    assert main([*command, "2026-11-08", "--resume"]) != 0
    assert "RM521" in capsys.readouterr().err
    assert main([*command, "2026-11-07", "--resume"]) == 0
    assert main([*command, "today", "--force"]) == 2
    assert "RM506" in capsys.readouterr().err
