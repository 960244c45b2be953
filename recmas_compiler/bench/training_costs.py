"""`recmasc bench training`: what can learn from the same records, beside its costs.

Every row is trained, measured and asked in processes of its own, so that its memory is its own;
a row that is finished is kept in `table.json`, and one that was stopped goes on from its last
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from recmas_compiler.bench.looplm_spec import looplm_spec
from recmas_compiler.bench.own_process import Ran, run_alone
from recmas_compiler.bench.training_measure import MODULE as MEASURE
from recmas_compiler.bench.training_rows import (
    TEXTGRAD,
    Row,
    TrainingCostOptions,
    rows_of,
    sets,
)
from recmas_compiler.evaluation.intervals import wilson
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import Spec, load_spec
from recmas_compiler.training.settings import TrainSettings, train_settings
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import exclusive, sha256_of, write_whole
from recmas_runtime.core.progress import Advance, Progress
from recmas_runtime.core.text import counted

TABLE: Final = "table.json"
LOOPLM_SPEC: Final = "looplm.yaml"
LINKS: Final = "links"
_STEP: Final = b'"kind": "step"'
# What concerns one row alone: a missing package, nothing to learn, memory, a loss that diverges.
_OF_ONE_ROW: Final = ("RM201", "RM506", "RM507", "RM508", "RM701", "RM702", "RM705")


@dataclass(kw_only=True)
class RowResult:
    """What is known of a row.

    Attributes:
        why_not: Why it has no figures; empty if it has.
        steps: Of its last stage.
        step_s: Median seconds of a step; of an inner stage, of a step of each agent.
        wall_s: Of the whole process that trained it, and of that of the row that it starts from:
            loading, closed forms and measuring included. Parts of a resumed run add up. Of textual
            gradients, of their steps.
        losses: Held out, in nats per token of the answer: its own first, then under controls.
        accuracy: Share of right answers with Wilson's interval; `by` says what right is.
    """

    key: str
    title: str
    learns: str
    why_not: str = ""
    trainable_parameters: int | None = None
    steps: int | None = None
    step_s: float | None = None
    peak_memory_mb: float | None = None
    wall_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, Any] | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has figures."""
        return not self.why_not

    def price(self, hourly_rate: float | None) -> float | None:
        """Return what its training costs at a rate; None where nothing was trained."""
        if hourly_rate is None or not self.learns or not self.is_done:
            return None
        return hourly_rate * self.wall_s / 3600


@dataclass(kw_only=True)
class TrainingCosts:
    """The table, as far as it has come."""

    options: TrainingCostOptions
    rows: list[RowResult] = field(default_factory=list)
    interrupted: bool = False


def measure_training(
    options: TrainingCostOptions, *, commands: str, progress: Progress
) -> TrainingCosts:
    """Train and measure every row; what concerns one row alone is told in it.

    Args:
        commands: The module that runs `recmasc`.

    Raises:
        RecmasError: RM506 for options that make no sense, RM302 for a folder with a table where
            `resume` is off, RM703 for one with another run's, and what concerns all rows.
    """
    options.check()
    spec = load_spec(options.spec, overrides=options.overrides)
    settings = train_settings(spec)
    program = run_pipeline(build_topology(spec))
    out = options.out.absolute()
    identity = _identity(options, spec, settings)
    table = out / TABLE
    kept = _kept(table, identity, resume=options.resume)
    out.mkdir(parents=True, exist_ok=True)
    looplm = out / LOOPLM_SPEC
    no_looplm = ""
    try:
        write_whole(looplm, looplm_spec(spec, program, links_dir=out / LINKS / "looplm"))
    except RecmasError as error:
        no_looplm = error.problems[0].message
    found = TrainingCosts(options=options)
    rows = rows_of(options, spec, looplm)
    with (
        exclusive(out, code="RM302", what="table of training costs"),
        progress.stage("Training costs", len(rows)) as advance,
    ):
        for row in rows:
            result = kept.get(row.key)
            if result is None:
                result = RowResult(key=row.key, title=row.title, learns=row.learns)
                if row.key == "looplm" and no_looplm:
                    result.why_not = no_looplm
                else:
                    run = _RowRun(options, settings, row, out, commands, advance, result)
                    try:
                        run.go({one.key: one for one in found.rows})
                    except KeyboardInterrupt:
                        found.interrupted = True
                        break
            found.rows.append(result)
            _write(table, identity, found.rows)
            advance(note=row.title)
    return found


@dataclass
class _RowRun:
    """One row on its way."""

    options: TrainingCostOptions
    settings: TrainSettings
    row: Row
    out: Path
    commands: str
    advance: Advance
    result: RowResult

    @property
    def folder(self) -> Path:
        """Where everything of the row lies."""
        return self.out / self.row.key

    def go(self, others: Mapping[str, RowResult]) -> None:
        """Train, measure and ask; leave the figures in the result.

        Raises:
            RecmasError: What concerns other rows too.
            KeyboardInterrupt: The row is not finished.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        start = others.get(self.row.starts_from or "")
        try:
            if start is not None and not start.is_done:
                self.result.why_not = f"there is nothing to start from: {start.why_not}"
                return
            if self.row.train is not None:
                self._train(start)
            if self.row.kind is not None:
                self._measure()
            self._ask()
        except RecmasError as error:
            first = error.problems[0]
            # A self-loop is a spec of its own: what is wrong with it is nothing to the others.
            if first.code not in _OF_ONE_ROW and self.row.key != "looplm":
                raise
            self.result.why_not = f"{first.message} ({first.code})"

    def _train(self, start: RowResult | None) -> None:
        assert self.row.train is not None
        overrides = (*self.row.overrides, f"train.links_dir={self.out / LINKS / self.row.key}")
        if start is not None:
            links = self.out / start.key / "inner" / "links"
            shutil.copytree(links, self.folder / "inner" / "links", dirs_exist_ok=True)
        steps = self.options.steps
        ran = self._recmasc(
            "train",
            str(self.row.spec),
            "--out",
            str(self.folder),
            "--resume",
            "--quiet",
            *self.row.train,
            *(("--steps", str(steps)) if steps is not None else ()),
            *sets(overrides),
        )
        self._note_wall(ran.wall_s)
        if ran.interrupted:
            raise KeyboardInterrupt
        costs: dict[str, dict[str, Any]] = ran.data["costs"]
        # An inner stage has a loop for every agent, one after the other.
        last = [costs["outer"]] if "outer" in costs else list(costs.values())
        self.result.trainable_parameters = sum(cost["trainable_parameters"] for cost in last)
        self.result.steps = max(cost["steps"] for cost in last)
        self.result.step_s = sum(cost["step_seconds"] for cost in last)
        self.result.peak_memory_mb = max(cost["peak_memory_mb"] for cost in costs.values())
        self.result.wall_s = self._walls() + (start.wall_s if start is not None else 0.0)

    def _measure(self) -> None:
        overrides = list(self.row.overrides)
        if self.row.model is not None:
            overrides.append(self._own_backbone)
        request = {
            "spec": str(self.row.spec),
            "overrides": overrides,
            "kind": self.row.kind,
            "links": None if self.row.links is None else str(self.folder / self.row.links),
        }
        data = run_alone(MEASURE, [json.dumps(request)], log=self._log).data
        self.result.losses = data["losses"]
        right, records = data["num_exact"], data["num_records"]
        if self.options.data is None and records:
            self.result.accuracy = _accuracy(right, records, by="exact")

    def _ask(self) -> None:
        """Build a bundle and ask it the questions, if there are any."""
        options, row = self.options, self.row
        if options.data is None or options.protocol is None:
            if row.key == TEXTGRAD:
                self.result.why_not = "textual gradients need --data and --protocol"
            return
        overrides = list(row.overrides)
        # Untrained systems share a bundle, whatever is asked of it.
        bundle = self.folder / "bundle" if row.train is not None else self.out / "bundle"
        links = self.out / LINKS / "none" if row.links is None else self.folder / row.links
        overrides.append(f"train.links_dir={links}")
        if row.model is not None:
            overrides.append(self._own_backbone)
        built = ("build", str(row.spec), "--out", str(bundle), "--quiet")
        self._recmasc(*built, *sets(overrides))
        limit = () if options.limit is None else ("--limit", str(options.limit))
        ran = self._recmasc(
            "eval",
            str(bundle),
            "--data",
            str(options.data),
            "--protocol",
            options.protocol,
            "--baseline",
            row.baseline,
            "--out",
            str(self.folder / "answers"),
            "--resume",
            "--quiet",
            *limit,
            *self._textgrad(),
        )
        if ran.interrupted:
            raise KeyboardInterrupt
        system = next(s for s in ran.data["systems"] if s["name"] == row.baseline)
        self.result.accuracy = _accuracy(
            system["num_right"], system["num_questions"], by=options.protocol
        )
        if row.key == TEXTGRAD:
            self._note_textgrad(ran)

    def _textgrad(self) -> tuple[str, ...]:
        """Return the options of textual gradients: the same records, steps and batches."""
        if self.row.key != TEXTGRAD:
            return ()
        outer = self.settings.section.outer
        steps = outer.steps if self.options.steps is None else self.options.steps
        given = {"data": self.settings.data, "steps": steps, "batch": outer.batch_size}
        return tuple(
            part for key, value in given.items() for part in ("--textgrad", f"{key}={value}")
        )

    def _note_textgrad(self, ran: Ran) -> None:
        told: dict[str, Any] = ran.data[TEXTGRAD]
        steps, seconds = len(told["steps"]), told["spent"]["seconds"]
        self.result.trainable_parameters = 0
        self.result.peak_memory_mb = ran.peak_memory_mb
        self.result.wall_s = seconds
        self.result.steps = steps
        self.result.step_s = seconds / steps if steps else None

    @property
    def _own_backbone(self) -> str:
        return f"backbones.{self.row.backbone}.source={self.folder / (self.row.model or '')}"

    @property
    def _log(self) -> Path:
        return self.out / f"{self.row.key}.log"

    def _recmasc(self, *arguments: str) -> Ran:
        offline = self.options.offline and arguments[0] in ("train", "build")
        return run_alone(
            self.commands,
            [*arguments, *(("--offline",) if offline else ()), "--json"],
            log=self._log,
            look=self._look(arguments[0]),
        )

    def _look(self, what: str) -> Callable[[], None]:
        """Return what tells how far a command has come."""

        def look() -> None:
            done = ""
            if what == "train":
                steps = 0
                for path in self.folder.glob("**/metrics.jsonl"):
                    with suppress(OSError):
                        steps += path.read_bytes().count(_STEP)
                done = f", {counted(steps, 'step')}"
            self.advance(0, note=f"{self.row.title}: {what}{done}")

        return look

    def _note_wall(self, seconds: float) -> None:
        """Keep how long a process ran: one that is gone on with has several."""
        with (self.folder / "wall_s.txt").open("a", encoding="ascii") as file:
            file.write(f"{seconds}\n")

    def _walls(self) -> float:
        lines = (self.folder / "wall_s.txt").read_text(encoding="ascii").split()
        return sum(map(float, lines))


def _accuracy(right: float, num: int, *, by: str) -> dict[str, Any]:
    found = wilson(right, num)
    return {
        "share": right / num if num else 0.0,
        "low": found.low,
        "high": found.high,
        "right": right,
        "of": num,
        "by": by,
    }


def _identity(
    options: TrainingCostOptions, spec: Spec, settings: TrainSettings
) -> dict[str, str | int | None]:
    """Return what the rows are made of; which of them there are, and the rate, may change."""
    held_out = settings.held_out
    return {
        "the spec": hashlib.sha256(spec.resolved_yaml().encode()).hexdigest(),
        "the data": sha256_of(settings.data) if settings.data.is_file() else None,
        "the held-out data": sha256_of(held_out) if isinstance(held_out, Path) else None,
        "--steps": options.steps,
        "--data": None if options.data is None else sha256_of(options.data),
        "--protocol": options.protocol,
        "--limit": options.limit,
        "--rounds": ",".join(map(str, options.rounds)),
    }


def _kept(
    table: Path, identity: Mapping[str, str | int | None], *, resume: bool
) -> dict[str, RowResult]:
    """Return the finished rows of an earlier run.

    Raises:
        RecmasError: RM302 if there is one and `resume` is off, RM703 if it is another one's.
    """
    if not table.exists():
        return {}
    if not resume:
        hint = "Go on with --resume, or choose another --out."
        raise fail("RM302", f"{table} is there already", hint=hint)
    try:
        told = json.loads(table.read_bytes())
        rows = [RowResult(**row) for row in told["rows"]]
        other = [name for name, value in identity.items() if told["identity"].get(name) != value]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "Choose another --out, or delete it."
        raise fail("RM703", f"{table} cannot be read ({error})", hint=hint) from error
    if other:
        raise fail(
            "RM703",
            f"{table} is of another run: {', '.join(other)} differ",
            hint="Choose another --out.",
        )
    return {row.key: row for row in rows if row.is_done}


def _write(table: Path, identity: Mapping[str, Any], rows: Sequence[RowResult]) -> None:
    content = {"identity": dict(identity), "rows": [asdict(row) for row in rows]}
    write_whole(table, json.dumps(content, indent=1) + "\n")
