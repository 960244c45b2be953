"""Models of a build, loaded when a part has to be made of them, and the time of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Backbone
from recmas_runtime.core.progress import Progress

if TYPE_CHECKING:
    from recmas_compiler.backbones.torch_model import TorchBackbone


class Timer:
    """Wall time by stage, in seconds; what another stage within it takes is that stage's."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._inner_s = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block; further blocks of a stage add up."""
        started, before_s = time.perf_counter(), self._inner_s
        self._inner_s = 0.0
        yield
        spent_s = time.perf_counter() - started
        self._seconds[stage] = self._seconds.get(stage, 0.0) + spent_s - self._inner_s
        self._inner_s = before_s + spent_s


class LoadedBackbones(Mapping[str, "TorchBackbone"]):
    """Models by shared name, each loaded when it is first asked for, unless it was given.

    Args:
        declared: Backbones of a system, by shared name.
    """

    def __init__(
        self,
        declared: Mapping[str, Backbone],
        given: Mapping[str, TorchBackbone] | None,
        *,
        timer: Timer,
        progress: Progress,
    ) -> None:
        self._declared, self._loaded = declared, dict(given or {})
        self._timer, self._progress = timer, progress

    def __getitem__(self, name: str) -> TorchBackbone:
        if name not in self._loaded:
            with self._timer("load"):
                from recmas_compiler.backbones.torch_model import load_backbone

                found = self._declared[name]
                self._loaded[name] = load_backbone(
                    found.facts, progress=self._progress, dtype=found.dtype, template=found.template
                )
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._declared)

    def __len__(self) -> int:
        return len(self._declared)

    def is_loaded(self, name: str) -> bool:
        """Tell whether asking for it loads nothing."""
        return name in self._loaded


def used_backbones(program: Graph) -> dict[str, Backbone]:
    """Return the backbones that agents use, by shared name, also those of dead agents."""
    system = program.system
    backbones = (system.backbone_of(agent) for agent in system.local_agents)
    return {backbone.name: backbone for backbone in backbones}
