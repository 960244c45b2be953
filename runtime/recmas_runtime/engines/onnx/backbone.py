"""The engines: a backbone's three graphs and the link graph, driven by ONNX Runtime.

Shape legend: R rows (agents of a batch times samples), S positions of a call, C cache rows per
sample, H key/value heads, D head width, d model width, V vocabulary, G groups of rows with one
link each, N vectors.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.engines.interface import Floats, Indices, Operands
from recmas_runtime.engines.onnx.caches import ELEMENT_TYPES, Cache, CachePool, Memory, Series
from recmas_runtime.engines.onnx.packed import PackedGraphs
from recmas_runtime.engines.onnx.session import Device, call_onnx, make_session
from recmas_runtime.formats.layers import HIDDEN_ROWS, cache_tensors, is_rows
from recmas_runtime.formats.manifest import BackboneEntry
from recmas_runtime.formats.precisions import device_named

if TYPE_CHECKING:
    import onnxruntime


class BackboneEngine:
    """One backbone's engines. Agents that share a backbone share this object and its weights.

    Where CUDA graphs are refused, at any time, `problems` gets a warning. On the CPU, graphs whose
    weights are packed are opened by way of `packed`, where it is given; those that are made for a
    GPU, in 16 bits, are not.

    Raises:
        RecmasError: RM404 if the decoder has other caches than the entry says, RM504 if the device
            is not available, RM507 if ONNX Runtime refuses a graph.
    """

    def __init__(
        self,
        entry: BackboneEntry,
        root: Path,
        *,
        threads: int | None = None,
        device: Device = "cpu",
        problems: list[Problem] | None = None,
        packed: PackedGraphs | None = None,
    ) -> None:
        self.entry = entry
        self.device = device
        self.problems = [] if problems is None else problems
        self.uses_graphs = device_named(device).kind == "cuda"
        self._open = functools.partial(
            make_session, root / entry.decoder_on(device), threads=threads, device=device
        )
        open_packed = None
        if packed is not None and device == "cpu" and not entry.is_narrow:
            open_packed = functools.partial(packed.open, weights=entry.weights, threads=threads)
        decoder = entry.decoder_on(device)
        self.decoder = self._open_decoder() if open_packed is None else open_packed(decoder)
        _check_caches(self.decoder, entry, decoder)
        # Grouped attention takes no batches behind cached rows.
        self._takes_batches = entry.is_narrow or decoder == entry.decoder
        self.memory = Memory(device, shared=device == "cpu")
        self.caches = CachePool(self.decoder, entry, self.memory)
        # The table is read in place from the mapped weights file: packing would copy all of it.
        unpacked = {"session.disable_prepacking": "1"}
        self._embed = make_session(
            root / entry.embed, threads=threads, device=device, options=unpacked
        )
        # Quantized products are fast only on packed weights: unpacked ones are widened each time.
        is_read_in_place = entry.precision == "float32"
        self._head = (
            open_packed(entry.head_on(device))
            if open_packed is not None and not is_read_in_place
            else make_session(
                root / entry.head_on(device),
                threads=threads,
                device=device,
                options=unpacked if is_read_in_place else None,
            )
        )

    def _open_decoder(self) -> onnxruntime.InferenceSession:
        if self.uses_graphs:
            try:
                return self._open(cuda_graphs=True)
            except RecmasError as error:
                if error.problems[0].code != "RM507":
                    raise
                self._give_up_graphs(error.problems[0].message)
        return self._open()

    def _give_up_graphs(self, reason: str) -> None:
        self.uses_graphs = False
        self.problems.append(
            Problem(
                code="RM507",
                message=f"runs without CUDA graphs, for one was refused: {reason}",
                hint="Steps are slower and compute the same; upgrade onnxruntime-gpu.",
                severity="warning",
            )
        )

    def _run_step(self, cache: Cache) -> None:
        """Run a step, once more without graphs where they are refused.

        That is safe: a step reads nothing that it writes, but for the cache row it writes again,
        and only one that has succeeded makes its states those that are read next.
        """
        try:
            cache.run_step()
        except RecmasError as error:
            if not self.uses_graphs:
                raise
            self._give_up_graphs(error.problems[0].message)
            # A capture that failed leaves its stream unusable, so the session goes with it.
            self.decoder = self._open_decoder()
            self.caches.bind_to(self.decoder)
            cache.run_step()

    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""
        (embeds,) = call_onnx(self._embed.run, ["inputs_embeds"], {"input_ids": input_ids})
        return _shaped(embeds, (*input_ids.shape, self.entry.width), file=self.entry.embed)

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""
        (logits,) = call_onnx(self._head.run, ["logits"], {"hidden": hidden})
        return _shaped(logits, (len(hidden), self.entry.vocab_size), file=self.entry.head)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """Return a cache for `rows` sequences of at most `capacity` positions."""
        return self.caches.take(rows, capacity)

    def release(self, cache: Cache) -> None:
        """Keep a cache that its user needs no more for the next one."""
        self.caches.release(cache)

    def drop_idle(self) -> None:
        """Free the caches that are kept for later."""
        self.caches.drop_idle()

    def forward(
        self,
        cache: Cache,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence through the backbone and extend the cache."""
        rows, positions, width = inputs_embeds.shape
        assert rows == cache.rows, f"{rows} rows in a cache of {cache.rows}"
        assert int(write_index.max()) + positions <= cache.capacity, "cache overflow"
        cache.begin(np.flatnonzero(write_index == 0).tolist())
        if not self._takes_batches and rows > 1 and positions > 1 and write_index.any():
            return self._forward_by_row(cache, inputs_embeds, write_index, last_index, inner)
        cache.bind_inner(inner)
        cache.write_index.write(write_index)
        cache.last_index.write(last_index)
        if positions == 1:
            cache.embeds.write(inputs_embeds)
            self._run_step(cache)
            hidden = cache.thought
        else:
            hidden = self.memory.zeros((rows, positions, width))
            cache.run_call(self.memory.hold(inputs_embeds), hidden)
        # The next call overwrites what this one leaves at fixed addresses.
        return (
            hidden.numpy().copy() if hidden is cache.thought else hidden.numpy(),
            cache.thought.numpy().copy(),
            cache.next_embeds.numpy().copy(),
        )

    def _forward_by_row(
        self,
        cache: Cache,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run each sequence by itself, up to its last real input; one without any is left alone."""
        rows_per_group = len(inputs_embeds) // len(inner["w1"])
        hidden = np.zeros_like(inputs_embeds)
        last = np.zeros((2, len(inputs_embeds), 1, inputs_embeds.shape[2]), np.float32)
        for row, end in enumerate((last_index + 1).tolist()):
            if end == 0:
                continue
            group, one = row // rows_per_group, slice(row, row + 1)
            hidden[one, :end], last[0, one], last[1, one] = self.forward(
                cache.of_row(row),
                np.ascontiguousarray(inputs_embeds[one, :end]),
                write_index[one],
                last_index[one],
                {name: operand[group : group + 1] for name, operand in inner.items()},
            )
        cache.have_run(paused=np.flatnonzero(last_index < 0).tolist())
        return hidden, last[0], last[1]

    def read_draft(
        self, cache: Cache, inputs_embeds: Floats, write_index: Indices, inner: Operands
    ) -> Floats:
        """Run a token of one sequence and all that are drafted behind it."""
        last_index = np.array([inputs_embeds.shape[1] - 1], np.int64)
        return self.forward(cache, inputs_embeds, write_index, last_index, inner)[0]

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

        All buffers are there before the first call and keep their addresses; between calls a few
        rows are copied where they are, on a device on the device.
        """
        rows, _, width = thought.shape
        assert int(write_index.max()) + num_steps - 1 <= cache.capacity, "cache overflow"
        cache.bind_inner(inner)
        empty = np.empty((num_steps, rows, 1, width), np.float32)
        thoughts, embeds = Series(self.memory, empty), Series(self.memory, empty)
        later = np.arange(num_steps - 1)[:, None] + write_index
        positions = Series(self.memory, later, "tensor(int64)")
        cache.thought.write(thought)
        cache.next_embeds.write(next_embeds)
        cache.last_index.write(0)
        for step in range(num_steps):
            if step > 0:
                cache.embeds.copy(cache.next_embeds)
                positions.load(step - 1, cache.write_index)
                self._run_step(cache)
            thoughts.store(step, cache.thought)
            embeds.store(step, cache.next_embeds)
        return thoughts.numpy()[:, :, 0], embeds.numpy()[:, :, 0]


def _check_caches(decoder: onnxruntime.InferenceSession, entry: BackboneEntry, file: str) -> None:
    """Demand the caches that the manifest counts: rows of other shapes would be read as garbage."""
    told = {tensor.name: (tensor.shape, tensor.is_state) for tensor in cache_tensors(entry.layers)}
    outputs = {value.name for value in decoder.get_outputs()}
    found = {
        value.name: (
            (value.shape[1], value.shape[3]) if is_rows(value.name) else tuple(value.shape[1:]),
            not is_rows(value.name),
        )
        for value in decoder.get_inputs()
        if f"present_{value.name}" in outputs
    }
    types = {value.type for value in decoder.get_inputs() if is_rows(value.name)}
    if any(ELEMENT_TYPES.get(kind) != entry.cache_dtype for kind in types):
        raise fail(
            "RM404",
            f"the manifest tells of keys and values in {entry.cache_dtype}, the decoder has "
            f"{', '.join(sorted(types))}",
            file=file,
            hint="Build the bundle again with one version of recmas.",
        )
    if found != told:
        others = sorted(name for name, _ in found.items() ^ told.items())
        raise fail(
            "RM404",
            f"the manifest tells of {len(told)} cache tensors in {entry.num_layers} layers, the "
            f"decoder has others, such as {others[0]!r}",
            file=file,
            hint="Build the bundle again with one version of recmas.",
        )
    masks = [value.shape[1] for value in decoder.get_inputs() if value.name == HIDDEN_ROWS]
    if masks != ([len(entry.masked_layers)] if entry.masked_layers else []):
        raise fail(
            "RM404",
            f"the manifest tells of {len(entry.masked_layers)} groups of layers that rows can be "
            f"hidden from, the decoder has {masks[0] if masks else 'none'}",
            file=file,
            hint="Build the bundle again with one version of recmas.",
        )


class LinkEngine:
    """The link graph: serves every link of a bundle, their weights are inputs."""

    def __init__(self, path: Path, *, threads: int | None = None, device: Device = "cpu") -> None:
        self._session = make_session(path, threads=threads, device=device)
        self._file = path.name

    def apply(self, x: Floats, operands: Operands) -> Floats:
        """Map vectors [G, N, d_in] through G links at once; returns [G, N, d_out]."""
        (y,) = call_onnx(self._session.run, ["y"], {"x": x, **operands})
        return _shaped(y, (*x.shape[:2], operands["bias"].shape[-1]), file=self._file)


def _shaped(output: object, shape: tuple[int, ...], *, file: str) -> Floats:
    """Return what a graph gave as numbers; one of another shape would be read as garbage."""
    if not isinstance(output, np.ndarray) or output.dtype.kind != "f" or output.shape != shape:
        found = output.shape if isinstance(output, np.ndarray) else type(output).__name__
        raise fail(
            "RM507",
            f"the graph gives {found}, not numbers of shape {shape}",
            file=file,
            hint="Build the bundle again, or copy it afresh.",
        )
    return np.asarray(output, dtype=np.float32)
