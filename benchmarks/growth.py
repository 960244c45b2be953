"""How the time of the latent phase grows: agents, rounds, records, latent steps, prompts.

    python benchmarks/growth.py BUNDLE [--repeats 2] [--threads N] [--json FILE]
    python benchmarks/growth.py --table-only --json FILE

Engines and weights are the bundle's; only plans and questions differ: a ring of agents on one
backbone, each receiving from the one before it, the last one answering. One thing grows at a time.
Beside FILE there are a table, `.md`, and curves, `.png`, which `--table-only` writes anew from it.

What is worse than linear in a prompt is attention, and that is measured: 64 positions behind more
and more rows differ in nothing else. Their slope gives the attention of a prompt of n positions,
n^2 / 2 pairs of a position and a row; what is left of a prompt's time is fitted once more.

The exponent p is that of t = a + b n^p, fitted by least squares of relative errors. The slope of
log t over log n alone would mix in what does not grow (a > 0 makes it too small) and what is left
out once (the last agent of the last round writes and does not think: a < 0 makes it too large);
with a on its own, p tells how the growing part grows, which is what a limit of 1.05 is about.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from msgspec import structs

import recmas_runtime as rt
from recmas_compiler.analysis.plots import COLOURS, save_figure
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.formats.plan import (
    AgentPlan,
    CachePlan,
    DecodeStep,
    Limits,
    LinkPlan,
    Message,
    Plan,
    PrefillStep,
    PromptPart,
    SendStep,
    Step,
    ThinkStep,
    cache_capacity,
)

THEORY = {
    "agents": "linear",
    "rounds": "linear",
    "latent steps": "linear, and attention over what the steps themselves add",
    "prompt tokens": "linear, and attention over the prompt: up to quadratic",
    "records": "at most linear: they share the reading of weights",
    "one prompt": "linear, and attention over the prompt: up to quadratic",
    "one prompt without attention": "linear",
}
# Positions of the calls behind more and more rows.
CHUNK: Final = 64
ROWS_BEFORE: Final = (0, 512, 1024, 1536, 1984)
ONE_PROMPT: Final = (64, 128, 256, 512, 1024, 2048)
FEWEST: Final = 3
# What an exponent may be and still count as linear.
LINEAR: Final = 1.05


@dataclass(frozen=True)
class Size:
    """One system and one question."""

    agents: int = 2
    rounds: int = 2
    latent_steps: int = 8
    words: int = 32
    records: int = 1


AXES: dict[str, tuple[Sequence[int], Callable[[int], Size]]] = {
    "agents": ((2, 4, 8, 16), lambda n: Size(agents=n)),
    "rounds": ((1, 2, 4, 8), lambda n: Size(rounds=n)),
    "latent steps": ((8, 16, 32, 64, 96), lambda n: Size(latent_steps=n)),
    "prompt tokens": ((64, 128, 256, 512, 1024, 2048), lambda n: Size(latent_steps=2, words=n)),
    "records": ((1, 2, 4, 8, 16, 32), lambda n: Size(records=n)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--most", type=int, help="leave out what is larger, for a short look")
    parser.add_argument("--json", type=Path, default=Path("out/growth.json"))
    parser.add_argument("--table-only", action="store_true", help="of the figures in --json")
    given = parser.parse_args()
    if given.table_only:
        if not given.json.exists():
            raise SystemExit(f"--json {given.json}: there is no such file")
        write(json.loads(given.json.read_text(encoding="utf-8")), given.json)
        return
    if given.bundle is None:
        raise SystemExit("a bundle is missing: `recmasc build SPEC --out DIR` writes one")
    base = rt.load(given.bundle, threads=given.threads)
    figures: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{describe_machine()['cpu']}, {given.threads} threads",
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    most = given.most or max(ONE_PROMPT)
    try:
        for axis, (all_counts, size_of) in AXES.items():
            print(axis, file=sys.stderr, flush=True)
            counts = some_of(all_counts, most)
            sizes = [size_of(n) for n in counts]
            figures[axis] = curve(counts, measure(base, sizes, given.repeats))
        figures |= prompts(base, some_of(ONE_PROMPT, most), given.repeats)
    except KeyboardInterrupt:
        print("interrupted: the curves that ended are written", file=sys.stderr)
        write(figures, given.json)
        sys.exit(130)
    write(figures, given.json)


def some_of(counts: Sequence[int], most: int) -> list[int]:
    """Return those up to the most, or the first three: fewer have no exponent."""
    found = [n for n in counts if n <= most]
    return found if len(found) >= FEWEST else list(counts[:FEWEST])


def write(figures: Mapping[str, Any], path: Path) -> None:
    """Write figures, table and curves, and print the table."""
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(figures) + "\n", encoding="utf-8")
    draw(figures, path.with_suffix(".png"))
    print(table(figures))


def curve(counts: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """Return a curve with its fit."""
    fixed, factor, exponent = fit(counts, seconds)
    return {
        "n": list(counts),
        "seconds": list(seconds),
        "fixed_s": fixed,
        "factor_s": factor,
        "exponent": exponent,
    }


def measure(base: rt.System, sizes: Sequence[Size], repeats: int) -> list[float]:
    """Return the median seconds of the latent phase of each size; sizes take turns."""
    found: list[list[float]] = [[] for _ in sizes]
    systems = [on_ring(base, size) for size in sizes]
    one_token = structs.replace(base.plan.sampling, max_new_tokens=1)
    systems[0].run("warm up", sampling=one_token)
    for _ in range(repeats):
        for size, system, seconds in zip(sizes, systems, found, strict=True):
            questions = ["word " * size.words] * size.records
            (first, *_) = system.run_batch(questions, sampling=one_token)
            if isinstance(first, rt.RecmasError):
                raise first
            seconds.append((first.timing_ms.total - first.timing_ms.decode) / 1e3)
    return [statistics.median(seconds) for seconds in found]


def prompts(base: rt.System, counts: Sequence[int], repeats: int) -> dict[str, Any]:
    """Return the curves of one prompt in one call, with and without its attention."""
    agent = base.plan.agents[base.plan.answer_agent]
    engines = base.loaded.engines
    engine, inner = engines.backbones[agent.backbone], engines.stacked([agent.inner])
    rows_before = [n for n in ROWS_BEFORE if n + CHUNK <= engine.entry.max_positions]

    def call(positions: int, before: int) -> float:
        cache = engine.new_cache(1, cache_capacity(before + positions))
        ids = np.random.default_rng(0).integers(0, engine.entry.vocab_size, (1, positions))
        embeds, last = engine.embed(ids), np.array([positions - 1], np.int64)
        if before:  # rows of zeros cost what others do
            engine.forward(cache, embeds[:, :1], np.zeros(1, np.int64), last * 0, inner)
        start = time.perf_counter()
        engine.forward(cache, embeds, np.array([before], np.int64), last, inner)
        taken = time.perf_counter() - start
        engine.release(cache)
        return taken

    asked = [*((n, 0) for n in counts), *((CHUNK, rows) for rows in rows_before)]
    found: dict[tuple[int, int], list[float]] = {each: [] for each in asked}
    for repeat in range(-1, 2 * repeats + 1):
        for each, seconds in found.items():
            taken = call(*each)
            if repeat >= 0:
                seconds.append(taken)
    whole = [statistics.median(found[n, 0]) for n in counts]
    behind = [statistics.median(found[CHUNK, rows]) for rows in rows_before]
    slope = float(np.polyfit(rows_before, behind, 1)[0])
    pair = max(0.0, slope) / CHUNK  # of a position and a row before it
    rest = [s - pair * n * n / 2 for n, s in zip(counts, whole, strict=True)]
    return {
        "one prompt": curve(counts, whole),
        "one prompt without attention": curve(counts, rest),
        "attention": {
            "positions": CHUNK,
            "rows_before": rows_before,
            "seconds": behind,
            "ns_a_pair": 1e9 * pair,
            "share": [pair * n * n / 2 / s for n, s in zip(counts, whole, strict=True)],
        },
    }


def on_ring(base: rt.System, size: Size) -> rt.System:
    """Return a ring of agents on the engines of a system; all its links weigh the same."""
    (link, *_) = (step.links[0] for step in base.plan.steps if isinstance(step, SendStep))
    loaded = base.loaded
    operands = loaded.engines.operands
    shared = {**operands, **dict.fromkeys(ring_links(size), operands[link])}
    engines = replace(loaded.engines, operands=shared)
    return rt.System(ring(base.plan, size), replace(loaded, engines=engines))


def ring_links(size: Size) -> list[str]:
    return [f"a{i}->a{(i + 1) % size.agents}" for i in range(size.agents)]


def ring(plan: Plan, size: Size) -> Plan:
    """Return the plan of a ring of agents; they are like a given plan's answer agent."""
    like, links = plan.agents[plan.answer_agent], ring_links(size)
    positions = size.words + size.latent_steps + 64
    agents, caches, steps = {}, {}, list[Step]()
    for i in range(size.agents):
        question = PromptPart(kind="field", value="question")
        slot = PromptPart(kind="slot", value=f"a{(i - 1) % size.agents}")
        agents[f"a{i}"] = AgentPlan(
            backbone=like.backbone,
            system=(),
            first=(question,) if i == 0 else None,
            then=(question, slot),
            inner=like.inner,
            latent_steps=size.latent_steps,
        )
        caches[f"a{i}"] = CachePlan(
            backbone=like.backbone, agents=(f"a{i}",), capacity=positions, bytes_per_sample=0
        )
    for round_ in range(1, size.rounds + 1):
        for i in range(size.agents):
            name, is_last = f"a{i}", round_ == size.rounds and i == size.agents - 1
            variant: Literal["first", "then"] = "first" if round_ == 1 and i == 0 else "then"
            steps.append(
                PrefillStep(
                    round=round_, agents=(name,), variants=(variant,), reuse_prefix=round_ > 1,
                    cache=name,
                    messages=() if variant == "first" else (
                        Message(
                            agent=name, slot=f"a{(i - 1) % size.agents}", link=links[i - 1],
                            round=round_ - 1 if i == 0 else round_,
                        ),
                    ),
                )
            )  # fmt: skip
            if is_last:
                steps.append(DecodeStep(round=round_, agent=name, cache=name))
            else:
                steps.append(ThinkStep(round=round_, agents=(name,), fused=True, cache=name))
                steps.append(
                    SendStep(
                        round=round_, source=name, targets=(f"a{(i + 1) % size.agents}",),
                        links=(links[i],), apply_inner=False,
                    )
                )  # fmt: skip
    return structs.replace(
        plan,
        rounds=size.rounds,
        answer_agent=f"a{size.agents - 1}",
        agents=agents,
        links={
            link: LinkPlan(source=f"a{i}", target=f"a{(i + 1) % size.agents}", carries="thoughts")
            for i, link in enumerate(links)
        },
        caches=caches,
        steps=tuple(steps),
        limits=Limits(max_prompt_tokens=positions, max_batch=size.records),
        fields=("question",),
        stop_when=None,
        tools=None,
    )


def fit(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fit t = a + b n^p; returns a, b and p, the best of a grid."""
    n, t = np.array(counts, float), np.array(seconds)
    best = (np.inf, 0.0, 0.0, 0.0)
    for exponent in np.arange(0.5, 2.5, 0.005):
        # Each equation over its t: relative errors count.
        columns = np.stack([1 / t, n**exponent / t], axis=1)
        fixed, factor = np.linalg.lstsq(columns, np.ones_like(t), rcond=None)[0]
        error = float(np.sum((columns @ [fixed, factor] - 1) ** 2))
        best = min(best, (error, float(fixed), float(factor), float(exponent)))
    return best[1:]


def table(figures: Mapping[str, Any]) -> str:
    lines = [
        f"**{figures['machine']}; {figures['date']}**",
        "",
        "| grows | n | seconds | exponent | theory |",
        "|---|---|---|---|---|",
    ]
    for axis, theory in THEORY.items():
        if axis not in figures:
            continue
        found = figures[axis]
        n, seconds = (
            ", ".join(texts)
            for texts in (map(str, found["n"]), (f"{s:.3g}" for s in found["seconds"]))
        )
        exponent = f"{found['exponent']:.2f}"
        if found["exponent"] > LINEAR:
            exponent = f"**{exponent}**"
        lines.append(f"| {axis} | {n} | {seconds} | {exponent} | {theory} |")
    if "attention" in figures:
        attention = figures["attention"]
        behind = ", ".join(f"{1e3 * s:.1f}" for s in attention["seconds"])
        rows = ", ".join(map(str, attention["rows_before"]))
        counts = figures["one prompt"]["n"]
        shares = (f"{n}: {s:.0%}" for n, s in zip(counts, attention["share"], strict=True))
        lines += [
            "",
            f"{attention['positions']} positions behind {rows} rows: {behind} ms, so attention "
            f"takes {attention['ns_a_pair']:.1f} ns for a position and a row before it. Its share "
            f"of one prompt, by positions: {', '.join(shares)}.",
        ]
    return "\n".join(lines)


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """Draw each curve with its fit, both axes logarithmic."""

    def panel(number: int, axis: str) -> Callable[[Any], None]:
        found = figures[axis]
        n = np.geomspace(found["n"][0], found["n"][-1], 50)
        fitted = found["fixed_s"] + found["factor_s"] * n ** found["exponent"]
        colour = COLOURS[number % len(COLOURS)]

        def one(axes: Any) -> None:
            axes.loglog(found["n"], found["seconds"], "o", color=colour)
            axes.loglog(n, fitted, "-", color=colour, linewidth=1)
            axes.set_title(f"{axis}: {found['exponent']:.2f}", fontsize="small")
            axes.set_xlabel(axis, fontsize="small")
            axes.set_ylabel("seconds", fontsize="small")

        return one

    panels = [panel(number, axis) for number, axis in enumerate(a for a in THEORY if a in figures)]
    footnote = f"{figures['machine']}; {figures['date']}"
    title = "How the latent phase grows; exponents of t = a + b n^p"
    return save_figure(path, panels, panel_size=(2.9, 3.0), title=title, footnote=footnote)


if __name__ == "__main__":
    main()
