"""A bundle opened on this machine: the device, the engines, and all that its systems share."""

from __future__ import annotations

import ctypes
import datetime
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recmas_runtime.cache.store import Store
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.text import listed
from recmas_runtime.engines.devices import DeviceChoice, joined
from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.onnx.backbone import BackboneEngine, LinkEngine
from recmas_runtime.engines.onnx.packed import PackedGraphs
from recmas_runtime.engines.onnx.probe import measure_probe
from recmas_runtime.engines.onnx.session import Device, onnx_runtime, resolve_device
from recmas_runtime.engines.tensorrt.engine_cache import (
    EngineFolder,
    as_warning,
    find_engines,
    find_engines_or_say_why,
)
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.formats.codec import malformed
from recmas_runtime.formats.links import Operands, read_operands
from recmas_runtime.formats.manifest import PLAN_NAME, BackboneEntry, Manifest
from recmas_runtime.formats.plan import Plan, parse_day
from recmas_runtime.formats.precisions import AUTO, TENSORRT, TOLERANCES, device_named
from recmas_runtime.prompts.chat_template import read_template
from recmas_runtime.prompts.render import DEFAULT_VARIABLES, Chat
from recmas_runtime.remote.model import RemoteModel, open_models
from recmas_runtime.running.executor import Engines
from recmas_runtime.running.generation import DecoderSettings
from recmas_runtime.scheduling.engine_lock import EngineLock, TaskLock
from recmas_runtime.scheduling.remote_calls import RemoteCalls
from recmas_runtime.scheduling.scheduler import Scheduler
from recmas_runtime.scheduling.shared_engine import SharedEngine

if TYPE_CHECKING:
    from recmas_runtime.tools.toolbox import Toolbox

Function = Callable[[str], str]
# More is a mistake: the command line has the same bound.
MAX_THREADS: Final = 4096

_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def choose_provider(
    device: str, probe: Path, *, threads: int | None = None
) -> tuple[Device, tuple[Problem, ...]]:
    """Return the device to run on, and a warning where `auto` could not take CUDA.

    CUDA is taken where ONNX Runtime offers it, it starts, and the known-answer probe comes out
    right there.

    Raises:
        RecmasError: RM504 if the device is unknown or cannot be used.
    """
    where = resolve_device(device)
    if where == "cpu":
        return where, ()
    try:
        _demand_cuda(probe, threads, where)
    except RecmasError as error:
        if device != "auto":
            raise
        warning = Problem(
            code="RM504",
            message=f"runs on the CPU, for CUDA cannot be used: {error.problems[0].message}",
            hint="Fix that, or say --device cpu to run there without this warning.",
            severity="warning",
        )
        return "cpu", (warning,)
    return where, ()


def _demand_cuda(probe: Path, threads: int | None, device: Device) -> None:
    needed = str(getattr(onnx_runtime(), "cuda_version", "") or "")
    reason = why_no_cuda(_DRIVER, needed, index=device_named(device).number)
    if reason:
        raise fail("RM504", reason, hint="Install a newer NVIDIA driver, or use --device cpu.")
    difference = measure_probe(probe, threads=threads, device=device)
    if not difference <= TOLERANCES["probe_absolute"]:
        raise fail(
            "RM504",
            f"the known-answer probe is off by {difference:.2e} on CUDA, "
            f"allowed is {TOLERANCES['probe_absolute']:.0e}",
            hint="Upgrade onnxruntime-gpu, or use --device cpu.",
        )


def why_no_cuda(driver: str, needed: str, *, index: int = 0) -> str:
    """Return what is wrong with the NVIDIA driver library or its devices, empty if nothing is.

    Needed is the CUDA version that ONNX Runtime was built with, such as `13.0`; empty if unknown.
    """
    try:
        library = ctypes.CDLL(driver)
    except OSError:
        return f"there is no NVIDIA driver here ({driver} cannot be loaded)"
    return _judge_driver(library, needed, index)


def _judge_driver(library: Any, needed: str, index: int = 0) -> str:
    """Ask the CUDA driver API whether it starts, for which CUDA it was made, and what is there."""
    status = library.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver does not start (cuInit returns {status})"
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    has, has_minor = version.value // 1000, version.value % 1000 // 10
    if needed and has < int(needed.split(".")[0]):
        return (
            f"the NVIDIA driver is too old: it runs CUDA {has}.{has_minor}, and this ONNX Runtime "
            f"was built with CUDA {needed}"
        )
    if index > 0:  # the first one is there where the driver starts
        count = ctypes.c_int()
        library.cuDeviceGetCount(ctypes.byref(count))
        if index >= count.value:
            there = ", ".join(f"cuda:{number}" for number in range(count.value))
            return f"there is no device cuda:{index}; here are {there or 'none'}"
    return ""


@dataclass(frozen=True, kw_only=True)
class OpenedEngines:
    """What computes; problems say why engines of the bundle are not used, more may come in a run.

    Attributes:
        devices: Where each backbone runs: `cpu`, `cuda`, `cuda:1` or `tensorrt`.
        provider: What ONNX Runtime runs links on: the device of all backbones, else the CPU, for
            messages between devices cross through memory of the host.
    """

    backbones: Mapping[str, Backbone[Any]]
    link: LinkEngine
    devices: Mapping[str, str]
    provider: Device
    problems: list[Problem]


@dataclass(frozen=True, kw_only=True)
class _Placement:
    """What was found of a machine: where each backbone runs, and what to say of it.

    Attributes:
        devices: As in `OpenedEngines`.
        providers: By backbone, where ONNX Runtime runs what it runs of it.
        provider: What else it runs, see `OpenedEngines`.
        engines: TensorRT's, where a backbone runs on them.
        is_demanded: Whether one must run on them.
    """

    devices: Mapping[str, str]
    providers: Mapping[str, Device]
    provider: Device
    engines: EngineFolder | None
    is_demanded: bool


def open_engines(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    store: Store | None = None,
    verify_hashes: bool = False,
) -> OpenedEngines:
    """Open a bundle's engines.

    Args:
        device: A device, `BACKBONE=DEVICE`, or several with commas between. Devices `cpu`, `cuda`
            and `cuda:1` are ONNX Runtime's; `tensorrt` takes nothing else; `auto` is what the
            bundle says of each backbone, and where that is nothing TensorRT if the bundle has
            engines for this machine, then CUDA, then the CPU.
        threads: Within an operator; None takes the physical cores.
        store: Where weights that are packed for this processor are kept; None for nowhere.
        verify_hashes: Compare with their digest those that are taken from there.

    Raises:
        RecmasError: RM504 for a device that is not there, RM507 or RM510 if a graph or plan is
            refused, RM511 for `tensorrt` without engines that can be used.
    """
    problems: list[Problem] = []
    found = _place(bundle, device, threads, problems)
    entries = bundle.manifest.backbones
    packed = None
    if store is not None:
        packed = PackedGraphs(bundle, store, problems, verify_hashes=verify_hashes)

    def on_onnx(name: str) -> Backbone[Any]:
        return BackboneEngine(
            entries[name],
            bundle.root,
            threads=threads,
            device=found.providers[name],
            problems=problems,
            packed=packed,
        )

    devices = dict(found.devices)
    backbones: dict[str, Backbone[Any]] = {}
    if found.engines is not None:
        from recmas_runtime.engines.tensorrt.backbone import open_backbones

        names = [name for name, where in devices.items() if where == TENSORRT]
        try:
            backbones |= open_backbones(bundle, found.engines, names, on_onnx, problems)
        except RecmasError as error:
            if found.is_demanded:
                raise
            problems += [as_warning(problem) for problem in error.problems]
            devices |= {name: found.providers[name] for name in names}
    return OpenedEngines(
        backbones={
            name: backbones[name] if name in backbones else on_onnx(name) for name in entries
        },
        link=LinkEngine(
            bundle.file(bundle.manifest.link_engine), threads=threads, device=found.provider
        ),
        devices=devices,
        provider=found.provider,
        problems=problems,
    )


def choose_device(bundle: Bundle, device: str, problems: list[Problem]) -> str:
    """Return what `open_engines` would run a bundle on, opening nothing; raises as it does."""
    found = _place(bundle, device, None, problems)
    return joined(found.devices) or found.provider


def _place(bundle: Bundle, device: str, threads: int | None, problems: list[Problem]) -> _Placement:
    """Find where each backbone can run; RM504 or RM511 where it cannot where it must."""
    entries = bundle.manifest.backbones
    choice = DeviceChoice.parse(device)
    wanted = choice.of({name: entry.device for name, entry in entries.items()})
    # A bundle of remote models has no backbones, and a device all the same.
    asked = dict.fromkeys(wanted.values() if wanted else [choice.default])
    engines = None
    if TENSORRT in asked:
        engines = find_engines(bundle)
    elif AUTO in asked:
        engines = find_engines_or_say_why(bundle, problems)
    providers: dict[str, Device] = {}
    for each in asked:
        providers[each], warnings = choose_provider(
            AUTO if each == TENSORRT else each,
            bundle.file(bundle.manifest.probe),
            threads=threads,
        )
        problems += warnings
    devices = {
        name: TENSORRT if engines is not None and each in (AUTO, TENSORRT) else providers[each]
        for name, each in wanted.items()
    }
    problems += [
        _narrow_on_cpu(name, entries[name])
        for name, where in devices.items()
        if where == "cpu" and wanted[name] != "cpu" and entries[name].is_narrow
    ]
    found = set(providers.values())
    return _Placement(
        devices=devices,
        providers={name: providers[each] for name, each in wanted.items()},
        provider=found.pop() if len(found) == 1 else "cpu",
        engines=engines,
        is_demanded=TENSORRT in asked,
    )


def _narrow_on_cpu(name: str, entry: BackboneEntry) -> Problem:
    return Problem(
        code="RM553",
        message=f"backbone {name!r} is in {entry.cache_dtype}, for a GPU; the CPU computes it in "
        "float32 with a rounding behind every operator",
        hint="That is right, in no less time and memory than float32 takes: build with int8 or "
        "int4 for a CPU, or say --device cpu to run it there without this warning.",
        severity="warning",
    )


def open_toolbox(
    bundle: Bundle, functions: Mapping[str, Function] | None, ask: Function | None
) -> Toolbox | None:
    """Return the tools of a bundle with those of the caller, see `load`; None for none."""
    tools = bundle.plan.tools
    if tools is None:
        return None
    from recmas_runtime.tools.toolbox import Toolbox

    corpus = tools.search.corpus if tools.search is not None else None
    return Toolbox(
        tools,
        corpus=None if corpus is None else bundle.file(corpus),
        functions=functions,
        ask=ask,
    )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is read of a bundle beside its engines."""

    day: datetime.date
    chats: Mapping[str, Chat]
    operands: Mapping[str, Operands]


@dataclass(frozen=True, kw_only=True)
class LoadedBundle:
    """What a bundle loads once and every system on it shares; problems say why on which device.

    Devices and provider are those of `OpenedEngines`.
    """

    manifest: Manifest
    day: datetime.date
    devices: Mapping[str, str]
    provider: Device
    problems: list[Problem]
    engines: Engines
    chats: Mapping[str, Chat]
    lock: EngineLock = field(default_factory=EngineLock)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        opened: OpenedEngines,
        texts: Texts,
        models: Mapping[str, RemoteModel] | None = None,
    ) -> LoadedBundle:
        """Put together what was opened and read."""
        lock = EngineLock()
        engines = Engines(
            backbones=opened.backbones,
            link=opened.link,
            operands=texts.operands,
            decoder_settings={
                name: DecoderSettings(
                    tokenizer=texts.chats[name].tokenizer,
                    eos_token_ids=frozenset(entry.eos_token_ids),
                    max_positions=entry.max_positions,
                    num_rows=entry.vocab_size,
                )
                for name, entry in bundle.manifest.backbones.items()
            },
            remotes=RemoteCalls(models=models or {}, lock=lock),
        )
        return cls(
            manifest=bundle.manifest,
            day=texts.day,
            devices=opened.devices,
            provider=opened.provider,
            problems=opened.problems,
            engines=engines,
            chats=texts.chats,
            lock=lock,
        )

    @property
    def device(self) -> str:
        """The device of all backbones, or each with its own."""
        return joined(self.devices) or self.provider

    @property
    def can_share(self) -> bool:
        """Whether runs can share engine calls: on the CPU, where rows of caches can be moved."""
        return all(
            isinstance(engine, BackboneEngine) and engine.memory.shared
            for engine in self.engines.backbones.values()
        )

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches that runs use now, where engines can be shared."""
        return sum(
            engine.cache_bytes
            for engine in self.engines.backbones.values()
            if isinstance(engine, SharedEngine)
        )

    @property
    def kept_bytes(self) -> int:
        """Memory of beginnings of prompts that are kept for later runs."""
        return sum(
            engine.kept.num_bytes
            for engine in self.engines.backbones.values()
            if isinstance(engine, SharedEngine)
        )

    def shared(self, scheduler: Scheduler, *, chunk: int, kept_bytes: int) -> LoadedBundle:
        """Return the same bundle for runs of a scheduler, whose engine calls are shared.

        Args:
            chunk: Positions of a prompt that run in one call.
            kept_bytes: Memory for beginnings of prompts that are kept for other runs, of all
                backbones together.
        """
        backbones = {
            name: SharedEngine(
                engine,
                self.engines.link,
                scheduler,
                chunk=chunk,
                kept_bytes=kept_bytes // len(self.engines.backbones),
            )
            for name, engine in self.engines.backbones.items()
            if isinstance(engine, BackboneEngine)
        }
        lock = TaskLock(self.lock, scheduler)
        remotes = replace(self.engines.remotes, lock=lock)
        engines = replace(self.engines, backbones=backbones, remotes=remotes)
        return replace(self, engines=engines, lock=lock)

    def prompt_day(self, plan: Plan) -> str | None:
        """Return the date that prompts of a plan show; None if no chat template writes one."""
        hello = [{"role": "user", "content": "Hello"}]
        for agent in plan.agents.values():
            chat = self.chats.get(agent.backbone)
            variables = {**DEFAULT_VARIABLES, **agent.chat_template}
            try:
                if chat is not None and chat.template.changes_with_the_day(hello, **variables):
                    return self.day.isoformat()
            except RecmasError:
                continue  # such a template fails for every record, which is told there
        return None

    def no_weights(self, agent: str, plan: Plan) -> RecmasError:
        """Return RM569 for what takes the weights of an agent on a remote model."""
        entry = self.manifest.remotes[plan.agents[agent].backbone]
        return fail(
            "RM569",
            f"agent {agent!r} runs on {entry.name}, which writes text: it neither scores the "
            "likelihood of others' text nor reads any for its hidden states",
            hint="Let an agent answer whose weights are in the bundle.",
        )


def _day_of(plan: Plan) -> datetime.date | None:
    try:
        return plan.day
    except ValueError as error:
        raise malformed(PLAN_NAME, f"the date is none: {error}") from error


def open_remotes(bundle: Bundle) -> dict[str, RemoteModel]:
    """Open the models behind an API that a bundle names; nobody is asked anything yet.

    Raises:
        RecmasError: RM560 for keys that are not there, RM201 without the package `openai`.
    """
    agents = bundle.plan.agents.items()
    entries = bundle.manifest.remotes
    users = {
        model: [name for name, agent in agents if agent.backbone == model] for model in entries
    }
    return open_models(entries, {model: listed(names) for model, names in users.items()})


def load_bundle(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    models: Mapping[str, RemoteModel] | None = None,
    day: datetime.date | None = None,
    store: Store | None = None,
    verify_hashes: bool = False,
) -> LoadedBundle:
    """Open a bundle's engines and read what systems on them share; see `open_engines`.

    Args:
        models: What `open_remotes` has opened; None where no run will ask them.
        day: For chat templates that write the date; None for that of the bundle, or else today.

    Raises:
        RecmasError: RM40x for files that are wrong, and what `open_engines` raises.
    """
    # Engines are opened without Python's lock: what they leave of it is enough for the texts.
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(read_texts, bundle, day)
        opened = open_engines(
            bundle, device=device, threads=threads, store=store, verify_hashes=verify_hashes
        )
        texts = reading.result()
    return LoadedBundle.of(bundle, opened, texts, models)


def read_texts(bundle: Bundle, day: datetime.date | None = None) -> Texts:
    """Read tokenizers, chat templates and links; RM40x for files that are wrong."""
    day = day or _day_of(bundle.plan) or datetime.date.today()
    chats = {}
    for name, entry in bundle.manifest.backbones.items():
        template = read_template(bundle.file(entry.chat_template), file=entry.chat_template)
        chats[name] = Chat.load(
            bundle.file(entry.tokenizer), template, entry.special_tokens, day=day
        )
    operands = read_operands(bundle.file, bundle.manifest.links)
    return Texts(day=day, chats=chats, operands=operands)


def check_arguments(
    threads: object, functions: Mapping[str, Function] | None, ask: Function | None
) -> None:
    """Refuse arguments of `load` that would fail later, or be passed over."""
    if threads is not None and (
        not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS
    ):
        hint = f"Give a whole number from 1 to {MAX_THREADS}, or None."
        raise fail("RM506", f"threads is {threads!r}", hint=hint)
    if functions is not None and not isinstance(functions, Mapping):
        hint = "Give a mapping of names to functions."
        raise fail("RM506", f"functions is of the type {type(functions).__name__}", hint=hint)
    tools = {f"the function {name!r}": function for name, function in (functions or {}).items()}
    for what, function in {**tools, "ask": ask}.items():
        if function is not None and not callable(function):
            hint = "Give a function from a text to a text."
            kind = type(function).__name__
            raise fail("RM506", f"{what} is of the type {kind}, which cannot be called", hint=hint)


def given_day(text: str) -> datetime.date:
    """Return the day that a caller gave; RM506 if it is none."""
    try:
        return parse_day(text)
    except ValueError as error:
        hint = "Write it as 2026-01-31."
        raise fail("RM506", f"{text!r} is no day as YYYY-MM-DD", hint=hint) from error
