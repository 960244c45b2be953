"""How cost grows: curves, their exponents, and what is written from one file of figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.peer_race import RACE
from kit.specs import SEQUENTIAL

sys.path.append(str(RACE.parent))
import growth  # isort: skip


def test_a_fit_finds_the_exponent_beside_what_does_not_grow() -> None:
    counts = [64, 128, 256, 512, 1024, 2048]
    fixed, _, exponent = growth.fit(counts, [0.05 + 1e-5 * n**1.4 for n in counts])
    assert exponent == pytest.approx(1.4, abs=0.01)
    assert fixed == pytest.approx(0.05, rel=0.05)


def test_curves_of_a_ring(build_tiny: BuildTiny) -> None:
    base = rt.load(build_tiny(SEQUENTIAL).bundle, threads=1)
    sizes = [growth.Size(agents=2, rounds=1, latent_steps=2, words=4, records=n) for n in (1, 2)]
    seconds = growth.measure(base, sizes, 1)
    assert len(seconds) == 2
    assert min(seconds) > 0
    found = growth.prompts(base, [8, 16, 32], 1)
    whole = np.array(found["one prompt"]["seconds"])
    rest = np.array(found["one prompt without attention"]["seconds"])
    assert (rest <= whole).all()
    shares = found["attention"]["share"]
    np.testing.assert_allclose(rest, whole * (1 - np.array(shares)))


def test_the_table_is_written_anew_from_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "growth.json"
    figures = {
        "date": "2026-01-02",
        "machine": "A processor, 2 threads",
        "agents": growth.curve([2, 4, 8], [0.2, 0.4, 0.8]),
        "one prompt": growth.curve([64, 128, 256], [1e-5 * n**1.5 for n in (64, 128, 256)]),
    }
    path.write_text(json.dumps(figures), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["growth", "--table-only", "--json", str(path)])
    growth.main()
    shown = capsys.readouterr().out
    assert "| agents | 2, 4, 8 | 0.2, 0.4, 0.8 | 1.00 | linear |" in shown
    assert "**1.50**" in shown, "worse than linear is set off"
    assert path.with_suffix(".md").read_text(encoding="utf-8") == shown
    assert path.with_suffix(".png").stat().st_size > 1000
