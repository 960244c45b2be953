"""A stand-in for TensorRT on a machine without a GPU: plans hold the graph, ONNX Runtime runs it.

It keeps TensorRT's documented rules where the code could break them: caches are written in place
and their input and output must be one address; addresses are multiples of 256; shapes lie within
the context's optimization profile; a call cannot be captured before it has run once in that shape.
The parser refuses what its documentation does not list, and reports every node at once.
The version can be set, to see what happens with another one.
"""

from __future__ import annotations

import ctypes
import json
import os
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from cuda.bindings import runtime as cudart
from google.protobuf.message import DecodeError

from kit.parser_documentation import refused_nodes

__version__ = os.environ.get("SIMULATED_TENSORRT", "11.4.0.106")

_NUMPY = {1: np.float32, 7: np.int64, 9: np.bool_, 10: np.float16}


class DataType(IntEnum):
    """TensorRT's names, with ONNX's numbers."""

    FLOAT = 1
    INT64 = 7
    BOOL = 9
    HALF = 10
    BF16 = 16


def nptype(trt_type: DataType) -> type[np.generic]:
    if trt_type not in _NUMPY:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return _NUMPY[trt_type]


class TensorIOMode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(IntEnum):
    ON_PROFILE_CHANGE = 1


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    TF32 = 1


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class ITimingCache:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> bytes:
        return self.blob


class INetworkDefinition:
    model: onnx.ModelProto
    path: Path


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    progress_monitor: Any

    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[Any] = []
        self.cache = ITimingCache(b"")

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self.cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        assert not config.flags, "float32 is float32"
        for node in network.model.graph.node:
            names = {attribute.name for attribute in node.attribute}
            if node.op_type == "Attention" and "TRT_decomposable" not in names:
                self.logger.log(ILogger.Severity.ERROR, "no fused kernel for float32")
                return None
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 3)
        monitor.phase_start("Tactic", "Timing", 500)
        goes_on = monitor.step_complete("Tactic", 0)
        monitor.phase_finish("Tactic")
        for step in range(3):
            goes_on = goes_on and monitor.step_complete("Timing", step)
        monitor.phase_finish("Timing")
        goes_on = goes_on and monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        if not goes_on:
            return None
        config.cache.blob += b"."
        header = {"path": str(network.path.resolve()), "profiles": config.profiles}
        return json.dumps(header).encode() + b"\0" + network.model.SerializeToString()


class ParserError:
    def __init__(self, text: str, node: onnx.NodeProto | None = None) -> None:
        self.text = text
        self.node = node

    def desc(self) -> str:
        return self.text

    def node_name(self) -> str:
        return self.node.name if self.node is not None else ""

    def node_operator(self) -> str:
        return self.node.op_type if self.node is not None else ""


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.network = network
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse(self, model: bytes, path: str = "") -> bool:
        try:
            self.network.model = onnx.load_from_string(model)
        except DecodeError:
            self.errors.append(ParserError("Failed to parse the ONNX model."))
            return False
        self.network.path = Path(path)
        graph = self.network.model.graph
        inputs = {value.name: value for value in graph.input}
        refused = refused_nodes(self.network.model)
        for node in graph.node:
            if node.op_type == "TensorScatter" and node.input[0] in inputs:
                cache = inputs[node.input[0]].type.tensor_type.shape.dim[2]
                if cache.HasField("dim_param"):
                    refused.append((node, "the rows of a cache must be static"))
        self.errors += [ParserError(reason, node) for node, reason in refused]
        return not self.errors


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        header, separator, model = serialized_engine.partition(b"\0")
        if not separator:
            self.logger.log(ILogger.Severity.ERROR, "the plan has no magic tag")
            return None
        return ICudaEngine(json.loads(header), onnx.load_from_string(model))


class ICudaEngine:
    def __init__(self, header: dict[str, Any], model: onnx.ModelProto) -> None:
        self.profiles = header["profiles"]
        self.graph = model.graph
        self.aliases = {
            node.output[0]: node.input[0]
            for node in model.graph.node
            if node.op_type == "TensorScatter"
        }
        for node in model.graph.node:
            for attribute in list(node.attribute):
                if attribute.name.startswith("TRT_"):
                    node.attribute.remove(attribute)
        onnx.external_data_helper.load_external_data_for_model(
            model, str(Path(header["path"]).parent)
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.values = {value.name: value for value in (*self.graph.input, *self.graph.output)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = any(value.name == name for value in self.graph.input)
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.values[name].type.tensor_type.elem_type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self.values[name].type.tensor_type.shape.dim
        return tuple(-1 if dim.HasField("dim_param") else dim.dim_value for dim in dims)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.profile: dict[str, Any] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran_in: set[str] = set()

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = self.engine.profiles[profile_index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, most = self.profile[name]
        self.shapes[name] = tuple(shape)
        return len(shape) == len(least) and all(
            a <= b <= c for a, b, c in zip(least, shape, most, strict=True)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory % cudart.ALIGNMENT == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        for output, cache in self.engine.aliases.items():
            if self.addresses[output] != self.addresses[cache]:
                return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if cudart.is_capturing(stream_handle):
            if str(sorted(shapes.items())) not in self.ran_in:
                return False
        else:
            self.ran_in.add(str(sorted(shapes.items())))
        cudart.on_stream(stream_handle, lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self.engine
        feeds = {}
        for value in engine.graph.input:
            dtype = np.dtype(_NUMPY[value.type.tensor_type.elem_type])
            shape = shapes.get(value.name, engine.get_tensor_shape(value.name))
            size = int(np.prod(shape)) * dtype.itemsize
            assert cudart.owns(addresses[value.name], size), value.name
            raw = ctypes.string_at(addresses[value.name], size)
            feeds[value.name] = np.frombuffer(raw, dtype).reshape(shape)
        names = [value.name for value in engine.graph.output]
        for name, array in zip(names, engine.session.run(names, feeds), strict=True):
            assert cudart.owns(addresses[name], array.nbytes), name
            ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
