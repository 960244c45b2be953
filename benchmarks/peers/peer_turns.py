"""The race itself: everyone open in a process of its own, asked in turn, cell by cell.

What is asked of one is asked of all within seconds, so that ratios are of turns, not of hours.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any, Final

import numpy as np
from contenders import LOAD, TEXT, TRANSFORMERS, Cell, Contender
from numpy.typing import NDArray

from recmas_compiler.bench.engine_worker import weight_bytes
from recmas_compiler.bench.engines import Reader, host_reader

# Programs are started, and looked at from outside, as in the race of frameworks.
sys.path.append(str(Path(__file__).parents[1] / "frameworks"))
from cells import SILENT
from processes import TICKS, peak_kib, processor_s, running

# Threads of the one before may go on turning for a few milliseconds.
REST_S: Final = 0.03
# Reads of a step's weights before and behind each visit; the fastest of them is its floor.
READS: Final = 3
LOADS: Final = 3
MIB: Final = 1024
KEPT: Final = ("PATH", "LANG", "LC_ALL", "RECMAS_CACHE")

Row = dict[str, dict[str, float]]  # a turn: what each contender's reply was, by its name


class Opened:
    """A contender in its process."""

    def __init__(self, contender: Contender, process: Popen[str], log: Path) -> None:
        self.contender, self.process, self._log = contender, process, log
        said = self._said()
        self.open_s: float = said["open_s"]
        self.about: Mapping[str, Any] = said["about"]
        graph = contender.step_graph
        self.step_bytes: int = self.about["step_bytes"] + (weight_bytes(graph) if graph else 0)

    def ask(self, request: Mapping[str, Any]) -> dict[str, float]:
        """Put a request and return the reply."""
        assert self.process.stdin is not None, "stdin is a pipe"
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._said()

    def _said(self) -> dict[str, Any]:
        assert self.process.stdout is not None, "stdout is a pipe"
        line = self.process.stdout.readline()
        if not line:
            words = self._log.read_text(encoding="utf-8", errors="replace")[-1500:]
            name = self.contender.name
            raise SystemExit(f"{name} ended before it answered; the end of {self._log}:\n{words}")
        said: dict[str, Any] = json.loads(line)
        return said


@dataclass(frozen=True, kw_only=True)
class Race:
    """Who races, and where what is found is kept.

    Attributes:
        folder: Gets `cells/NAME.json`, `files/NAME.json` and `logs/`.
        turns: Of each cell that count, behind one that does not.
    """

    contenders: Sequence[Contender]
    environments: Path
    folder: Path
    threads: int
    turns: int

    def run(self, cells: Sequence[Cell]) -> None:
        """Measure every cell that is not there yet, and loading before them."""
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        self._load()
        left = [cell for cell in cells if len(self.rows(cell.name)) < self.turns]
        if not left:
            return
        with ExitStack() as stack:
            opened = [stack.enter_context(self.opened(c)) for c in self.contenders]
            for each in opened:
                self.note(each.contender, **self._facts(each))
            readers = {n: host_reader(n, threads=self.threads) for n in _sizes(opened)}
            for number, cell in enumerate(left, start=1):
                say(f"{number} of {len(left)}: {cell.name}")
                self._cell(cell, opened, readers)
                if cell.name == TEXT:
                    for each in opened:
                        peak = peak_kib(each.process.pid) / MIB
                        self.note(each.contender, memory_mib=round(peak, 1))

    @contextmanager
    def opened(self, contender: Contender) -> Iterator[Opened]:
        """Run a contender until the context is left."""
        log = self.folder / "logs" / f"{contender.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        options = json.dumps(contender.options)
        command = [*contender.command(self.environments), options]
        environment = _environment(self.folder)
        with running(command, log=log, environment=environment, pipes=True) as process:
            yield Opened(contender, process, log)

    def rows(self, cell: str) -> list[Row]:
        """Return the turns of a cell that are there."""
        return list(read(self._cell_path(cell)).get("turns", []))

    def note(self, contender: Contender, **facts: object) -> None:
        """Add what was found out about a contender's file; what is there of it stays."""
        path = self._file(contender)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {**facts, **read(path)})

    def _load(self) -> None:
        """Open everyone alone, in turn; the first time, files come from the disk."""
        loads = min(LOADS, self.turns)
        rows = self.rows(LOAD)
        if len(rows) >= loads:
            return
        say("loading")
        busy = Busy()
        for turn in range(-1 if not rows else len(rows), loads):
            row: Row = {}
            for contender in _rotated(self.contenders, turn):
                with self.opened(contender) as opened:
                    row[contender.name] = {"seconds": opened.open_s}
            if turn >= 0:
                rows.append(row)
                self._keep(LOAD, {}, rows, busy)

    def _cell(self, cell: Cell, opened: Sequence[Opened], readers: Mapping[int, Reader]) -> None:
        rows, busy = self.rows(cell.name), Busy()
        for turn in [-1, *range(len(rows), self.turns)]:
            row: Row = {}
            for each in _rotated(opened, turn):
                row[each.contender.name] = _visit(each, cell, readers.get(each.step_bytes))
            if turn >= 0:
                rows.append(row)
                self._keep(cell.name, cell.request, rows, busy)
        for each in opened:
            each.ask({"do": "drop"})

    def _keep(self, name: str, request: Mapping[str, Any], rows: Sequence[Row], busy: Busy) -> None:
        found = {"request": request, "others": round(busy.others(), 3), "turns": rows}
        write(self._cell_path(name), found)

    def _cell_path(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"

    @staticmethod
    def _facts(opened: Opened) -> dict[str, Any]:
        about = opened.about
        return {
            "version": about["version"],
            "step_bytes": opened.step_bytes,
            "head_in_prompt": about["head_in_prompt"],
            "head_in_step": about["head_in_step"],
            "settings": about["settings"],
        }

    def losses(self, texts: Sequence[Sequence[int]], keys: Mapping[str, str]) -> None:
        """Measure the loss of everyone on the same texts, each in a process for that alone.

        Args:
            texts: As tokens.
            keys: By name what tells one file on these texts from another: a loss is measured once.
        """

        def losses(contender: Contender) -> dict[str, Any]:
            with self.opened(contender) as opened:
                return opened.ask({"do": "losses", "texts": texts})

        for contender in self.contenders:
            self._once("loss", keys[contender.name], contender, losses)

    def unknown_errors(self, keys: Mapping[str, str]) -> list[Contender]:
        """Return those whose error was never measured."""
        kept = read(self._kept)
        return [c for c in self.contenders if f"error {keys[c.name]}" not in kept]

    def errors(
        self, others: Sequence[Contender], ids: Sequence[int], keys: Mapping[str, str]
    ) -> None:
        """Measure how far logits on random weights are from those of transformers in float32.

        `others` are those on such weights whose error is unknown, by the same names.
        """
        by_name = {other.name: other for other in others}
        exact: list[NDArray[np.float32]] = []

        def logits(contender: Contender) -> NDArray[np.float32]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "logits.npy")
                with self.opened(contender) as opened:
                    opened.ask({"do": "logits", "ids": ids, "to": str(path)})
                found: NDArray[np.float32] = np.load(path)
                return found

        def error(contender: Contender) -> dict[str, Any]:
            if not exact:
                exact.append(logits(next(c for c in others if c.peer == TRANSFORMERS)))
            off = logits(by_name[contender.name]) - exact[0]
            share = float(np.linalg.norm(off) / np.linalg.norm(exact[0]))
            return {"error": float(f"{share:.5g}")}

        unknown = self.unknown_errors(keys)
        for contender in self.contenders:
            if contender in unknown and contender.name not in by_name:
                say(f"error: {contender.name} has no file of random weights, and gets none")
            else:
                self._once("error", keys[contender.name], contender, error)

    def _once(
        self,
        what: str,
        key: str,
        contender: Contender,
        measure: Callable[[Contender], dict[str, Any]],
    ) -> None:
        """Note what does not depend on time: it is kept beside the files, by their key."""
        key = f"{what} {key}"
        kept = read(self._kept)
        if key not in kept:
            say(f"{what}: {contender.name}")
            kept = {**kept, key: measure(contender)}
            write(self._kept, kept)
        self.note(contender, **kept[key])

    @property
    def _kept(self) -> Path:
        return self.environments / "kept.json"

    def _file(self, contender: Contender) -> Path:
        return self.folder / "files" / f"{contender.name}.json"


class Busy:
    """How many processors others had, from when this is made."""

    def __init__(self) -> None:
        self._start, self._all, self._own = time.monotonic(), busy_s(), self._ours()

    def others(self) -> float:
        """Return it as a mean; processes of this race that have ended count as its own."""
        wall = time.monotonic() - self._start
        others = (busy_s() - self._all) - (self._ours() - self._own)
        return max(0.0, others / wall) if wall else 0.0

    @staticmethod
    def _ours() -> float:
        ended = os.times()
        return processor_s(os.getpid()) + ended.children_user + ended.children_system


def busy_s() -> float:
    """Return the seconds that all processors of the machine were busy, since it is up."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    user, nice, system, _idle, _waiting, *others = map(int, first.split()[1:])
    # Of the others, time of guests is in `user` and `nice` already.
    return (user + nice + system + sum(others[:3])) / TICKS


def _visit(opened: Opened, cell: Cell, reader: Reader | None) -> dict[str, float]:
    """Ask one; where it takes a step, its weights are read before and behind that."""
    time.sleep(REST_S)
    if not cell.rows or reader is None:
        return _rounded(opened.ask(cell.request))
    before = min(reader() for _ in range(READS))
    reply = opened.ask(cell.request)
    floor = min(before, *(reader() for _ in range(READS)))
    return _rounded({**reply, "floor_s": floor})


def _rounded(reply: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in reply.items()}


def _rotated(items: Sequence[Any], turn: int) -> list[Any]:
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def _sizes(opened: Sequence[Opened]) -> set[int]:
    return {each.step_bytes for each in opened} - {0}


def _environment(folder: Path) -> dict[str, str]:
    """Return what an adapter sees: a home of the race's own, and nothing that asks a network."""
    home = (folder / "logs/home").absolute()
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, **SILENT, "HOME": str(home)}


def read(path: Path) -> dict[str, Any]:
    """Return what a file of this race holds; nothing if it is not there."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, what: Mapping[str, Any]) -> None:
    """Write a file at once: one that is there is whole."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    new.rename(path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
