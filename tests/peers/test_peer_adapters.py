"""Every peer's adapter with its real package on a tiny model: `make test-peers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.gguf_models import write_gguf
from kit.peer_race import ENVIRONMENTS, PROMPT, STEPS, TEXT

import contenders  # isort: skip
import peer_files  # isort: skip
import peer_turns  # isort: skip

pytestmark = pytest.mark.peers

PEERS = [contenders.LLAMA, contenders.OPENVINO, contenders.GENAI, contenders.TRANSFORMERS]
# Of the norm of all logits: numbers of 16, 8 and 4 bits.
MOST_OFF = {"float32": 2e-3, "int8": 0.05, "int4": 0.4}
IDS = list(range(5, 29))


@pytest.fixture(scope="session")
def race(families: Path, tmp_path_factory: pytest.TempPathFactory) -> peer_turns.Race:
    """Everyone on a tiny model in every precision, but for recmas."""
    folder = tmp_path_factory.mktemp("peers")
    source = write_gguf(families / "llama", folder / "F32.gguf")
    models = contenders.Models(folder=folder, source=source, own_type="F32")
    peer_files.make_environments(ENVIRONMENTS, PEERS)
    peer_files.make_models(models, ENVIRONMENTS, PEERS)
    return peer_turns.Race(
        contenders=contenders.contenders_of(models, {}, threads=1),
        environments=ENVIRONMENTS,
        folder=folder / "out",
        threads=1,
        turns=1,
    )


def logits_of(race: peer_turns.Race, contender: Any, path: Path) -> Any:
    with race.opened(contender) as opened:
        opened.ask({"do": "logits", "ids": IDS, "to": str(path)})
    return np.load(path)


def test_everyone_computes_the_same_model(race: peer_turns.Race, tmp_path: Path) -> None:
    by_peer = {c.peer: c for c in race.contenders if c.precision == "float32"}
    exact = logits_of(race, by_peer[contenders.TRANSFORMERS], tmp_path / "exact.npy")
    for contender in race.contenders:
        found = logits_of(race, contender, tmp_path / "found.npy")
        off = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert off < MOST_OFF[contender.precision], contender.name


def test_everyone_answers_every_request(race: peer_turns.Race) -> None:
    assert {c.peer for c in race.contenders} == set(PEERS)
    for contender in race.contenders:
        with race.opened(contender) as opened:
            assert opened.step_bytes > 0, contender.name
            for request in (PROMPT, STEPS, STEPS, TEXT, {**STEPS, "rows": 1}):
                reply = opened.ask(dict(request))
                assert reply["seconds"] > 0, (contender.name, request)
            assert opened.ask({"do": "drop"}) == {}
