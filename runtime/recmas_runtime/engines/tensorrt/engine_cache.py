"""Built engines on disk: a cache in the bundle, which stays whole and valid without them.

    engines/tensorrt-11.4.0.106-sm90/engines.json      what these engines are good for
                                     timing.cache      TensorRT's measurements, for the next build
                                     BACKBONE.CAPACITY.plan, BACKBONE.head.plan

The manifest does not list them: they come and go with GPUs and TensorRT versions. `engines.json`
has their hashes; plans that are damaged, or that another machine built, are never opened.
"""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from recmas_runtime.core.errors import Problem, RecmasError, fail, how_to_install
from recmas_runtime.core.files import reason_of, sha256_of
from recmas_runtime.engines.tensorrt.own_engines import are_own_engines
from recmas_runtime.formats.bundle import ENGINES_FOLDER, Bundle, inside, write_json_atomic
from recmas_runtime.formats.codec import StrictStruct, Whole, read_json_file, to_json
from recmas_runtime.formats.manifest import FileEntry

RECORD_NAME: Final = "engines.json"
TIMING_CACHE_NAME: Final = "timing.cache"
ENGINES_VERSION: Final = 1

# The first version whose parser reads TensorScatter, the cache write of every decoder graph.
OLDEST_VERSION: Final = (10, 15)

_INSTALL: Final = f"{how_to_install('tensorrt')} Or use target onnx."


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What engines are good for: they run on nothing else.

    Attributes:
        tensorrt: Full version; plans of another build of TensorRT are refused by it.
        architecture: Compute capability of the GPU, such as `sm90`.
    """

    tensorrt: str
    architecture: str

    @property
    def key(self) -> str:
        """The name of the folder that holds such engines."""
        return f"tensorrt-{self.tensorrt}-{self.architecture}"


def find_platform() -> Platform:
    """Return what this machine has.

    Raises:
        RecmasError: RM201 for a package that is missing or cannot be imported, RM509 for a TensorRT
            that is too old, RM504 for a GPU or driver that is not there.
    """
    version = str(_package("tensorrt", "tensorrt").__version__)
    if parse_version(version) < OLDEST_VERSION:
        raise fail(
            "RM509",
            f"TensorRT {version} is installed; its parser does not read TensorScatter",
            hint="Install TensorRT 10.15 or newer, or use target onnx.",
        )
    cuda = _package("cuda.bindings.runtime", "cuda-bindings")
    return Platform(tensorrt=version, architecture=_architecture(cuda))


def parse_version(version: str) -> tuple[int, int]:
    """Return major and minor; what does not look like a version counts as the oldest."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _package(name: str, distribution: str) -> Any:
    missing = fail("RM201", f"{distribution} is not installed", hint=_INSTALL)
    try:
        module = importlib.import_module(name)
    # A package whose shared libraries are missing fails to import in ways of its own.
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name)):
            raise missing from None
        raise fail(
            "RM201", f"{distribution} is installed but cannot be imported: {error}", hint=_INSTALL
        ) from error
    if module.__file__ is None:  # any folder of this name that happens to be on the path
        raise missing
    return module


def _architecture(cuda: Any) -> str:
    error, num_devices = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess or num_devices == 0:
        _, text = cuda.cudaGetErrorString(error)
        reason = text.decode() if num_devices is None else "there is no device"
        raise fail(
            "RM504",
            f"CUDA finds no GPU: {reason}",
            hint="Check the driver (CUDA 13 needs r580 or newer), or use target onnx.",
        )
    digits = []
    for part in ("Major", "Minor"):
        attribute = getattr(cuda.cudaDeviceAttr, f"cudaDevAttrComputeCapability{part}")
        error, value = cuda.cudaDeviceGetAttribute(attribute, 0)
        assert error == cuda.cudaError_t.cudaSuccess, "a device has a compute capability"
        digits.append(str(value))
    return f"sm{''.join(digits)}"


class DecoderPlan(StrictStruct, frozen=True, kw_only=True):
    """A decoder engine; its capacity is the cache rows per sample that it was built for."""

    capacity: Whole
    file: str


class BackbonePlans(StrictStruct, frozen=True, kw_only=True):
    """The engines of one backbone; decoders by ascending capacity."""

    decoders: tuple[DecoderPlan, ...]
    head: str
    max_rows: Whole
    max_groups: Whole


class EngineRecord(StrictStruct, frozen=True, kw_only=True):
    """What a folder of engines is good for. Paths are relative to the folder.

    The fingerprint is that of the bundle that they were built from.
    """

    version: Whole = ENGINES_VERSION
    fingerprint: str
    tensorrt: str
    architecture: str
    backbones: dict[str, BackbonePlans]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class EngineFolder:
    """Engines that this machine can use."""

    path: Path
    record: EngineRecord

    @property
    def is_own(self) -> bool:
        """Whether this user built them."""
        return are_own_engines(self.path / RECORD_NAME)

    def file(self, relative: str) -> Path:
        """Return the path of a plan."""
        return inside(self.path, relative)


def engine_folders(root: Path) -> tuple[Path, ...]:
    """Return the folders of finished engines in a bundle, by name."""
    folder = root / ENGINES_FOLDER
    found = sorted(folder.glob(f"*/{RECORD_NAME}")) if folder.is_dir() else []
    return tuple(path.parent for path in found if not path.parent.name.startswith("."))


def choose_engines(
    root: Path, fingerprint: str, platform: Platform
) -> tuple[EngineFolder | None, tuple[str, ...]]:
    """Return engines that this machine can use, or else why it cannot use each there is."""
    reasons = []
    # The folder that is named after this machine most probably fits.
    for path in sorted(engine_folders(root), key=lambda path: path.name != platform.key):
        try:
            shown = f"{ENGINES_FOLDER}/{path.name}/{RECORD_NAME}"
            record = read_json_file(EngineRecord, path / RECORD_NAME, file=shown)
            reason = _why_unusable(record, fingerprint, platform) or _why_damaged(path, record)
        except RecmasError as error:
            reason = error.problems[0].message
        else:
            if reason is None:
                return EngineFolder(path, record), ()
        reasons.append(f"{path.relative_to(root).as_posix()}: {reason}")
    return None, tuple(reasons)


def _why_unusable(record: EngineRecord, fingerprint: str, platform: Platform) -> str | None:
    if record.version != ENGINES_VERSION:
        return f"of format version {record.version}, this runtime reads {ENGINES_VERSION}"
    if record.fingerprint != fingerprint:
        return (
            f"built from another bundle (fingerprint {record.fingerprint[:12]}, "
            f"this one's is {fingerprint[:12]})"
        )
    if record.tensorrt != platform.tensorrt:
        return f"built by TensorRT {record.tensorrt}, here is {platform.tensorrt}"
    if record.architecture != platform.architecture:
        return f"built on a GPU of {record.architecture}, here is {platform.architecture}"
    return None


def _why_damaged(path: Path, record: EngineRecord) -> str | None:
    """Compare every plan with its hash: what TensorRT does with a damaged plan is undefined."""
    used = {plans.head for plans in record.backbones.values()}
    used |= {plan.file for plans in record.backbones.values() for plan in plans.decoders}
    if missing := sorted(used - record.files.keys()):
        return f"{RECORD_NAME} does not list {missing[0]}"
    for relative, entry in record.files.items():
        file = inside(path, relative)
        if not file.is_file():
            return f"{relative} is missing"
        if file.stat().st_size != entry.size_bytes or sha256_of(file) != entry.sha256:
            return f"{relative} is damaged"
    return None


def find_engines(bundle: Bundle) -> EngineFolder:
    """Return the engines of a bundle that this machine can use.

    Raises:
        RecmasError: RM201, RM504 or RM509 if it has no TensorRT, RM511 with every reason why it can
            use none of the engines that are there.
    """
    platform = find_platform()
    engines, reasons = choose_engines(bundle.root, bundle.manifest.fingerprint, platform)
    if engines is None:
        why = "; ".join(reasons) if reasons else "the bundle holds none"
        raise no_engine(f"no TensorRT engine of this bundle can be used here: {why}", bundle.root)
    return engines


def no_engine(message: str, root: Path, *, others: str = "") -> RecmasError:
    """Return the error for a bundle without the engines that are needed; `others` can be done."""
    hint = f"Build engines for this machine with `recmas engines {root}`{others}."
    return fail("RM511", message, hint=hint)


def find_engines_or_say_why(bundle: Bundle, problems: list[Problem]) -> EngineFolder | None:
    """Return engines that this user built, or None where ONNX Runtime is to be used.

    A bundle without engines gives no warning. One with engines that cannot be used adds the reasons
    to `problems`: who built them expects them to run.
    """
    if not engine_folders(bundle.root):
        return None
    try:
        engines = find_engines(bundle)
        if not engines.is_own:
            raise no_engine(
                f"the engines in {ENGINES_FOLDER}/{engines.path.name} were not built by this user, "
                "and a plan of TensorRT can do what a program can",
                bundle.root,
                others=", or take these with --device tensorrt",
            )
        return engines
    except RecmasError as error:
        problems += [as_warning(problem) for problem in error.problems]
        return None


def as_warning(problem: Problem) -> Problem:
    """Return an error as the reason why ONNX Runtime is used instead."""
    message = f"{problem.message}; ONNX Runtime is used"
    return replace(problem, code="RM550", message=message, severity="warning")


def engines_text(root: Path) -> dict[str, str]:
    """Return for each folder of engines, relative to the bundle, who built it."""
    return {
        path.relative_to(root).as_posix(): (
            "built by this user"
            if are_own_engines(path / RECORD_NAME)
            else "not built by this user; loaded only with --device tensorrt"
        )
        for path in engine_folders(root)
    }


def timing_caches(root: Path) -> dict[str, bytes]:
    """Return the timing caches of a bundle by the name of their folder.

    They are worth keeping when a bundle is replaced: measuring is most of a build.
    """
    found = sorted((root / ENGINES_FOLDER).glob(f"*/{TIMING_CACHE_NAME}"))
    return {path.parent.name: path.read_bytes() for path in found}


@contextmanager
def staged_engines(root: Path, platform: Platform) -> Iterator[Path]:
    """Give an empty folder to build in; it takes its place only if the block ends well.

    Raises:
        RecmasError: RM303 if the bundle cannot be written to.
    """
    # Its locks are not there on every system that loads engines.
    from recmas_runtime.core.files import clear_away_dead_builds, move_into_place, staged_folder

    engines = root / ENGINES_FOLDER
    target = engines / platform.key
    try:
        engines.mkdir(exist_ok=True)
        try:
            clear_away_dead_builds(engines)
            with staged_folder(target) as folder:
                yield folder
                if not move_into_place(folder, target):
                    raise OSError(errno.EBUSY, "another build is replacing them")
        finally:
            if not any(engines.iterdir()):
                engines.rmdir()
    except OSError as error:
        raise fail(
            "RM303",
            f"cannot write engines into {engines}: {reason_of(error)}",
            hint="Free some space, or copy the bundle to where it can be written.",
        ) from error


def write_record(
    folder: Path, *, fingerprint: str, platform: Platform, backbones: Mapping[str, BackbonePlans]
) -> EngineRecord:
    """Write the record of the plans in a folder, with their sizes and hashes."""
    plans = sorted(folder.glob("*.plan"))
    record = EngineRecord(
        fingerprint=fingerprint,
        tensorrt=platform.tensorrt,
        architecture=platform.architecture,
        backbones=dict(backbones),
        files={
            path.name: FileEntry(sha256=sha256_of(path), size_bytes=path.stat().st_size)
            for path in plans
        },
    )
    write_json_atomic(folder / RECORD_NAME, to_json(record))
    return record
