"""What links are compared with: the weights of a backbone learn, from the same records.

The answer agent on its own is asked what the runtime's baseline `single` asks it: `lora` trains
low-rank additions to its matrices (arXiv 2106.09685), `sft` all of its weights. `text` trains all
weights of the backbone that all agents share, to write the texts that the data has for each of
them: the text system learns what to hand over. All end as a backbone of their own, a folder that a
spec can name.

Shape legend: N rows, S columns, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.ops import System
from recmas_compiler.ir.text_links import writing_agents
from recmas_compiler.lowering.reference import module_name
from recmas_compiler.lowering.training_graph.agent_calls import recomputed
from recmas_compiler.lowering.training_graph.calls import Call, CallWriter, TrainExample
from recmas_compiler.lowering.training_graph.graph import Loss, turn_loss, weighted_loss
from recmas_compiler.lowering.training_graph.padded_rows import Row, pad_rows
from recmas_compiler.spec.schema.train import LoraSection, MethodName, SftSection, TrainSection
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.loop import AtStep
from recmas_runtime.core.errors import fail, how_to_install
from recmas_runtime.core.files import sync_folder, write_whole
from recmas_runtime.prompts.render import Tokens
from recmas_runtime.running.baselines import without_slots

ADAPTER: Final = "adapter"
MODEL: Final = "model"


@dataclass(eq=False)
class SingleAgentTask:
    """Trains weights of one backbone on one agent's prompts and targets.

    Attributes:
        writer: Renders the agent's prompt, which has no slots.
        batch_size: Records of a measurement's batch.
        compute: Element type of products; weights keep theirs.
    """

    writer: CallWriter
    agent: str
    backbone: TorchBackbone
    links: Mapping[str, nn.Module]
    _: KW_ONLY
    train: Sequence[TrainExample]
    held_out: Sequence[TrainExample]
    batch_size: int
    checkpointed: bool
    compute: torch.dtype
    # What the held-out figure is called.
    figure: ClassVar[str] = "alone"

    def __post_init__(self) -> None:
        self.name = f"`{self.agent}` alone"
        self.num_examples = len(self.train)
        self.rates: Mapping[str, float] = {}

    def loss(self, places: Sequence[int], at: AtStep | None = None) -> Loss:
        """Return the loss of the records at these places."""
        return self.loss_of([self.train[place] for place in places])

    def turns(self, example: TrainExample) -> Sequence[Call]:
        """Return the turns of a record that have a loss."""
        return (self.writer.write(self.agent, "then", "turn", example),)

    def finish_step(self, at: AtStep, world: World) -> None:
        """Do nothing: a step is the optimizer's."""

    @torch.no_grad()
    def measure(self, world: World) -> Mapping[str, Any]:
        """Return the held-out loss."""
        if not self.held_out:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        batches = range(0, len(self.held_out), self.batch_size)
        for first in world.share(batches):
            loss = self.loss_of(self.held_out[first : first + self.batch_size])
            sums[0] += loss.total.double()
            sums[1] += loss.tokens
        total, tokens = world.add_up(sums).tolist()
        return {self.figure: total / tokens}

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return nothing more: there are no rounds."""
        return {}

    def loss_of(self, examples: Sequence[TrainExample]) -> Loss:
        """Return the loss of records; what is said of records in it is of all turns, in order."""
        calls = [turn for example in examples for turn in self.turns(example)]
        rows = [Row(pieces=(_ids(call),), num_wanted=call.num_target_tokens + 1) for call in calls]
        device = self.backbone.model.device
        reduced = self.compute != torch.float32
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
            hidden_NSD = self._read(rows)
            turns_TD = [h_SD[-row.num_wanted :] for h_SD, row in zip(hidden_NSD, rows, strict=True)]
            loss = turn_loss(self.backbone, turns_TD, calls, checkpointed=self.checkpointed)
        return weighted_loss(loss, last_round=1, earlier={})

    def _read(self, rows: Sequence[Row]) -> Tensor:
        device = self.backbone.model.device
        padded = pad_rows(
            rows, lambda ids: self.backbone.embed(ids.to(device)), multiple=1, always_mask=False
        )

        def run(embeds_NSD: Tensor) -> Tensor:
            hidden_NSD: Tensor = self.backbone.body(
                inputs_embeds=embeds_NSD,
                attention_mask=padded.mask_NS,
                position_ids=padded.positions_NS,
                use_cache=False,
            ).last_hidden_state
            return hidden_NSD

        return recomputed(run, padded.embeds_NSD, checkpointed=self.checkpointed)


class TextSystemTask(SingleAgentTask):
    """Trains the backbone of all agents to write what the data has for each, turn by turn.

    Slots hold the senders' texts as the data has them: what should have been handed over.
    """

    figure = "given texts"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = "the text system"

    def turns(self, example: TrainExample) -> Sequence[Call]:
        """Return the turns of all agents that have a part in the answer."""
        return [
            call
            for agent in writing_agents(self.writer.system)
            for call in self.writer.write_given(agent, example)
        ]


def calls_without_slots(
    system: System, backbones: Mapping[str, TorchBackbone], agent: str
) -> CallWriter:
    """Return a writer of an agent's calls without messages, as the runtime's `single` asks it."""
    declared = system.agents[agent]
    alone = replace(declared, first=None, then=without_slots(declared.then))
    return CallWriter(replace(system, agents={**system.agents, agent: alone}), backbones)


def _ids(call: Call) -> tuple[int, ...]:
    return tuple(i for item in call.items if isinstance(item, Tokens) for i in item.ids)


class Learner(Protocol):
    """Weights of a backbone that learn."""

    @property
    def weights(self) -> nn.ParameterDict:
        """What learns, by name; the backbone uses these very tensors."""

    @property
    def settings(self) -> LoraSection | SftSection:
        """The method's own settings."""

    def save(self, folder: Path) -> None:
        """Write what was learned into a folder; nothing can be learned after this."""


class FullLearner:
    """All weights of a backbone."""

    def __init__(self, backbone: TorchBackbone, section: TrainSection) -> None:
        self.settings = section.sft
        self._backbone = backbone
        for weight in backbone.model.parameters():
            weight.data = weight.data.clone()  # it may be a read-only map of its file
            weight.requires_grad_(True)
        self.weights = _trainable(backbone.model)

    def save(self, folder: Path) -> None:
        """Write the backbone into `folder/model`."""
        _save_model(self._backbone, self._backbone.model, folder)


class LoraLearner:
    """Low-rank additions, drawn by the seed, to all matrices but embeddings and head.

    Raises:
        RecmasError: RM201 without peft.
    """

    def __init__(self, backbone: TorchBackbone, section: TrainSection) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise fail(
                "RM201",
                "--method lora needs the package peft, which is not installed",
                hint=how_to_install("train"),
            ) from error
        self.settings = section.lora
        self._backbone = backbone
        config = LoraConfig(
            r=section.lora.rank,
            lora_alpha=section.lora.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(section.seed)
            self._adapted = get_peft_model(backbone.model, config)
        self.weights = _trainable(backbone.model)
        for weight in self.weights.values():
            weight.data = weight.data.float()  # they learn, so they are no bfloat16 numbers

    def save(self, folder: Path) -> None:
        """Write the additions into `folder/adapter`, as peft does, and the sum into `model`.

        The sum is float32: in bfloat16, small additions would be lost in its rounding.
        """
        from peft import get_peft_model_state_dict

        place = folder / ADAPTER
        place.mkdir(parents=True, exist_ok=True)
        learned = get_peft_model_state_dict(self._adapted, save_embedding_layers=False)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}
        write_whole(place / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
        self._adapted.peft_config["default"].save_pretrained(place)
        adapted = self._adapted.to("cpu", torch.float32)
        _save_model(self._backbone, adapted.merge_and_unload(), folder)


METHODS: Final = MappingProxyType[MethodName, Callable[[TorchBackbone, TrainSection], Learner]](
    {"lora": LoraLearner, "sft": FullLearner, "text": FullLearner}
)


def _trainable(model: nn.Module) -> nn.ParameterDict:
    """Return the weights that have gradients, each once, under names that modules may have."""
    found = {name: w for name, w in model.named_parameters() if w.requires_grad}
    return nn.ParameterDict({module_name(name): weight for name, weight in found.items()})


def _save_model(backbone: TorchBackbone, model: Any, folder: Path) -> None:
    """Write model, tokenizer and chat template; the folder is complete or not there."""
    place, staged = folder / MODEL, folder / f".{MODEL}.writing"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    backbone.tokenizer.save_pretrained(staged)
    shutil.rmtree(place, ignore_errors=True)
    staged.rename(place)
    sync_folder(folder)
