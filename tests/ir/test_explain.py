"""What users read about their system: what the passes did, and the memory it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from kit.graphs import EXAMPLES, backbone, sequential, stateful, topology
from recmas_compiler.analysis.explain import explain
from recmas_compiler.analysis.memory import memory_plan
from recmas_compiler.ir.graph import Graph
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.passes.pass_base import RecordPasses
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_runtime.core.text import counted, human_bytes, listed
from recmas_runtime.formats.plan import PromptPart, cache_capacity
from recmas_runtime.sequences.sequence_batch import DECODE_HEADROOM

SAVES = "PlanSnapshots"


def words(backbone: str, text: str) -> int:
    return len(text.split())


def explained(graph: Graph, **options: Callable[[str, str], int | None]) -> str:
    record = RecordPasses()
    run_pipeline(graph, instruments=(record,))
    return explain(graph, record.records, **options)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, golden: Callable[..., None]) -> None:
    golden(explained(EXAMPLES[name](), count_tokens=words))


def test_dead_steps_and_shared_backbones(golden: Callable[..., None]) -> None:
    graph = topology(
        "mute planner critic after solver",
        "mute>planner planner>critic critic>solver critic~>planner planner~>after solver>after "
        "after~>after after~>solver solver~>mute",
        steps_of={"mute": 0, "after": 0},
        backbones=(backbone("smol"), backbone("alias")),
        backbone_of={"critic": "alias"},
    )
    golden(explained(graph, count_tokens=words))


def test_without_a_tokenizer_texts_are_named_but_not_counted() -> None:
    told = explained(sequential())
    assert told == explained(sequential(), count_tokens=lambda backbone, text: None)
    assert (
        'critic in rounds 2 and 3: keeps its prompt up to "{{ question }} Continue. planner '
        'thought:".' in told
    )


def test_half_a_word_is_not_kept() -> None:
    graph = topology("a", "a~>a", rounds=2)
    agent = graph.system.agents["a"]
    first = (PromptPart(kind="text", value="Now think."),)
    then = (PromptPart(kind="text", value="Now that: "), PromptPart(kind="slot", value="a"))
    changed = replace(agent, first=first, then=then)
    system = replace(graph.system, agents={"a": changed})
    told = explained(graph.replaced(system=system, nodes={"a": changed}), count_tokens=words)
    assert 'a in round 2: keeps its prompt up to "Now" (5 tokens).' in told


def test_a_prompt_without_slots_is_kept_whole() -> None:
    told = explained(topology("a b", "a>b b~>b", rounds=3), count_tokens=words)
    assert "a in rounds 2 and 3: keeps its whole prompt (5 tokens and the question)." in told


def test_a_pass_that_recmas_does_not_know_is_told_of_by_its_size() -> None:
    graph = sequential()
    record = RecordPasses()
    run_pipeline(graph, instruments=(record,))
    (unroll,) = [r for r in record.records if r.name == "UnrollRounds"]
    renamed = type(unroll)(name="MyPass", before=unroll.before, after=unroll.after)
    assert "MyPass\n  - 3 nodes became 26." in explain(graph, [renamed])


def test_every_pass_has_a_title() -> None:
    told = explained(sequential())
    assert all(f"\n{pass_.name}: " in told for pass_ in PIPELINE)


def test_memory_plan_of_two_backbones(golden: Callable[..., None]) -> None:
    tables = (
        backbone("smol"),
        backbone("tiny", identity="tiny", source="tiny", width=64, num_parameters=1000),
    )
    graph = topology(
        "planner critic solver",
        "planner>critic critic>solver solver~>planner",
        backbones=tables,
        backbone_of={"critic": "tiny"},
    )
    memory = memory_plan(run_pipeline(graph))
    golden(f"{memory}\n\n{json.dumps(memory.to_json(), indent=1)}\n")


def test_memory_plan_counts_only_what_runs() -> None:
    graph = topology("a b c", "a>b b~>c", rounds=1, answer="b")
    memory = memory_plan(run_pipeline(graph))
    assert memory.backbones[0].agents == ("a", "b")
    assert memory.num_links == 2  # a's inner link and a->b; b only answers
    per_record = memory.cache_bytes(batch=1) + memory.activation_bytes(batch=1)
    fixed = memory.runtime_bytes + memory.weights_bytes
    assert memory.total_bytes(batch=3) == fixed + 3 * per_record


def test_shorter_prompts_take_the_caches_that_a_run_takes() -> None:
    program = run_pipeline(topology("a b c", "a>b b~>c", rounds=1, answer="b"))
    most, less = memory_plan(program), memory_plan(program, prompt_tokens=100)
    by_agent = {cache.agents[0]: cache for cache in program.system.caches.values()}
    row_bytes = by_agent["a"].bytes_per_sample // by_agent["a"].capacity
    text = min(program.system.sampling.max_new_tokens, DECODE_HEADROOM)
    steps = program.system.agents["a"].latent_steps
    rows = cache_capacity(100 + steps) + cache_capacity(100 + max(text, steps))
    assert less.cache_bytes(batch=1) == rows * row_bytes
    limit = program.system.build.max_prompt_tokens
    assert less.activation_bytes(batch=1) * limit == most.activation_bytes(batch=1) * 100
    assert less.runtime_bytes == most.runtime_bytes


@pytest.mark.parametrize(
    ("kind", "role", "expected"),
    [
        ("residual", "inner", 2 * 16),
        ("residual", "outer", 24 + 36 + 24),
        ("ln_residual", "inner", (16 + 4) * 2 + 4 * 4),
        ("ln_residual", "outer", (4 * 12 + 12) + (12 * 6 + 6) + (24 + 6) + 2 * 4 + 2 * 6),
        ("projected", "inner", (16 + 4) * 3 + 8),
        ("projected", "outer", (24 + 6) + (36 + 6) + (24 + 6) + 8),
    ],
)
def test_link_parameters(kind: str, role: str, expected: int) -> None:
    out_dim = 4 if role == "inner" else 6
    weights = LinkWeights(kind=kind, init="random", file=None, in_dim=4, out_dim=out_dim)  # type: ignore[arg-type]
    assert weights.num_parameters(role) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9996, "10.0 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (538_060_032, "538 MB"),
        (4 * 10**15, "4000 TB"),
    ],
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert human_bytes(size) == text


def test_lists_and_counts_in_words() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b"
    assert listed([1, 2, 3]) == "1, 2 and 3"
    assert counted(1, "step") == "1 step"
    assert counted(0, "step") == "0 steps"


def test_snapshots_are_told_and_counted() -> None:
    links = "a>b b>c c~>a"
    graph = topology("a b c", links, backbones=(stateful("state"),), role="You are one of several.")
    told = explained(graph)
    size = "2.40 kB for each record."
    assert f"b in round 1: goes on from layer states of a, {size}" in told
    assert f"b in rounds 2 and 3: goes on from layer states of an earlier round, {size}" in told
    assert "In all 12.0 kB for one record, 96.0 kB for a batch of 8." in told
    memory = memory_plan(run_pipeline(graph))
    assert memory.snapshot_bytes(batch=2) == 2 * 5 * 2400
    assert "Snapshots of layer states take 12.0 kB for one record, 96.0 kB for 8." in str(memory)
    assert memory.to_json()["snapshot_bytes"] == {"one": 12_000, "max": 96_000}
    rows = memory_plan(run_pipeline(graph, passes=tuple(p for p in PIPELINE if p.name != SAVES)))
    assert memory.total_bytes(batch=2) - rows.total_bytes(batch=2) == 2 * 5 * 2400
    assert "Snapshots" not in str(rows)
