"""What is run, as the three YAML files beside this one and a config say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct, field

from recmas_compiler.evaluation.data.protocol import Protocol, load_protocol
from recmas_compiler.released.styles import STYLES, Style, style_named
from recmas_compiler.spec.document.problems import did_you_mean
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.running.baselines import LATENT

HERE = Path(__file__).parent
HUB = "hf"


class DataFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A published file.

    Attributes:
        file: Where it is expected, relative to the folder of data.
        sha256: None where it is not known.
    """

    file: str
    sha256: str | None


class Benchmark(Struct, frozen=True, forbid_unknown_fields=True):
    """A benchmark as the paper asks it.

    Attributes:
        task: Whose released links answer it.
        set: Overrides of the protocol.
        questions: In the paper; None if not known.
        records: In the files, where the paper does not say how many it asks.
        data: The published files, read one after the other.
        fetch: How to get them, in the folder of data.
        note: What differs from the paper whatever is set.
    """

    title: str
    task: str
    protocol: str
    set: tuple[str, ...]
    questions: int | None
    data: tuple[DataFile, ...]
    fetch: str
    note: str = ""
    records: int | None = None


class StyleSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What a style needs that the others do not.

    Attributes:
        set: Overrides of its spec.
        prompt_tokens: Instead of the config's.
        answer_tokens: Instead of the config's; answers that a benchmark would let grow longer end
            there.
        note: What this makes different from the paper.
    """

    set: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    note: str = ""


class Rates(Struct, frozen=True, forbid_unknown_fields=True):
    """The stated assumptions of a cost; positions are latent steps and tokens of text."""

    gpu: str
    positions_per_s: float
    price_per_hour: float
    currency: str


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A run of the table; `paper.yaml` says what each key means."""

    out: str
    weights: str
    data: str
    styles: dict[str, StyleSettings]
    benchmarks: tuple[str, ...]
    systems: tuple[str, ...]
    cost: Rates
    cells: Literal["all", "published"] = "all"
    runs: int = 5
    rounds: int = 3
    latent_steps: int = 80
    prompt_tokens: int = 4096
    answer_tokens: int = 16000
    batch: int = 16
    device: str = "auto"
    threads: int | None = None
    build_set: tuple[str, ...] = ()
    eval_set: tuple[str, ...] = ()
    limit: int | None = None
    benchmarks_file: str | None = None


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """Where figures are published, and by whom."""

    of: Literal["paper", "authors", "others"]
    text: str


class Row(Struct, frozen=True, forbid_unknown_fields=True):
    """Published figures of one method and style, by benchmark.

    Attributes:
        method: Its name there.
        system: What it is called here; None where recmas has no such system.
    """

    style: str
    values: dict[str, float]
    origin: str = field(name="from")
    method: str = ""
    system: str | None = None


class Published(Struct, frozen=True, forbid_unknown_fields=True):
    """All published figures: accuracies in percent, and tokens of text per answer."""

    sources: dict[str, Source]
    rows: tuple[Row, ...]
    tokens: tuple[Row, ...]

    def tokens_of(self, style: str, system: str, benchmark: str) -> float | None:
        """Return the mean tokens of text per answer, where they are published."""
        for row in self.tokens:
            if (row.style, row.system) == (style, system) and benchmark in row.values:
                return row.values[benchmark]
        return None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A style on a benchmark, under all systems.

    Attributes:
        protocol: As it is asked: the benchmark's, the run's and the style's settings.
        overrides: Those settings, for the command line.
        notes: What differs from the paper.
    """

    style: Style
    benchmark: str
    about: Benchmark
    protocol: Protocol
    overrides: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its folder, and what it is called in messages."""
        return f"{self.style.name}/{self.benchmark}"

    @property
    def bundle(self) -> str:
        """The system that answers, and which of its links."""
        return f"{self.style.name}-{self.about.task}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A config with everything that it names."""

    config: Config
    benchmarks: Mapping[str, Benchmark]
    published: Published
    cells: tuple[Cell, ...]

    @property
    def out(self) -> Path:
        """Where everything is written."""
        return Path(self.config.out)


_T = TypeVar("_T")


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=kind)
    except OSError as error:
        hint = "Give a config, such as benchmarks/paper/paper.yaml."
        message = f"it cannot be read: {error.strerror}"
        raise fail("RM502", message, file=str(path), hint=hint) from error
    except msgspec.DecodeError as error:
        hint = "benchmarks/paper/paper.yaml has every key, with its meaning."
        raise fail("RM506", str(error), file=str(path), hint=hint) from error


def read_published() -> Published:
    """Return the published figures."""
    return _read(HERE / "published.yaml", Published)


def load_grid(path: Path) -> Grid:
    """Return what a config asks for.

    Raises:
        RecmasError: RM502 and RM506 for a config that is not there or malformed, RM600 and RM122
            for settings that a protocol refuses.
    """
    config = _read(path, Config)
    file = HERE / "benchmarks.yaml" if config.benchmarks_file is None else config.benchmarks_file
    known = _read(Path(file), dict[str, Benchmark])
    published = read_published()
    _check(config, known, file=str(path))
    cells = [
        _cell(config, style, config.styles[style], name, known[name])
        for style in config.styles
        for name in config.benchmarks
        if config.cells == "all" or _is_published(published, style, name)
    ]
    if not cells:
        hint = "Name others, or say `cells: all`."
        raise fail("RM506", "the paper has no figure for these styles and benchmarks", hint=hint)
    return Grid(config=config, benchmarks=known, published=published, cells=tuple(cells))


def _check(config: Config, known: Mapping[str, Any], *, file: str) -> None:
    """Refuse what is not there, all of it at once."""
    problems = []

    def refuse(message: str, hint: str) -> None:
        problems.append(fail("RM506", message, file=file, hint=hint).problems[0])

    for style in config.styles:
        if style not in STYLES:
            refuse(f"there is no released style `{style}`", did_you_mean(style, STYLES))
    for name in config.benchmarks:
        if name not in known:
            refuse(f"there is no benchmark `{name}`", did_you_mean(name, known))
    for key in ("styles", "benchmarks", "systems"):
        if not getattr(config, key):
            refuse(f"`{key}` is empty", "Name at least one.")
    if LATENT not in config.systems:
        refuse(f"`systems` lacks `{LATENT}`", "The others are compared with it.")
    for key in ("runs", "rounds", "batch", "prompt_tokens", "answer_tokens"):
        if getattr(config, key) < 1:
            refuse(f"`{key}` is {getattr(config, key)}", "Give at least 1.")
    if config.cost.positions_per_s <= 0:
        refuse(f"`cost.positions_per_s` is {config.cost.positions_per_s}", "Give more than 0.")
    if problems:
        raise RecmasError(problems)


def _is_published(published: Published, style: str, benchmark: str) -> bool:
    return any(
        row.style == style
        and benchmark in row.values
        and published.sources[row.origin].of == "paper"
        for row in published.rows
    )


def _cell(config: Config, style: str, settings: StyleSettings, name: str, about: Benchmark) -> Cell:
    seeds = ",".join(map(str, range(config.runs)))
    overrides = [*about.set, f"seeds=[{seeds}]", *config.eval_set]
    if config.limit is not None:
        overrides.append(f"n={config.limit}")
    most = settings.answer_tokens or config.answer_tokens
    asked = load_protocol(about.protocol, overrides=overrides)
    notes = [note for note in (about.note,) if note]
    if asked.max_new_tokens is None or asked.max_new_tokens > most:
        overrides.append(f"max_new_tokens={most}")
        notes.append(settings.note or f"answers end at {most} tokens")
    paper = load_protocol(about.protocol, overrides=about.set)
    asked = load_protocol(about.protocol, overrides=overrides)
    for key in ("rollouts", "temperature", "top_p"):
        if (now := getattr(asked, key)) != (then := getattr(paper, key)):
            notes.append(f"{key} is {now:g}, not {then:g}")
    if (config.rounds, config.latent_steps, config.runs) != (3, 80, 5):
        notes.append(
            f"{config.rounds} rounds, {config.latent_steps} latent steps, {config.runs} runs, "
            "not 3, 80 and 5"
        )
    return Cell(
        style=style_named(style),
        benchmark=name,
        about=about,
        protocol=asked,
        overrides=tuple(overrides),
        notes=tuple(notes),
    )
