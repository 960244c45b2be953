"""What each pass does: golden programs, and the decisions that need a word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kit.graphs import EXAMPLES, backbone, mixture, sequential, stateful, topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level, Prefill, Send, Think
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.passes.batch_parallel_agents import BatchParallelAgents
from recmas_compiler.passes.pass_base import DumpIR, Pass, RecordPasses, VerifyPasses
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_compiler.passes.plan_caches import PlanCaches
from recmas_compiler.passes.plan_snapshots import PlanSnapshots
from recmas_compiler.passes.prompt_prefix import HoistPromptPrefix, SharePromptPrefix
from recmas_compiler.passes.remove_dead_steps import RemoveDeadSteps
from recmas_compiler.passes.share_backbones import ShareBackbones
from recmas_compiler.passes.unroll_rounds import UnrollRounds
from recmas_runtime.core.errors import Exit, RecmasError


def prefills(program: Graph, agent: str) -> dict[int, Prefill]:
    """Return an agent's Prefills by round; it runs in no batch."""
    steps = program.nodes().values()
    return {op.round: op for op in steps if isinstance(op, Prefill) and op.agents == (agent,)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_pass(name: str, golden: Callable[..., None]) -> None:
    record = RecordPasses()
    topology_graph = EXAMPLES[name]()
    program = run_pipeline(topology_graph, instruments=(record, VerifyPasses()))
    texts = ["# topology", print_graph(topology_graph)]
    for step in record.records:
        if step.after is step.before:
            texts += [f"# after {step.name}: unchanged\n"]
        elif step.after.level is Level.UNROLLED:
            _, _, steps = print_graph(step.after).partition("\nprogram\n")
            texts += [f"# after {step.name}", steps]
    golden("\n".join([*texts, "# in the end", print_graph(program)]))


def test_names_and_options_of_the_pipeline() -> None:
    assert [repr(pass_) for pass_ in PIPELINE] == [
        "ShareBackbones()",
        "UnrollRounds()",
        "RemoveDeadSteps()",
        "HoistPromptPrefix()",
        "FuseLinks()",
        "BatchParallelAgents()",
        "SharePromptPrefix()",
        "PlanSnapshots()",
        "PlanCaches()",
    ]


def test_backbones_of_one_identity_and_dtype_are_shared() -> None:
    tables = (
        backbone("base"),
        backbone("alias"),
        backbone("half", dtype="float16"),
        backbone("other", identity="other"),
    )
    shared = ShareBackbones()(topology("a b c d", "a>d b>d c>d", backbones=tables))
    owners = {name: b.shared_as for name, b in shared.system.backbones.items()}
    assert owners == {"base": "base", "alias": "base", "half": "half", "other": "other"}


def test_one_round_is_prompt_think_send_and_answer() -> None:
    program = UnrollRounds()(topology("a b", "a>b b~>a", rounds=1))
    assert list(program.nodes()) == [
        "r1/a/prefill",
        "r1/a/think",
        "r1/a->b/send",
        "r1/b/prefill",
        "r1/b/decode",
    ]


def test_agents_behind_the_answer_do_not_run_in_the_last_round() -> None:
    graph = topology("solver reviewer", "solver>reviewer reviewer~>solver", answer="solver")
    program = run_pipeline(graph)
    assert sorted(prefills(program, "reviewer")) == [1, 2]


def test_agent_without_steps_sends_an_empty_message() -> None:
    graph = topology("a b", "a>b b~>a", rounds=3, steps_of={"a": 0})
    unrolled = UnrollRounds()(graph)
    assert not [step for step in unrolled.nodes() if step.startswith(("r1/a->", "r1/a/think"))]
    program = run_pipeline(graph)
    assert list(program.nodes()) == ["r3/b/prefill", "r3/b/decode"]


def test_agent_without_steps_that_answers_runs_once() -> None:
    program = run_pipeline(topology("a b", "a>b b~>b", rounds=3, steps_of={"b": 0}))
    assert list(program.nodes()) == [
        "r3/a/prefill",
        "r3/a/think",
        "r3/a->b/send",
        "r3/b/prefill",
        "r3/b/decode",
    ]
    prefill = program.op("r3/b/prefill")
    assert isinstance(prefill, Prefill)
    assert prefill.variants == ("then",)


def test_a_feedback_link_to_a_later_agent_is_read_in_the_next_round() -> None:
    """The message sent before the agent's turn in this round is not for this turn."""
    graph = topology("a b c", "a>b b>c a~>c c~>a", rounds=2)
    program = run_pipeline(graph)
    assert "r1/a->c/send" not in program  # joined with r1/a->b
    assert program.edge("r1/a->b+c/send", "r2/c/prefill") is not None
    assert program.edge("r2/a->b/send", "r2/c/prefill") is None


def test_reuse_skips_a_round_in_which_the_agent_does_not_run() -> None:
    # x reads the answer agent's thoughts of the round before; two feedback links make a cycle of
    # two rounds, so every second turn is dead.
    graph = topology("x y", "y~>x x~>y", rounds=5)
    program = run_pipeline(graph)
    turns = prefills(program, "y")
    assert sorted(turns) == [1, 3, 5]
    assert turns[5].reuse == "r3/y/prefill"


def test_states_are_saved_where_rows_are_kept() -> None:
    graph = topology("a b", "a>b b~>a", rounds=3, backbones=(stateful("state"),))
    program = run_pipeline(graph, instruments=(VerifyPasses(),))
    turns = prefills(program, "a") | {r + 3: op for r, op in prefills(program, "b").items()}
    assert [(op.restore, op.snapshots) for op in turns.values()] == [
        (None, ("a",)),
        ("a", ("a",)),  # the later one takes the place of the earlier one
        ("a", ()),
        (None, ("b",)),
        ("b", ("b",)),
        ("b", ()),
    ]
    assert {s.id: s.bytes_per_sample for s in program.system.snapshots.values()} == {
        "a": 4 * 600,
        "b": 4 * 600,
    }
    assert "reuse=%r1/a/prefill, restore=a, snapshot=a" in print_graph(program)
    passes = tuple(p for p in PIPELINE if not isinstance(p, PlanSnapshots))
    without = run_pipeline(graph, passes=passes)
    assert not without.system.snapshots
    rows = topology("a b", "a>b b~>a", rounds=3)
    assert print_graph(run_pipeline(rows, passes=passes)) == print_graph(run_pipeline(rows))


def test_states_of_a_shared_beginning_are_saved_for_each_who_copies_it() -> None:
    tables = (stateful("state"),)
    graph = topology("a b c", "a>b b>c c~>a", rounds=2, role=ALIKE, backbones=tables)
    program = run_pipeline(graph, instruments=(VerifyPasses(),))
    found = {s: op for s, op in program.nodes().items() if isinstance(op, Prefill)}
    assert {s: (op.restore, op.snapshots) for s, op in found.items()} == {
        "r1/a/prefill": (None, ("a>b", "a")),
        "r1/b/prefill": ("a>b", ("b>c", "b")),
        "r1/c/prefill": ("b>c", ("c",)),
        "r2/a/prefill": ("a", ()),
        "r2/b/prefill": ("b", ()),
        "r2/c/prefill": ("c", ()),
    }
    graph = topology("a b c d", "a>b a>c b>d c>d", rounds=1, role=ALIKE, backbones=tables)
    table = run_pipeline(graph, instruments=(VerifyPasses(),)).system.snapshots
    # One agent's states for two that run as one batch, and those of two for one.
    sizes = {"a>b+c": 4 * 600, "b+c>d": 2 * 4 * 600}
    assert {s.id: s.bytes_per_sample for s in table.values()} == sizes


ALIKE = "You are one of several."


def test_prompts_that_begin_alike_are_copied_until_agents_have_rows_of_their_own() -> None:
    graph = topology("a b c", "a>b b>c c~>a", rounds=2, role=ALIKE)
    program = run_pipeline(graph, instruments=(VerifyPasses(),))
    sources = {
        step: op.prefix_of for step, op in program.nodes().items() if isinstance(op, Prefill)
    }
    assert sources == {
        "r1/a/prefill": None,
        # The first prompt of a has another text behind the question than those of b and c.
        "r1/b/prefill": "r1/a/prefill",
        "r1/c/prefill": "r1/b/prefill",
        "r2/a/prefill": None,
        "r2/b/prefill": None,
        "r2/c/prefill": None,
    }
    assert "prefix=%r1/a/prefill" in print_graph(program)
    # Caches are read after their own agents' last step.
    assert program.system.caches["a"].last_step == "r2/a/think"
    once = run_pipeline(topology("a b", "a>b", rounds=1, role=ALIKE))
    assert once.system.caches["a"].last_step == "r1/b/prefill"


def test_only_agents_of_one_backbone_system_text_and_template_begin_alike() -> None:
    def source(graph: Graph) -> str | None:
        op = run_pipeline(graph).op("r1/b/prefill")
        assert isinstance(op, Prefill)
        return op.prefix_of

    alike = topology("a b", "a>b", rounds=1, role=ALIKE)
    assert source(alike) == "r1/a/prefill"
    assert source(topology("a b", "a>b", rounds=1)) is None, "each is told who it is"
    tables = (backbone("one"), backbone("two", identity="two"))
    homes = {"a": "one", "b": "two"}
    apart = topology("a b", "a>b", rounds=1, role=ALIKE, backbones=tables, backbone_of=homes)
    assert source(apart) is None
    agents = dict(alike.system.agents)
    agents["b"] = replace(agents["b"], chat_template={"enable_thinking": True})
    other = alike.replaced(system=replace(alike.system, agents=agents), nodes=dict(agents))
    assert source(other) is None


def test_a_batch_takes_what_all_of_it_have_in_common_with_another() -> None:
    graph = topology("a b c d", "a>b a>c b>d c>d", rounds=1, role=ALIKE)
    program = run_pipeline(graph, instruments=(VerifyPasses(),))
    batch, last = program.op("r1/b+c/prefill"), program.op("r1/d/prefill")
    assert isinstance(batch, Prefill)
    assert isinstance(last, Prefill)
    assert (batch.prefix_of, last.prefix_of) == ("r1/a/prefill", "r1/b+c/prefill")


def test_fan_out_joins_only_equally_wide_messages() -> None:
    tables = (backbone("wide"), backbone("slim", identity="slim", width=64))
    graph = topology(
        "s a b c end",
        "s>a s>b s>c a>end b>end c>end",
        rounds=1,
        backbones=tables,
        backbone_of={"b": "slim"},
        kind_of={"s->a": "ln_residual"},
    )
    steps = run_pipeline(graph).nodes().values()
    fans = [op.targets for op in steps if isinstance(op, Send) and op.source == "s"]
    assert sorted(fans) == [("a", "c"), ("b",)]


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("steps differ", {"steps_of": {"math": 3}}),
        (
            "backbones differ",
            {
                "backbones": (backbone("one"), backbone("two", identity="two")),
                "backbone_of": {"math": "two"},
            },
        ),
    ],
)
def test_agents_that_differ_are_not_batched(reason: str, changes: dict[str, object]) -> None:
    links = "math>end code>end science>end end~>math end~>code end~>science"
    graph = topology("math code science end", links, rounds=2, **changes)  # type: ignore[arg-type]
    assert run_pipeline(graph).system.caches.keys() == {"math", "code+science", "end"}, reason


def test_agents_that_run_in_different_rounds_are_not_batched() -> None:
    graph = topology("a b end", "a>end b~>end end~>a", rounds=3)
    program = run_pipeline(graph)
    assert set(program.system.caches) == {"a", "b", "end"}


def test_an_agent_that_another_waits_for_is_not_batched_with_it() -> None:
    program = run_pipeline(topology("a b end", "a>b b>end a>end", rounds=2))
    assert all(len(op.agents) == 1 for op in program.nodes().values() if isinstance(op, Think))


def test_a_batch_waits_for_all_its_agents() -> None:
    """`late` stands after `early` in the order but waits for more."""
    graph = topology("s early t late end", "s>early t>late early>end late>end", rounds=1)
    order = run_pipeline(graph).order()
    batch = order.index("r1/early+late/prefill")
    assert batch > order.index("r1/t->late/send") > order.index("r1/s+t/think")


def test_capacities_and_bytes() -> None:
    program = run_pipeline(mixture())
    specialists = program.system.caches["math+code+science"]
    assert specialists.capacity == 576  # 512 prompt tokens, 16 latent steps
    assert specialists.bytes_per_sample == 3 * 576 * 2 * 30 * 3 * 64 * 4
    assert program.system.caches["summarizer"].capacity == 768  # 512 and 256 new tokens


def test_a_pass_that_does_not_apply_returns_its_input() -> None:
    graph = topology("a", "", rounds=1)
    assert ShareBackbones()(graph) is graph
    program = UnrollRounds()(graph)
    for pass_ in (
        RemoveDeadSteps(),
        HoistPromptPrefix(),
        BatchParallelAgents(),
        SharePromptPrefix(),
    ):
        assert pass_(program) is program


@dataclass(frozen=True)
class Failing(Pass):
    """Fails."""

    depth: int = 3
    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        raise ZeroDivisionError("by zero")


@dataclass(frozen=True)
class Breaking(Pass):
    """Breaks a rule."""

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        nodes = graph.nodes()
        think = nodes["r1/planner/think"]
        assert isinstance(think, Think)
        return graph.replaced(nodes=nodes | {"r1/planner/think": replace(think, fused=True)})


def test_a_failing_pass_is_named_with_those_before_it() -> None:
    with pytest.raises(RecmasError) as caught:
        run_pipeline(sequential(), passes=(ShareBackbones(), UnrollRounds(), Failing()))
    (problem,) = caught.value.problems
    assert problem.code == "RM205"
    assert problem.message == (
        "Failing(depth=3) failed after ShareBackbones, UnrollRounds: ZeroDivisionError: by zero."
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.exit_code is Exit.RUN_FAILED


def test_a_pass_at_the_wrong_level_is_refused() -> None:
    with pytest.raises(RecmasError) as caught:
        run_pipeline(sequential(), passes=(PlanCaches(),))
    (problem,) = caught.value.problems
    assert problem.code == "RM205"
    assert problem.message == (
        "PlanCaches() takes a graph of level UNROLLED but was given one of level TOPOLOGY, "
        "after no other pass."
    )


def test_a_broken_rule_is_found_at_the_next_level() -> None:
    passes = (UnrollRounds(), Breaking(), PlanCaches())
    with pytest.raises(RecmasError, match="after PlanCaches, rule inner_once"):
        run_pipeline(sequential(), passes=passes)
    with pytest.raises(RecmasError, match="after Breaking, rule inner_once"):
        run_pipeline(sequential(), passes=passes, instruments=(VerifyPasses(),))


def test_dump_writes_the_text_after_every_pass(tmp_path: Path) -> None:
    program = run_pipeline(sequential(), instruments=(DumpIR(tmp_path / "ir"),))
    files = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert files == [
        "000_topology.txt",
        "001_ShareBackbones.txt",
        "002_UnrollRounds.txt",
        "003_RemoveDeadSteps.txt",
        "004_HoistPromptPrefix.txt",
        "005_FuseLinks.txt",
        "006_BatchParallelAgents.txt",
        "007_SharePromptPrefix.txt",
        "008_PlanSnapshots.txt",
        "009_PlanCaches.txt",
    ]
    assert (tmp_path / "ir" / files[0]).read_text() == print_graph(sequential())
    assert (tmp_path / "ir" / files[-1]).read_text() == print_graph(program)
