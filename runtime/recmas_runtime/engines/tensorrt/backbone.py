"""A backbone on TensorRT: caches written in place, a latent rollout as one CUDA graph.

Imported only where `engine_cache` has found TensorRT and CUDA's bindings. Token embeddings are
looked up on the host, in the table that is mapped from the bundle: a few rows a call, which is no
reason to hold the whole table on the device a second time.

Shape legend: R rows, S positions of a call, C cache rows per sample, H key/value heads, D head
width, d model width, V vocabulary, M latent steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import Problem
from recmas_runtime.engines.interface import (
    Backbone,
    Floats,
    HandedRows,
    Indices,
    KeyValueRows,
    Operands,
    keeps_rows_only,
    sees_all_rows,
)
from recmas_runtime.engines.onnx.session import call_onnx, make_session
from recmas_runtime.engines.tensorrt.engine_cache import BackbonePlans, EngineFolder, no_engine
from recmas_runtime.engines.tensorrt.execution import Call, Engine, Stream, Workspace
from recmas_runtime.engines.tensorrt.static_graph import PREFILL, STEP, choose_capacity
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.formats.manifest import BackboneEntry

OpenOnnx = Callable[[str], Backbone[Any]]

# Workspaces that wait for the next batch. Their caches are the largest buffers there are, but what
# they hold besides is costly to make again: a captured rollout.
_MOST_WAITING: Final = 4


def open_backbones(
    bundle: Bundle,
    engines: EngineFolder,
    names: Sequence[str],
    open_onnx: OpenOnnx,
    problems: list[Problem],
) -> Mapping[str, Backbone[Any]]:
    """Open backbones of a bundle on TensorRT.

    A batch that needs more than the engines take adds a warning to `problems`.

    Raises:
        RecmasError: RM510 if TensorRT refuses a plan, RM511 if a backbone has none.
    """

    def beyond(name: str) -> Backbone[Any]:
        plans = engines.record.backbones[name]
        problems.append(
            Problem(
                code="RM550",
                message=f"backbone {name!r}: a batch needs more than its TensorRT engines take "
                f"({plans.max_rows} rows, {plans.decoders[-1].capacity} positions); it ran on ONNX "
                "Runtime",
                hint="Build with a larger build.max_batch or answer.max_new_tokens.",
                severity="warning",
            )
        )
        return open_onnx(name)

    entries = bundle.manifest.backbones
    for name in sorted(set(names) - engines.record.backbones.keys()):
        raise no_engine(f"there is no TensorRT engine of backbone {name!r}", bundle.root)
    return {
        name: TensorrtBackbone(
            entries[name],
            bundle.root,
            engines=engines,
            plans=engines.record.backbones[name],
            fallback=partial(beyond, name),
        )
        for name in names
    }


class TensorrtCache:
    """Keys and values of R sequences on the device; see `recmas_runtime.engines.onnx.caches.Cache`.

    The workspace goes back to `release` with the end of this object.
    """

    def __init__(self, workspace: Workspace, release: Callable[[Workspace], None]) -> None:
        self.workspace = workspace
        self.rows = workspace.rows
        self.capacity = workspace.capacity
        weakref.finalize(self, release, workspace).atexit = False

    def copy_rows(self, source: KeyValueRows, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given sequences of another cache, in this order."""
        if isinstance(source, TensorrtCache):
            self.workspace.copy_rows(source.workspace, rows, positions)
        else:
            self.workspace.write_rows(source.read_rows(rows, positions))

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies [n, H, positions, D] on the host: keys, values of each layer in turn."""
        return self.workspace.read_rows(rows, positions)

    def hide_rows(self, row: int, handed: Sequence[HandedRows]) -> None:
        """Refuse rows that not every layer sees: its engines have no masks."""
        if any(rows.seen_by is not None for rows in handed):
            raise sees_all_rows("TensorRT")

    def write_rows(self, values: Sequence[NDArray[Any]]) -> None:
        """Overwrite the beginning of all sequences with [R, H, positions, D], as tensors come."""
        self.workspace.write_rows(values)

    def save_states(self) -> Any:
        """Refuse: there are none."""
        raise keeps_rows_only("TensorRT")

    def restore_states(self, saved: Any, rows: Mapping[int, int]) -> None:
        """Refuse: there are none."""
        raise keeps_rows_only("TensorRT")


class _Decoder:
    """The engine of one capacity, and its calls for prompts and for single positions."""

    def __init__(self, path: Path, stream: Stream) -> None:
        self.engine = Engine(path)
        self.engine.check_decoder()
        self.prefill = Call(self.engine, PREFILL, stream)
        self.step = Call(self.engine, STEP, stream)


class TensorrtBackbone:
    """One backbone's engines on TensorRT; `fallback` opens it on ONNX Runtime for what is larger.

    Raises:
        RecmasError: RM510 if TensorRT refuses a plan.
    """

    def __init__(
        self,
        entry: BackboneEntry,
        root: Path,
        *,
        engines: EngineFolder,
        plans: BackbonePlans,
        fallback: Callable[[], Backbone[Any]],
    ) -> None:
        self.entry = entry
        self._plans = plans
        self._stream = Stream()
        self._decoders = {
            plan.capacity: _Decoder(engines.file(plan.file), self._stream)
            for plan in plans.decoders
        }
        self._waiting: list[Workspace] = []
        self._open_fallback = fallback
        self._fallback: Backbone[Any] | None = None
        self._head = Call(Engine(engines.file(plans.head)), 0, self._stream)
        self._embed = make_session(
            root / entry.embed, device="cpu", options={"session.disable_prepacking": "1"}
        )

    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""
        (embeds,) = call_onnx(self._embed.run, ["inputs_embeds"], {"input_ids": input_ids})
        return np.asarray(embeds, dtype=np.float32)

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""
        most = self._plans.max_rows
        parts = [hidden[first : first + most] for first in range(0, len(hidden), most)]
        return np.concatenate([self._logits(np.ascontiguousarray(part)) for part in parts])

    def _logits(self, hidden: Floats) -> Floats:
        """Return the logits of no more rows than the engine takes."""
        shape = (len(hidden), self._head.engine.tensors["logits"].shape[1])
        (logits,) = self._head.run({"hidden": hidden}, {"logits": shape})
        return logits

    def new_cache(self, rows: int, capacity: int) -> KeyValueRows:
        """Return a cache for `rows` sequences of at least `capacity` positions."""
        chosen = choose_capacity(tuple(self._decoders), capacity)
        if chosen is None or rows > self._plans.max_rows:
            larger: KeyValueRows = self._beyond().new_cache(rows, capacity)
            return larger
        for workspace in self._waiting:
            if (workspace.rows, workspace.capacity) == (rows, chosen):
                self._waiting.remove(workspace)
                return TensorrtCache(workspace, self._take_back)
        engine = self._decoders[chosen].engine
        workspace = Workspace(engine, self._stream, self.entry, rows=rows, capacity=chosen)
        return TensorrtCache(workspace, self._take_back)

    def release(self, cache: KeyValueRows) -> None:
        """Take a cache that its user needs no more; one of TensorRT returns when it is dropped."""
        if not isinstance(cache, TensorrtCache):
            self._beyond().release(cache)

    def drop_idle(self) -> None:
        """Free the workspaces that are kept for later, and what ONNX Runtime keeps."""
        self._waiting.clear()
        if self._fallback is not None:
            self._fallback.drop_idle()

    def forward(
        self,
        cache: KeyValueRows,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence; returns hidden, last hidden, next embeddings."""
        if not isinstance(cache, TensorrtCache):
            return self._beyond().forward(cache, inputs_embeds, write_index, last_index, inner)
        rows, positions, width = inputs_embeds.shape
        assert int(write_index.max()) + positions <= cache.capacity, "cache overflow"
        workspace = cache.workspace
        workspace.bind_inner(inner)
        decoder = self._decoders[cache.capacity]
        call = decoder.step if positions == 1 else decoder.prefill
        call.bind(workspace)
        workspace.write_indices(write_index, last_index)
        last = (rows, 1, width)
        shapes = {"hidden": (rows, positions, width), "thought": last, "next_embeds": last}
        hidden, thought, following = call.run({"inputs_embeds": inputs_embeds}, shapes)
        return hidden, thought, following

    def read_draft(
        self, cache: KeyValueRows, inputs_embeds: Floats, write_index: Indices, inner: Operands
    ) -> Floats:
        """Run a token of one sequence and all that are drafted behind it."""
        last_index = np.array([inputs_embeds.shape[1] - 1], np.int64)
        return self.forward(cache, inputs_embeds, write_index, last_index, inner)[0]

    def rollout(
        self,
        cache: KeyValueRows,
        thought: Floats,
        next_embeds: Floats,
        write_index: Indices,
        inner: Operands,
        num_steps: int,
    ) -> tuple[Floats, Floats]:
        """Continue latent steps; returns thoughts and next embeddings, both [num_steps, R, d]."""
        if not isinstance(cache, TensorrtCache):
            return self._beyond().rollout(
                cache, thought, next_embeds, write_index, inner, num_steps
            )
        assert int(write_index.max()) + num_steps - 1 <= cache.capacity, "cache overflow"
        cache.workspace.bind_inner(inner)
        return cache.workspace.rollout(thought, next_embeds, write_index, num_steps)

    def _take_back(self, workspace: Workspace) -> None:
        self._waiting.append(workspace)
        del self._waiting[:-_MOST_WAITING]

    def _beyond(self) -> Backbone[Any]:
        """Return the backbone on ONNX Runtime, opened when it is first needed."""
        if self._fallback is None:
            self._fallback = self._open_fallback()
        return self._fallback
