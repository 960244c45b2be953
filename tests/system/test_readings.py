"""What is written of thoughts: the tokens that the tables of the backbones themselves give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny, Built
from kit.files import lines
from kit.specs import SPECS
from recmas_compiler.links.modules import load_link
from recmas_compiler.lowering.reference import load_backbones
from recmas_runtime.cli.main import main
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.plan import StopPlan
from recmas_runtime.running.executor import Execution
from recmas_runtime.running.run_trace import RECORDS_NAME, TraceWriter
from recmas_runtime.running.system import System
from recmas_runtime.sequences import thoughts as thoughts_module

NUM_NEAREST = 4
RECORDS: list[dict[str, object]] = [
    {"id": "a", "question": "What is 7 * 8?"},
    {"id": "b", "question": "Anna has three plans and an orange. Which of the plans is the best?"},
    {"id": "c", "question": "Hm?"},
]


class Tables:
    """The tables of a bundle's backbones and its inner links, in plain numpy."""

    def __init__(self, built: Built) -> None:
        self.backbones = {
            name: backbone.model
            for name, backbone in load_backbones(built.program, progress=Silent()).items()
        }
        self.plan = built.system.plan
        self._built = built

    def embeddings(self, agent: str) -> np.ndarray:
        """Return the input embeddings [V, d] of an agent's backbone, in float64."""
        module = self.backbones[self.plan.agents[agent].backbone].get_input_embeddings()
        with torch.no_grad():
            return module(torch.arange(module.num_embeddings)).double().numpy()

    def head(self, agent: str) -> np.ndarray:
        """Return the rows [V, d] of the head of an agent's backbone, in float64."""
        module = self.backbones[self.plan.agents[agent].backbone].get_output_embeddings()
        return module.weight.detach().double().numpy()

    def fed_back(self, agent: str, thoughts: np.ndarray) -> np.ndarray:
        """Return what the agent's inner link makes of thoughts [m, d]."""
        entry = self._built.system.manifest.links[self.plan.agents[agent].inner]
        link = load_link(
            self._built.bundle / entry.file, entry.kind, entry.role, entry.in_dim, entry.out_dim
        )
        with torch.no_grad():
            return link(torch.from_numpy(thoughts)).double().numpy()


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores - scores.max())
    return exponents / exponents.sum()


def assert_reading(
    found: dict[str, Any], vector: np.ndarray, scores: np.ndarray, *, cosines: bool
) -> None:
    """Demand the highest of the scores [V], in order, with their part of the softmax of all."""
    best = np.argsort(-scores, kind="stable")[:NUM_NEAREST]
    assert [token["id"] for token in found["tokens"]] == best.tolist()
    masses = softmax(scores * np.sqrt(len(vector)) if cosines else scores)
    near = {"rel": 1e-3, "abs": 1e-5}
    assert [token["mass"] for token in found["tokens"]] == pytest.approx(masses[best], **near)
    assert found["rest"] == pytest.approx(1 - masses[best].sum(), **near)
    assert found["norm"] == pytest.approx(np.linalg.norm(vector), **near)
    if cosines:
        assert [t["cosine"] for t in found["tokens"]] == pytest.approx(scores[best], **near)
    else:
        assert all("cosine" not in token for token in found["tokens"])


def run_with_thoughts(built: Built, folder: Path, *more: str) -> list[dict[str, Any]]:
    """Answer the records on the command line and return the trace's lines."""
    questions = folder.with_suffix(".jsonl")
    questions.write_text(lines(*RECORDS))
    command = ["run", str(built.bundle), "--input", str(questions), "--quiet", "--json"]
    wanted = ["--trace", str(folder), "--thoughts", str(NUM_NEAREST), "--threads", "1"]
    assert main([*command, *wanted, *more]) == 0
    return [json.loads(line) for line in (folder / RECORDS_NAME).read_text().splitlines()]


@pytest.mark.parametrize("spec", ["heterogeneous", "sequential"])
def test_the_printed_tokens_are_those_of_the_tables(
    build_tiny: BuildTiny, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build_tiny(SPECS[spec])
    tables, reference = Tables(built), built.reference(RECORDS)
    run_with_thoughts(built, tmp_path / "trace")
    capsys.readouterr()
    assert main(["thoughts", str(tmp_path / "trace"), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["ok"]
    records = body["data"]["records"]
    assert [record["id"] for record in records] == [record["id"] for record in RECORDS]
    num_thoughts = sum(thoughts.shape[1] for thoughts in reference.thoughts.values())
    num_sent = sum(message.shape[1] for message in reference.messages.values())
    for row, record in enumerate(records):
        assert len(record["thoughts"]) == num_thoughts > 0
        assert len(record["messages"]) == num_sent > 0
        for found in record["thoughts"]:
            agent, round_, step = found["agent"], found["round"], found["step"]
            thoughts = reference.thoughts[f"{agent}@{round_}"][row].numpy()
            thought = thoughts[step - 1].astype(np.float64)
            assert_reading(found["head"], thought, tables.head(agent) @ thought, cosines=False)
            vector = tables.fed_back(agent, thoughts)[step - 1]
            cosines = unit(tables.embeddings(agent)) @ unit(vector)
            assert_reading(found["fed_back"], vector, cosines, cosines=True)
            if round_ == 1:
                assert found["cosine_before"] is None
            else:
                before = reference.thoughts[f"{agent}@{round_ - 1}"][row, step - 1].double()
                expected = float(unit(before.numpy()) @ unit(thought))
                assert found["cosine_before"] == pytest.approx(expected, abs=1e-4)
        for found in record["messages"]:
            message = reference.messages[f"{found['link']}@{found['round']}"][row].double().numpy()
            vector = message[found["place"] - 1]
            target = tables.plan.links[found["link"]].target
            cosines = unit(tables.embeddings(target)) @ unit(vector)
            assert_reading(found["embedding"], vector, cosines, cosines=True)


def test_a_record_reads_the_same_in_any_batch_and_with_any_piece_of_the_table(
    build_tiny: BuildTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_tiny(SPECS["heterogeneous"])
    together = run_with_thoughts(built, tmp_path / "many", "--batch", "3")
    # Pieces of seven rows and of one, blocks of two vectors and of one.
    monkeypatch.setattr(thoughts_module, "_TABLE_NUMBERS", 7 * 32)
    monkeypatch.setattr(thoughts_module, "_MOST_SCORES", 14)
    alone = run_with_thoughts(built, tmp_path / "one", "--batch", "1")
    assert len(together) == len(alone) == len(RECORDS)
    for one, other in zip(together, alone, strict=True):
        for kind, reads in (("thoughts", ("head", "fed_back")), ("messages", ("embedding",))):
            assert len(one[kind]) == len(other[kind])
            for left, right in zip(one[kind], other[kind], strict=True):
                for read in reads:
                    ids = [[t["id"] for t in side[read]["tokens"]] for side in (left, right)]
                    assert ids[0] == ids[1]
                    assert left[read]["rest"] == pytest.approx(right[read]["rest"], abs=1e-4)


def test_only_rounds_that_a_record_ran_are_read(build_tiny: BuildTiny, tmp_path: Path) -> None:
    full = build_tiny(SPECS["sequential"].replace("rounds: 3", "rounds: 5")).system

    def run(bar: float) -> tuple[list[int], list[dict[str, Any]]]:
        system = System(structs.replace(full.plan, stop_when=StopPlan(cosine=bar)), full.loaded)
        with TraceWriter(tmp_path / str(bar), thoughts=1) as trace:
            answers = system.run_batch([dict(record) for record in RECORDS], trace=trace)
        traced = (tmp_path / str(bar) / RECORDS_NAME).read_text().splitlines()
        rounds = [answer.rounds for answer in answers if isinstance(answer, rt.Answer)]
        return rounds, [json.loads(line) for line in traced]

    # A bar that some records pass after two rounds and others do not.
    found = {bar: run(bar) for bar in (0.9, 0.99, 0.995, 0.999)}
    rounds, traced = next(ran for ran in found.values() if len(set(ran[0])) > 1)
    for line, ran in zip(traced, rounds, strict=True):
        own = {*range(1, ran), 5}
        for kind in ("thoughts", "messages"):
            assert {reading["round"] for reading in line[kind]} == own
        assert ("solver", 5) not in {(t["agent"], t["round"]) for t in line["thoughts"]}
        # The last round is compared with the last one before it that ran.
        for thought in line["thoughts"]:
            assert (thought["cosine_before"] is None) == (thought["round"] == 1)


def test_without_the_option_nothing_is_read_or_kept(
    build_tiny: BuildTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = build_tiny(SPECS["sequential"]).system
    kept: list[int] = []
    run_rounds = Execution.run_rounds

    def noting(execution: Execution) -> None:
        run_rounds(execution)
        kept.append(len(execution.thoughts))

    monkeypatch.setattr(Execution, "run_rounds", noting)
    for count in (0, 2):
        with TraceWriter(tmp_path / str(count), thoughts=count) as trace:
            system.run_batch([dict(RECORDS[0])], trace=trace)
    assert kept[0] == 0 < kept[1]
    (line,) = (tmp_path / "0" / RECORDS_NAME).read_text().splitlines()
    assert set(json.loads(line)) == {"id", "file", "batch_size", "steps"}
