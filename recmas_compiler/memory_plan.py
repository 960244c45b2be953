"""How much memory a program needs, known before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level, Send, System, Think
from recmas_compiler.ir.sizes import (
    ENGINE_DTYPE,
    dtype_bytes,
    human_bytes,
    link_num_parameters,
    weights_bytes,
)
from recmas_compiler.ir.text_table import aligned


@dataclass(frozen=True, kw_only=True)
class BackboneMemory:
    """One backbone's share.

    Attributes:
        name: The backbone; those that use its weights are not listed apart.
        source: As the spec names it.
        dtype: Element type that float32 engines store weights in; in memory they are float32.
        precision: How its engines hold weights.
        agents: Agents that the program runs on it.
        weights_bytes: Its weights, held once.
        cache_bytes: Key/value caches of its agents for one record, at the limits of the build.
    """

    name: str
    source: str
    dtype: str
    precision: str
    agents: tuple[str, ...]
    weights_bytes: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The whole system's memory. Activations, a few MB, are not in it.

    Attributes:
        num_links: Inner and outer links that the program uses.
        links_bytes: Their weights.
        max_batch: Records in the largest batch.
    """

    backbones: tuple[BackboneMemory, ...]
    num_links: int
    links_bytes: int
    max_batch: int

    @property
    def weights_bytes(self) -> int:
        """Weights of all backbones and links."""
        return sum(backbone.weights_bytes for backbone in self.backbones) + self.links_bytes

    def cache_bytes(self, *, batch: int) -> int:
        """Return the bytes of all caches for a batch, at the limits of the build."""
        return batch * sum(backbone.cache_bytes for backbone in self.backbones)

    def total_bytes(self, *, batch: int) -> int:
        """Return the bytes of weights and caches for a batch."""
        return self.weights_bytes + self.cache_bytes(batch=batch)

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return asdict(self) | {
            "weights_bytes": self.weights_bytes,
            "cache_bytes": {"one": self.cache_bytes(batch=1), "max": self._max_cache_bytes},
            "total_bytes": {
                "one": self.total_bytes(batch=1),
                "max": self.total_bytes(batch=self.max_batch),
            },
        }

    @property
    def _max_cache_bytes(self) -> int:
        return self.cache_bytes(batch=self.max_batch)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("", "weights", "caches, 1 record", f"caches, {self.max_batch} records", "agents")
        ]
        for backbone in self.backbones:
            caches = (backbone.cache_bytes, self.max_batch * backbone.cache_bytes)
            sizes = map(human_bytes, (backbone.weights_bytes, *caches))
            rows.append((backbone.name, *sizes, ", ".join(backbone.agents)))
        rows.append((f"links ({self.num_links})", human_bytes(self.links_bytes)))
        sums = (self.weights_bytes, self.cache_bytes(batch=1), self._max_cache_bytes)
        rows.append(("sum", *map(human_bytes, sums)))
        one, most = self.total_bytes(batch=1), self.total_bytes(batch=self.max_batch)
        return "\n".join(
            (
                *aligned(rows),
                "",
                f"In all {human_bytes(one)} for one record, {human_bytes(most)} for a batch of "
                f"{self.max_batch}.",
                "Caches are counted at the longest prompt allowed; shorter prompts take less.",
            )
        )


def memory_plan(program: Graph) -> MemoryPlan:
    """Return the memory that a program with planned caches needs."""
    assert program.level is Level.PLANNED, "caches are not planned yet"
    system = program.system
    links = dict(_links_used(program))
    return MemoryPlan(
        backbones=tuple(_backbones(system)),
        num_links=len(links),
        links_bytes=sum(links.values()) * dtype_bytes(ENGINE_DTYPE),
        max_batch=system.build.max_batch,
    )


def _backbones(system: System) -> Iterator[BackboneMemory]:
    for name, backbone in system.backbones.items():
        caches = [cache for cache in system.caches.values() if cache.backbone == name]
        if caches:
            yield BackboneMemory(
                name=name,
                source=backbone.facts.source,
                dtype=backbone.dtype,
                precision=backbone.precision,
                agents=tuple(agent for cache in caches for agent in cache.agents),
                weights_bytes=weights_bytes(backbone.facts, precision=backbone.precision),
                cache_bytes=sum(cache.bytes_per_sample for cache in caches),
            )


def _links_used(program: Graph) -> Iterator[tuple[str, int]]:
    """Yield (id, number of parameters) of each link that a step applies, again per step."""
    for op in program.nodes().values():
        match op:
            case Think(agents=agents):
                for name in agents:
                    inner = program.system.agents[name].inner
                    yield f"{name}.inner", link_num_parameters(inner, role="inner")
            case Send(links=links):
                for link in links:
                    outer = program.system.links[link].weights
                    yield link, link_num_parameters(outer, role="outer")
            case _:
                pass
