"""Token counts in warnings; cycles and reach against networkx."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.specs import PAIR, write_config
from recmas_compiler.analysis.token_count import TokenCounter
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.spec.checks.table import closing_links, feedbacks_to
from recmas_compiler.spec.schema.sections import LinkSection
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError

EARLY_SLOT = PAIR.replace(
    "Solve {{ question }} with {{ latent.planner }}",
    "With {{ latent.planner }} now solve {{ question }}",
)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are words."""
    model = tokenizers.models.WordLevel({"?": 0, "now": 1, "solve": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    write_config(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_tokens_are_counted_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    (guess,) = parse_spec(EARLY_SLOT, base_dir=tmp_path).warnings
    assert guess.code == "RM150"
    assert "and about 3 tokens of text around it" in guess.message
    write_tokenizer(tmp_path / "small")
    (exact,) = parse_spec(EARLY_SLOT, base_dir=tmp_path).warnings
    assert "and 2 tokens of text around it" in exact.message
    assert (exact.line, exact.column) == (14, 18)


def test_a_broken_tokenizer_only_means_a_guess(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    (guess,) = parse_spec(EARLY_SLOT, base_dir=tmp_path).warnings
    assert "about" in guess.message


def test_odd_sources_only_mean_a_guess() -> None:
    for source in ("x" * 300, "~nobody-of-this-name", "hf:a/b@c", "builtin:smollm2-135m-instruct"):
        text = EARLY_SLOT.replace("{source: ./small}", f'{{source: "{source}"}}')
        assert "about" in parse_spec(text).warnings[0].message
    with pytest.raises(RecmasError, match="RM110"):
        parse_spec(EARLY_SLOT, overrides=["agents.solver.backbone=gone"])


def test_one_round_reuses_nothing() -> None:
    assert parse_spec(EARLY_SLOT, overrides=["rounds=1"]).warnings == ()


def test_token_counter(tmp_path: Path) -> None:
    write_config(tmp_path / "small")
    spec = parse_spec(PAIR, base_dir=tmp_path)
    counter = TokenCounter(build_topology(spec).system)
    assert counter("small", "now solve it") is None
    write_tokenizer(tmp_path / "small")
    assert counter("small", "now solve it") == 3


LINKS = st.dictionaries(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")),
    st.booleans().map(lambda feedback: LinkSection(feedback=feedback)),
    max_size=20,
)


@settings(deadline=None)
@given(LINKS)
def test_closing_links_break_all_cycles(links: dict[tuple[str, str], LinkSection]) -> None:
    within = [ends for ends, link in links.items() if not link.feedback]
    cycles = closing_links(links)
    for cycle in cycles:
        assert all(link in within for link in cycle)
        assert all(a[1] == b[0] for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True))
        assert within.index(cycle[-1]) == max(map(within.index, cycle))
    closing = {cycle[-1] for cycle in cycles}
    assert nx.is_directed_acyclic_graph(
        nx.DiGraph([ends for ends in within if ends not in closing])
    )
    assert bool(cycles) != nx.is_directed_acyclic_graph(nx.DiGraph(within))


@settings(deadline=None)
@given(LINKS)
def test_reach_is_the_shortest_way(links: dict[tuple[str, str], LinkSection]) -> None:
    graph = nx.DiGraph()
    graph.add_node("a")
    for (source, target), link in links.items():
        graph.add_edge(target, source, weight=int(link.feedback))
    assert feedbacks_to("a", links) == nx.single_source_dijkstra_path_length(graph, "a")
