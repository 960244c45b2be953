"""Everything that a stage needs, made ready once: settings, data, backbones, links."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

import torch

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import System
from recmas_compiler.links.calibration import Calibration
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.links.modules import make_link
from recmas_compiler.lowering.choose_layers import choose_layers
from recmas_compiler.lowering.materialize import (
    MaterializedLink,
    declared_links,
    materialize_links,
)
from recmas_compiler.lowering.reference import load_backbones
from recmas_compiler.lowering.training_graph.calls import CallWriter, TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.spec.schema.train import BackboneDtype
from recmas_compiler.spec.spec import Spec
from recmas_compiler.training.data.examples import Examples, leave_out_long
from recmas_compiler.training.data.hidden_state_cache import HiddenStates, TargetCall
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.preflight import thinkers
from recmas_compiler.training.settings import TrainSettings
from recmas_compiler.training.tasks.inner import calibration_of, can_align
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.ids import inner_link_id, link_file_name
from recmas_runtime.prompts.render import Tokens

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Narrower backbones spend their time elsewhere.
NARROW: Final = 256
# Processors with instructions for bfloat16 reach two and more, others one and less.
WORTH_IT: Final = 1.5
_TRIALS: Final = 7


@dataclass(frozen=True, kw_only=True)
class Session:
    """A spec, made ready to train.

    Attributes:
        examples: The data, without records that are too long.
        backbones: By shared name, on the world's device.
        graph: The program as a module; its links have no trained weights yet.
        compute: Element type that backbones multiply in.
    """

    spec: Spec
    program: Graph
    settings: TrainSettings
    examples: Examples
    backbones: Mapping[str, TorchBackbone]
    graph: TrainingGraph
    calls: CallWriter
    world: World
    progress: Progress
    compute: torch.dtype

    @property
    def dtype(self) -> str:
        """The name of the element type that backbones multiply in."""
        return str(self.compute).removeprefix("torch.")

    @property
    def system(self) -> System:
        """The declared tables."""
        return self.program.system

    @property
    def thinkers(self) -> tuple[str, ...]:
        """Agents that make latent steps and have a target: those with something to learn inside."""
        return thinkers(self.program, self.settings)

    def backbone(self, agent: str) -> TorchBackbone:
        """Return the backbone that an agent runs on."""
        return self.backbones[self.system.backbone_of(agent).name]

    def target_calls(self, agent: str, examples: Sequence[TrainExample]) -> list[TargetCall]:
        """Return an agent's turns with perfect messages in their slots, record by record.

        Real messages depend on links that are about to learn.
        """
        found = []
        for example in examples:
            for call in self.calls.write_ideal(agent, example):
                ids = [i for item in call.items if isinstance(item, Tokens) for i in item.ids]
                found.append(TargetCall(ids=tuple(ids), num_target_tokens=call.num_target_tokens))
        return found

    def start(
        self,
        *,
        trained: Path | None = None,
        hidden_states: Mapping[str, HiddenStates] | None = None,
        as_built: bool = False,
    ) -> dict[str, MaterializedLink]:
        """Give the graph's links the weights that training starts from.

        Aligned inner links are aligned to the agents' target texts, where there are enough of them.

        Args:
            trained: A folder with link files that win over the spec's start.
            hidden_states: By agent: those over its target texts in the training records, where
                they are known already.
            as_built: Align as a build does, which knows no target texts.

        Returns:
            Where the weights of every link came from.
        """
        program = self.program if trained is None else _with_files(self.program, trained)

        def target(agent: str) -> Calibration | None:
            if as_built or agent not in self.thinkers:
                return None
            states = (hidden_states or {}).get(agent)
            with self.progress.stage(f"Aligning {agent}"):
                if states is None:
                    calls = self.target_calls(agent, self.examples.train)
                    states = HiddenStates(backbone=self.backbone(agent), calls=calls)
                found = calibration_of(states)
            return found if can_align(found) else None

        made = materialize_links(program, self.backbones, progress=self.progress, targets=target)
        applied = self.system.link_weights  # of the others nothing is learned or kept
        made = {link_id: link for link_id, link in made.items() if link_id in applied}
        for link_id, link in made.items():
            self.graph.link(link_id).load_state_dict(link.module.state_dict())
        return made


def open_session(
    spec: Spec,
    program: Graph,
    settings: TrainSettings,
    *,
    world: World,
    progress: Progress,
    weights: BackboneDtype | None = None,
    examples: Examples | None = None,
    kept_dtype: str | None = None,
) -> Session:
    """Read the data, load the backbones, and leave out records that are too long.

    Args:
        weights: Element type of the backbones; None for that of the settings.
        examples: The data, where they are read already.
        kept_dtype: What `auto` meant when the run began.

    Raises:
        RecmasError: RM700 for data that cannot be used, RM500 or RM206 for a call that cannot be
            written, and what loading backbones raises.
    """
    section = settings.section
    if examples is None:
        examples = settings.examples(spec)  # before anything that takes long
    backbones = load_backbones(program, progress=progress)
    program, _ = choose_layers(program, backbones)
    widest = max(backbone.facts.width for backbone in backbones.values())
    wanted: str = section.backbone_dtype
    if wanted == "auto" and kept_dtype is not None and kept_dtype in _DTYPES:
        wanted = kept_dtype
    compute = element_type(wanted, world.device, width=widest)
    dtype = compute if weights is None else element_type(weights, world.device)
    for backbone in backbones.values():
        backbone.model.to(device=world.device, dtype=dtype)
    blank = {  # of the declared form; weights come later
        link_id: make_link(weights.kind, role, weights.in_dim, weights.out_dim).to(world.device)
        for link_id, weights, role, *_ in declared_links(program.system)
    }
    graph = TrainingGraph(
        program,
        backbones=backbones,
        links=blank,
        mode=section.outer.mode,
        supervise=section.outer.supervise,
        checkpoint_calls=section.checkpoint_calls,
        compile_calls=section.compile,
        pack_weights=True,
    )
    calls, with_targets = graph.writer, thinkers(program, settings)

    def lengths(example: TrainExample) -> dict[tuple[str, int], int]:
        # A text of any length is looked at before it takes its length in time.
        least = {(agent, 1): calls.min_positions(agent, example) for agent in program.system.agents}
        if max(least.values()) > section.max_length:
            return least
        found = graph.lengths(example)
        for agent in with_targets:  # whose turns are read with perfect messages too
            for round_, turn in enumerate(calls.write_ideal(agent, example), start=1):
                found[agent, round_] = max(found.get((agent, round_), 0), turn.num_positions({}))
        return found

    examples = leave_out_long(examples, lengths, max_length=section.max_length, progress=progress)
    examples = replace(examples, warnings=examples.warnings + calls.warnings())
    return Session(
        spec=spec,
        program=program,
        settings=settings,
        examples=examples,
        backbones=backbones,
        graph=graph,
        calls=calls,
        world=world,
        progress=progress,
        compute=compute,
    )


def element_type(wanted: str, device: torch.device, *, width: int = 0) -> torch.dtype:
    """Return the element type that a setting means on a device.

    `auto` takes bfloat16 on a GPU that has it, and on a processor that multiplies faster in it.

    Args:
        wanted: `auto`, or the type's name.
        width: Hidden width; what is narrow is not worth it on a processor.
    """
    if wanted != "auto":
        return _DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    is_worth_it = width >= NARROW and bfloat16_speedup() >= WORTH_IT
    return torch.bfloat16 if is_worth_it else torch.float32


@cache
def bfloat16_speedup() -> float:
    """Return how much faster this processor multiplies matrices in bfloat16; measured once."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(512, 512, dtype=dtype) for _ in range(2))
        best = float("inf")
        for _ in range(_TRIALS):
            begun = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - begun)
        seconds.append(best)
    return seconds[0] / seconds[1]


def _with_files(program: Graph, folder: Path) -> Graph:
    """Return the program with its links started from the files of a folder, where there are any."""

    def file_of(weights: LinkWeights, link_id: str) -> LinkWeights:
        file = folder / link_file_name(link_id)
        return replace(weights, file=str(file)) if file.is_file() else weights

    system = program.system
    agents = {
        name: agent
        if agent.inner is None
        else replace(agent, inner=file_of(agent.inner, inner_link_id(name)))
        for name, agent in system.agents.items()
    }
    links = {
        link_id: link
        if link.weights is None
        else replace(link, weights=file_of(link.weights, link_id))
        for link_id, link in system.links.items()
    }
    return program.replaced(system=replace(system, agents=agents, links=links))
