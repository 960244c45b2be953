"""Engines and calls: what is bound to what, and when.

Imported only where `availability` has found TensorRT and CUDA's bindings.

Shape legend: R rows, S positions of a call, d model width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import tensorrt as trt
from numpy.typing import NDArray

from recmas_runtime.engines.onnx.backbone import Floats, Indices
from recmas_runtime.engines.tensorrt.device_memory import DeviceMemory, Stream
from recmas_runtime.engines.tensorrt.element_types import HOST_TYPES, from_engine, to_engine
from recmas_runtime.engines.tensorrt.network import Log

if TYPE_CHECKING:
    from recmas_runtime.engines.tensorrt.workspace import Workspace

_CACHE_PREFIX: Final = "present_"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        element_type: TensorRT's name of it, such as `BF16`.
        shape: Free axes are -1.
    """

    is_input: bool
    element_type: str
    shape: tuple[int, ...]

    @property
    def host_type(self) -> np.dtype[Any]:
        """What stands for the element type on the host."""
        return HOST_TYPES[self.element_type]


@dataclass(frozen=True)
class Binding:
    """Where a tensor lies, and the shape it has there."""

    address: int
    shape: tuple[int, ...]


class Engine:
    """A plan that TensorRT has read.

    Args:
        path: The plan.

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
                element_type=engine.get_tensor_dtype(name).name,
                shape=tuple(engine.get_tensor_shape(name)),
            )
            for name in names
        }

    @property
    def cache_outputs(self) -> tuple[str, ...]:
        """The outputs that are caches."""
        return tuple(name for name in self.tensors if name.startswith(_CACHE_PREFIX))

    def check_decoder(self) -> None:
        """Make sure that caches are written in place and that a step can feed the next one.

        Raises:
            RecmasError: RM510; such an engine would copy its caches or read the wrong ones.
        """
        for name in self.cache_outputs:
            expected = name.removeprefix(_CACHE_PREFIX)
            if self._engine.get_aliased_input_tensor(name) != expected:
                raise self._log.failure(f"does not write {expected} in place", file=self._file)
        ends = {self.tensors[name].element_type for name in ("inputs_embeds", "next_embeds")}
        if len(ends) > 1:
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


class _Buffers:
    """Device memory by tensor; grows, and moves when it does."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._memory: dict[str, DeviceMemory] = {}

    def place(self, name: str, array: NDArray[Any]) -> Binding:
        """Return room for an array."""
        memory = self._memory.get(name)
        if memory is None or memory.num_bytes < array.nbytes:
            memory = self._memory[name] = DeviceMemory(array.nbytes, self._stream)
        return Binding(memory.address, array.shape)


class Call:
    """A decoder's call in one optimization profile, for all workspaces in turn.

    Args:
        engine: A decoder.
        profile: The optimization profile.
        stream: Where it runs.
    """

    def __init__(self, engine: Engine, profile: int, stream: Stream) -> None:
        self._engine = engine
        self._stream = stream
        self._context = engine.context(profile, stream)
        self._buffers = _Buffers(stream)
        # Weak, so that a call does not keep the last caches alive.
        self._bound: tuple[weakref.ref[Workspace], int] | None = None

    def run(
        self,
        workspace: Workspace,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence; returns hidden, last hidden, next embeddings."""
        rows, positions, width = inputs_embeds.shape
        if self._bound != (weakref.ref(workspace), workspace.version):
            self._engine.bind(self._context, workspace.bindings())
            self._bound = weakref.ref(workspace), workspace.version
        workspace.write_indices(write_index, last_index)
        tensors = self._engine.tensors
        embeds = to_engine(inputs_embeds, tensors["inputs_embeds"].element_type)
        outputs = {
            name: np.empty((rows, length, width), tensors[name].host_type)
            for name, length in (("hidden", positions), ("thought", 1), ("next_embeds", 1))
        }
        arrays = {"inputs_embeds": embeds, **outputs}
        bindings = {name: self._buffers.place(name, array) for name, array in arrays.items()}
        self._engine.bind(self._context, bindings)
        self._stream.write(bindings["inputs_embeds"].address, embeds)
        self._engine.enqueue(self._context, self._stream)
        for name, array in outputs.items():
            self._stream.read(bindings[name].address, array)
        hidden, thought, following = (
            from_engine(array, tensors[name].element_type) for name, array in outputs.items()
        )
        return hidden, thought, following


class HeadCall:
    """The language-model head.

    Args:
        engine: The head's.
        stream: Where it runs.
    """

    def __init__(self, engine: Engine, stream: Stream) -> None:
        self._engine = engine
        self._stream = stream
        self._context = engine.context(0, stream)
        self._buffers = _Buffers(stream)

    def run(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of hidden states [R, d]."""
        tensors = self._engine.tensors
        states = to_engine(hidden, tensors["hidden"].element_type)
        logits = np.empty((len(hidden), tensors["logits"].shape[1]), tensors["logits"].host_type)
        arrays = {"hidden": states, "logits": logits}
        bindings = {name: self._buffers.place(name, array) for name, array in arrays.items()}
        self._engine.bind(self._context, bindings)
        self._stream.write(bindings["hidden"].address, states)
        self._engine.enqueue(self._context, self._stream)
        self._stream.read(bindings["logits"].address, logits)
        return from_engine(logits, tensors["logits"].element_type)
