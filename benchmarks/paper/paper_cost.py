"""What a run takes, told before it starts: turns, latent steps, tokens, hours and money."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paper_config import Cell, Config, Grid

from recmas_compiler.spec.document.problems import did_you_mean
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import aligned
from recmas_runtime.running.baselines import LATENT, baseline_name


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one answer of a system runs.

    Attributes:
        turns: Prompts of agents that are read.
        thinks: Turns that end in latent steps.
        writes: Turns that end in text, the answer included.
    """

    turns: int
    thinks: int
    writes: int


def _rollout(agents: int, rounds: int) -> Shape:
    turns = agents * rounds
    return Shape(turns=turns, thinks=turns - 1, writes=1)


def _answer_alone(agents: int, rounds: int) -> Shape:
    return Shape(turns=1, thinks=0, writes=1)


def _text(agents: int, rounds: int) -> Shape:
    return Shape(turns=agents * rounds, thinks=0, writes=agents * rounds)


def _moa(agents: int, rounds: int) -> Shape:
    turns = (agents - 1) * rounds + 1
    return Shape(turns=turns, thinks=0, writes=turns)


# Every agent of the released styles thinks in every round, but the last one in the last.
SHAPES: dict[str, Callable[[int, int], Shape]] = {
    LATENT: _rollout,
    "shuffled": _rollout,
    "mean": _rollout,
    "null": _answer_alone,
    "single": _answer_alone,
    "all-context": _answer_alone,
    "text": _text,
    "moa": _moa,
}


def shape_of(system: str, *, agents: int, rounds: int) -> Shape:
    """Return what an answer of a system runs; `text@N` is a text system.

    Raises:
        RecmasError: RM508 for a system that this table does not know.
    """
    name, _, _ = baseline_name(system).partition("@")
    if name not in SHAPES:
        raise fail(
            "RM508",
            f"the table has no system `{system}`",
            hint=f"{did_you_mean(name, SHAPES)} Systems are {', '.join(SHAPES)}.",
        )
    return SHAPES[name](agents, rounds)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a system takes on a cell, or several together.

    Attributes:
        answers: Questions times runs times rollouts.
        tokens: Of text, expected from published counts; the most where there are none.
        most_tokens: If every text grew as long as it may.
    """

    answers: int
    turns: int
    latent_steps: int
    tokens: float
    most_tokens: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            answers=self.answers + other.answers,
            turns=self.turns + other.turns,
            latent_steps=self.latent_steps + other.latent_steps,
            tokens=self.tokens + other.tokens,
            most_tokens=self.most_tokens + other.most_tokens,
        )

    def hours(self, config: Config) -> tuple[float, float]:
        """Return the hours expected, and at most; reading prompts is in neither."""
        rate = config.cost.positions_per_s * 3600
        return (self.latent_steps + self.tokens) / rate, (
            self.latent_steps + self.most_tokens
        ) / rate


NOTHING = Cost(answers=0, turns=0, latent_steps=0, tokens=0.0, most_tokens=0)


def cost_of(grid: Grid, cell: Cell, system: str) -> Cost:
    """Return what a system takes on a cell."""
    config = grid.config
    shape = shape_of(system, agents=len(cell.style.agents), rounds=config.rounds)
    most = cell.protocol.max_new_tokens
    assert most is not None
    about, limit = cell.about, cell.protocol.n
    counts = [n for n in (limit, about.questions or about.records) if n is not None]
    questions = min(counts)
    answers = questions * len(cell.protocol.seeds) * cell.protocol.rollouts
    return Cost(
        answers=answers,
        turns=answers * shape.turns,
        latent_steps=answers * shape.thinks * config.latent_steps,
        tokens=answers * _expected(grid, cell, system, shape, most),
        most_tokens=answers * shape.writes * most,
    )


def _expected(grid: Grid, cell: Cell, system: str, shape: Shape, most: int) -> float:
    """Return the tokens of text that an answer takes, with all that agents write for it."""
    tokens_of = grid.published.tokens_of
    whole = tokens_of(cell.style.name, system, cell.benchmark)
    if whole is not None:
        return min(whole, shape.writes * most)
    # Another style's answers are nearer to it than the limit.
    for style in (cell.style.name, "sequential_scaled", "sequential_light"):
        answer = tokens_of(style, LATENT, cell.benchmark)
        if answer is not None:
            return shape.writes * min(answer, most)
    return shape.writes * most


def plan_text(grid: Grid, cells: Sequence[Cell]) -> str:
    """Return the cost of some cells as it is shown before a run."""
    config = grid.config
    head = (
        "cell", "answers", "agent turns", "latent steps", "tokens", "at most",
        "hours", "at most", config.cost.currency, "at most",
    )  # fmt: skip
    rows = [head]
    whole = NOTHING
    for cell in cells:
        costs = [cost_of(grid, cell, system) for system in config.systems]
        together = sum(costs, NOTHING)
        whole += together
        rows.append((cell.name, *_figures(together, config)))
    rows.append(("all", *_figures(whole, config)))
    rates, table = config.cost, "\n".join(aligned(rows))
    return (
        f"{table}\n\n"
        f"{len(cells)} cells under {', '.join(config.systems)}; {config.runs} runs.\n"
        f"Assumed: {rates.positions_per_s:g} latent steps and tokens a second on {rates.gpu}, "
        f"{rates.price_per_hour:g} {rates.currency} an hour. Tokens are those that the paper\n"
        "counted (table 2), where it did; otherwise, and at most, every text grows as long as it "
        "may. Building is not in it, nor reading prompts."
    )


def _figures(cost: Cost, config: Config) -> tuple[str, ...]:
    expected, most = cost.hours(config)
    price = config.cost.price_per_hour
    return (
        f"{cost.answers:,}",
        f"{cost.turns:,}",
        f"{cost.latent_steps:,}",
        f"{cost.tokens:,.0f}",
        f"{cost.most_tokens:,}",
        f"{expected:,.1f}",
        f"{most:,.1f}",
        f"{expected * price:,.0f}",
        f"{most * price:,.0f}",
    )
