"""One plan from one graph, by TensorRT's builder.

Imported only where `availability` has found TensorRT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tensorrt as trt

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.tensorrt.phase_progress import PhaseProgress
from recmas_runtime.engines.tensorrt.profiles import ProfileShapes

if TYPE_CHECKING:
    import onnx


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


class _Monitor(trt.IProgressMonitor):
    """TensorRT's callbacks; an interrupt must not leave them as an exception."""

    def __init__(self, phases: PhaseProgress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._phases = phases

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        try:
            self._phases.start(phase_name, parent_phase or None, num_steps)
        except KeyboardInterrupt:
            self._phases.interrupt()

    def step_complete(self, phase_name: str, step: int) -> bool:
        try:
            return self._phases.step(phase_name)
        except KeyboardInterrupt:
            self._phases.interrupt()
            return False

    def phase_finish(self, phase_name: str) -> None:
        try:
            self._phases.finish(phase_name)
        except KeyboardInterrupt:
            self._phases.interrupt()


def build_plan(
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
        model: The graph, without its weights.
        path: Where the graph lies: its weights are found relative to it.
        profiles: Shapes by input, one mapping for each optimization profile.
        timing_cache: From an earlier build, or empty.
        progress: Is told about TensorRT's phases.
        title: What is built, for progress.

    Returns:
        The plan, and the timing cache with what this build measured.

    Raises:
        RecmasError: RM510 if TensorRT refuses the graph or finds no kernels.
        KeyboardInterrupt: The user gave up.
    """
    log = Log()
    builder = trt.Builder(log)
    # Element types are those of the graph. TensorRT 11 knows nothing else, but takes the flag.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(path)):
        log.errors += [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise log.failure("refuses the graph", file=str(path))
    config = builder.create_builder_config()
    # On by default, it would round float32 factors to 10 bits. Workspace is left unlimited: a limit
    # of 1 GB, as is often seen, hides the kernels that a decoder needs.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False)
    phases = PhaseProgress(progress, title)
    monitor = _Monitor(phases)  # must outlive the config, which keeps no reference
    config.progress_monitor = monitor
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, typical, most) in shapes.items():
            profile.set_shape(name, least, typical, most)
        if config.add_optimization_profile(profile) < 0:
            raise log.failure("refuses the shapes", file=str(path))
    plan = builder.build_serialized_network(network, config)
    if phases.was_interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise log.failure("built no engine", file=str(path))
    return bytes(plan), bytes(config.get_timing_cache().serialize())
