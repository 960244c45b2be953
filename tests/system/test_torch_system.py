"""A bundle's system on torch engines gives the reference's messages and texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.bundles import BuildTiny
from kit.specs import SPECS
from kit.torch_system import load_torch_system
from kit.traced import assert_messages_agree, run_traced
from recmas_compiler.bench.open_torch import TransformersEngine, load_bundle_backbones
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.links import load_operands, stack_operands
from recmas_runtime.formats.precisions import TOLERANCES

QUESTIONS = ["What is 7 * 8?", "Anna has three plans and an orange. Which is best?", "Hm?"]
RECORDS = [{"id": str(i), "question": question} for i, question in enumerate(QUESTIONS)]


def absolute(name: str, families: Path) -> str:
    """Return a spec whose backbones are found from anywhere."""
    text = SPECS[name]
    for family in ("llama", "qwen3", "gemma3"):
        text = text.replace(f"source: {family}}}", f"source: {families / family}}}")
    return text


@pytest.mark.parametrize("name", SPECS)
def test_batches_agree_with_the_reference(
    name: str, families: Path, build_tiny: BuildTiny, tmp_path: Path
) -> None:
    built = build_tiny(absolute(name, families))
    system = load_torch_system(built.bundle, threads=1, compiled=False)
    answers, messages = run_traced(system, tmp_path, RECORDS, batch=len(RECORDS))
    reference = built.reference(RECORDS)
    assert [answer.answer for answer in answers] == reference.texts
    assert_messages_agree(messages, reference)


@pytest.mark.parametrize("recompute", [False, True])
def test_transformers_engine_agrees_with_the_bundles_engine(
    recompute: bool, families: Path, build_tiny: BuildTiny
) -> None:
    bundle = open_bundle(build_tiny(absolute("sequential", families)).bundle)
    (name, entry), *_ = bundle.manifest.backbones.items()
    link = bundle.manifest.links["solver.inner"]
    inner = stack_operands([load_operands(bundle.file(link.file), link)])
    ids = np.random.default_rng(0).integers(3, entry.vocab_size, (2, 9))
    start, used = np.zeros(2, np.int64), np.full(2, 9)
    found = []
    for engine in (
        TransformersEngine(load_bundle_backbones(bundle.root)[name], recompute=recompute),
        BackboneEngine(entry, bundle.root, threads=1),
    ):
        cache = engine.new_cache(2, 64)
        for _ in range(2):  # the second time over what the first one left behind
            _, thought, following = engine.forward(cache, engine.embed(ids), start, used - 1, inner)
            thoughts, embeds = engine.rollout(cache, thought, following, used, inner, 4)
        found.append((thoughts, embeds, engine.logits(np.ascontiguousarray(thought[:, 0]))))
    for ours, expected in zip(*found, strict=True):
        relative = np.abs(ours - expected).max() / np.abs(expected).max()
        assert relative <= TOLERANCES["hidden_relative"]
