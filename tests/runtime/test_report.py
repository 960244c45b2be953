"""`recmas report`: what the file holds, and what it is refused for. Browsers: tests/serving."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import recmas_runtime as rt
from kit.files import lines
from recmas_runtime.cli.main import main
from recmas_runtime.running.run_trace import RECORDS_NAME, TraceWriter

HOSTILE = "</script><!--<img src=x onerror=alert(1)>\u2028\ud800"


class Report(HTMLParser):
    """The elements of a report with their texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self._is_open = True

    def handle_endtag(self, tag: str) -> None:
        self._is_open = False

    def handle_data(self, data: str) -> None:
        if self.texts and self._is_open:
            self.texts[-1] += data

    def of(self, tag: str, **attributes: str) -> list[str]:
        """Return the texts of elements that have these attributes."""
        return [
            text
            for (name, own), text in zip(self.elements, self.texts, strict=True)
            if name == tag and attributes.items() <= own.items()
        ]

    def data(self, name: str) -> Any:
        (text,) = self.of("script", type="application/json", id=name)
        return json.loads(text)


@pytest.fixture
def traced(hand_bundle: Path, tmp_path: Path) -> Path:
    """A folder with the trace of two records and their answers."""
    questions = tmp_path / "q.jsonl"
    questions.write_text(lines({"id": 17, "question": "4"}, {"id": "b", "question": "55"}))
    command = ["run", str(hand_bundle), "--input", str(questions), "--quiet"]
    files = ["--output", str(tmp_path / "a.jsonl"), "--trace", str(tmp_path / "trace")]
    assert main([*command, *files, "--thoughts", "3"]) == 0
    return tmp_path


def report(traced: Path, *options: str) -> Report:
    out = traced / "report.html"
    assert main(["report", str(traced / "trace"), "-o", str(out), "--force", *options]) == 0
    return Report(out)


def of_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORDS_NAME).read_text().splitlines()]


def test_it_holds_what_the_trace_holds(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = report(traced)
    assert re.fullmatch(r".*report\.html: 2 records, 0\.\d MiB\n", capsys.readouterr().out)
    for number, line in enumerate(of_lines(traced / "trace"), 1):
        told = page.data(f"trace-{number}")
        assert told["thoughts"] == line["thoughts"]
        assert told["messages"] == line["messages"]
        for shown, step in zip(told["steps"], line["steps"], strict=True):
            assert shown.items() <= step.items()
            assert {"op", "round", "agents", "ms"} <= shown.keys()
    assert page.data("index") == [{"id": 17, "note": "11 steps"}, {"id": "b", "note": "11 steps"}]


def test_times_of_several_records_are_named_so(traced: Path) -> None:
    told = of_lines(traced / "trace")
    (traced / "trace" / RECORDS_NAME).write_text(lines({**told[0], "batch_size": 2}))
    (entry,) = report(traced).data("index")
    assert entry["note"] == "11 steps; times are those of the 2 records that ran together"


def test_answers_stand_beside_the_trace(traced: Path) -> None:
    index = report(traced, "--answers", str(traced / "a.jsonl")).data("index")
    assert [(each["question"], each["answer"], each["error"]) for each in index] == [
        ("4", "e", ""),
        ("55", "f", ""),
    ]


def test_fields_are_named(traced: Path) -> None:
    record = {"id": 17, "ticket": "It is dark.", "customer": "Ada", "answer": "12"}
    (traced / "a.jsonl").write_text(lines({"id": 17, "record": record, "answer": "Light."}))
    index = report(traced, "--answers", str(traced / "a.jsonl")).data("index")
    assert index[0]["question"] == "ticket: It is dark.\ncustomer: Ada"
    assert "question" not in index[1]


def test_one_record(traced: Path) -> None:
    page = report(traced, "--record", "b")
    assert [each["id"] for each in page.data("index")] == ["b"]
    assert page.data("trace-1")["thoughts"] == of_lines(traced / "trace")[1]["thoughts"]


def test_it_runs_nothing_but_its_own_script(traced: Path) -> None:
    """And asks for no other file: the policy names the digests of what the file holds."""
    page = report(traced)
    (policy,) = (
        own["content"] or ""
        for name, own in page.elements
        if name == "meta" and own.get("http-equiv") == "Content-Security-Policy"
    )
    (script,) = (
        text
        for (name, own), text in zip(page.elements, page.texts, strict=True)
        if name == "script" and "type" not in own
    )
    (style,) = page.of("style")
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, style)
    ]
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digests[0]}';" in policy
    assert f"style-src 'sha256-{digests[1]}';" in policy
    assert not [own for _, own in page.elements if {"src", "style", "onclick"} & own.keys()]
    assert not [own for name, own in page.elements if name in ("link", "img", "iframe")]


def test_texts_stay_texts(traced: Path) -> None:
    """What models and files say ends no element and begins none."""
    told = of_lines(traced / "trace")
    told[0]["id"] = told[0]["steps"][0]["agents"][0] = HOSTILE
    told[0]["steps"][0]["texts"] = [HOSTILE]
    told[0]["thoughts"][0]["head"]["tokens"][0]["text"] = HOSTILE
    folder = traced / '<b>&"'
    folder.mkdir()
    (folder / RECORDS_NAME).write_text("".join(json.dumps(line) + "\n" for line in told))
    answers = traced / "hostile.jsonl"
    answers.write_text(json.dumps({"id": HOSTILE, "record": {"q": HOSTILE}, "answer": HOSTILE}))
    answers.write_text(answers.read_text() + "\n")
    plain = report(traced, "--answers", str(traced / "a.jsonl"))
    out = traced / "hostile.html"
    arguments = ["report", str(folder), "-o", str(out), "--answers", str(answers)]
    assert main(arguments) == 0
    page = Report(out)
    assert [name for name, _ in page.elements] == [name for name, _ in plain.elements]
    assert page.of("title") == ['Report: <b>&"']
    assert page.data("index")[0]["id"] == page.data("index")[0]["answer"] == HOSTILE
    trace = page.data("trace-1")
    assert trace["steps"][0]["texts"] == [HOSTILE]
    assert trace["thoughts"][0]["head"]["tokens"][0]["text"] == HOSTILE


def test_texts_that_agents_wrote(hand_bundle: Path, tmp_path: Path) -> None:
    """A trace without thoughts has steps, times and what was handed over in words."""
    with TraceWriter(tmp_path / "trace") as trace:
        rt.load(hand_bundle, threads=1).baseline("text").run_batch(["4"], trace=trace)
    told = report(tmp_path).data("trace-1")
    assert told["thoughts"] == told["messages"] == []
    assert [step["texts"] for step in told["steps"] if step["op"] == "write"]


def test_a_file_is_kept(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = traced / "report.html"
    out.write_text("precious")
    assert main(["report", str(traced / "trace"), "-o", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"{out}: error[RM520]: it exists already. "
        "Name another file, or write over it with --force.\n"
    )
    assert out.read_text() == "precious"
    assert main(["report", str(traced / "trace"), "-o", str(traced), "--force"]) == 2
    assert "error[RM520]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["none", "-o", "r"], 1, r"RM502\]: there is no trace"),
        (["trace", "-o", "r", "--record", "x"], 2, r"RM506\]: the trace holds no record 'x'"),
        (["trace", "-o", "none/r"], 1, r"RM503\]: the report cannot be written: No such file"),
        (["trace", "-o", "r", "--answers", "none"], 1, r"RM502\]: the answers cannot be read: No"),
        (["trace", "-o", "r", "--answers", "b"], 1, r"RM502\]: the answers .*no answer of"),
        (["broken", "-o", "r"], 1, r"trace.jsonl:1: error\[RM502\]: .*steps\[0\]"),
        (["thoughts", "-o", "r"], 1, r"trace.jsonl:1: error\[RM502\]: .*thoughts\[0\].round"),
        (["trace"], 2, r"RM506\]: the following arguments are required: -o"),
    ],
)
def test_what_cannot_be_reported(
    arguments: list[str],
    status: int,
    message: str,
    traced: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(traced)
    Path("b").write_text("[]\n")
    for name, parts in {
        "broken": {"steps": [{"op": "think"}]},
        "thoughts": {"steps": [], "thoughts": [{"agent": "a"}]},
    }.items():
        Path(name).mkdir()
        Path(name, RECORDS_NAME).write_text(lines({"id": 1, "batch_size": 1, **parts}))
    before = sorted(path.name for path in traced.iterdir())
    assert main(["report", *arguments]) == status
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in traced.iterdir()) == before
