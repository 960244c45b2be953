"""Installed packages that a sandbox can show: their files and the shared libraries below them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.metadata import packages_distributions as distributions_by_name
from importlib.util import find_spec
from pathlib import Path
from typing import Final

# Imports what it is given, as far as that goes, and says which shared libraries are loaded then.
_PROBE: Final = """
import contextlib, importlib, json, pathlib, sys
folders, names = json.loads(sys.argv[1])
sys.path += folders
for name in names:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
print()
print(json.dumps(sorted({line.split(maxsplit=5)[5] for line in maps if ".so" in line})))
"""
_PROBE_TIMEOUT_S: Final = 120.0
# What asks for more memory or processes than a sandbox has, by its environment variable.
THREADS: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Packages:
    """Files of packages; every path is absolute.

    Attributes:
        entries: Files and folders, by their names beside each other.
        libraries: Shared libraries outside of them that they load.
    """

    entries: tuple[tuple[str, Path], ...] = ()
    libraries: tuple[Path, ...] = ()


@cache
def installed_packages(names: Sequence[str], *, executable: Path) -> Packages:
    """Return the files of packages by the names that they are imported by, with what they need.

    What is not installed is left out.

    Args:
        names: A tuple of them.
        executable: The interpreter that will import them.
    """
    entries: dict[str, Path] = {}
    for name in names:
        for found in _distributions(name):
            entries |= _entries(found)
        if not entries.keys() & {name, f"{name}.py"}:
            entries |= _module_entries(name)
    if not entries:
        return Packages()
    return Packages(tuple(sorted(entries.items())), _libraries(entries, names, executable))


def _distributions(name: str) -> list[Distribution]:
    """Return the distributions that bring a package, and all that they require."""
    found: dict[str, Distribution] = {}
    waiting = list(distributions_by_name().get(name, ()))
    while waiting:
        project = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if project in found:
            continue
        try:
            found[project] = distribution(project)
        except PackageNotFoundError:
            continue  # required on other machines
        needed = (line for line in found[project].requires or () if "extra ==" not in line)
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed]
    return list(found.values())


def _entries(found: Distribution) -> dict[str, Path]:
    tops = {file.parts[0] for file in found.files or () if ".." not in file.parts}
    paths = {top: Path(str(found.locate_file(top))).resolve() for top in tops - {"__pycache__"}}
    return {top: path for top, path in paths.items() if path.exists() and path.suffix != ".pth"}


def _module_entries(name: str) -> dict[str, Path]:
    """Return where a package is that no distribution lists, as those of operating systems."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return {}
    if spec is None or not spec.has_location or spec.origin is None:
        return {}
    path = Path(spec.origin).resolve()
    path = path.parent if path.name == "__init__.py" else path
    return {path.name: path}


def _libraries(
    entries: dict[str, Path], names: Sequence[str], executable: Path
) -> tuple[Path, ...]:
    folders = sorted({str(path.parent) for path in entries.values()})
    try:
        ran = subprocess.run(  # noqa: S603 - our own interpreter and program
            [str(executable), "-I", "-S", "-B", "-c", _PROBE, json.dumps([folders, names])],
            check=True,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            env=THREADS,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    mapped = map(Path, json.loads(ran.stdout.splitlines()[-1]))
    own = tuple(entries.values())
    outside = (path for path in mapped if not any(path.is_relative_to(one) for one in own))
    return tuple(sorted({name for path in outside for name in names_of(path)}))


def names_of(library: Path) -> set[Path]:
    """Return the library and the links beside it that lead to it, `libz.so.1` to `libz.so.1.3`."""
    stem = library.name.partition(".so")[0].partition("-")[0]
    links = (path for path in library.parent.glob(f"{stem}*.so*") if path.is_symlink())
    return {library} | {link for link in links if link.resolve() == library}
