"""The files that a run needs: weights and data, what is missing of them, and how to get it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from paper_config import HUB, Benchmark, Cell, Grid

from recmas_compiler.released.repositories import find_repositories
from recmas_compiler.released.styles import ORGANISATION, Style
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import write_whole

CHECKED = "checked.json"


def missing(grid: Grid) -> dict[str, tuple[Problem, ...]]:
    """Return what is missing or wrong, by style and by benchmark; nothing for what is there."""
    styles = {cell.style.name: cell.style for cell in grid.cells}
    found = {name: tuple(_of_style(grid, style)) for name, style in styles.items()}
    for name in dict.fromkeys(cell.benchmark for cell in grid.cells):
        found[name] = tuple(_of_benchmark(grid, grid.benchmarks[name]))
    return {name: problems for name, problems in found.items() if problems}


def runnable(grid: Grid, lacks: dict[str, tuple[Problem, ...]]) -> tuple[Cell, ...]:
    """Return the cells for which all files are there."""
    return tuple(
        cell for cell in grid.cells if not {cell.style.name, cell.benchmark} & lacks.keys()
    )


def how_to_get(style: Style) -> str:
    """Return the command that fetches the weights of a style."""
    names = [*(style.agent_repository(agent.role) for agent in style.agents)]
    names.append(style.outer_repository)
    return "; ".join(f"hf download {ORGANISATION}/{n} --local-dir {n}" for n in names)


def _of_style(grid: Grid, style: Style) -> Iterator[Problem]:
    """Yield what is wrong with the weights; the hub's are found when they are imported."""
    if grid.config.weights == HUB:
        return
    folder = Path(grid.config.weights)
    try:
        found = find_repositories(style, folder=folder, agents={}, outer=None)
    except RecmasError as error:
        for problem in error.problems:
            hint = f"In {folder}: {how_to_get(style)}"
            yield replace(problem, message=f"{style.name}: {problem.message}", hint=hint)
        return
    for role, repository in found.agents.items():
        if not any(repository.folder.glob("*.safetensors")):
            yield fail(
                "RM207",
                f"{style.name}: the {role} has no weights (*.safetensors)",
                file=str(repository.folder),
                hint=f"In {folder}: {how_to_get(style)}",
            ).problems[0]


def _of_benchmark(grid: Grid, about: Benchmark) -> Iterator[Problem]:
    folder = Path(grid.config.data)
    for one in about.data:
        path = folder / one.file
        if not path.is_file():
            yield fail(
                "RM502",
                f"{about.title}: there is no such file",
                file=str(path),
                hint=f"In {folder}: {about.fetch}",
            ).problems[0]
        elif path.suffix == ".parquet" and find_spec("pyarrow") is None:
            message = f"{about.title}: Parquet is read by pyarrow, which is not installed"
            hint = "pip install pyarrow, or write the table as JSON lines and name that file."
            yield fail("RM201", message, file=str(path), hint=hint).problems[0]
        elif one.sha256 is not None and (found := _sha256(path, grid.out)) != one.sha256:
            yield fail(
                "RM502",
                f"{about.title}: its sha256 is {found}, not {one.sha256}",
                file=str(path),
                hint=f"Fetch it again. In {folder}: {about.fetch}",
            ).problems[0]


def data_file(grid: Grid, cell: Cell) -> Path:
    """Return the records of a cell in one file; several are joined in the run's folder."""
    parts = [Path(grid.config.data) / one.file for one in cell.about.data]
    if len(parts) == 1:
        return parts[0]
    joined = grid.out / "data" / f"{cell.benchmark}{parts[0].suffix}"
    size = sum(part.stat().st_size for part in parts)
    if not joined.exists() or joined.stat().st_size < size:
        joined.parent.mkdir(parents=True, exist_ok=True)
        partial = joined.with_suffix(".partial")
        with partial.open("wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    last = b"\n"
                    while block := source.read(1 << 20):
                        out.write(block)
                        last = block[-1:]
                    if last != b"\n":
                        out.write(b"\n")
        partial.replace(joined)
    return joined


def _sha256(path: Path, out: Path) -> str:
    """Return a file's sha256; that of an unchanged file is remembered, for some have gigabytes."""
    memory, stat = out / CHECKED, path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    known = json.loads(memory.read_text()) if memory.is_file() else {}
    if key not in known:
        with path.open("rb") as stream:
            known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        if out.is_dir():
            write_whole(memory, json.dumps(known, indent=1) + "\n")
    return str(known[key])
