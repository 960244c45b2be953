"""A bundle's engines on this machine: TensorRT where it can, ONNX Runtime otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.onnx.backbone import BackboneEngine, LinkEngine
from recmas_runtime.engines.onnx.session import Device
from recmas_runtime.engines.tensorrt.engine_cache import (
    EngineFolder,
    as_warning,
    find_engines,
    find_engines_or_say_why,
)
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.formats.manifest import BackboneEntry
from recmas_runtime.formats.targets import TENSORRT
from recmas_runtime.running.devices import choose_provider


@dataclass(frozen=True, kw_only=True)
class OpenedEngines:
    """What computes.

    Attributes:
        backbones: By id.
        link: The link graph.
        device: What the backbones run on: `cpu`, `cuda` or `tensorrt`.
        provider: Where ONNX Runtime runs what it runs; with TensorRT only embeddings and links.
        problems: Warnings: why engines of the bundle are not used. More may come during a run.
    """

    backbones: Mapping[str, Backbone[Any]]
    link: LinkEngine
    device: str
    provider: Device
    problems: list[Problem]


def open_engines(bundle: Bundle, *, device: str, threads: int | None) -> OpenedEngines:
    """Open a bundle's engines.

    Args:
        bundle: The bundle.
        device: `cpu` and `cuda` are ONNX Runtime's; `tensorrt` takes nothing else; `auto` takes
            TensorRT where the bundle has engines for this machine, then CUDA, then the CPU.
        threads: Threads within an operator; None takes the physical cores.

    Raises:
        RecmasError: RM504 for a device that is not there, RM507 or RM510 if a graph or plan is
            refused, RM511 for `tensorrt` without engines that can be used.
    """
    problems: list[Problem] = []
    engines = _find_engines(bundle, device, problems)
    provider = _find_provider(bundle, device, threads, problems)

    def on_onnx(entry: BackboneEntry) -> Backbone[Any]:
        return BackboneEngine(
            entry, bundle.root, threads=threads, device=provider, problems=problems
        )

    backbones: Mapping[str, Backbone[Any]] | None = None
    if engines is not None:
        from recmas_runtime.engines.tensorrt.backbone import open_backbones

        try:
            backbones = open_backbones(bundle, engines, on_onnx, problems)
        except RecmasError as error:
            if device == TENSORRT:
                raise
            problems += [as_warning(problem) for problem in error.problems]
    return OpenedEngines(
        backbones=backbones
        or {name: on_onnx(entry) for name, entry in bundle.manifest.backbones.items()},
        link=LinkEngine(bundle.file(bundle.manifest.link_engine), threads=threads, device=provider),
        device=TENSORRT if backbones is not None else provider,
        provider=provider,
        problems=problems,
    )


def choose_device(bundle: Bundle, device: str, problems: list[Problem]) -> str:
    """Return what `open_engines` would run a bundle on, without opening anything.

    Args:
        bundle: The bundle.
        device: As for `open_engines`.
        problems: Gets warnings: why engines of the bundle are not used.

    Raises:
        RecmasError: RM504 or RM511 if the device is not there.
    """
    if _find_engines(bundle, device, problems) is not None:
        return TENSORRT
    return _find_provider(bundle, device, None, problems)


def _find_provider(
    bundle: Bundle, device: str, threads: int | None, problems: list[Problem]
) -> Device:
    wanted = "auto" if device == TENSORRT else device
    provider, warnings = choose_provider(
        wanted, bundle.file(bundle.manifest.probe), threads=threads
    )
    problems += warnings
    return provider


def _find_engines(bundle: Bundle, device: str, problems: list[Problem]) -> EngineFolder | None:
    if device == TENSORRT:
        return find_engines(bundle)
    return find_engines_or_say_why(bundle, problems) if device == "auto" else None
