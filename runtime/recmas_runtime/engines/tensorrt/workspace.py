"""The device memory of one lane: caches, indices, inner links, and captured rollouts.

Imported only where `availability` has found TensorRT and CUDA's bindings.

Shape legend: R rows, C cache rows per sample, H key/value heads, D head width, d model width, M
latent steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.onnx.backbone import Floats, Indices, Operands
from recmas_runtime.engines.tensorrt.device_memory import (
    CapturedGraph,
    DeviceMemory,
    DeviceTable,
    Stream,
)
from recmas_runtime.engines.tensorrt.element_types import from_engine, to_engine
from recmas_runtime.engines.tensorrt.execution import Binding, Engine
from recmas_runtime.engines.tensorrt.profiles import STEP
from recmas_runtime.formats.manifest import BackboneEntry

# A graph has a node for every kernel of every step: longer rollouts are several graphs, so that
# CUDA need not set up a million nodes at once.
MOST_STEPS_OF_A_GRAPH: Final = 256

_INNER_PREFIX: Final = "inner."


class Workspace:
    """Memory for R sequences of C positions.

    Attributes:
        version: Changes when something has moved and must be bound again.

    Args:
        engine: The decoder of this capacity.
        stream: Where it runs.
        entry: The backbone.
        rows: Sequences, R.
        capacity: Positions per sequence, C.
    """

    def __init__(
        self, engine: Engine, stream: Stream, entry: BackboneEntry, *, rows: int, capacity: int
    ) -> None:
        self.rows = rows
        self.capacity = capacity
        self.version = 0
        self._engine = engine
        self._stream = stream
        self._shape = (rows, entry.num_kv_heads, capacity, entry.head_dim)
        self._names = [f"{kind}.{i}" for i in range(entry.num_layers) for kind in ("key", "value")]
        self._element_type = engine.tensors[self._names[0]].element_type
        self._item_bytes = engine.tensors[self._names[0]].host_type.itemsize
        num_bytes = int(np.prod(self._shape)) * self._item_bytes
        self._stores = {name: DeviceMemory(num_bytes, stream) for name in self._names}
        # TensorRT converts nothing: where the graph says int64, it reads eight bytes an index.
        index = np.dtype(np.int64)
        self._write_index = DeviceTable(1, (rows,), index, stream)
        self._last_index = DeviceTable(1, (rows,), index, stream)
        self._inner: Operands | None = None
        self._inner_tables: dict[str, DeviceTable] = {}
        self._inner_shapes: dict[str, tuple[int, ...]] = {}
        self._rollouts: dict[int, _Rollout] = {}

    def bindings(self) -> dict[str, Binding]:
        """Return where everything lies that stays where it is from call to call."""
        bindings = {
            "write_index": Binding(self._write_index.address(0), (self.rows,)),
            "last_index": Binding(self._last_index.address(0), (self.rows,)),
        }
        for name, store in self._stores.items():
            # Input and output are one buffer; TensorRT refuses anything else.
            cache = Binding(store.address, self._shape)
            bindings |= {name: cache, f"present_{name}": cache}
        for name, table in self._inner_tables.items():
            bindings[name] = Binding(table.address(0), self._inner_shapes[name])
        return bindings

    def bind_inner(self, inner: Operands) -> None:
        """Hold the operands of the inner links; nothing happens if they are here already."""
        if self._inner is inner:
            return
        arrays = {
            name: to_engine(array, self._engine.tensors[name].element_type)
            for name, array in ((f"{_INNER_PREFIX}{key}", value) for key, value in inner.items())
        }
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._inner_shapes:
            self._inner_tables = {
                name: DeviceTable(1, array.shape, array.dtype, self._stream)
                for name, array in arrays.items()
            }
            self._inner_shapes = shapes
            self._rollouts.clear()
            self.version += 1
        for name, array in arrays.items():
            self._inner_tables[name].write(0, array)
        self._inner = inner

    def write_indices(self, write_index: Indices, last_index: Indices) -> None:
        """Say where the next call writes, and which of its positions is each row's last."""
        self._write_index.write(0, to_engine(write_index, "INT64"))
        self._last_index.write(0, to_engine(last_index, "INT64"))

    def copy_rows(self, source: Workspace, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given rows of another workspace, in this order."""
        _, heads, capacity, width = self._shape
        position_bytes = width * self._item_bytes
        pitches = capacity * position_bytes, source.capacity * position_bytes
        for name in self._names:
            for index, row in enumerate(rows):
                self._stream.copy_blocks(
                    self._stores[name].address + index * heads * pitches[0],
                    source._stores[name].address + row * heads * pitches[1],
                    pitches=pitches,
                    width=positions * position_bytes,
                    height=heads,
                )

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies [n, H, positions, D] on the host: keys, values of each layer in turn."""
        copies = []
        for name in self._names:
            whole = np.empty(self._shape, self._engine.tensors[name].host_type)
            self._stream.read(self._stores[name].address, whole)
            copies.append(from_engine(whole[list(rows), :, :positions], self._element_type))
        return copies

    def write_rows(self, values: Sequence[NDArray[Any]]) -> None:
        """Overwrite the beginning of all rows with what `read_rows` of some cache returned."""
        for name, array in zip(self._names, values, strict=True):
            whole = np.zeros(self._shape, np.float32)
            whole[:, :, : array.shape[2]] = array
            self._stream.write(self._stores[name].address, to_engine(whole, self._element_type))

    def rollout(
        self, thought: Floats, next_embeds: Floats, write_index: Indices, num_steps: int
    ) -> tuple[Floats, Floats]:
        """Continue latent steps; returns thoughts and next embeddings, both [M, R, d]."""
        if num_steps == 1:  # the prefill's own thought
            return thought[:, 0][None], next_embeds[:, 0][None]
        rollout = self._rollouts.get(num_steps)
        if rollout is None:
            rollout = _Rollout(self._engine, self._stream, self, thought.shape[2], num_steps)
            self._rollouts[num_steps] = rollout
        return rollout.run(thought, next_embeds, write_index)


class _Rollout:
    """The calls of a rollout, captured once and then launched as one.

    Every step has its own addresses, because a captured call always reads and writes where it did
    when it was captured: it reads the embedding that the step before wrote, and its write index
    from a table that is filled before the launch. So nothing is computed between two steps.
    """

    def __init__(
        self, engine: Engine, stream: Stream, workspace: Workspace, width: int, num_steps: int
    ) -> None:
        rows = workspace.rows
        vector = (rows, 1, width)
        self._engine = engine
        self._stream = stream
        self._num_steps = num_steps
        self._thoughts = self._table(num_steps, vector, "thought")
        self._embeds = self._table(num_steps, vector, "inputs_embeds")
        self._scratch = self._table(1, vector, "hidden")
        self._positions = DeviceTable(num_steps, (rows,), np.dtype(np.int64), stream)
        # Memory is zeroed: the last of one input is input 0.
        self._last_index = DeviceTable(1, (rows,), np.dtype(np.int64), stream)
        # A context of its own: another call of it would change what the graph launches.
        self._context = engine.context(STEP, stream)
        engine.bind(
            self._context,
            {
                **workspace.bindings(),
                "last_index": Binding(self._last_index.address(0), (rows,)),
                "inputs_embeds": Binding(self._embeds.address(0), vector),
                "hidden": Binding(self._scratch.address(0), vector),
            },
        )
        self._graphs: list[CapturedGraph] = []

    def run(
        self, thought: Floats, next_embeds: Floats, write_index: Indices
    ) -> tuple[Floats, Floats]:
        """Roll out from a prefill's last position."""
        types = {name: self._engine.tensors[name].element_type for name in self._engine.tensors}
        self._thoughts.write(0, to_engine(thought, types["thought"]))
        self._embeds.write(0, to_engine(next_embeds, types["inputs_embeds"]))
        # Step 1 writes at the index; entry 0 is the prefill's and is not read.
        steps = np.arange(-1, self._num_steps - 1)[:, None]
        self._positions.write_all(to_engine(write_index + steps, "INT64"))
        if not self._graphs:
            self._capture()
        for graph in self._graphs:
            graph.launch()
        thoughts = from_engine(self._thoughts.read(), types["thought"])
        embeds = from_engine(self._embeds.read(), types["inputs_embeds"])
        return thoughts[:, :, 0], embeds[:, :, 0]

    def _capture(self) -> None:
        # The first call of a shape sets things up in ways that cannot be captured. It is the real
        # first step, which the graph then runs again with the same result.
        self._enqueue(range(1, 2))
        self._stream.wait()
        steps = range(1, self._num_steps)
        # Assigned when all are there: half a rollout must never wait to be launched.
        self._graphs = [
            self._stream.capture(
                partial(self._enqueue, steps[index : index + MOST_STEPS_OF_A_GRAPH])
            )
            for index in range(0, len(steps), MOST_STEPS_OF_A_GRAPH)
        ]

    def _enqueue(self, steps: range) -> None:
        for step in steps:
            addresses = {
                "write_index": self._positions.address(step),
                "inputs_embeds": self._embeds.address(step - 1),
                "next_embeds": self._embeds.address(step),
                "thought": self._thoughts.address(step),
            }
            self._engine.move(self._context, addresses)
            self._engine.enqueue(self._context, self._stream)

    def _table(self, num_entries: int, shape: tuple[int, ...], tensor: str) -> DeviceTable:
        return DeviceTable(num_entries, shape, self._engine.tensors[tensor].host_type, self._stream)
