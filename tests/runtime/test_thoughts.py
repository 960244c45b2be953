"""`recmas thoughts` and the option that writes what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recmas_runtime as rt
from kit.files import lines, read_messages
from kit.hand_bundle import CHAT_TEMPLATE, make_tokenizer
from recmas_runtime.cli.main import main
from recmas_runtime.prompts.tokenizer import Tokenizer
from recmas_runtime.running.run_trace import RECORDS_NAME, TraceWriter
from recmas_runtime.sequences.thoughts import RecordReadings, _Nearest

NUM_NEAREST = 3


@pytest.fixture
def traced(hand_bundle: Path, tmp_path: Path) -> Path:
    """The trace of two records with three tokens a thought."""
    questions, folder = tmp_path / "q.jsonl", tmp_path / "trace"
    questions.write_text(lines({"id": 17, "question": "4"}, {"id": "b", "question": "55"}))
    command = ["run", str(hand_bundle), "--input", str(questions), "--output", str(tmp_path / "a")]
    wanted = ["--trace", str(folder), "--thoughts", str(NUM_NEAREST), "--quiet"]
    assert main([*command, *wanted]) == 0
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["thoughts", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_messages_are_read_by_the_table(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embeddings are one-hot here, so a vector's cosines are its own direction."""
    tokenizer = Tokenizer(make_tokenizer().to_str(), CHAT_TEMPLATE)
    messages = read_messages(traced)
    records = json.loads(printed(capsys, traced, "--json"))["data"]["records"]
    assert [record["id"] for record in records] == [17, "b"]
    for row, record in enumerate(records):
        assert len(record["messages"]) == sum(message.shape[1] for message in messages.values())
        for found in record["messages"]:
            vector = messages[f"{found['link']}@{found['round']}"][row, found["place"] - 1]
            cosines = vector.astype(np.float64) / np.linalg.norm(vector)
            best = np.argsort(-cosines)[:NUM_NEAREST]
            tokens = found["embedding"]["tokens"]
            assert [token["id"] for token in tokens] == best.tolist()
            assert [token["text"] for token in tokens] == list(map(tokenizer.text_of, best))
            assert [token["cosine"] for token in tokens] == pytest.approx(cosines[best], rel=1e-4)
            exponents = np.exp(np.sqrt(len(vector)) * cosines)
            mass = exponents[best].sum() / exponents.sum()
            assert found["embedding"]["rest"] == pytest.approx(1 - mass, rel=1e-4)


def test_a_table_for_each_agent_and_round(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, traced)
    heads = [line for line in shown.splitlines() if line and not line.startswith(" ")]
    agents = [
        f"{agent}, round {round_}"
        for agent, round_ in (("planner", 1), ("solver", 1), ("planner", 2))
    ]
    head = "thoughts through the head (probability)"
    fed_back = "fed back to itself, among input embeddings (cosine)"
    sent = "sent, among input embeddings of the receiver (cosine)"
    paths = ("planner -> solver", "solver -> planner", "planner -> solver")
    tables = [
        line
        for a, p in zip(agents, paths, strict=True)
        for line in (a, head, fed_back, f"{p}: {sent}")
    ]
    assert heads == ["record 17", *tables, "record b", *tables]
    assert printed(capsys, traced, "--record", "17") + "\n" in shown
    assert printed(capsys, traced, "--record", "b").startswith("record b\n\nplanner, round 1\n")
    # The planner's prompt ends in "4" and the head says that "e" comes next, which it feeds back.
    (first,) = (line for line in shown.splitlines()[5:6])
    place, norm, rest, token, mass, *others = first.split()
    assert (place, norm, token) == ("1", "1", '"e"')
    line = json.loads((traced / RECORDS_NAME).read_text().splitlines()[0])
    head = line["thoughts"][0]["head"]
    assert (rest, mass) == (f"{head['rest']:.3f}", f"{head['tokens'][0]['mass']:.3f}")
    assert len(others) == 2 * (NUM_NEAREST - 1)


def test_a_thought_is_compared_with_the_round_before(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed(capsys, traced, "--record", "17").splitlines()
    second = shown.index("planner, round 2") + 1
    assert shown[second + 1].split() == ["norm", "before", "rest", "nearest", "tokens"]
    (line,) = (json.loads(s) for s in (traced / RECORDS_NAME).read_text().splitlines()[:1])
    cosines = {(t["agent"], t["round"], t["step"]): t["cosine_before"] for t in line["thoughts"]}
    assert [cosines["planner", 1, step] for step in (1, 2)] == [None, None]
    for step in (1, 2):
        assert shown[second + 1 + step].split()[2] == f"{cosines['planner', 2, step]:.3f}"


def test_what_is_sent_as_it_is_fed_back_is_not_printed_twice(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = traced / RECORDS_NAME
    line = json.loads(path.read_text().splitlines()[0])
    for thought, message in zip(line["thoughts"][:2], line["messages"][:2], strict=True):
        message["embedding"] = thought["fed_back"]
    path.write_text(json.dumps(line) + "\n")
    shown = printed(capsys, traced).splitlines()
    assert shown.count("planner -> solver: sent as it was fed back") == 1
    assert sum(text.startswith("planner -> solver: ") for text in shown) == 2


def test_messages_of_who_did_not_think_are_printed(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = traced / RECORDS_NAME
    line = json.loads(path.read_text().splitlines()[0])
    line["thoughts"] = [t for t in line["thoughts"] if t["agent"] == "solver"]
    path.write_text(lines(line))
    shown = printed(capsys, traced).splitlines()
    first = shown.index("planner, round 1")
    assert shown[first + 1].startswith("planner -> solver: sent, among input embeddings of the")
    assert shown[first + 3].split()[0] == "1"


def test_records_without_thoughts_are_counted(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = traced / RECORDS_NAME
    one, other = map(json.loads, path.read_text().splitlines())
    del other["thoughts"], other["messages"]
    path.write_text(lines(one, other))
    assert main(["thoughts", str(traced)]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("record ") == 1
    assert shown.err == "1 of 2 records left out: traced without --thoughts\n"
    assert json.loads(printed(capsys, traced, "--json"))["data"]["records_without_thoughts"] == 1


def test_of_a_system_that_writes_the_texts_are_printed(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(hand_bundle), "4", "--baseline", "text", "--quiet"]
    assert main([*command, "--trace", str(tmp_path / "t"), "--thoughts", "2"]) == 0
    line = json.loads((tmp_path / "t" / RECORDS_NAME).read_text())
    written = [(s["agents"], s["round"], s["texts"]) for s in line["steps"] if s["op"] == "write"]
    assert written
    expected = "record 1\n"
    for (agent,), round_, (text,) in written:
        wrote = json.dumps(text, ensure_ascii=False)
        expected += f"\n{agent}, round {round_}\nwrote {wrote}\n"
    assert printed(capsys, tmp_path / "t") == expected


def test_a_trace_of_ones_own_may_ask_for_readings(hand_bundle: Path) -> None:
    class Kept:
        num_nearest = 2

        def __init__(self) -> None:
            self.readings: list[RecordReadings] = []

        def add_batch(
            self,
            records: object,
            events: object,
            messages: object,
            readings: list[RecordReadings] | None = None,
        ) -> None:
            self.readings += readings or []

    trace = Kept()
    rt.load(hand_bundle, threads=1).run_batch(["4", "5"], trace=trace)
    assert [len(readings.thoughts) for readings in trace.readings] == [6, 6]
    assert {len(thought.head.tokens) for thought in trace.readings[0].thoughts} == {2}


def test_more_tokens_than_there_are(hand_bundle: Path, tmp_path: Path) -> None:
    with TraceWriter(tmp_path, thoughts=4096) as trace:
        rt.load(hand_bundle, threads=1).run_batch(["4"], trace=trace)
    (line,) = (json.loads(s) for s in (tmp_path / RECORDS_NAME).read_text().splitlines())
    for read in (line["thoughts"][0]["head"], line["messages"][0]["embedding"]):
        assert sorted(token["id"] for token in read["tokens"]) == list(range(260))
        assert read["rest"] == pytest.approx(0, abs=1e-6)
        assert sum(token["mass"] for token in read["tokens"]) == pytest.approx(1, abs=1e-4)


def test_pieces_of_a_vocabulary_are_one() -> None:
    """Equal scores are in order of their ids, wherever the pieces are cut."""
    scores = np.random.default_rng(0).integers(0, 6, (5, 50)).astype(np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :7]
    totals = np.log(np.exp(scores.astype(np.float64)).sum(axis=1))
    for size in (1, 3, 7, 49, 50):
        nearest = _Nearest(7, len(scores))
        for first in range(0, 50, size):
            nearest.add(first, scores[:, first : first + size])
        assert nearest.ids.tolist() == expected.tolist()
        assert nearest.log_totals == pytest.approx(totals, rel=1e-6)


def test_the_text_of_a_token() -> None:
    made = make_tokenizer()
    tokenizer = Tokenizer(made.to_str(), CHAT_TEMPLATE)
    ids = {text: made.token_to_id(text) for text in ("a", "\u0120", "\u010a", "<|end|>", "\u00c3")}
    assert [tokenizer.text_of(token_id) for token_id in ids.values()] == [
        "a", " ", "\n", "<|end|>", "\u00c3",
    ]  # fmt: skip
    assert tokenizer.text_of(100_000) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thoughts", "5"], "--thoughts needs --trace DIR"),
        (["--trace", "t", "--thoughts", "0"], "'0' is not a number from 1 to 4096"),
        (["--trace", "t", "--thoughts", "all"], "'all' is not a number from 1 to 4096"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "B", "q", *arguments]) == 2
    assert f"error[RM506]: {message}" in capsys.readouterr().err.replace(
        "argument --thoughts: ", ""
    )


@pytest.mark.parametrize("count", [-1, 4097, True, 1.0, "5"])
def test_a_number_of_tokens_that_is_none(count: Any, tmp_path: Path) -> None:
    with pytest.raises(rt.RecmasError, match=r"RM506.*thoughts is .*from 0 to 4096"):
        TraceWriter(tmp_path / "t", thoughts=count)
    assert not (tmp_path / "t").exists()


def test_a_trace_without_thoughts_says_how_to_make_one(
    hand_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(hand_bundle), "4", "--trace", str(tmp_path), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["thoughts", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}: error[RM506]: this trace was written without thoughts. Run again with them: "
        "recmas run BUNDLE QUESTION --trace DIR --thoughts 5. Agents that take no latent steps "
        "have none.\n"
    )


@pytest.mark.parametrize(
    ("content", "record", "status", "code", "message"),
    [
        (None, None, 1, "RM502", "there is no trace"),
        ("", None, 2, "RM506", "the trace holds no records"),
        ('{"id": 1}\n', "2", 2, "RM506", "the trace holds no record '2'"),
        ("[]\n", None, 1, "RM502", "expected an object"),
        ('{"id": 1, "steps": []}\n{"id": 2\n', None, 1, "RM502", "cannot be read: Expecting"),
        (
            '{"id": 1, "thoughts": [{"agent": "a"}], "messages": []}\n',
            None,
            1,
            "RM502",
            "thoughts[0].round: missing",
        ),
    ],
)
def test_traces_that_cannot_be_printed(
    content: str | None,
    record: str | None,
    status: int,
    code: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / RECORDS_NAME).write_text(content)
    more = [] if record is None else ["--record", record]
    assert main(["thoughts", str(tmp_path), *more]) == status
    shown = capsys.readouterr()
    assert f"error[{code}]: {message}" in shown.err.replace("the trace cannot", "cannot")
    assert shown.out == ""
    if content and "\n{" in content:
        assert f"{RECORDS_NAME}:2: " in shown.err
