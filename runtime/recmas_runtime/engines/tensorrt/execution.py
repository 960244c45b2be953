"""Engines on the device: memory, streams and captured graphs, contexts, caches, rollouts.

Imported only where `engine_cache` has found TensorRT and CUDA's own Python bindings. Element types
are those of the engine; results are float32.

Shape legend: R rows, S positions of a call, C cache rows per sample, H key/value heads, D head
width, d model width, V vocabulary, M latent steps.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from recmas_runtime.core.errors import fail
from recmas_runtime.engines.element_types import HOST_TYPES, narrowed, widened
from recmas_runtime.engines.interface import Floats, Indices, Operands
from recmas_runtime.engines.tensorrt.network import Log
from recmas_runtime.engines.tensorrt.static_graph import STEP
from recmas_runtime.formats.layers import cache_tensors
from recmas_runtime.formats.manifest import BackboneEntry

# TensorRT wants tensor addresses to be multiples of this.
_ALIGNMENT: Final = 256

# A graph has a node for every kernel of every step: longer rollouts are several graphs, so that
# CUDA need not set up a million nodes at once.
MOST_STEPS_OF_A_GRAPH: Final = 256

_CACHE_PREFIX: Final = "present_"
_INNER_PREFIX: Final = "inner."
# Where the graph says int64, TensorRT reads eight bytes an index.
_INDEX: Final = np.dtype(np.int64)


@dataclass(frozen=True)
class Binding:
    """Where a tensor lies, and the shape it has there."""

    address: int
    shape: tuple[int, ...]


def check(result: tuple[Any, ...]) -> Any:
    """Return what a call gave besides its status: nothing, one value or several.

    Raises:
        RecmasError: RM507 if the call failed; RM504 would be too late for a missing device.
    """
    error, *values = result
    if error != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(error)
        raise fail(
            "RM507",
            f"CUDA: {text.decode()}",
            hint="Free GPU memory or take a smaller batch; --device cpu runs without a GPU.",
        )
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


class Stream:
    """A stream of device work; all copies and launches of an engine go through one."""

    def __init__(self) -> None:
        # Graphs cannot be captured on the default stream.
        self._stream = check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        weakref.finalize(self, cudart.cudaStreamDestroy, self._stream)

    @property
    def handle(self) -> int:
        """The stream's address, as TensorRT takes it."""
        return int(self._stream)

    def wait(self) -> None:
        """Wait until everything that was given to the stream is done."""
        check(cudart.cudaStreamSynchronize(self._stream))

    def write(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device."""
        assert array.flags.c_contiguous, "copies are of contiguous arrays"
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self._stream))

    def read(self, address: int, array: NDArray[Any]) -> None:
        """Fill a contiguous host array from the device, and wait for it."""
        assert array.flags.c_contiguous, "copies are of contiguous arrays"
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self._stream))
        self.wait()

    def copy_blocks(
        self, target: int, source: int, *, pitches: tuple[int, int], width: int, height: int
    ) -> None:
        """Copy `height` blocks of `width` bytes within the device.

        Pitches are bytes from block to block, in the target and in the source.
        """
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(
            cudart.cudaMemcpy2DAsync(
                target, pitches[0], source, pitches[1], width, height, kind, self._stream
            )
        )

    def capture(self, launch: Callable[[], None]) -> CapturedGraph:
        """Record what `launch` gives to this stream, without running it."""
        # Thread-local: what other threads of the process do with CUDA must not spoil the capture.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            launch()
        finally:
            # A capture that is left open would make every later call on the stream fail.
            ended = cudart.cudaStreamEndCapture(self._stream)
        return CapturedGraph(check(ended), self._stream)


class CapturedGraph:
    """Recorded device work that is launched as one."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._stream = stream
        try:
            self._executable = check(cudart.cudaGraphInstantiate(graph, 0))
        finally:
            check(cudart.cudaGraphDestroy(graph))
        weakref.finalize(self, cudart.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Run the recorded work on the stream it was recorded from."""
        check(cudart.cudaGraphLaunch(self._executable, self._stream))


class DeviceMemory:
    """Zeroed device memory; freed with the object."""

    def __init__(self, num_bytes: int, stream: Stream) -> None:
        self.num_bytes = num_bytes
        self.address = int(check(cudart.cudaMalloc(num_bytes)))
        weakref.finalize(self, cudart.cudaFree, self.address)
        check(cudart.cudaMemsetAsync(self.address, 0, num_bytes, stream.handle))


class DeviceTable:
    """Arrays of one shape on the device, each at an address that engines take: a padded table."""

    def __init__(
        self, num_entries: int, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Stream
    ) -> None:
        self.shape = shape
        self._dtype = dtype
        self._entry_bytes = int(np.prod(shape)) * dtype.itemsize
        self._pitch = -(-self._entry_bytes // _ALIGNMENT) * _ALIGNMENT
        self._num_entries = num_entries
        self._stream = stream
        self._memory = DeviceMemory(num_entries * self._pitch, stream)

    def address(self, index: int) -> int:
        """Return the address of one array."""
        assert 0 <= index < self._num_entries, f"entry {index} of {self._num_entries}"
        return self._memory.address + index * self._pitch

    def binding(self, index: int = 0) -> Binding:
        """Return one array as a context takes it."""
        return Binding(self.address(index), self.shape)

    def write(self, array: NDArray[Any]) -> None:
        """Overwrite the first array; TensorRT converts nothing, so the element type is set here."""
        assert array.shape == self.shape, f"{array.shape} into {self.shape}"
        self._stream.write(self.address(0), np.ascontiguousarray(array, self._dtype))

    def write_all(self, arrays: NDArray[Any]) -> None:
        """Overwrite all arrays, [num_entries, *shape], in one copy."""
        assert arrays.shape == (self._num_entries, *self.shape), f"{arrays.shape}"
        padded = np.zeros((self._num_entries, self._pitch), np.uint8)
        entries = np.ascontiguousarray(arrays, self._dtype).reshape(self._num_entries, -1)
        padded[:, : self._entry_bytes] = entries.view(np.uint8)
        self._stream.write(self._memory.address, padded)

    def read(self) -> NDArray[Any]:
        """Return all arrays, [num_entries, *shape]."""
        padded = np.empty((self._num_entries, self._pitch), np.uint8)
        self._stream.read(self._memory.address, padded)
        entries = np.ascontiguousarray(padded[:, : self._entry_bytes])
        return entries.view(self._dtype).reshape(self._num_entries, *self.shape)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of an engine; free axes are -1."""

    is_input: bool
    element_type: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What holds it on the host: of bfloat16, which numpy does not have, the bits."""
        found: np.dtype[Any] = np.dtype(HOST_TYPES.get(self.element_type, self.element_type))
        return found


def _element_type(found: trt.DataType) -> str:
    # `nptype` knows no bfloat16.
    return "bfloat16" if found == trt.DataType.BF16 else np.dtype(trt.nptype(found)).name


class Engine:
    """A plan that TensorRT has read.

    Raises:
        RecmasError: RM510 if TensorRT refuses it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.name
        self._log = Log()
        self._runtime = trt.Runtime(self._log)  # must outlive the engine
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self._log.failure("refuses the plan", file=self._file)
        self._engine = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.tensors = {
            name: Tensor(
                is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                element_type=_element_type(engine.get_tensor_dtype(name)),
                shape=tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        }

    def check_decoder(self) -> None:
        """Make sure that caches are written in place and that a step can feed the next one.

        Raises:
            RecmasError: RM510; such an engine would copy its caches or read the wrong ones.
        """
        for name in self.tensors:
            if name.startswith(_CACHE_PREFIX):
                expected = name.removeprefix(_CACHE_PREFIX)
                if self._engine.get_aliased_input_tensor(name) != expected:
                    raise self._log.failure(f"does not write {expected} in place", file=self._file)
        if self.tensors["inputs_embeds"].dtype != self.tensors["next_embeds"].dtype:
            raise self._log.failure("has a step that cannot feed the next one", file=self._file)

    def context(self, profile: int, stream: Stream) -> trt.IExecutionContext:
        """Return a new context for one optimization profile.

        It takes the scratch memory of that profile only; prompts need far more than steps.
        """
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, stream.handle):
            raise self._log.failure("gives no execution context", file=self._file)
        stream.wait()
        return context

    def bind(self, context: trt.IExecutionContext, bindings: Mapping[str, Binding]) -> None:
        """Tell a context where tensors lie and how large inputs are; outputs follow from those."""
        self.move(context, {name: binding.address for name, binding in bindings.items()})
        for name, binding in bindings.items():
            tensor = self.tensors[name]
            is_free = tensor.is_input and -1 in tensor.shape
            if is_free and not context.set_input_shape(name, binding.shape):
                shape = list(binding.shape)
                raise self._log.failure(f"does not take {name} {shape}", file=self._file)

    def move(self, context: trt.IExecutionContext, addresses: Mapping[str, int]) -> None:
        """Tell a context where tensors lie whose shapes stay as they are."""
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._log.failure(f"does not take the place of {name}", file=self._file)

    def enqueue(self, context: trt.IExecutionContext, stream: Stream) -> None:
        """Give a call to the stream."""
        if not context.execute_async_v3(stream.handle):
            raise self._log.failure("failed", file=self._file)


class Call:
    """Calls of an engine in one optimization profile, one after the other."""

    def __init__(self, engine: Engine, profile: int, stream: Stream) -> None:
        self.engine = engine
        self._stream = stream
        self._context = engine.context(profile, stream)
        self._buffers: dict[str, DeviceMemory] = {}
        # Weak, so that a call does not keep the last caches alive.
        self._bound: tuple[weakref.ref[Workspace], int] | None = None

    def bind(self, workspace: Workspace) -> None:
        """Take the caches, indices and inner links of a workspace for the next runs."""
        if self._bound != (weakref.ref(workspace), workspace.version):
            self.engine.bind(self._context, workspace.bindings())
            self._bound = weakref.ref(workspace), workspace.version

    def run(
        self, inputs: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
    ) -> list[Floats]:
        """Run the engine on host arrays and return its outputs of the given shapes, in order."""
        tensors = self.engine.tensors
        given = {
            name: np.ascontiguousarray(array, tensors[name].dtype) for name, array in inputs.items()
        }
        results = {name: np.empty(shape, tensors[name].dtype) for name, shape in shapes.items()}
        bindings = {name: self._place(name, array) for name, array in {**given, **results}.items()}
        self.engine.bind(self._context, bindings)
        for name, array in given.items():
            self._stream.write(bindings[name].address, array)
        self.engine.enqueue(self._context, self._stream)
        for name, array in results.items():
            self._stream.read(bindings[name].address, array)
        return [array.astype(np.float32, copy=False) for array in results.values()]

    def _place(self, name: str, array: NDArray[Any]) -> Binding:
        """Return room for an array; a buffer grows, and moves when it does."""
        memory = self._buffers.get(name)
        if memory is None or memory.num_bytes < array.nbytes:
            memory = self._buffers[name] = DeviceMemory(array.nbytes, self._stream)
        return Binding(memory.address, array.shape)


class Workspace:
    """Device memory for R sequences of C positions: caches, indices, inner links, rollouts.

    Its version changes when something has moved and must be bound again.
    """

    def __init__(
        self, engine: Engine, stream: Stream, entry: BackboneEntry, *, rows: int, capacity: int
    ) -> None:
        self.rows = rows
        self.capacity = capacity
        self.version = 0
        self._engine = engine
        self._stream = stream
        self._tensors = cache_tensors(entry.layers)
        self._shapes = {t.name: t.whole(rows, capacity) for t in self._tensors}
        self._dtypes = {t.name: engine.tensors[t.name].dtype for t in self._tensors}
        self._caches = {
            name: DeviceMemory(int(np.prod(shape)) * self._dtypes[name].itemsize, stream)
            for name, shape in self._shapes.items()
        }
        self._indices = {
            name: DeviceTable(1, (rows,), _INDEX, stream) for name in ("write_index", "last_index")
        }
        self._inner: Operands | None = None
        self._inner_tables: dict[str, DeviceTable] = {}
        self._rollouts: dict[int, _Rollout] = {}

    def bindings(self) -> dict[str, Binding]:
        """Return where everything lies that stays where it is from call to call."""
        tables = {**self._indices, **self._inner_tables}
        bindings = {name: table.binding() for name, table in tables.items()}
        for name, memory in self._caches.items():
            # Input and output are one buffer; TensorRT refuses anything else.
            cache = Binding(memory.address, self._shapes[name])
            bindings |= {name: cache, f"{_CACHE_PREFIX}{name}": cache}
        return bindings

    def bind_inner(self, inner: Operands) -> None:
        """Hold the operands of the inner links; nothing happens if they are here already."""
        if self._inner is inner:
            return
        arrays = {f"{_INNER_PREFIX}{name}": array for name, array in inner.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != {name: table.shape for name, table in self._inner_tables.items()}:
            self._inner_tables = {
                name: DeviceTable(1, shape, self._engine.tensors[name].dtype, self._stream)
                for name, shape in shapes.items()
            }
            self._rollouts.clear()
            self.version += 1
        for name, array in arrays.items():
            self._inner_tables[name].write(array)
        self._inner = inner

    def write_indices(self, write_index: Indices, last_index: Indices) -> None:
        """Say where the next call writes, and which of its positions is each row's last."""
        self._indices["write_index"].write(write_index)
        self._indices["last_index"].write(last_index)

    def copy_rows(self, source: Workspace, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given rows of another workspace, in this order."""
        for tensor in self._tensors:
            memory, other = self._caches[tensor.name], source._caches[tensor.name]
            # A state is one block for a sequence, rows are one for each of its heads.
            heads, width = (1, math.prod(tensor.shape)) if tensor.is_state else tensor.shape
            unit = width * self._dtypes[tensor.name].itemsize
            lengths = (1, 1, 1) if tensor.is_state else (self.capacity, source.capacity, positions)
            pitches = lengths[0] * unit, lengths[1] * unit
            for index, row in enumerate(rows):
                self._stream.copy_blocks(
                    memory.address + index * heads * pitches[0],
                    other.address + row * heads * pitches[1],
                    pitches=pitches,
                    width=lengths[2] * unit,
                    height=heads,
                )

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies on the host, [n, H, positions, D] or whole states, as tensors come."""
        copies = []
        for tensor in self._tensors:
            whole = np.empty(self._shapes[tensor.name], self._dtypes[tensor.name])
            self._stream.read(self._caches[tensor.name].address, whole)
            part = whole[list(rows)] if tensor.is_state else whole[list(rows), :, :positions]
            copies.append(widened(part, self._engine.tensors[tensor.name].element_type))
        return copies

    def write_rows(self, values: Sequence[NDArray[Any]]) -> None:
        """Overwrite the beginning of all rows with what `read_rows` of some cache returned."""
        for tensor, array in zip(self._tensors, values, strict=True):
            whole = np.zeros(self._shapes[tensor.name], self._dtypes[tensor.name])
            numbers = narrowed(array, self._engine.tensors[tensor.name].element_type)
            if tensor.is_state:
                whole[:] = numbers
            else:
                whole[:, :, : array.shape[2]] = numbers
            self._stream.write(self._caches[tensor.name].address, whole)

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
        tensors = engine.tensors
        self._engine = engine
        self._stream = stream
        self._num_steps = num_steps
        self._thoughts = DeviceTable(num_steps, vector, tensors["thought"].dtype, stream)
        self._embeds = DeviceTable(num_steps, vector, tensors["inputs_embeds"].dtype, stream)
        self._hidden = DeviceTable(1, vector, tensors["hidden"].dtype, stream)
        self._positions = DeviceTable(num_steps, (rows,), _INDEX, stream)
        # Memory is zeroed: the last of one input is input 0.
        self._last_index = DeviceTable(1, (rows,), _INDEX, stream)
        # A context of its own: another call of it would change what the graph launches.
        self._context = engine.context(STEP, stream)
        engine.bind(
            self._context,
            {
                **workspace.bindings(),
                "last_index": self._last_index.binding(),
                "inputs_embeds": self._embeds.binding(),
                "hidden": self._hidden.binding(),
            },
        )
        self._graphs: list[CapturedGraph] = []

    def run(
        self, thought: Floats, next_embeds: Floats, write_index: Indices
    ) -> tuple[Floats, Floats]:
        """Roll out from a prefill's last position."""
        self._thoughts.write(thought)
        self._embeds.write(next_embeds)
        # Step 1 writes at the index; entry 0 is the prefill's and is not read.
        self._positions.write_all(write_index + np.arange(-1, self._num_steps - 1)[:, None])
        if not self._graphs:
            self._capture()
        for graph in self._graphs:
            graph.launch()
        thoughts, embeds = (
            table.read()[:, :, 0].astype(np.float32, copy=False)
            for table in (self._thoughts, self._embeds)
        )
        return thoughts, embeds

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
