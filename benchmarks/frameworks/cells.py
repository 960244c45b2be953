"""A cell of the race: one system on one endpoint at one number of rounds over a few questions.

Every cell has processes of its own, so that no system finds a cache that another one filled.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from processes import free_port, peak_kib, processor_s, running, wait_until_up
from recorder import Call, Recorder, recording

HERE = Path(__file__).parent
# Asked first in every process, and not counted.
WARM_UP = "A hen lays 2 eggs a day. How many eggs does it lay in a week?"
LLAMA_CPP, RECMAS = "llama.cpp", "recmas serve"
ENDPOINTS = (LLAMA_CPP, RECMAS)
IN_PROCESS = "in process"
# Switches of the packages; that nothing leaves the machine is also held by every adapter.
SILENT = {
    "ANONYMIZED_TELEMETRY": "False",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TRACKING": "true",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "127.0.0.1",
    "OTEL_SDK_DISABLED": "true",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True, kw_only=True)
class Racer:
    """A system: which adapter it is, and the environment that its packages are in.

    Attributes:
        environment: A folder below `--environments`; empty for this program's own packages.
        asks: Whether it asks an endpoint; the others hold the model themselves.
        precision: That it always has, whatever the others run in.
    """

    adapter: str
    environment: str = ""
    baseline: str = "latent"
    asks: bool = True
    precision: str | None = None


RACERS: Mapping[str, Racer] = {
    "plain": Racer(adapter="plain_team.py"),
    "langgraph": Racer(adapter="langgraph_team.py", environment="langgraph"),
    "crewai": Racer(adapter="crewai_team.py", environment="crewai"),
    "crewai-own": Racer(adapter="crewai_team.py", environment="crewai", baseline="own"),
    "autogen": Racer(adapter="autogen_team.py", environment="autogen"),
    "avp": Racer(adapter="avp_team.py", environment="avp", asks=False, precision="float32"),
    "text": Racer(adapter="recmas_team.py", baseline="text", asks=False),
    "latent": Racer(adapter="recmas_team.py", asks=False),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What runs in one go."""

    system: str
    endpoint: str
    rounds: int
    block: int
    at_once: int = 1

    @property
    def name(self) -> str:
        """Return the name of its file."""
        endpoint = self.endpoint.replace(" ", "-")
        at_once = f"-x{self.at_once}" if self.at_once > 1 else ""
        return f"{self.system}-{endpoint}-r{self.rounds}{at_once}-b{self.block}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells have in common.

    Attributes:
        model: The GGUF file that llama.cpp serves.
        weights: The folder that AVP loads.
        single: The bundle that `recmas serve` serves; `team` is that of the team.
    """

    team_file: Path
    max_tokens: int
    latent_steps: int
    threads: int
    environments: Path
    llama_server: Path
    model: Path
    weights: Path
    single: Path
    team: Path


def plan(
    systems: Sequence[str],
    endpoints: Sequence[str],
    questions_by_rounds: Mapping[int, int],
    block: int,
    at_once: Sequence[int] = (1,),
) -> list[Cell]:
    """Return all cells in the order they run: block by block, another system first each time.

    AVP takes one question at a time.
    """
    cells = []
    for number in range(-(-max(questions_by_rounds.values()) // block)):
        for rounds, questions in questions_by_rounds.items():
            if number * block >= questions:
                continue
            first = (number + rounds) % len(systems)
            for system in (*systems[first:], *systems[:first]):
                where = endpoints if RACERS[system].asks else (IN_PROCESS,)
                cells += [
                    Cell(
                        system=system,
                        endpoint=endpoint,
                        rounds=rounds,
                        block=number,
                        at_once=together,
                    )
                    for endpoint in where
                    for together in at_once
                    if together == 1 or system != "avp"
                ]
    return cells


def run_cell(
    cell: Cell, questions: Sequence[Mapping[str, str]], setting: Setting, logs: Path
) -> dict[str, Any]:
    """Ask every question; returns a row for each, as JSON."""
    log = logs / f"{cell.name}.log"
    log.write_text("", encoding="utf-8")
    with ExitStack() as stack:
        recorder, server = None, None
        if cell.endpoint != IN_PROCESS:
            url, server = stack.enter_context(_endpoint(cell, setting, log))
            recorder = stack.enter_context(recording(url))
        command = _command(cell, setting, recorder)
        environment = _environment(logs)
        adapter = stack.enter_context(
            running(command, log=log, environment=environment, pipes=True)
        )
        assert adapter.stdin is not None
        assert adapter.stdout is not None
        _said(adapter.stdout, log)
        rows: list[dict[str, Any]] = []
        groups = [[{"id": "warm-up", "question": WARM_UP}]]
        for start in range(0, len(questions), cell.at_once):
            groups.append([dict(q) for q in questions[start : start + cell.at_once]])
        for group in groups:
            before = processor_s(server) if server else 0.0
            words = {"questions": [question["question"] for question in group]}
            print(json.dumps(words), file=adapter.stdin, flush=True)
            said = _said(adapter.stdout, log)
            if server:
                said["server_processor_s"] = processor_s(server) - before
                said["server_peak_kib"] = peak_kib(server)
            rows += _rows(group, said, recorder)
    return {"cell": asdict(cell), "rows": rows[1:]}


def _rows(
    group: Sequence[Mapping[str, str]], said: dict[str, Any], recorder: Recorder | None
) -> list[dict[str, Any]]:
    """Return a row for each question: its answer, its calls, and its share of the time."""
    answers = said.pop("answers")
    calls = recorder.take() if recorder else []
    for name in ("seconds", "processor_s", "server_processor_s"):
        if name in said:
            said[name] /= len(group)
    rows = []
    for question, answer in zip(group, answers, strict=True):
        row = {"id": question["id"], **answer, **said}
        if recorder:
            # Prompts begin with the question, and the calls of one question come one by one.
            row |= _counts([c for c in calls if question["question"] in c.messages[-1]["content"]])
        rows.append(row)
    return rows


def _counts(calls: Sequence[Call]) -> dict[str, Any]:
    return {
        "calls": len(calls),
        "prompt_tokens": sum(call.prompt_tokens for call in calls),
        "cached_tokens": sum(call.cached_tokens for call in calls),
        "written_tokens": sum(call.written_tokens for call in calls),
        "asked": [asdict(call) for call in calls],
    }


def _said(lines: IO[str], log: Path) -> dict[str, Any]:
    line = lines.readline()
    if not line:
        words = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise SystemExit(f"an adapter ended before it answered; the end of {log}:\n{words}")
    said: dict[str, Any] = json.loads(line)
    return said


def _command(cell: Cell, setting: Setting, recorder: Recorder | None) -> list[str]:
    racer = RACERS[cell.system]
    python = sys.executable
    if racer.environment:
        python = str(setting.environments.absolute() / racer.environment / "bin/python")
    bundle = setting.weights if cell.system == "avp" else setting.team
    options = {
        "--team": setting.team_file,
        "--rounds": cell.rounds,
        "--max-tokens": setting.max_tokens,
        "--url": recorder.url if recorder else "",
        "--model": "single",
        "--bundle": bundle,
        "--baseline": racer.baseline,
        "--threads": setting.threads,
        "--latent-steps": setting.latent_steps,
        "--at-once": cell.at_once,
    }
    adapter = str(HERE / "adapters" / racer.adapter)
    return [python, adapter, *(str(word) for pair in options.items() for word in pair)]


def _environment(home: Path) -> dict[str, str]:
    """Return what an adapter sees: no keys of others, and a home of the race's own."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    folder = str((home / "home").absolute())
    Path(folder).mkdir(exist_ok=True)
    return {**kept, **SILENT, "HOME": folder, "CREWAI_STORAGE_DIR": folder}


@contextmanager
def _endpoint(cell: Cell, setting: Setting, log: Path) -> Iterator[tuple[str, int]]:
    """Start a server; gives its address in OpenAI's form, and its process."""
    port, threads = free_port(), setting.threads
    if cell.endpoint == LLAMA_CPP:
        command = (
            f"{setting.llama_server} --model {setting.model} --alias single --threads {threads}"
        )
        command += f" --host 127.0.0.1 --port {port} --ctx-size 8192 --offline"
        if cell.at_once > 4:  # its own number of slots
            command += f" --parallel {cell.at_once}"
    else:
        recmas = Path(sys.executable).with_name("recmas")
        command = f"{recmas} serve single={setting.single} --port {port} --threads {threads} --json"
    health = f"http://127.0.0.1:{port}/{'ready' if cell.endpoint == RECMAS else 'health'}"
    with running(command.split(), log=log, environment=os.environ) as server:
        wait_until_up(health, server, log)
        yield f"http://127.0.0.1:{port}/v1", server.pid
