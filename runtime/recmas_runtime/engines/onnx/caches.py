"""Key/value caches: a decoder's buffers and bindings, made once and used again.

Shape legend: R rows (sequences), C cache rows per sequence, H key/value heads, D head width, d
model width, G groups of rows with one link each.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.element_types import narrowed, widened
from recmas_runtime.engines.interface import HandedRows, Operands, masks_of
from recmas_runtime.engines.onnx.session import NO_GRAPH, call_onnx, onnx_runtime, run_options
from recmas_runtime.formats.layers import (
    HIDDEN_ROWS,
    CacheTensor,
    cache_tensors,
    hidden_rows_tensor,
)
from recmas_runtime.formats.manifest import BackboneEntry
from recmas_runtime.formats.precisions import device_named

if TYPE_CHECKING:
    import onnxruntime


# What of a sequence's tensor is meant, by its axes.
Part = tuple[slice, ...]

# numpy's types for those of ONNX Runtime. It has none for bfloat16, whose bits it can hold.
NUMPY_TYPES: Final[dict[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
# Names of element types for those of ONNX Runtime.
ELEMENT_TYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}
_GRAPH_IDS: Final = itertools.count(1)
_BFLOAT16: Final = 16  # its number among ONNX's types


class Memory:
    """Where the buffers of an engine live, by ONNX Runtime's name of the device and its number.

    Memory that is shared is the host's, so numpy reads and writes buffers in place. The host may
    be treated as if it were another device; it then does what others do.
    """

    def __init__(self, device: str, *, shared: bool) -> None:
        self.kind, self.index = device_named(device)
        self.shared = shared

    def zeros(self, shape: tuple[int, ...], kind: str = "tensor(float)") -> DeviceArray:
        """Return a buffer of zeros of one of `NUMPY_TYPES`."""
        return DeviceArray(np.zeros(shape, NUMPY_TYPES[kind]), kind, self)

    def hold(self, array: NDArray[Any], kind: str = "tensor(float)") -> DeviceArray:
        """Return a buffer with the contents of an array; where memory is shared, the array."""
        numbers = narrowed(array, ELEMENT_TYPES.get(kind, ""))
        return DeviceArray(np.ascontiguousarray(numbers, NUMPY_TYPES[kind]), kind, self)


class DeviceArray:
    """A contiguous array at a fixed address, which binds to a graph's input or output.

    Where memory is shared the buffer is the numpy array itself; elsewhere `write` and `numpy` copy
    over the bus and `copy` stays on the device. An array that is not writeable may lie in memory
    that others read, such as a mapped file or the object store of a cluster: graphs read from it,
    and none writes there.
    """

    def __init__(self, array: NDArray[Any], kind: str, memory: Memory) -> None:
        self.shape: tuple[int, ...] = array.shape
        self.kind = kind
        self._memory = memory
        self._host = array if memory.shared else None
        # On the host the value points into the array, which must outlive it.
        self._value = ort_value(array, kind)
        if not memory.shared:
            self._value = self._new_value()
            self.write(array)

    def _new_value(self) -> Any:
        element = _BFLOAT16 if self.kind == "tensor(bfloat16)" else NUMPY_TYPES[self.kind]
        make = onnx_runtime().OrtValue.ortvalue_from_shape_and_type
        return call_onnx(make, self.shape, element, self._memory.kind, self._memory.index)

    def clone(self) -> DeviceArray:
        """Return a buffer of its own with the same contents."""
        if self._host is not None:
            return DeviceArray(self._host.copy(), self.kind, self._memory)
        made = copy.copy(self)
        made._value = self._new_value()
        made.copy(self)
        return made

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return math.prod(self.shape) * int(np.dtype(NUMPY_TYPES[self.kind]).itemsize)

    def write(self, array: NDArray[Any] | float) -> None:
        """Overwrite the buffer."""
        if self._host is not None:
            self._host[...] = array
        else:
            whole = np.empty(self.shape, NUMPY_TYPES[self.kind])
            whole[...] = array
            self._value.update_inplace(ort_value(whole, self.kind))

    def copy(self, source: DeviceArray) -> None:
        """Overwrite the buffer with another one of the same place, shape and type."""
        if self._host is not None and source._host is not None:
            self._host[...] = source._host
        else:
            self._value.update_inplace(source._value)

    def take(self, array: NDArray[Any]) -> bool:
        """Overwrite the buffer if that is better than another buffer for this array.

        It is not where memory is shared, for an array is a buffer there, or where it does not fit.
        """
        if self._host is not None or array.shape != self.shape:
            return False
        self.write(array)
        return True

    def part(self, start: int, stop: int) -> DeviceArray:
        """Return entries `start` to `stop` of the first axis as a buffer over the same memory."""
        assert self._host is not None, "parts of a device's buffer have no handle"
        return DeviceArray(self._host[start:stop], self.kind, self._memory)

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Fill some rows of a buffer [R, ...] with zeros."""
        if len(rows) == self.shape[0]:
            self.write(0)
            return
        array = self.numpy()
        array[list(rows)] = 0
        if self._host is None:
            self.write(array)

    def move(self, rows: Sequence[int], part: Part) -> None:
        """Move a part of rows of a buffer [R, ...] to its beginning.

        Rows come in ascending order, so that none is overwritten before it has moved; the rest of
        each keeps what lay at the beginning before.
        """
        assert self._host is not None, "parts of a device's buffer have no handle"
        for place, row in enumerate(rows):
            if place != row:
                self._host[place][part] = self._host[row][part]

    def copy_part(self, source: DeviceArray, rows: Sequence[int], part: Part) -> None:
        """Take a part of rows of a buffer [R, ...], in this order."""
        array = self.numpy()
        array[(slice(None), *part)] = source.read_part(rows, part)
        if self._host is None:
            self.write(array)

    def read_part(self, rows: Sequence[int], part: Part) -> NDArray[Any]:
        """Return a copy of a part of rows of a buffer [R, ...] on the host."""
        index: Any = (list(rows), *part)  # at once: the rest of a row is not to be copied
        return np.asarray(self.numpy()[index])

    def take_rows(self, source: DeviceArray, rows: Mapping[int, int]) -> None:
        """Overwrite some rows of a buffer [R, ...] with rows of another.

        Where all rows keep their places, nothing leaves the device.
        """
        keep_places = rows == {place: place for place in range(self.shape[0])}
        if keep_places and source.shape == self.shape:
            self.copy(source)
            return
        array = self.numpy()
        array[list(rows)] = source.numpy()[list(rows.values())]
        if self._host is None:
            self.write(array)

    def numpy(self) -> NDArray[Any]:
        """Return the contents: with shared memory the buffer itself, else a copy."""
        if self._host is not None:
            return self._host
        array = np.empty(self.shape, NUMPY_TYPES[self.kind])
        ort_value(array, self.kind).update_inplace(self._value)
        return array

    def bind_input(self, binding: Any, name: str) -> None:
        """Make the graph's input `name` read from here."""
        call_onnx(binding.bind_ortvalue_input, name, self._value)

    def bind_output(self, binding: Any, name: str) -> None:
        """Make the graph's output `name` write here."""
        # ONNX Runtime asks nobody: it would write into memory that is somebody else's too.
        can_write = self._host is None or self._host.flags.writeable
        assert can_write, f"output {name!r} is bound to an array that is not writeable"
        call_onnx(binding.bind_ortvalue_output, name, self._value)


class Series:
    """Arrays [N, ...] that are stored and loaded one by one, and read together."""

    def __init__(self, memory: Memory, initial: NDArray[Any], kind: str = "tensor(float)") -> None:
        self._whole = initial.astype(NUMPY_TYPES[kind]) if memory.shared else None
        # Slices of one device buffer have no handle of their own, so each array has its buffer.
        self._parts = [] if memory.shared else [memory.hold(part, kind) for part in initial]

    def store(self, index: int, source: DeviceArray) -> None:
        """Copy a buffer into one of the arrays."""
        if self._whole is not None:
            self._whole[index] = source.numpy()
        else:
            self._parts[index].copy(source)

    def load(self, index: int, target: DeviceArray) -> None:
        """Copy one of the arrays into a buffer."""
        if self._whole is not None:
            target.write(self._whole[index])
        else:
            target.copy(self._parts[index])

    def numpy(self) -> NDArray[Any]:
        """Return all of them, [N, ...]."""
        return (
            self._whole if self._whole is not None else np.stack([p.numpy() for p in self._parts])
        )


def ort_value(array: NDArray[Any], kind: str) -> Any:
    """Return a value of ONNX Runtime that is the memory of an array."""
    make = onnx_runtime().OrtValue
    if kind == "tensor(bfloat16)":
        return make.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return make.ortvalue_from_numpy(array)


class Cache:
    """What layers keep of R sequences, and the bindings to it.

    Rows are written in place: input and output of the graph are the same buffer. Rows at and beyond
    a sequence's write index are never read, so forgetting is only a smaller write index. A state is
    read while the next one is made, so it has two buffers, which change places with every call. All
    are made here, unless `stores` has them by name: for each turn those that a call reads.

    There are two bindings for each turn. A call of one position has all its buffers at fixed
    addresses, so nothing is bound again from step to step and a CUDA graph of it can be replayed. A
    call of more positions binds what depends on their number.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        entry: BackboneEntry,
        memory: Memory,
        *,
        rows: int,
        capacity: int,
        stores: Sequence[Mapping[str, DeviceArray]] | None = None,
    ) -> None:
        self.rows = rows
        self.capacity = capacity
        self._entry = entry
        self._memory = memory
        self._parts: dict[tuple[int, int], Cache] = {}
        self._tensors = cache_tensors(entry.layers)
        masks = [hidden_rows_tensor(len(entry.masked_layers))] if entry.masked_layers else []
        self._states = [tensor.name for tensor in self._tensors if tensor.is_state]
        if stores is None:
            kinds = {value.name: value.type for value in session.get_inputs()}
            first, second = (
                {
                    t.name: memory.zeros(t.whole(rows, capacity), kinds[t.name])
                    for t in (*self._tensors, *masks)
                    if t.is_state or is_first
                }
                for is_first in (True, False)
            )
            stores = (first, first | second) if self._states else (first,)
        self._stores = stores
        self._turn = 0
        row = (rows, 1, entry.width)
        self.write_index = memory.zeros((rows,), "tensor(int64)")
        self.last_index = memory.zeros((rows,), "tensor(int64)")
        self.embeds, self.thought, self.next_embeds = (memory.zeros(row) for _ in range(3))
        self._inner: Operands | None = None
        self._operands: dict[str, DeviceArray] = {}
        self._options = [run_options(NO_GRAPH) for _ in stores]
        self.num_bytes = sum(store.num_bytes for store in self._all_stores())
        self.bind_to(session)

    def bind_to(self, session: onnxruntime.InferenceSession) -> None:
        """Call this session from now on, over the same buffers."""
        self.session = session
        self._steps, self._calls = (
            [session.io_binding() for _ in self._stores] for _ in ("step", "call")
        )
        for binding in (*self._steps, *self._calls):
            for name, operand in self._operands.items():
                operand.bind_input(binding, f"inner.{name}")
            self.write_index.bind_input(binding, "write_index")
            self.last_index.bind_input(binding, "last_index")
            self.thought.bind_output(binding, "thought")
            self.next_embeds.bind_output(binding, "next_embeds")
        for turn, read in enumerate(self._stores):
            written = self._stores[self._after(turn)]
            for binding in (self._steps[turn], self._calls[turn]):
                for name in read:
                    read[name].bind_input(binding, name)
                    if name != HIDDEN_ROWS:
                        written[name].bind_output(binding, f"present_{name}")
            self.embeds.bind_input(self._steps[turn], "inputs_embeds")

    @property
    def _layers(self) -> Mapping[str, DeviceArray]:
        """What the next call reads."""
        return self._stores[self._turn]

    def _after(self, turn: int) -> int:
        return (turn + 1) % len(self._stores)

    def _all_stores(self) -> list[DeviceArray]:
        first, *others = self._stores
        return [*first.values(), *(store[name] for store in others for name in self._states)]

    def begin(self, rows: Sequence[int]) -> None:
        """Let sequences begin anew: rows are written over, but states and masks would go on."""
        for name in self._states:
            self._layers[name].clear_rows(rows)
        if self._masks is not None and rows:
            self._masks.clear_rows(rows)

    def hide_rows(self, row: int, handed: Sequence[HandedRows]) -> None:
        """Hide rows of a sequence from layers, see `KeyValueRows`."""
        hidden = masks_of(self._entry.masked_layers, handed, self.capacity)
        if self._masks is None:
            assert all(rows.seen_by is None for rows in handed), "no layer of this one has a mask"
            return
        masks = self._masks.numpy()
        masks[row] = hidden[:, :, None]
        self._masks.write(masks)

    @property
    def _masks(self) -> DeviceArray | None:
        """The masks [R, masks, C, 1]: True for rows that are hidden."""
        return self._stores[0].get(HIDDEN_ROWS)

    def of_row(self, row: int) -> Cache:
        """Return one sequence's rows as a cache of its own, over the same memory.

        Call `have_run` when each was run once.
        """
        return self._kept_part(row, row + 1)

    def leading(self, rows: int) -> Cache:
        """Return the first sequences as a cache of their own, over the same memory.

        Call `follow` when it was run.
        """
        return self if rows == self.rows else self._kept_part(0, rows)

    def follow(self, part: Cache) -> None:
        """Go on where a part of this cache is; what others keep is not that of their last call."""
        self._turn = part._turn

    def _kept_part(self, start: int, stop: int) -> Cache:
        if (start, stop) not in self._parts:
            self._parts[start, stop] = self._part(start, stop)
        self._parts[start, stop]._turn = self._turn
        return self._parts[start, stop]

    def have_run(self, paused: Sequence[int]) -> None:
        """Go on behind one call of each sequence by itself, but for those that had none."""
        read, written = self._layers, self._stores[self._after(self._turn)]
        for row in paused:
            for name in self._states:
                written[name].part(row, row + 1).copy(read[name].part(row, row + 1))
        self._turn = self._after(self._turn)

    def narrowed(self, rows: Sequence[int], positions: int) -> Cache | None:
        """Move the first positions of some sequences to the beginning; return a cache of those.

        It lies in this one's memory, which must outlive it; the other sequences are lost. In memory
        of a device nothing is moved and None returned: parts of its buffers have no handle.

        Args:
            rows: Sequences to go on with, in ascending order.
        """
        if not self._memory.shared:
            return None
        for tensor in self._tensors:
            self._layers[tensor.name].move(rows, part_of(tensor, positions))
        if self._masks is not None:
            self._masks.move(rows, ())  # whole: what is left of others would hide rows to come
        return self._part(0, len(rows))

    def _part(self, start: int, stop: int) -> Cache:
        first, *others = self._stores
        parts = {name: store.part(start, stop) for name, store in first.items()}
        stores = [parts]
        for store in others:
            states = {name: store[name].part(start, stop) for name in self._states}
            stores.append(parts | states)
        made = Cache(
            self.session,
            self._entry,
            self._memory,
            rows=stop - start,
            capacity=self.capacity,
            stores=stores,
        )
        made._turn = self._turn
        return made

    def clear(self) -> None:
        """Forget everything: what an earlier user left behind cannot reach a later one."""
        for store in self._all_stores():
            store.write(0)

    def copy_rows(self, source: Any, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given sequences of another cache, in this order."""
        if self._masks is not None:
            whole = np.zeros(self._masks.shape, np.bool_)
            if isinstance(source, Cache) and source._masks is not None:
                part = slice(None), slice(positions)
                whole[(slice(None), *part)] = source._masks.read_part(rows, part)
            self._masks.write(whole)
        if isinstance(source, Cache):
            for tensor in self._tensors:
                store, other = self._layers[tensor.name], source._layers[tensor.name]
                store.copy_part(other, rows, part_of(tensor, positions))
            return
        # Rows of another kind of engine come as arrays of the host.
        host, everything = Memory("cpu", shared=True), range(len(rows))
        arrays = source.read_rows(rows, positions)
        for tensor, array in zip(self._tensors, arrays, strict=True):
            store = self._layers[tensor.name]
            store.copy_part(host.hold(array, store.kind), everything, part_of(tensor, positions))

    def take(self, row: int, source: Cache, source_row: int, start: int, stop: int) -> None:
        """Take positions `start` to `stop` of one sequence of another cache, or of this one.

        States and masks come whole. Both lie in memory that is shared.
        """
        for tensor in self._tensors:
            part = () if tensor.is_state else (slice(None), slice(start, stop))
            store, other = self._layers[tensor.name], source._layers[tensor.name]
            store.numpy()[row][part] = other.numpy()[source_row][part]
        if self._masks is not None:
            own, others = self._masks.numpy()[row], source._masks_of(source_row)
            width = min(own.shape[1], others.shape[1])
            own[:, :width] = others[:, :width]
            own[:, width:] = False

    def _masks_of(self, row: int) -> NDArray[Any]:
        assert self._masks is not None, "caches of one backbone have the same masks"
        return np.asarray(self._masks.numpy()[row])

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies on the host, [n, H, positions, D] or whole states, as tensors come.

        They are float32, whatever the cache is.
        """
        stores = ((self._layers[tensor.name], tensor) for tensor in self._tensors)
        return [
            widened(store.read_part(rows, part_of(tensor, positions)), ELEMENT_TYPES[store.kind])
            for store, tensor in stores
        ]

    def write_rows(self, values: Sequence[NDArray[Any]]) -> None:
        """Overwrite the beginning of all sequences with [R, H, positions, D], as tensors come."""
        host = Memory("cpu", shared=True)
        for tensor, array in zip(self._tensors, values, strict=True):
            store = self._layers[tensor.name]
            part = part_of(tensor, array.shape[2])
            store.copy_part(host.hold(array, store.kind), range(self.rows), part)

    def save_states(self) -> dict[str, DeviceArray]:
        """Return a copy of the states of all sequences; it stays on the device."""
        return {name: self._layers[name].clone() for name in self._states}

    def restore_states(self, saved: Mapping[str, DeviceArray], rows: Mapping[int, int]) -> None:
        """Overwrite the states of some sequences with saved ones."""
        for name, states in saved.items():
            self._layers[name].take_rows(states, rows)

    def bind_inner(self, inner: Operands) -> None:
        """Bind the inner links' operands; nothing happens if they are bound already."""
        if self._inner is inner:
            return
        self._inner = inner
        for name, array in inner.items():
            held = self._operands.get(name)
            if held is not None and held.take(array):
                continue
            kind = "tensor(bool)" if array.dtype == np.bool_ else "tensor(float)"
            self._operands[name] = operand = self._memory.hold(array, kind)
            for binding in (*self._steps, *self._calls):
                operand.bind_input(binding, f"inner.{name}")
            # A CUDA graph remembers addresses, so one that knows others must not be replayed.
            self._options = [run_options(next(_GRAPH_IDS)) for _ in self._stores]

    def run_step(self) -> None:
        """Run one position: reads `embeds`, writes `thought` and `next_embeds`."""
        turn = self._turn
        call_onnx(self.session.run_with_iobinding, self._steps[turn], self._options[turn])
        self._turn = self._after(turn)

    def run_call(self, embeds: DeviceArray, hidden: DeviceArray) -> None:
        """Run the positions in `embeds` [R, S, d]; writes `hidden` [R, S, d] besides."""
        call = self._calls[self._turn]
        embeds.bind_input(call, "inputs_embeds")
        hidden.bind_output(call, "hidden")
        call_onnx(self.session.run_with_iobinding, call, run_options(NO_GRAPH))
        self._turn = self._after(self._turn)


def part_of(tensor: CacheTensor, positions: int) -> Part:
    """Return what a sequence keeps of its first positions: a state is always whole."""
    return () if tensor.is_state else (slice(None), slice(positions))


class CachePool:
    """Makes caches, and hands those out again that were given back.

    What is kept for later never makes the total larger than what was once in use at the same time.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, entry: BackboneEntry, memory: Memory
    ) -> None:
        self._session = session
        self._entry = entry
        self._memory = memory
        self._made: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._idle: list[Cache] = []  # the one given back first comes first
        self._most_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Size of all caches, those in use and those kept for later."""
        return sum(cache.num_bytes for cache in self._made)

    @property
    def bytes_in_use(self) -> int:
        """Size of all caches but those kept for later."""
        return self.num_bytes - sum(cache.num_bytes for cache in self._idle)

    def bind_to(self, session: onnxruntime.InferenceSession) -> None:
        """Make all caches, also those in use, call another session of the same graph."""
        self._session = session
        for cache in self._made:
            cache.bind_to(session)

    def take(self, rows: int, capacity: int) -> Cache:
        """Return an empty cache."""
        for cache in self._idle:
            if (cache.rows, cache.capacity) == (rows, capacity):
                self._idle.remove(cache)
                cache.clear()
                return cache
        made = Cache(self._session, self._entry, self._memory, rows=rows, capacity=capacity)
        self._made.add(made)
        self._drop_idle()
        return made

    def release(self, cache: Cache) -> None:
        """Keep a cache that its user needs no more."""
        self._idle.append(cache)

    def discard(self, cache: Cache) -> None:
        """Let a cache go that nobody will use again."""
        self._made.discard(cache)

    def drop_idle(self) -> None:
        """Free what is kept for later."""
        self._idle.clear()
        self._most_bytes = 0

    def _drop_idle(self) -> None:
        """Drop idle caches until the total is no more than what was once in use."""
        self._most_bytes = max(self._most_bytes, self.bytes_in_use)
        while self._idle and self.num_bytes > self._most_bytes:
            del self._idle[0]
