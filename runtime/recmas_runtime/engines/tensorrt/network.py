"""One engine from one graph, by TensorRT's parser and builder.

Imported only where `engine_cache` has found TensorRT.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import tensorrt as trt

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.progress import Advance, Progress
from recmas_runtime.engines.tensorrt.static_graph import ProfileShapes, unsupported

if TYPE_CHECKING:
    import onnx

# Deeper phases come by the hundred and last milliseconds.
_DEPTH_SHOWN: Final = 2
# Nodes that a message names: a decoder has the same ones in every layer.
_NAMES_SHOWN: Final = 4


class Log(trt.ILogger):
    """Keeps TensorRT's errors, which say why a call returned nothing."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Keep a message if it is an error."""
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self.errors.append(msg)

    def failure(self, what: str, *, file: str) -> RecmasError:
        """Return an error with the last thing that TensorRT said."""
        reason = self.errors[-1] if self.errors else "it gave no reason"
        return fail(
            "RM510",
            f"TensorRT {trt.__version__} {what}: {reason}",
            file=file,
            hint="Use target onnx, or another version of TensorRT.",
        )


class BuildMonitor(trt.IProgressMonitor):
    """TensorRT's nested phases as stages of the project's progress.

    TensorRT calls from several threads, and no exception may leave a callback: an interrupt makes
    it give up at its next step.
    """

    def __init__(self, progress: Progress, title: str) -> None:
        trt.IProgressMonitor.__init__(self)
        self.was_interrupted = False
        self._progress = progress
        self._title = title
        self._lock = threading.Lock()
        self._depths: dict[str, int] = {}
        self._shown: dict[str, tuple[ExitStack, Advance]] = {}

    @contextmanager
    def _callback(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except KeyboardInterrupt:
            self.was_interrupted = True

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        """Open a stage, unless it lies too deep; the outermost phase has no parent."""
        with self._callback():
            depth = self._depths.get(parent_phase, 0) + 1
            self._depths[phase_name] = depth
            if depth <= _DEPTH_SHOWN:
                stack = ExitStack()
                stage = self._progress.stage(f"{self._title}: {phase_name}", num_steps)
                self._shown[phase_name] = stack, stack.enter_context(stage)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Count a step; returns False to make TensorRT give up."""
        with self._callback():
            if phase_name in self._shown:
                self._shown[phase_name][1]()
        return not self.was_interrupted

    def phase_finish(self, phase_name: str) -> None:
        """Close a phase's stage."""
        with self._callback():
            self._depths.pop(phase_name, None)
            stack, _ = self._shown.pop(phase_name, (None, None))
            if stack is not None:
                stack.close()


def serialize_engine(
    model: onnx.ModelProto,
    path: Path,
    profiles: Sequence[ProfileShapes],
    *,
    timing_cache: bytes,
    progress: Progress,
    title: str,
) -> tuple[bytes, bytes]:
    """Build one engine.

    Args:
        path: Where the graph lies: its weights are found relative to it.
        profiles: Shapes by input, one mapping for each optimization profile.
        timing_cache: From an earlier build, or empty.

    Returns:
        The serialized engine, and the timing cache with what this build measured.

    Raises:
        RecmasError: RM203 with the nodes that TensorRT's parser does not read, RM510 if TensorRT
            refuses the graph for another reason or finds no kernels.
        KeyboardInterrupt: The user gave up.
    """
    log = Log()
    builder = trt.Builder(log)
    # Element types are those of the graph. TensorRT 11 knows nothing else, but takes the flag.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(path)):
        raise _refusal(parser, log, file=str(path))
    config = builder.create_builder_config()
    # On by default, it would round float32 factors to 10 bits. Workspace is left unlimited: a limit
    # of 1 GB, as is often seen, hides the kernels that a decoder needs.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False)
    monitor = BuildMonitor(progress, title)  # must outlive the config, which keeps no reference
    config.progress_monitor = monitor
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, typical, most) in shapes.items():
            profile.set_shape(name, least, typical, most)
        if config.add_optimization_profile(profile) < 0:
            raise log.failure("refuses the shapes", file=str(path))
    engine = builder.build_serialized_network(network, config)
    if monitor.was_interrupted:
        raise KeyboardInterrupt
    if engine is None:
        raise log.failure("built no engine", file=str(path))
    return bytes(engine), bytes(config.get_timing_cache().serialize())


def _refusal(parser: trt.OnnxParser, log: Log, *, file: str) -> RecmasError:
    """Return what the parser says of the nodes that it does not read, or else of the graph.

    It checks every node before it gives up, so that one message holds all of them.
    """
    nodes: dict[tuple[str, str], list[str]] = {}
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        reason = " ".join(error.desc().split())
        if error.node_operator():
            nodes.setdefault((error.node_operator(), reason), []).append(error.node_name())
        else:  # no node's: a model or weights that cannot be read
            log.errors.append(reason)
    if not nodes:
        return log.failure("refuses the graph", file=file)
    found = []
    for (operator, reason), names in nodes.items():
        more = len(names) - _NAMES_SHOWN
        shown = ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        found.append(f"operator {operator} ({shown}): {reason}")
    return unsupported(f"TensorRT's parser does not read {'; '.join(found)}", file=file)
