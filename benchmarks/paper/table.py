"""The paper's main table: five released styles on nine benchmarks, beside published figures.

    python benchmarks/paper/table.py plan CONFIG.yaml      what it takes, and what is missing
    python benchmarks/paper/table.py run CONFIG.yaml       runs what is not done yet; asks first
    python benchmarks/paper/table.py table CONFIG.yaml     the table of what is there

CONFIG is benchmarks/paper/paper.yaml or one like it; docs/paper.md tells what is in it. A cell is a
style on a benchmark, under the system itself, the controls and the baselines. A cell that fails
leaves the others; one that was stopped goes on with its answers. Writes OUT/table.json and
table.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from paper_config import Grid, load_grid
from paper_cost import plan_text
from paper_needs import missing, runnable
from paper_results import table, table_text
from paper_run import Recmasc, is_done, recmasc_process, run_cells

from recmas_runtime.core.errors import Exit, Problem, RecmasError
from recmas_runtime.core.files import exclusive, write_whole
from recmas_runtime.core.text import counted


def main() -> None:
    sys.exit(run_table(sys.argv[1:]))


def run_table(arguments: list[str], recmasc: Recmasc = recmasc_process) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog=Path(__file__).stem, description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["plan", "run", "table"])
    parser.add_argument("config", type=Path)
    parser.add_argument("--yes", action="store_true", help="do not ask before a run")
    parser.add_argument(
        "--skip-missing", action="store_true", help="run the cells for which all files are there"
    )
    given = parser.parse_args(arguments)
    try:
        grid = load_grid(given.config)
        if given.action == "plan":
            return _plan(grid)
        if given.action == "run":
            return _run(grid, recmasc, yes=given.yes, skip_missing=given.skip_missing)
        print(_write(grid))
    except RecmasError as error:
        return _report(error.problems, error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return Exit.INTERRUPTED
    return Exit.OK


def _plan(grid: Grid) -> int:
    print(plan_text(grid, grid.cells))
    lacks = missing(grid)
    if not lacks:
        print("\nAll weights and data are there.")
        return Exit.OK
    print(f"\n{counted(len(runnable(grid, lacks)), 'cell')} can run; the others miss files:")
    for problems in lacks.values():
        for problem in problems:
            print(f"- {problem}")
    return Exit.OK


def _run(grid: Grid, recmasc: Recmasc, *, yes: bool, skip_missing: bool) -> int:
    lacks = missing(grid)
    if lacks and not skip_missing:
        everything = tuple(problem for problems in lacks.values() for problem in problems)
        status = _report(everything, RecmasError(everything).exit_code)
        print("Fetch them, or pass --skip-missing to run the other cells.", file=sys.stderr)
        return status
    cells = [cell for cell in runnable(grid, lacks) if not is_done(grid, cell)]
    if not cells:
        print(_write(grid))
        return Exit.OK
    print(plan_text(grid, cells), file=sys.stderr)
    if not yes and not _agreed():
        print("Nothing was run. Pass --yes to run without a question.", file=sys.stderr)
        return Exit.USAGE
    grid.out.mkdir(parents=True, exist_ok=True)
    failed, interrupted = [], False
    with exclusive(grid.out, code="RM503", what="run of the table"):
        for cell, state in run_cells(grid, cells, recmasc):
            print(f"{cell.name}: {state.status}, {state.seconds:.0f} s", file=sys.stderr)
            for problem in state.problems:
                print(f"  {problem}", file=sys.stderr)
            failed += [cell.name] if state.status == "failed" else []
            interrupted |= state.status == "interrupted"
            _write(grid)
    print(_write(grid))
    if interrupted:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return Exit.INTERRUPTED
    if failed:
        print(f"Failed: {', '.join(failed)}. The same command tries them again.", file=sys.stderr)
        return Exit.RUN_FAILED
    return Exit.OK


def _agreed() -> bool:
    """Ask whether to go on; nobody to ask is no."""
    if not sys.stdin.isatty():
        return False
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _write(grid: Grid) -> str:
    """Write the table as JSON and Markdown; returns the Markdown."""
    found = table(grid)
    text = table_text(found)
    grid.out.mkdir(parents=True, exist_ok=True)
    write_whole(grid.out / "table.json", json.dumps(found, indent=1) + "\n")
    write_whole(grid.out / "table.md", text)
    return text


def _report(problems: tuple[Problem, ...], status: int) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
