"""The rows of the cost table: what learns, which command trains it, how it is measured and asked.

Every row learns from the records of the spec's `train` section, for as many steps of as many
records; no torch is needed to say how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Final, Literal

from recmas_compiler.bench.training_measure import Kind
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import counted, listed

Method = Literal["inner", "outer", "looplm", "lora", "sft", "text", "textgrad"]
METHODS: Final[tuple[Method, ...]] = (
    "inner",
    "outer",
    "looplm",
    "lora",
    "sft",
    "text",
    "textgrad",
)
TEXTGRAD: Final = "textgrad"
_UNTRAINED: Final = ("untrained", "alone", "texts")
MODEL: Final = "model"


@dataclass(frozen=True, kw_only=True)
class TrainingCostOptions:
    """What the command line asks for.

    Attributes:
        methods: None for all of them.
        rounds: Of the outer stage, a row each; none for those of the spec.
        steps: Of every stage and method; None for what the spec says.
        hourly_rate: What an hour of this machine costs, in whatever currency.
        data: Questions to ask built bundles; None counts targets that would be written exactly.
    """

    spec: Path
    out: Path
    overrides: tuple[str, ...] = ()
    methods: tuple[Method, ...] = ()
    rounds: tuple[int, ...] = ()
    steps: int | None = None
    hourly_rate: float | None = None
    data: Path | None = None
    protocol: str | None = None
    limit: int | None = None
    resume: bool = False
    offline: bool = False

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            RecmasError: RM506.
        """
        unknown = [name for name in self.methods if name not in METHODS]
        wrong = {
            f"--method {', '.join(unknown)} is none of {listed(METHODS)}": bool(unknown),
            "--data and --protocol belong together": (self.data is None) != (self.protocol is None),
            "--limit without --data": self.limit is not None and self.data is None,
            f"--hourly-rate {self.hourly_rate} is no price": not 0 <= (self.hourly_rate or 0) < inf,
            f"--rounds {self.rounds} are not all 1 or more": min(self.rounds, default=1) < 1,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise fail("RM506", message, hint="See `recmasc bench training --help`.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        key: Its name in files: its folder within `--out`.
        title: Its name for people.
        learns: What the training changes, in words; empty for what is not trained.
        kind: How it is measured on held-out records; None if that is not possible.
        baseline: How a bundle of it is asked.
        spec: What is trained, measured and built.
        overrides: Of that spec, for all three.
        train: Options of `recmasc train`; None where nothing is trained.
        starts_from: Key of the row whose links it starts from.
        links: Folder of the links that it gives, within its own.
        model: Folder of the backbone that it gives, within its own.
        backbone: The backbone of the spec that the model takes the place of.
    """

    key: str
    title: str
    kind: Kind | None
    baseline: str
    spec: Path
    overrides: tuple[str, ...]
    learns: str = ""
    train: tuple[str, ...] | None = None
    starts_from: str | None = None
    links: str | None = None
    model: str | None = None
    backbone: str = ""


def rows_of(options: TrainingCostOptions, spec: Spec, looplm: Path) -> list[Row]:
    """Return the rows in the order in which they run.

    Args:
        looplm: The spec of the self-loop.
    """
    asked = options.methods or METHODS
    agent = spec.document.answer.agent
    rounds = options.rounds or (spec.document.rounds,)
    system = Row(
        key="untrained",
        title="system, untrained",
        kind="system",
        baseline="latent",
        spec=options.spec.absolute(),
        overrides=(*options.overrides, f"rounds={max(rounds)}"),
        backbone=spec.document.agents[agent].backbone,
    )
    alone = replace(system, key="alone", title=f"`{agent}` alone", kind="single", baseline="single")
    texts = replace(system, key="texts", title="text system", kind="text", baseline="text")
    rows = {"untrained": [system], "alone": [alone], "texts": [texts]}
    rows["inner"] = [
        replace(
            system,
            key="inner",
            title="links, inner stage",
            learns="inner links",
            train=("--stage", "inner"),
            links="inner/links",
        )
    ]
    start = "inner" if "inner" in asked else None
    outer = replace(
        system,
        key="outer",
        title=f"links, {'inner, then ' if start else ''}outer stage",
        learns="links",
        train=("--stage", "outer"),
        starts_from=start,
        links="outer/links",
    )
    rows["outer"] = [
        outer
        if len(rounds) == 1
        else replace(
            outer,
            key=f"outer-{number}",
            title=f"{outer.title}, {counted(number, 'round')}",
            overrides=(*options.overrides, f"rounds={number}"),
        )
        for number in rounds
    ]
    rows["looplm"] = [
        replace(
            system,
            key="looplm",
            title=f"LoopLM of `{agent}`",
            learns="links of the loop",
            spec=looplm,
            overrides=(),
            train=("--stage", "all"),
            links="outer/links",
        )
    ]
    rows["lora"] = [_method(alone, "lora", f"LoRA, `{agent}` alone", "low-rank additions")]
    rows["sft"] = [_method(alone, "sft", f"full fine-tuning, `{agent}` alone", "all weights")]
    rows["text"] = [_method(texts, "text", "text system, fine-tuned", "all weights")]
    rows[TEXTGRAD] = [
        replace(
            system,
            key=TEXTGRAD,
            title="text system, TextGrad",
            learns="prompts",
            kind=None,
            baseline=TEXTGRAD,
        )
    ]
    return [row for key, some in rows.items() if key in (*_UNTRAINED, *asked) for row in some]


def _method(untrained: Row, key: Method, title: str, learns: str) -> Row:
    """Return the row of a method of `recmasc train`, which gives a backbone."""
    return replace(
        untrained,
        key=key,
        title=title,
        learns=learns,
        train=("--method", key),
        model=f"{key}/{MODEL}",
    )


def sets(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return overrides as options of commands."""
    return tuple(part for override in overrides for part in ("--set", override))
