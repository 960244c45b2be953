"""Whether greedy decoding would write a target, told without decoding."""

from __future__ import annotations

from dataclasses import replace

import torch
from msgspec import structs

from kit.models import LoadTiny
from kit.systems import random_links
from kit.training import on_one
from recmas_compiler.lowering.reference import TorchSystem
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.training.tasks.outer import CONTROLS, exact_answers

NUM_TOKENS = 6
QUESTIONS = ["What is 7 * 8?", "The rest?", "Anna has three plans."]


def test_what_greedy_decoding_writes_is_exact(tiny: LoadTiny) -> None:
    """The reference decodes; its own text is exact, and no longer so when a letter changes."""
    backbones = {"tiny": tiny("llama")}
    topology = on_one("sequential", backbones["tiny"])
    links = random_links(topology)
    program = run_pipeline(topology)
    graph = TrainingGraph(program, backbones=backbones, links=links, mode="rollout")
    answer = program.system.answer_agent
    records = [{"id": str(i), "question": question} for i, question in enumerate(QUESTIONS)]
    system = TorchSystem(program, backbones=backbones, links=links)
    sampling = structs.replace(program.system.sampling, max_new_tokens=NUM_TOKENS)
    written = system.run(records, sampling=sampling).token_ids

    def exact(change: int) -> list[bool]:
        """Ask about the written ids, the last of them shifted, as the targets' own tokens."""
        examples = [
            TrainExample(id=r["id"], index=i, fields=r, targets=dict.fromkeys([answer], "x" * 9))
            for i, r in enumerate(records)
        ]
        batch = graph.prepare(examples)
        key = answer, graph.answer.variant, "turn"
        vocabulary = backbones["tiny"].facts.vocab_size
        calls = []
        for call, ids in zip(batch.calls[key], written, strict=True):
            *before, last = call.items
            prompt = last.ids[: len(last.ids) - call.num_target_tokens]
            wanted = (*ids[:-1], (ids[-1] + change) % vocabulary)
            items = (*before, replace(last, ids=(*prompt, *wanted)))
            calls.append(replace(call, items=items, num_target_tokens=len(wanted)))
        asked = replace(batch, calls={**batch.calls, key: tuple(calls)})
        with torch.no_grad():
            return graph(asked).per_record_exact.tolist()

    assert exact(0) == [True, True, True]
    assert exact(1) == [False, False, False]


def test_by_control(tiny: LoadTiny) -> None:
    backbones = {"tiny": tiny("llama")}
    topology = on_one("sequential", backbones["tiny"])
    graph = TrainingGraph(
        run_pipeline(topology), backbones=backbones, links=random_links(topology), mode="rollout"
    )
    examples = [
        TrainExample(id=str(i), index=i, fields={"question": q}, targets={"solver": f"No way {i}."})
        for i, q in enumerate(QUESTIONS)
    ]
    found = exact_answers(graph, examples, batch_size=2)
    assert found == {name: [False] * 3 for name in CONTROLS}
