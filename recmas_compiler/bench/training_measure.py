"""One system of the cost table, measured on the held-out records, in a process of its own.

    python -m recmas_compiler.bench.training_measure REQUEST

The request is a JSON object, see `MeasureRequest`; the answer is one on stdout.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.text_links import with_text_links
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import load_spec
from recmas_compiler.training.settings import train_settings
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent
from recmas_runtime.running.baselines import LATENT

if TYPE_CHECKING:
    from recmas_compiler.lowering.training_graph.graph import Loss

MODULE: Final = "recmas_compiler.bench.training_measure"

# The whole system, its answer agent alone, or its agents writing text for each other.
Kind = Literal["system", "single", "text"]
# How the loss of the system as it is is called; controls have their own names.
OWN: Final[Mapping[Kind, str]] = {"system": LATENT, "single": "alone", "text": "texts"}


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """What to measure.

    Attributes:
        links: Folder with trained links; None for those that a build makes without training.
    """

    spec: str
    overrides: tuple[str, ...]
    kind: Kind
    links: str | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Figures on the held-out records.

    Attributes:
        losses: In nats per token of the answer, the system's own first, then under every control.
        num_exact: Records whose target greedy decoding would write, letter for letter.
    """

    losses: dict[str, float]
    num_exact: int
    num_records: int


def measure(request: MeasureRequest) -> HeldOut:
    """Measure a system; thoughts and hand-over texts are generated, as in a running one."""
    import torch

    from recmas_compiler.training.loop.distributed import joined_world
    from recmas_compiler.training.run import method_task
    from recmas_compiler.training.session import open_session
    from recmas_compiler.training.tasks.outer import control_losses

    spec = load_spec(request.spec, overrides=request.overrides)
    topology = build_topology(spec)
    if request.kind == "text":
        topology = with_text_links(topology)
    with joined_world() as world, torch.no_grad():
        session = open_session(
            spec, run_pipeline(topology), train_settings(spec), world=world, progress=Silent()
        )
        section = session.settings.section
        held_out, size = session.examples.held_out[: section.eval_records], section.outer.batch_size
        if request.kind == "single":
            task = method_task(session, None, {})
            parts = range(0, len(held_out), size)
            found = ((OWN["single"], task.loss_of(held_out[i : i + size])) for i in parts)
            return _held_out("single", found, len(held_out))
        trained = None if request.links is None else Path(request.links)
        session.start(trained=trained, as_built=trained is None)
        losses = control_losses(session.graph, held_out, batch_size=size, world=world)
        return _held_out(request.kind, ((name, loss) for name, _, loss in losses), len(held_out))


def _held_out(kind: Kind, found: Iterable[tuple[str, Loss]], num_records: int) -> HeldOut:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    num_exact = 0
    for name, loss in found:
        own = OWN[kind] if name == LATENT else name
        sums[own][0] += float(loss.total)
        sums[own][1] += loss.tokens
        if own == OWN[kind]:
            num_exact += int(loss.per_record_exact.sum())
    return HeldOut(
        losses={name: total / tokens for name, (total, tokens) in sums.items() if tokens},
        num_exact=num_exact,
        num_records=num_records,
    )


def main() -> None:
    """Answer the request on the command line."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    request = MeasureRequest(**{**given, "overrides": tuple(given["overrides"])})
    try:
        answer: dict[str, Any] = {"data": asdict(measure(request))}
    except RecmasError as error:
        answer = {"problems": [asdict(problem) for problem in error.problems]}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
