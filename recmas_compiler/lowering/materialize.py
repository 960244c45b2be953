"""Give every link of a program its weights: from its file, in closed form, or at random."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import System
from recmas_compiler.links.aligned import Alignment, align_inner, align_outer
from recmas_compiler.links.calibration import Calibration, calibrate
from recmas_compiler.links.files import LinkWeights, end_of
from recmas_compiler.links.latentmas import realign
from recmas_compiler.links.modules import load_declared_link, make_link, randomize
from recmas_compiler.spec.document.places import SourcePosition
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.link_kinds import LinkRole


@dataclass(frozen=True, kw_only=True)
class MaterializedLink:
    """A link with weights.

    Attributes:
        module: In float32, trainable.
        source: Identity of the backbone it reads from.
        target: Identity of the backbone it writes for.
        init: How its weights came to be; `unused` for numbers that nothing is mapped by.
    """

    module: nn.Module
    weights: LinkWeights
    role: LinkRole
    source: str
    target: str
    init: Literal["file", "aligned", "latentmas", "random", "unused"]
    alignment: Alignment | None = None

    @property
    def cosine(self) -> float | None:
        """Cosine of the closed form on held-out samples."""
        return None if self.alignment is None else self.alignment.cosine


def materialize_links(
    program: Graph,
    backbones: Mapping[str, TorchBackbone],
    *,
    progress: Progress,
    targets: Callable[[str], Calibration | None] = lambda agent: None,
    only: Collection[str] | None = None,
    calibrations: dict[str, Calibration] | None = None,
) -> dict[str, MaterializedLink]:
    """Make every link of a program, inner links first, in order of declaration.

    Args:
        backbones: By the name of the shared backbone.
        progress: Sees the calibration, once per backbone that needs one.
        targets: Takes an agent and gives thoughts to align its inner link to, instead of those over
            text that the backbone makes up itself; None for none. Asked when they are needed, for
            they are large.
        only: Links to make; None for all. What one becomes does not depend on the others.
        calibrations: Thoughts of earlier calls, by backbone; those of this one are added.

    Raises:
        RecmasError: RM120 for a file that does not fit, RM121 where no closed form exists.
    """
    system = program.system
    calibrations = {} if calibrations is None else calibrations

    def align(link_id: str, module: nn.Module, ends: tuple[str, str], role: LinkRole) -> Alignment:
        source, target = (system.backbone_of(agent).name for agent in ends)
        if role == "outer":
            return align_outer(module, backbones[source], backbones[target], link_id=link_id)
        given = targets(ends[0])
        if given is not None:
            return align_inner(module, given, link_id=link_id)
        if source not in calibrations:  # agents that share a backbone share its thoughts
            calibrations[source] = calibrate(backbones[source], progress=progress)
        return align_inner(module, calibrations[source], link_id=link_id)

    made: dict[str, MaterializedLink] = {}
    for link_id, weights, role, ends, where in declared_links(system):
        if only is not None and link_id not in only:
            continue
        source, target = (end_of(system.backbone_of(agent).facts) for agent in ends)
        alignment = None
        if weights.file is not None:
            module = load_declared_link(weights, role, source=source, target=target, where=where)
        else:
            module = make_link(weights.kind, role, weights.in_dim, weights.out_dim)
            if weights.init == "random":
                randomize(module, link_id=link_id)
            elif weights.init == "latentmas":
                realign(module, backbones[system.backbone_of(ends[0]).name], link_id=link_id)
            else:
                alignment = align(link_id, module, ends, role)
        made[link_id] = MaterializedLink(
            module=module,
            weights=weights,
            role=role,
            source=source.identity,
            target=target.identity,
            init=weights.init if weights.file is None else "file",
            alignment=alignment,
        )
    applied = system.link_weights
    return {**dict(_unused_links(system, backbones, applied, only)), **made}


def _unused_links(
    system: System,
    backbones: Mapping[str, TorchBackbone],
    applied: Container[str],
    only: Collection[str] | None,
) -> Iterator[tuple[str, MaterializedLink]]:
    """Return the inner links that nothing is mapped by: engines take one for every agent."""
    for name, agent in system.agents.items():
        link_id = inner_link_id(name)
        if link_id in applied or (only is not None and link_id not in only):
            continue
        if agent.inner is None:
            continue  # on a remote model, which has no engine
        module = make_link(agent.inner.kind, "inner", agent.inner.in_dim, agent.inner.out_dim)
        backbone = system.backbone_of(name)
        # A baseline takes steps where the system takes none.
        is_wanted = agent.inner.init == "latentmas" and agent.inner.file is None
        if is_wanted:
            realign(module, backbones[backbone.name], link_id=link_id)
        else:
            randomize(module, link_id=link_id)
        end = end_of(backbone.facts)
        yield (
            link_id,
            MaterializedLink(
                module=module,
                weights=agent.inner,
                role="inner",
                source=end.identity,
                target=end.identity,
                init="latentmas" if is_wanted else "unused",
            ),
        )


def declared_links(
    system: System,
) -> Iterator[tuple[str, LinkWeights, LinkRole, tuple[str, str], SourcePosition]]:
    """Yield each applied link's id, weights, role, agents at its ends, and place in the spec."""
    applied = system.link_weights
    for name, agent in system.agents.items():
        if agent.inner is not None and inner_link_id(name) in applied:
            yield inner_link_id(name), agent.inner, "inner", (name, name), agent.where
    for link_id, link in system.links.items():
        if link.weights is not None:
            yield link_id, link.weights, "outer", (link.source, link.target), link.where
