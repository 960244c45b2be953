"""The answer agent on its own: no other agents, no messages, its own backbone learns.

It is asked what the runtime's baseline `single` asks it, and learns from the same records in the
same order as links do.

Shape legend: N rows, S columns, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.training_graph.agent_calls import Row, pad_rows
from recmas_compiler.lowering.training_graph.calls import Call, CallWriter
from recmas_compiler.lowering.training_graph.loss import Loss, turn_loss, weighted_loss
from recmas_compiler.training.data.examples import TrainExample
from recmas_compiler.training.loop.checkpoint import unwritable
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.run_loop import RunOptions, figures_of, run_loop
from recmas_compiler.training.run import check_processes
from recmas_compiler.training.session import Session
from recmas_compiler.training.tasks.finetuning import METHODS, MethodName
from recmas_runtime.prompts.render import Tokens
from recmas_runtime.running.baselines import without_slots


class AloneTask:
    """Trains weights of one backbone on one agent's prompts and targets.

    Args:
        writer: Renders the agent's prompt, which has no slots.
        agent: Its name.
        backbone: Whose weights learn.
        learning: What learns, by name.
        train: Records to learn from.
        held_out: Records to measure on.
        batch_size: Records of a measurement's batch.
        checkpointed: Compute calls again for their gradients instead of keeping them.
        compute: Element type of products; weights keep theirs.
    """

    def __init__(
        self,
        writer: CallWriter,
        agent: str,
        backbone: TorchBackbone,
        learning: Mapping[str, nn.Module],
        *,
        train: Sequence[TrainExample],
        held_out: Sequence[TrainExample],
        batch_size: int,
        checkpointed: bool,
        compute: torch.dtype,
    ) -> None:
        self.name = f"`{agent}` alone"
        self.links = learning
        self.num_examples = len(train)
        self._writer = writer
        self._agent = agent
        self._backbone = backbone
        self._train = train
        self._held_out = held_out
        self._batch_size = batch_size
        self._checkpointed = checkpointed
        self._compute = compute

    def loss(self, places: Sequence[int]) -> Loss:
        """Return the loss of the records at these places."""
        return self._loss([self._train[place] for place in places])

    @torch.no_grad()
    def measure(self, world: World) -> Mapping[str, Any]:
        """Return the held-out loss."""
        if not self._held_out:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        batches = range(0, len(self._held_out), self._batch_size)
        for first in world.share(batches):
            loss = self._loss(self._held_out[first : first + self._batch_size])
            sums[0] += loss.total.double()
            sums[1] += loss.tokens
        total, tokens = world.add_up(sums).tolist()
        return {"alone": total / tokens}

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return nothing more: there are no rounds."""
        return {}

    def _loss(self, examples: Sequence[TrainExample]) -> Loss:
        calls = [self._writer.write(self._agent, "then", "turn", e) for e in examples]
        rows = [Row(pieces=(_ids(call),), num_wanted=call.num_target_tokens + 1) for call in calls]
        device = self._backbone.model.device
        reduced = self._compute != torch.float32
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
            hidden_NSD = self._read(rows)
            turns_TD = [h_SD[-row.num_wanted :] for h_SD, row in zip(hidden_NSD, rows, strict=True)]
            loss = turn_loss(self._backbone, turns_TD, calls, checkpointed=self._checkpointed)
        return weighted_loss(loss, last_round=1, earlier={})

    def _read(self, rows: Sequence[Row]) -> Tensor:
        device = self._backbone.model.device
        padded = pad_rows(
            rows, lambda ids: self._backbone.embed(ids.to(device)), multiple=1, always_mask=False
        )

        def run(embeds_NSD: Tensor) -> Tensor:
            hidden_NSD: Tensor = self._backbone.body(
                inputs_embeds=embeds_NSD,
                attention_mask=padded.mask_NS,
                position_ids=padded.positions_NS,
                use_cache=False,
            ).last_hidden_state
            return hidden_NSD

        if not self._checkpointed or not torch.is_grad_enabled():
            return run(padded.embeds_NSD)
        hidden_NSD: Tensor = checkpoint(
            run, padded.embeds_NSD, use_reentrant=False, preserve_rng_state=False
        )
        return hidden_NSD


@dataclass(frozen=True, kw_only=True)
class AloneReport:
    """What a run of a method did.

    Attributes:
        agent: Who learned.
        figures: Steps, training loss, held-out loss before and after.
        interrupted: Whether somebody stopped it; nothing is saved then.
    """

    agent: str
    figures: Mapping[str, Any]
    interrupted: bool


def run_method(
    session: Session, method: MethodName, options: RunOptions, *, compute: torch.dtype
) -> AloneReport:
    """Train the answer agent's backbone in the place of links, which stay as they are.

    Steps, batches, their order and the records are those of the outer stage.

    Args:
        session: Its answer agent's backbone is changed; the other backbones are given up.
        method: What learns.
        options: How the run is started; results are in its folder's `lora` or `sft`.
        compute: Element type of products.

    Raises:
        RecmasError: As `run_loop`; RM201 without peft, RM303 if results cannot be written, RM704 if
            there are more processes than records in a batch.
    """
    agent, section = session.system.answer_agent, session.settings.section
    check_processes(section, "outer", session.world.size)
    backbone = session.backbone(agent)
    _give_up_others(session, backbone)
    learner = METHODS[method](backbone, section)
    stage = section.outer.model_copy(update={"lr": learner.settings.lr})
    task = AloneTask(
        alone_writer(session, agent),
        agent,
        backbone,
        {f"{agent}.{method}": learner.weights},
        train=session.examples.train,
        held_out=session.examples.held_out[: section.eval_records],
        batch_size=section.outer.batch_size,
        checkpointed=section.checkpoint_calls,
        compute=compute,
    )
    folder = options.folder / method
    own = (learner.settings,)
    result = run_loop(session, task, stage, folder, options, title=method, own=own)
    if not result.interrupted and session.world.is_main:
        try:
            learner.save(folder)
        except (OSError, SafetensorError) as error:
            raise unwritable(folder, error) from error
    session.world.wait()
    return AloneReport(agent=agent, figures=figures_of(result), interrupted=result.interrupted)


def alone_writer(session: Session, agent: str) -> CallWriter:
    """Return a writer of an agent's calls without slots."""
    system = session.system
    declared = system.agents[agent]
    alone = replace(declared, first=None, then=without_slots(declared.then))
    asked = replace(system, agents={**system.agents, agent: alone})
    return CallWriter(asked, session.backbones)


def _give_up_others(session: Session, kept: TorchBackbone) -> None:
    """Free the memory of backbones that do not run, so that it is not counted."""
    for backbone in session.backbones.values():
        if backbone is not kept:
            backbone.model.to("meta")
    if session.world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(session.world.device)


def _ids(call: Call) -> tuple[int, ...]:
    return tuple(i for item in call.items if isinstance(item, Tokens) for i in item.ids)
