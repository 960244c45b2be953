"""Resident memory of bundles beside what `recmasc plan` predicts, each run in its own process.

    python benchmarks/memory.py BUNDLE [BUNDLE ...] [--batch 1,8] [--words 20,380]

Each process loads a bundle, answers a batch of questions of so many words, and prints its peak
resident set. The prediction is for prompts as long as the longest of them was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from recmas_compiler import api
from recmas_compiler.analysis.memory import memory_plan
from recmas_compiler.spec.spec import load_spec

CHILD = """
import json, sys
import recmas_runtime as rt
from recmas_runtime.checking.machine import peak_resident_bytes

class Longest:
    tokens = 0
    def add_batch(self, records, events, messages):
        for event in events:
            counts = zip(event.prefilled_tokens, event.reused_tokens)
            self.tokens = max([self.tokens, *map(sum, counts)])

path, batch, words = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
question = "word " * words
system, longest = rt.load(path), Longest()
records = [rt.Record(id=str(i), fields={"question": question}, index=i) for i in range(batch)]
found = system.run_batch(records, sampling=rt.SamplingPlan(max_new_tokens=16), trace=longest)
assert all(isinstance(answer, rt.Answer) for answer in found), found
steps = max(agent.latent_steps for agent in system.plan.agents.values())
print(json.dumps({"peak": peak_resident_bytes(), "prompt": longest.tokens + steps}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--words", type=numbers, default=[20, 380])
    arguments = parser.parse_args()
    print(
        "| bundle | records | longest prompt | predicted MB | measured MB | measured / predicted |"
    )
    print("|---|---|---|---|---|---|")
    for bundle in arguments.bundles:
        graph = api.compile(load_spec(bundle / "spec.yaml")).graph
        for batch in arguments.batch:
            for words in arguments.words:
                ran = subprocess.run(
                    [sys.executable, "-c", CHILD, bundle, str(batch), str(words)],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                found = json.loads(ran.stdout)
                plan = memory_plan(graph, prompt_tokens=found["prompt"])
                predicted = plan.total_bytes(batch=batch)
                print(
                    f"| {bundle} | {batch} | {found['prompt']} | {predicted / 1e6:.0f} "
                    f"| {found['peak'] / 1e6:.0f} | {found['peak'] / predicted:.2f} |",
                    flush=True,
                )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
