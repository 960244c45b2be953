"""The figures in `benchmarks/paper/published.yaml` give what the text of the paper states."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from paper_data import PAPER, paper_module, write_config
from recmas_runtime.core.errors import RecmasError

config = paper_module("paper_config")
PUBLISHED = config.read_published()


def rows(table: str) -> list[tuple[str, str, dict[str, float]]]:
    return [(r.style, r.method, r.values) for r in PUBLISHED.rows if r.origin == table]


def row(table: str, style: str, method: str) -> dict[str, float]:
    (found,) = [values for s, m, values in rows(table) if (s, m) == (style, method)]
    return found


def gains(own: dict[str, float], *others: dict[str, float]) -> list[tuple[float, float]]:
    """Return points, and percent of the best other, on each benchmark."""
    best = {name: max(other[name] for other in others) for name in own}
    return [(own[name] - best[name], 100 * (own[name] / best[name] - 1)) for name in own]


@pytest.mark.parametrize(
    ("table", "is_relative", "stated"),
    [("table3", True, 8.3), ("table6", True, 8.0), ("table7", False, 6.2), ("table8", True, 4.8)],
)
def test_averages_are_those_of_the_text(table: str, is_relative: bool, stated: float) -> None:
    """Its gains over the strongest other method; over the learner, over the tool caller."""
    against = {"table6": "the learner alone", "table8": "the tool caller alone"}.get(table)
    (own,) = [values for _, method, values in rows(table) if method == "RecursiveMAS"]
    others = [
        values
        for _, method, values in rows(table)
        if method != "RecursiveMAS" and against in (None, method)
    ]
    found = mean(gain[is_relative] for gain in gains(own, *others))
    assert found == pytest.approx(stated, abs=0.06)


def test_the_gain_over_text_is_that_of_the_text() -> None:
    both = [
        gain
        for style in ("sequential_light", "sequential_scaled")
        for gain in gains(
            row("table2", style, "RecursiveMAS"), row("table2", style, "Recursive-TextMAS")
        )
    ]
    assert mean(points for points, _ in both) == pytest.approx(7.2, abs=0.06)
    assert mean(percent for _, percent in both) == pytest.approx(20.2, abs=0.06)


def test_the_saving_of_tokens_is_that_of_the_text() -> None:
    latent, text = (
        sum(sum(r.values.values()) for r in PUBLISHED.tokens if r.system == system)
        for system in ("latent", "text")
    )
    assert 1 - latent / text == pytest.approx(0.756, abs=0.0006)


def test_every_row_is_of_a_style_and_a_benchmark() -> None:
    grid = config.load_grid(PAPER / "paper.yaml")
    assert len(grid.cells) == 5 * 9
    for one in (*PUBLISHED.rows, *PUBLISHED.tokens):
        assert one.style in grid.config.styles
        assert set(one.values) <= set(grid.benchmarks)
        assert one.origin in PUBLISHED.sources


def test_the_settings_are_the_papers() -> None:
    grid = config.load_grid(PAPER / "paper.yaml")
    asked = {cell.benchmark: cell.protocol for cell in grid.cells if cell.style.name == "mixture"}
    shown = {
        name: (p.rollouts, p.temperature, p.top_p, p.max_new_tokens, len(p.seeds))
        for name, p in asked.items()
    }
    assert shown == {
        "math500": (1, 0.6, 0.95, 2000, 5),
        "aime2025": (10, 0.6, 0.95, 16000, 5),
        "aime2026": (10, 0.6, 0.95, 16000, 5),
        "gpqa": (1, 0.6, 0.95, 4000, 5),
        "medqa": (1, 0.6, 0.95, 4000, 5),
        "livecodebench": (1, 0.2, 0.95, 4000, 5),
        "mbppplus": (1, 0.2, 0.95, 4000, 5),
        "hotpotqa": (1, 0.6, 0.95, 4000, 5),
        "bamboogle": (1, 0.6, 0.95, 4000, 5),
    }
    assert (grid.config.rounds, grid.config.latent_steps) == (3, 80)
    notes = {cell.name: cell.notes for cell in grid.cells}
    assert notes["sequential_scaled/aime2026"] == ()
    assert notes["sequential_light/aime2026"] == (
        "answers end at 3072 tokens, for the solver has 4096 positions",
    )


def test_only_published_cells(tmp_path: Path) -> None:
    grid = config.load_grid(write_config(tmp_path / "c.yaml", cells="published"))
    assert len(grid.cells) == 6 + 6 + 4 + 5 + 4


def test_what_a_config_says_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "c.yaml",
        styles={"sequential_lite": {}},
        benchmarks=["math5000"],
        systems=["shuffled"],
        runs=0,
    )
    with pytest.raises(RecmasError) as found:
        config.load_grid(path)
    assert [problem.message for problem in found.value.problems] == [
        "there is no released style `sequential_lite`",
        "there is no benchmark `math5000`",
        "`systems` lacks `latent`",
        "`runs` is 0",
    ]
    assert "sequential_light" in found.value.problems[0].hint
    with pytest.raises(RecmasError, match="unknown field `stiles`"):
        config.load_grid(write_config(path, stiles={}))
