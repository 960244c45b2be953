"""A tiny team: its bundle, and the bundle of its model alone behind OpenAI's form."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.bundles import BuildTiny
from kit.http_server import local, serving
from kit.race import ENVIRONMENTS, QUESTIONS, TOKENS, Run, Tiny


@pytest.fixture(scope="session")
def tiny(build_tiny: BuildTiny, families: Path) -> Tiny:
    from team import TEAM, endpoint_spec, team_spec

    source = "./llama"
    team = json.loads(TEAM.read_text(encoding="utf-8"))
    texts = (
        endpoint_spec(precision="float32", source=source),
        team_spec(team, rounds=3, latent_steps=4, precision="float32", source=source),
    )
    single, whole = (build_tiny(text).bundle for text in texts)
    return Tiny(single=single, team=whole, weights=families / "llama")


@pytest.fixture
def ask(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Ask a system questions, the endpoint a service of the tiny model in this process."""
    import cells
    from team import TEAM

    setting = cells.Setting(
        team_file=TEAM,
        max_tokens=TOKENS,
        latent_steps=4,
        threads=1,
        environments=ENVIRONMENTS,
        llama_server=Path("none"),
        model=Path("none"),
        weights=tiny.weights,
        single=tiny.single,
        team=tiny.team,
    )
    with serving(local({"single": tiny.single})) as service:

        @contextmanager
        def endpoint(*_: object) -> Iterator[tuple[str, int]]:
            yield f"{service.url}/v1", os.getpid()

        monkeypatch.setattr(cells, "_endpoint", endpoint)

        def run(
            system: str,
            rounds: int,
            questions: Sequence[Mapping[str, str]] = QUESTIONS[:1],
        ) -> list[dict[str, Any]]:
            at_once = len(questions)
            where = cells.RECMAS if cells.RACERS[system].asks else cells.IN_PROCESS
            cell = cells.Cell(
                system=system, endpoint=where, rounds=rounds, block=0, at_once=at_once
            )
            rows = cells.run_cell(cell, questions, setting, tmp_path)["rows"]
            return list(rows)

        yield run
