"""How much memory a program needs, known before anything is built.

What is counted is the resident memory of a process that loads the bundle and answers: weights as
engines hold them, links, caches, what a prompt passes through, and the runtime itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from recmas_compiler.backbones.facts import (
    ENGINE_ELEMENT_BYTES,
    BackboneFacts,
    angle_tables_bytes,
    has_expert_blocks,
    row_weights_bytes,
    step_bytes,
    weights_bytes,
)
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Backbone, Cache, Level, Send, System, Think
from recmas_compiler.passes.plan_caches import appended_rows
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import aligned, human_bytes
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.layers import sequence_bytes
from recmas_runtime.formats.plan import cache_capacity
from recmas_runtime.formats.precisions import AUTO, DTYPE_BYTES, PRECISIONS
from recmas_runtime.sequences.sequence_batch import DECODE_HEADROOM

# Measured on Linux with ONNX Runtime 1.31 and SmolLM2 (docs/performance.md). Python, numpy, ONNX
# Runtime and the other packages; and what an engine holds beside its weights.
RUNTIME_BYTES: Final = 62_000_000
ENGINE_BYTES: Final = 12_000_000
# A tokenizer's tables, per token of its vocabulary.
TOKENIZER_BYTES: Final = 850
# Vectors of the model's width that ONNX Runtime keeps for each position of a prompt.
VECTORS_PER_POSITION: Final = 34


@dataclass(frozen=True, kw_only=True)
class BackboneMemory:
    """One backbone's share.

    Attributes:
        name: The backbone; those that use its weights are not listed apart.
        dtype: Element type that float32 engines store weights in; in memory they are float32.
        device: What its engines are made for, as the spec names it.
        cache_dtype: Element type of keys and values.
        step_bytes: Weights that a latent step reads, those of the inner link apart: over the
            bandwidth of the memory that they lie in, the least time of a step.
        tables_bytes: The most that angles of the CPU's decoder take.
        snapshot_bytes: Copies of layer states, for one record.
        activation_bytes: What the longest prompt of one record passes through.
        packing_bytes: Stored table of a quantized head, which is there too while it is packed.
    """

    name: str
    source: str
    dtype: str
    precision: str
    device: str
    cache_dtype: str
    agents: tuple[str, ...]
    weights_bytes: int
    step_bytes: int
    tables_bytes: int
    cache_bytes: int
    snapshot_bytes: int
    activation_bytes: int
    packing_bytes: int
    tokenizer_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The whole system's memory.

    Attributes:
        prompt_tokens: Positions of every prompt, messages included.
        num_links: Inner and outer links that the program uses.
        remotes: By agent, the model behind an API that it runs on, which takes no memory here.
    """

    prompt_tokens: int
    backbones: tuple[BackboneMemory, ...]
    num_links: int
    links_bytes: int
    max_batch: int
    remotes: dict[str, str]

    @property
    def weights_bytes(self) -> int:
        """Weights of all backbones and links, tables of angles included."""
        stored = sum(backbone.weights_bytes + backbone.tables_bytes for backbone in self.backbones)
        return stored + self.links_bytes

    @property
    def runtime_bytes(self) -> int:
        """The process itself: packages, tokenizers, engines without their weights."""
        tokenizers = sum(backbone.tokenizer_bytes for backbone in self.backbones)
        return RUNTIME_BYTES + ENGINE_BYTES * len(self.backbones) + tokenizers

    def cache_bytes(self, *, batch: int) -> int:
        """Return the bytes of all caches for a batch."""
        return batch * sum(backbone.cache_bytes for backbone in self.backbones)

    def snapshot_bytes(self, *, batch: int) -> int:
        """Return the bytes of all snapshots of layer states for a batch."""
        return batch * sum(backbone.snapshot_bytes for backbone in self.backbones)

    def activation_bytes(self, *, batch: int) -> int:
        """Return the bytes that the prompts of a batch pass through; every engine keeps its own."""
        return batch * sum(backbone.activation_bytes for backbone in self.backbones)

    def total_bytes(self, *, batch: int) -> int:
        """Return the resident bytes of a process that answers a batch."""
        fixed = self.runtime_bytes + self.weights_bytes
        kept = self.cache_bytes(batch=batch) + self.snapshot_bytes(batch=batch)
        running = kept + self.activation_bytes(batch=batch)
        return fixed + max([running, *(backbone.packing_bytes for backbone in self.backbones)])

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        by_batch = {
            "cache_bytes": self.cache_bytes,
            "snapshot_bytes": self.snapshot_bytes,
            "activation_bytes": self.activation_bytes,
            "total_bytes": self.total_bytes,
        }
        return (
            asdict(self)
            | {"weights_bytes": self.weights_bytes, "runtime_bytes": self.runtime_bytes}
            | {k: {"one": f(batch=1), "max": f(batch=self.max_batch)} for k, f in by_batch.items()}
        )

    def _remote_rows(self) -> Iterator[tuple[str, str]]:
        """Yield the models behind an API, each with its agents."""
        for model in dict.fromkeys(self.remotes.values()):
            yield model, ", ".join(name for name, on in self.remotes.items() if on == model)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("", "weights", "caches, 1 record", f"caches, {self.max_batch} records", "agents")
        ]
        for backbone in self.backbones:
            caches = (backbone.cache_bytes, self.max_batch * backbone.cache_bytes)
            sizes = map(human_bytes, (backbone.weights_bytes + backbone.tables_bytes, *caches))
            rows.append((backbone.name, *sizes, ", ".join(backbone.agents)))
        rows += ((name, "none here", "", "", agents) for name, agents in self._remote_rows())
        rows.append((f"links ({self.num_links})", human_bytes(self.links_bytes)))
        batches = (1, self.max_batch)
        caches_of = [self.cache_bytes(batch=batch) for batch in batches]
        rows.append(("sum", *map(human_bytes, (self.weights_bytes, *caches_of))))
        prompts = [human_bytes(self.activation_bytes(batch=batch)) for batch in batches]
        copies = [human_bytes(self.snapshot_bytes(batch=batch)) for batch in batches]
        states = f"Snapshots of layer states take {copies[0]} for one record, {copies[1]} for "
        one, most = (human_bytes(self.total_bytes(batch=batch)) for batch in batches)
        return "\n".join(
            (
                *aligned(rows),
                "",
                *([f"{states}{self.max_batch}."] if self.snapshot_bytes(batch=1) else []),
                f"Prompts pass through {prompts[0]} for one record, {prompts[1]} for "
                f"{self.max_batch}; the runtime itself takes {human_bytes(self.runtime_bytes)}.",
                *(_step_text(backbone) for backbone in self.backbones),
                f"In all {one} for one record, {most} for a batch of {self.max_batch}.",
                f"Counted with prompts of {self.prompt_tokens} tokens, messages included; "
                "--prompt-tokens N counts others.",
            )
        )


def _step_text(backbone: BackboneMemory) -> str:
    where = "" if backbone.device == AUTO else f" on {backbone.device}"
    caches = "" if backbone.cache_dtype == "float32" else f"; caches are {backbone.cache_dtype}"
    read = human_bytes(backbone.step_bytes)
    return f"A latent step of {backbone.name} ({backbone.precision}{where}) reads {read}{caches}."


def memory_plan(program: Graph, *, prompt_tokens: int | None = None) -> MemoryPlan:
    """Return the memory that a program with planned caches needs.

    Args:
        prompt_tokens: Positions of every prompt, messages included; None for the most that the
            build allows, with caches for the longest answer.

    Raises:
        RecmasError: RM506 for prompts that no agent's backbone has positions for.
    """
    assert program.level is Level.PLANNED, "caches are not planned yet"
    system = program.system
    if prompt_tokens is not None:
        _check_positions(system, prompt_tokens)
    links = dict(_links_used(program))
    return MemoryPlan(
        prompt_tokens=prompt_tokens or system.build.max_prompt_tokens,
        backbones=tuple(_backbones(system, prompt_tokens)),
        num_links=len(links),
        links_bytes=sum(links.values()) * ENGINE_ELEMENT_BYTES,
        max_batch=system.build.max_batch,
        remotes={
            name: system.remotes[agent.backbone].entry.name
            for name, agent in system.agents.items()
            if system.is_remote(name)
        },
    )


def _check_positions(system: System, prompt_tokens: int) -> None:
    """Refuse prompts that leave no room for what an agent adds to them."""
    room = {}
    for name in system.local_agents:
        most = system.backbone_of(name).facts.max_positions
        room[name] = most - appended_rows(system, name)
    least = min(room, key=room.__getitem__)
    if prompt_tokens > room[least]:
        raise fail(
            "RM506",
            f"`{least}` has no room for prompts of {prompt_tokens} tokens and what it adds: its "
            f"backbone was made for {system.backbone_of(least).facts.max_positions} positions",
            hint=f"Ask for at most {room[least]}.",
        )


def _backbones(system: System, prompt_tokens: int | None) -> Iterator[BackboneMemory]:
    positions = prompt_tokens or system.build.max_prompt_tokens
    for name, backbone in system.backbones.items():
        caches = [cache for cache in system.caches.values() if cache.backbone == name]
        if caches:
            most_rows = max(len(cache.agents) for cache in caches)
            numbers = VECTORS_PER_POSITION * backbone.facts.width
            yield BackboneMemory(
                name=name,
                source=backbone.facts.source,
                dtype=backbone.dtype,
                precision=backbone.precision,
                device=backbone.device,
                cache_dtype=backbone.types.caches,
                agents=tuple(agent for cache in caches for agent in cache.agents),
                weights_bytes=weights_bytes(
                    backbone.facts, precision=backbone.precision, device=backbone.device_kind
                )
                + _for_prompts(backbone)
                + _beside_experts(backbone.facts, backbone.precision),
                step_bytes=step_bytes(
                    backbone.facts, precision=backbone.precision, device=backbone.device_kind
                ),
                tables_bytes=angle_tables_bytes(backbone.facts) if backbone.types.is_wide else 0,
                cache_bytes=sum(_cache_bytes(system, cache, prompt_tokens) for cache in caches),
                snapshot_bytes=sum(
                    snapshot.bytes_per_sample
                    for snapshot in system.snapshots.values()
                    if system.backbone_of(snapshot.agents[0]).name == name
                ),
                activation_bytes=most_rows * positions * numbers * ENGINE_ELEMENT_BYTES,
                packing_bytes=_packing_bytes(backbone),
                tokenizer_bytes=backbone.facts.vocab_size * TOKENIZER_BYTES,
            )


def _for_prompts(backbone: Backbone) -> int:
    """Return the most that a second copy of the layers takes, which prompts are computed with."""
    has_copy = PRECISIONS[backbone.precision].cpu_products == "rows in prompts"
    if not has_copy or not backbone.types.is_wide:
        return 0
    return row_weights_bytes(backbone.facts, precision=backbone.precision)


def _beside_experts(facts: BackboneFacts, precision: str) -> int:
    """Return what QMoE keeps beside blocks with their scales: sums of blocks, and scales again."""
    block_size = PRECISIONS[precision].block_size
    if block_size is None or not has_expert_blocks(facts, block_size):
        return 0
    return 2 * facts.num_expert_parameters // block_size * ENGINE_ELEMENT_BYTES


def _packing_bytes(backbone: Backbone) -> int:
    row, facts = PRECISIONS[backbone.precision], backbone.facts
    size = facts.vocab_size * facts.width * row.table_weight_bits(backbone.device_kind) / 8
    return 0 if row.block_size is None else round(size)


def _cache_bytes(system: System, cache: Cache, prompt_tokens: int | None) -> int:
    """Return a cache's bytes for one record, at the limits or as a run with such prompts has it."""
    if prompt_tokens is None:
        return cache.bytes_per_sample
    steps = max(system.agents[name].latent_steps for name in cache.agents)
    appended = max(appended_rows(system, name) for name in cache.agents)
    appended = max(steps, min(appended, DECODE_HEADROOM))  # text gets room as it grows
    backbone = system.backbones[cache.backbone]
    capacity = cache_capacity(prompt_tokens + appended)
    return len(cache.agents) * sequence_bytes(
        backbone.facts.layers,
        capacity,
        num_masks=system.num_masks(cache.backbone),
        element_bytes=DTYPE_BYTES[backbone.types.caches],
    )


def _links_used(program: Graph) -> Iterator[tuple[str, int]]:
    """Yield (id, number of parameters) of each link that a step applies, again per step."""
    for op in program.nodes().values():
        match op:
            case Think(agents=agents):
                for name in agents:
                    inner = program.system.agents[name].inner
                    assert inner is not None, "remote models do not think"
                    yield inner_link_id(name), inner.num_parameters("inner")
            case Send(source=source, links=links, apply_inner=apply_inner):
                if apply_inner:
                    inner = program.system.agents[source].inner
                    assert inner is not None, "remote models send text"
                    yield inner_link_id(source), inner.num_parameters("inner")
                for link in links:
                    outer = program.system.links[link].weights
                    if outer is not None:
                        yield link, outer.num_parameters("outer")
            case _:
                pass
