"""Engines, reference and naive form on the same questions: equal text, equal messages?

    python benchmarks/agreement.py BUNDLE --data QUESTIONS.jsonl [--limit 20] [--max-new-tokens 32]

Runs the bundle one by one and as ragged batches of 8, the eager reference and the naive form, all
greedy and on the bundle's own links, and prints how many texts are equal and the largest
difference of any message. Exit status 1 if a text differs or a message is off by more than the
tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from msgspec import structs

import recmas_runtime as rt
from recmas_compiler import api
from recmas_compiler.links.modules import load_link
from recmas_compiler.lowering.reference import TorchSystem, load_backbones
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.progress import LineProgress, Silent
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.running.run_trace import TraceWriter, messages_name

# The numeric oracle is the tests' own.
sys.path.extend(str(folder / "tests") for folder in Path(__file__).parents[1:3])
from kit.naive import run_naive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    lines = arguments.data.read_text().splitlines()[: arguments.limit]
    records = [json.loads(line) for line in lines]
    system = rt.load(arguments.bundle)
    sampling = structs.replace(
        system.plan.sampling, temperature=0.0, max_new_tokens=arguments.max_new_tokens, stop=()
    )
    questions = [rt.Record(id=r["id"], fields=r, index=i) for i, r in enumerate(records)]
    single, messages = run_traced(system, questions, sampling, batch=1)
    ragged, ragged_messages = run_traced(system, questions, sampling, batch=8)

    program = api.compile(load_spec(arguments.bundle / "spec.yaml"))
    backbones = load_backbones(program.graph, progress=Silent())
    links = {
        name: load_link(
            arguments.bundle / entry.file, entry.kind, entry.role, entry.in_dim, entry.out_dim
        )
        for name, entry in system.manifest.links.items()
    }
    reference = TorchSystem(program.graph, backbones=backbones, links=links).run(
        records, sampling=sampling
    )
    texts, largest = [], 0.0
    with LineProgress().stage("naive form", len(records)) as advance:
        for index, record in enumerate(records):
            naive = run_naive(
                program.topology,
                [record],
                backbones=backbones,
                links=links,
                max_new_tokens=arguments.max_new_tokens,
            )
            texts += naive.texts
            for name, array in messages.items():
                expected = naive.messages[name].numpy()[0]
                largest = max(largest, float(np.abs(array[index] - expected).max()))
            advance()

    def against(others: list[str]) -> str:
        return f"{sum(a == b for a, b in zip(single, others, strict=True))}/{len(single)}"

    # Of a system whose links carry text or rows, texts alone are compared: it has no vectors.
    between = max(
        (float(np.abs(a - ragged_messages[n]).max()) for n, a in messages.items()), default=0
    )
    to_reference = max(
        (float(np.abs(a - reference.messages[n].numpy()).max()) for n, a in messages.items()),
        default=0,
    )
    print(f"texts equal, engines and reference:      {against(reference.texts)}")
    print(f"texts equal, engines and naive form:     {against(texts)}")
    print(f"texts equal, one by one and batches of 8: {against(ragged)}")
    print(f"largest message difference to reference: {to_reference:.2e}")
    print(f"largest message difference to naive:     {largest:.2e}")
    print(f"largest message difference to batches:   {between:.2e}")
    agree = single == reference.texts == texts == ragged
    return 0 if agree and max(largest, to_reference) <= TOLERANCES["message_absolute"] else 1


def run_traced(
    system: rt.System, questions: list[rt.Record], sampling: rt.SamplingPlan, *, batch: int
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Answer in batches of `batch`; returns the texts and every message [records, m, d]."""
    with tempfile.TemporaryDirectory() as folder:
        trace = TraceWriter(Path(folder))
        texts = []
        for start in range(0, len(questions), batch):
            for answer in system.run_batch(
                questions[start : start + batch], sampling=sampling, trace=trace
            ):
                if isinstance(answer, rt.RecmasError):
                    raise answer
                texts.append(answer.answer)
        trace.close()
        records = [dict(np.load(Path(folder) / messages_name(record))) for record in questions]
        return texts, {name: np.stack([r[name] for r in records]) for name in records[0]}


if __name__ == "__main__":
    sys.exit(main())
