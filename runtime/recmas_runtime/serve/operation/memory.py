"""Whether what bundles take fits this machine, before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.text import counted, human_bytes
from recmas_runtime.formats.bundle import Bundle

# Of a front end and a worker before they load anything, and what engines compute in.
PROCESS_BYTES: Final = 512 * 2**20
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")
_HINT: Final = "Lower --max-batch or --keep-memory, serve fewer bundles, or use a larger machine."


@dataclass(frozen=True, kw_only=True)
class BundleNeeds:
    """What a bundle takes.

    Attributes:
        weight_bytes: Of the files with weights; engines hold them as they are stored.
        bytes_per_request: Of the caches of one request at the limits of the bundle.
        max_batch: Requests at a time that it was planned for.
    """

    weight_bytes: int
    bytes_per_request: int
    max_batch: int

    @classmethod
    def of(cls, bundle: Bundle) -> BundleNeeds:
        """Return what an opened bundle takes."""
        backbones, files = bundle.manifest.backbones.values(), bundle.manifest.files
        return cls(
            weight_bytes=sum(files[each].size_bytes for each in {b.weights for b in backbones}),
            bytes_per_request=sum(c.bytes_per_sample for c in bundle.plan.caches.values()),
            max_batch=bundle.plan.limits.max_batch,
        )

    def whole_bytes(self, *, max_batch: int, kept_bytes: int) -> int:
        """Return what a service of this bundle alone takes, all of it."""
        caches = max_batch * self.bytes_per_request
        return self.weight_bytes + caches + kept_bytes + PROCESS_BYTES


def fitting_batch(
    needs: Iterable[BundleNeeds],
    *,
    asked: int | None,
    kept_bytes: int,
    available_bytes: int | None,
    problems: list[Problem],
) -> int | None:
    """Return the requests that may run at a time: as asked or planned, or as many as fit.

    None leaves it at what each bundle was planned for. Engines work in memory of their own beside
    weights and caches, so this is a bound that is passed by what cannot work, not a promise.

    Args:
        asked: What the user wants; that is refused where it does not fit, and never changed.
        kept_bytes: For beginnings of prompts.
        available_bytes: None where that is not known; then nothing is checked.
        problems: Gets a warning where fewer requests fit than bundles are planned for.

    Raises:
        RecmasError: RM545 if what was asked does not fit, or not even one request.
    """
    needs = list(needs)
    if available_bytes is None or not needs:
        return asked
    weights = sum(each.weight_bytes for each in needs)
    largest = max(each.bytes_per_request for each in needs)
    wanted = asked or max(each.max_batch for each in needs)
    room = available_bytes - weights - kept_bytes
    fits = max(0, room // largest) if largest else wanted
    if room >= 0 and fits >= wanted:
        return asked
    held, caches = human_bytes(weights + kept_bytes), human_bytes(wanted * largest)
    message = (
        f"{counted(wanted, 'request')} at a time take {held} for weights and kept prompts and "
        f"{caches} for caches, and {human_bytes(available_bytes)} are free: "
        f"{fits if room >= 0 else 0} would fit"
    )
    if asked is not None or room < 0 or fits < 1:
        raise fail("RM545", message, hint=_HINT)
    problems.append(Problem(code="RM551", severity="warning", message=message))
    return int(fits)


def available_memory_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Return the memory that processes can still get: of the machine, or what a container may.

    None where neither is told.
    """
    found = [free for free in (_machine_free(meminfo), _cgroup_free(cgroup)) if free is not None]
    return min(found, default=None)


def _machine_free(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _cgroup_free(cgroup: Path) -> int | None:
    """Return what is left of a container's limit, files that were only read left out."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _lines(cgroup / limit), _lines(cgroup / used)
        if not most or not now or not most[0].isdecimal():  # no such file, or the limit is `max`
            continue
        stat = dict(
            line.split() for line in _lines((cgroup / used).parent / "memory.stat") if line.strip()
        )
        return max(0, int(most[0]) - int(now[0]) + int(stat.get(cached, 0)))
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
