"""The order of compilation, on one screen."""

from __future__ import annotations

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level
from recmas_compiler.ir.verify import verify
from recmas_compiler.passes.batch_parallel_agents import BatchParallelAgents
from recmas_compiler.passes.fuse_links import FuseLinks
from recmas_compiler.passes.pass_base import Instrument, Pass
from recmas_compiler.passes.plan_caches import PlanCaches
from recmas_compiler.passes.plan_snapshots import PlanSnapshots
from recmas_compiler.passes.prompt_prefix import HoistPromptPrefix, SharePromptPrefix
from recmas_compiler.passes.remove_dead_steps import RemoveDeadSteps
from recmas_compiler.passes.share_backbones import ShareBackbones
from recmas_compiler.passes.unroll_rounds import UnrollRounds
from recmas_runtime.core.errors import fail

PIPELINE: tuple[Pass, ...] = (
    ShareBackbones(),  # before batching, which joins agents of equal backbones
    UnrollRounds(),  # everything below works on steps
    RemoveDeadSteps(),  # before all that looks at neighbours: none of them may be dead
    HoistPromptPrefix(),  # before batching: agents of a batch must agree on reuse
    FuseLinks(),  # before batching, which keeps a source's Sends as they are
    BatchParallelAgents(),  # before caches: agents of a batch have one
    SharePromptPrefix(),  # after batching, which decides who runs before whom
    PlanSnapshots(),  # when it is settled who keeps whose rows
    PlanCaches(),
)


def run_pipeline(
    graph: Graph, *, passes: tuple[Pass, ...] = PIPELINE, instruments: tuple[Instrument, ...] = ()
) -> Graph:
    """Run the passes in order and return the last one's graph, verified where the level changes.

    Args:
        graph: What the first pass requires: a topology for the whole pipeline.
        passes: Any part of `PIPELINE`; every pass but UnrollRounds and PlanCaches is optional.

    Raises:
        RecmasError: RM204 for a graph that breaks a rule, RM205 for a pass that fails.
    """
    verify(graph, at="before the first pass")
    done: list[str] = []
    for current in passes:
        for instrument in instruments:
            instrument.before_pass(current.name, graph)
        result = _run(current, graph, done)
        for instrument in instruments:
            instrument.after_pass(current.name, result)
        if result.level != graph.level:
            verify(result, at=f"after {current.name}")
        graph = result
        done.append(current.name)
    verify(graph, at="after the last pass")
    return graph


def _run(current: Pass, graph: Graph, done: list[str]) -> Graph:
    before = ", ".join(done) if done else "no other pass"
    if graph.level is not current.requires:
        raise fail(
            "RM205",
            f"{current!r} takes a graph of level {current.requires.name} but was given one of "
            f"level {graph.level.name}, after {before}.",
            hint="Keep the order of PIPELINE, and keep UnrollRounds in it.",
        )
    try:
        result = current(graph)
    except Exception as error:
        raise fail(
            "RM205",
            f"{current!r} failed after {before}: {type(error).__name__}: {error}.",
            hint="This is a bug in the pass; --dump-ir DIR writes the graphs that led to it.",
        ) from error
    assert result.level is Level(current.ensures), f"{current!r} broke its promise"
    return result
