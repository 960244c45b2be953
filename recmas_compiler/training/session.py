"""Everything that a stage needs, made ready once: settings, data, backbones, links."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import System, Think
from recmas_compiler.links.calibration import Calibration
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.links.modules import make_link
from recmas_compiler.links.trained import links_folder
from recmas_compiler.lowering.materialize import (
    MaterializedLink,
    declared_links,
    materialize_links,
)
from recmas_compiler.lowering.reference import load_backbones
from recmas_compiler.lowering.training_graph.calls import CallWriter, TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.spec.document.places import path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import Section
from recmas_compiler.spec.schema.train import BackboneDtype, TrainSection
from recmas_compiler.spec.spec import Spec
from recmas_compiler.training.data.examples import Examples, leave_out_long, load_examples
from recmas_compiler.training.data.hidden_state_cache import HiddenStates, TargetCall
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.tasks.inner import calibration_of, can_align
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.ids import inner_link_id, link_file_name
from recmas_runtime.prompts.render import Tokens

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What a run may change between two starts and still end with the same weights, and the stages and
# methods, each of which counts by itself.
_WITHOUT_EFFECT: Final = (
    "accumulation", "cache_mb", "checkpoint_calls", "checkpoint_every", "data", "eval_every",
    "eval_records", "inner", "links_dir", "lora", "outer", "preset", "sft",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train on and how.

    Attributes:
        held_out: Absolute path of the held-out records, or the part of `data` that is held out.
        links_dir: Absolute path of the folder that trained links go to.
    """

    section: TrainSection
    data: Path
    held_out: Path | float
    links_dir: Path

    def examples(self, spec: Spec) -> Examples:
        """Read the data.

        Raises:
            RecmasError: RM700 for data that cannot be used.
        """
        section = self.section
        return load_examples(
            spec, section.targets, data=self.data, held_out=self.held_out, seed=section.seed
        )

    def digest(self, *own: Section) -> str:
        """Return the sha256 of the settings that a stage's result depends on, hexadecimal.

        Where things are kept, how often they are measured and into how many pieces a device splits
        its work do not count.

        Args:
            own: The stage's section, and that of the method if it is not links that learn.
        """
        values = self.section.model_dump(mode="json", exclude=set(_WITHOUT_EFFECT))
        values["own"] = [section.model_dump(mode="json") for section in own]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def train_settings(spec: Spec) -> TrainSettings:
    """Return what a spec says about training.

    Raises:
        RecmasError: RM104 if it says nothing.
    """
    section, folder = spec.document.train, links_folder(spec)
    if section is None or folder is None:
        hint = "Add `train: {data: FILE.jsonl, targets: {AGENT: FIELD}}`."
        place = spec.places.value(())
        raise RecmasError(problem_at(place, "RM104", "the spec has no `train`.", hint=hint))
    held_out = section.held_out
    return TrainSettings(
        section=section,
        data=path_of(section.data, spec.base_dir),
        held_out=path_of(held_out, spec.base_dir) if isinstance(held_out, str) else held_out,
        links_dir=folder,
    )


@dataclass(frozen=True, kw_only=True)
class Session:
    """A spec, made ready to train.

    Attributes:
        examples: The data, without records that are too long.
        backbones: By shared name, on the world's device.
        graph: The program as a module; its links have no trained weights yet.
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

    @property
    def system(self) -> System:
        """The declared tables."""
        return self.program.system

    @property
    def thinkers(self) -> tuple[str, ...]:
        """Agents that make latent steps and have a target: those with something to learn inside."""
        return _thinkers(self.program, self.settings)

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
) -> Session:
    """Read the data, load the backbones, and leave out records that are too long.

    The backbones have the element type `weights`, or that of the settings.

    Raises:
        RecmasError: RM700 for data that cannot be used, RM500 or RM206 for a call that cannot be
            written, and what loading backbones raises.
    """
    section = settings.section
    examples = settings.examples(spec)  # before anything that takes long
    backbones = load_backbones(program, progress=progress)
    dtype = element_type(weights or section.backbone_dtype, world.device)
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
    )
    calls, thinkers = graph.writer, _thinkers(program, settings)

    def lengths(example: TrainExample) -> dict[tuple[str, int], int]:
        # A text of any length is looked at before it takes its length in time.
        least = {(agent, 1): calls.min_positions(agent, example) for agent in program.system.agents}
        if max(least.values()) > section.max_length:
            return least
        found = graph.lengths(example)
        for agent in thinkers:  # whose turns are read with perfect messages too
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
    )


def element_type(wanted: BackboneDtype, device: torch.device) -> torch.dtype:
    """Return the element type that a setting means on a device."""
    if wanted != "auto":
        return _DTYPES[wanted]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _thinkers(program: Graph, settings: TrainSettings) -> tuple[str, ...]:
    thinking = {
        agent for _, op in program.in_order() if isinstance(op, Think) for agent in op.agents
    }
    return tuple(agent for agent in settings.section.targets if agent in thinking)


def _with_files(program: Graph, folder: Path) -> Graph:
    """Return the program with its links started from the files of a folder, where there are any."""

    def file_of(weights: LinkWeights, link_id: str) -> LinkWeights:
        file = folder / link_file_name(link_id)
        return replace(weights, file=str(file)) if file.is_file() else weights

    system = program.system
    agents = {
        name: replace(agent, inner=file_of(agent.inner, inner_link_id(name)))
        for name, agent in system.agents.items()
    }
    links = {
        link_id: replace(link, weights=file_of(link.weights, link_id))
        for link_id, link in system.links.items()
    }
    return program.replaced(system=replace(system, agents=agents, links=links))
