"""The engines: a backbone's three graphs and the link graph, driven by ONNX Runtime.

Shape legend: R rows (agents of a batch times samples), S positions of a call, C cache rows per
sample, H key/value heads, D head width, d model width, V vocabulary, G groups of rows with one
link each, N vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.buffers import DeviceArray
from recmas_runtime.manifest import BackboneEntry
from recmas_runtime.onnx_session import Device, make_session

if TYPE_CHECKING:
    from recmas_runtime.engine_interface import KeyValueRows

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Operands = Mapping[str, NDArray[Any]]


class Cache:
    """Key/value rows of R sequences and the bindings to them, both made once.

    The cache is written in place: input and output of the graph are the same buffer. Rows at and
    beyond a sequence's write index are never read, so forgetting is only a smaller write index.

    Args:
        engine: The engine it belongs to.
        rows: Sequences, R.
        capacity: Positions per sequence, C.
    """

    def __init__(self, engine: BackboneEngine, *, rows: int, capacity: int) -> None:
        entry = engine.entry
        shape = (rows, entry.num_kv_heads, capacity, entry.head_dim)
        self.rows = rows
        self.capacity = capacity
        self.binding = engine.decoder.io_binding()
        self._layers = []
        for layer in range(entry.num_layers):
            for name in ("key", "value"):
                store = DeviceArray.zeros(shape, np.float32, engine.device)
                store.bind_input(self.binding, f"{name}.{layer}")
                store.bind_output(self.binding, f"present_{name}.{layer}")
                self._layers.append(store)
        self.write_index = DeviceArray.zeros((rows,), np.int64, engine.device)
        self.last_index = DeviceArray.zeros((rows,), np.int64, engine.device)
        self.write_index.bind_input(self.binding, "write_index")
        self.last_index.bind_input(self.binding, "last_index")
        self._inner: Operands | None = None
        self._inner_arrays: list[DeviceArray] = []

    def copy_rows(self, source: KeyValueRows, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given sequences of another cache, in this order."""
        if isinstance(source, Cache):
            for store, other in zip(self._layers, source._layers, strict=True):
                store.copy_leading(other, rows, positions)
            return
        for store, array in zip(self._layers, source.read_rows(rows, positions), strict=True):
            whole = DeviceArray(np.ascontiguousarray(array), "cpu")
            store.copy_leading(whole, range(len(rows)), positions)

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies [n, H, positions, D] on the host: keys, values of each layer in turn."""
        return [store.numpy()[list(rows), :, :positions] for store in self._layers]

    def bind_inner(self, inner: Operands, device: Device) -> None:
        """Bind the inner links' operands; nothing happens if they are bound already."""
        if self._inner is inner:
            return
        self._inner = inner
        self._inner_arrays = []
        for name, array in inner.items():
            operand = DeviceArray(array, device)
            operand.bind_input(self.binding, f"inner.{name}")
            self._inner_arrays.append(operand)


class BackboneEngine:
    """One backbone's engines. Agents that share a backbone share this object and its weights.

    Args:
        entry: Its entry in the manifest.
        root: Folder that the entry's paths are relative to.
        threads: Threads within an operator; None takes the physical cores.
        device: Where to run.

    Raises:
        RecmasError: RM504 if the device is not available, RM507 if ONNX Runtime refuses a graph.
    """

    def __init__(
        self,
        entry: BackboneEntry,
        root: Path,
        *,
        threads: int | None = None,
        device: Device = "cpu",
    ) -> None:
        self.entry = entry
        self.device = device
        self.decoder = make_session(root / entry.decoder, threads=threads, device=device)
        # The table is read in place from the mapped weights file: packing would copy all of it.
        unpacked = {"session.disable_prepacking": "1"}
        self._embed = make_session(
            root / entry.embed, threads=threads, device=device, options=unpacked
        )
        self._head = make_session(
            root / entry.head, threads=threads, device=device, options=unpacked
        )

    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""
        (embeds,) = self._embed.run(["inputs_embeds"], {"input_ids": input_ids})
        return np.asarray(embeds, dtype=np.float32)

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""
        (logits,) = self._head.run(["logits"], {"hidden": hidden})
        return np.asarray(logits, dtype=np.float32)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Return a cache for `rows` sequences of at most `capacity` positions."""
        return Cache(self, rows=rows, capacity=capacity)

    def forward(
        self,
        cache: Cache,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence through the backbone and extend the cache.

        Args:
            cache: Is written at `write_index .. write_index + S`.
            inputs_embeds: [R, S, d]; what lies after a sequence's last real position is ignored.
            write_index: [R], the position of each sequence's first input.
            last_index: [R], each sequence's last real input, counted within S.
            inner: Operands of the inner links, G groups with R = G * B.

        Returns:
            Hidden states [R, S, d], the last real one [R, 1, d], and its inner link's output
            [R, 1, d].
        """
        rows, positions, width = inputs_embeds.shape
        assert rows == cache.rows, f"{rows} rows in a cache of {cache.rows}"
        assert int(write_index.max()) + positions <= cache.capacity, "cache overflow"
        cache.bind_inner(inner, self.device)
        cache.write_index.write(write_index)
        cache.last_index.write(last_index)
        embeds = DeviceArray(np.ascontiguousarray(inputs_embeds), self.device)
        hidden = DeviceArray.zeros((rows, positions, width), np.float32, self.device)
        thought = DeviceArray.zeros((rows, 1, width), np.float32, self.device)
        following = DeviceArray.zeros((rows, 1, width), np.float32, self.device)
        embeds.bind_input(cache.binding, "inputs_embeds")
        hidden.bind_output(cache.binding, "hidden")
        thought.bind_output(cache.binding, "thought")
        following.bind_output(cache.binding, "next_embeds")
        self.decoder.run_with_iobinding(cache.binding)
        return hidden.numpy(), thought.numpy(), following.numpy()

    def rollout(
        self,
        cache: Cache,
        thought: Floats,
        next_embeds: Floats,
        write_index: Indices,
        inner: Operands,
        num_steps: int,
    ) -> tuple[Floats, Floats]:
        """Continue latent steps from a prefill's last position, each in one call.

        The first thought is the prefill's own, so `num_steps - 1` calls are made. Thoughts and
        embeddings stay where the engine wrote them; a step reads the slice the last one wrote.

        Args:
            cache: Is extended by `num_steps - 1` positions.
            thought: [R, 1, d], the hidden state at the last prompt position.
            next_embeds: [R, 1, d], its inner link's output.
            write_index: [R], the position after the prompt.
            inner: As in `forward`.
            num_steps: Latent steps, at least 1.

        Returns:
            Thoughts and their inner links' outputs, both [num_steps, R, d].
        """
        rows, _, width = thought.shape
        assert int(write_index.max()) + num_steps - 1 <= cache.capacity, "cache overflow"
        cache.bind_inner(inner, self.device)
        thoughts = DeviceArray.zeros((num_steps, rows, 1, width), np.float32, self.device)
        embeds = DeviceArray.zeros((num_steps, rows, 1, width), np.float32, self.device)
        thoughts.write_slice(0, thought)
        embeds.write_slice(0, next_embeds)
        cache.last_index.write(np.zeros(rows, np.int64))
        scratch = DeviceArray.zeros((rows, 1, width), np.float32, self.device)
        scratch.bind_output(cache.binding, "hidden")
        position = write_index.copy()
        for step in range(1, num_steps):
            cache.write_index.write(position)
            embeds.bind_input(cache.binding, "inputs_embeds", index=step - 1)
            embeds.bind_output(cache.binding, "next_embeds", index=step)
            thoughts.bind_output(cache.binding, "thought", index=step)
            self.decoder.run_with_iobinding(cache.binding)
            position += 1
        return thoughts.numpy()[:, :, 0], embeds.numpy()[:, :, 0]


class LinkEngine:
    """The link graph: serves every link of a bundle, their weights are inputs.

    Args:
        path: `link.onnx`.
        threads: Threads within an operator; None takes the physical cores.
        device: Where to run.
    """

    def __init__(self, path: Path, *, threads: int | None = None, device: Device = "cpu") -> None:
        self._session = make_session(path, threads=threads, device=device)

    def apply(self, x: Floats, operands: Operands) -> Floats:
        """Map vectors [G, N, d_in] through G links at once; returns [G, N, d_out]."""
        (y,) = self._session.run(["y"], {"x": x, **operands})
        return np.asarray(y, dtype=np.float32)
