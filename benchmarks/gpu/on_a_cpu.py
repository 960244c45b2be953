"""What bundles of 16 bits take on a CPU, as a ratio to a float32 bundle of the same model.

    python benchmarks/gpu/on_a_cpu.py FLOAT32_BUNDLE BUNDLE...

Engines take turns call by call in this process, and CPU time of one thread is what counts, so that
other programs of the machine spread the figures and do not move them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.links import read_operands, stack_operands

_STEPS = 4


def opened(path: Path) -> tuple[str, BackboneEngine, dict[str, np.ndarray]]:
    """Return the precision of a bundle's first backbone, its engine and one of its links."""
    bundle = open_bundle(path)
    entry = next(iter(bundle.manifest.backbones.values()))
    links = {i: e for i, e in bundle.manifest.links.items() if e.role == "inner"}
    operands = read_operands(bundle.file, links)
    inner = next(o for o in operands.values() if o["w1"].shape[0] == entry.width)
    return entry.precision, BackboneEngine(entry, bundle.root, threads=1), stack_operands([inner])


def quartiles(times: list[float], beside: list[float]) -> str:
    """Return the median ratio of times of the same turn, quartiles in brackets."""
    ratios = [a / b for a, b in zip(times, beside, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--prompt", type=int, default=128, metavar="POSITIONS")
    parser.add_argument("--turns", type=int, default=7, metavar="N")
    options = parser.parse_args()
    engines = [opened(path) for path in options.bundles]
    capacity = -(-(options.prompt + _STEPS) // 64) * 64
    caches = [engine.new_cache(1, capacity) for _, engine, _ in engines]
    prompts: list[list[float]] = [[] for _ in engines]
    steps: list[list[float]] = [[] for _ in engines]
    generator = np.random.default_rng(0)
    for _ in range(options.turns + 1):
        for i, (_, engine, inner) in enumerate(engines):
            size = (1, options.prompt, engine.entry.width)
            embeds = generator.normal(size=size).astype(np.float32) * np.float32(0.1)
            start = time.thread_time()
            last = np.array([options.prompt - 1])
            engine.forward(caches[i], embeds, np.array([0]), last, inner)
            prompts[i].append(time.thread_time() - start)
            start = time.thread_time()
            for step in range(_STEPS):
                one, at = np.ascontiguousarray(embeds[:, :1]), np.array([options.prompt + step])
                engine.forward(caches[i], one, at, np.array([0]), inner)
            steps[i].append(time.thread_time() - start)
    print("| precision | prompt | step |\n|---|---|---|")
    for i, (precision, _, _) in enumerate(engines):
        figures = (quartiles(each[i][1:], each[0][1:]) for each in (prompts, steps))
        print(f"| {precision} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
