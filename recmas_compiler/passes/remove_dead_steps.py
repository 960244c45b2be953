"""Dead code elimination: what the answer does not need is not run."""

from __future__ import annotations

from dataclasses import dataclass

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level, is_answer
from recmas_compiler.passes.pass_base import Pass


@dataclass(frozen=True)
class RemoveDeadSteps(Pass):
    """Drop every step that the answer does not depend on.

    1. The step that writes the answer is needed.
    2. What a needed step takes something from is needed.
    3. Nothing else is: messages of the last round's feedback links, agents whose thoughts reach
       the answer in no round, and agents without latent steps that do not write the answer.
    """

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with needed steps only."""
        steps = graph.nodes()
        needed = {step for step, op in steps.items() if is_answer(op)}  # 1
        needed |= {earlier for step in needed for earlier in graph.ancestors(step)}  # 2
        if len(needed) == len(steps):
            return graph
        return graph.replaced(  # 3
            nodes={step: op for step, op in steps.items() if step in needed},
            edges=tuple(e for e in graph.edges() if e.source in needed and e.target in needed),
        )
