"""Rows handed over for some layers only: engines and reference agree, and a build chooses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.bundles import BuildTiny, tiny_builder
from kit.files import MadeOnce
from kit.models import write_tiny_backbone
from kit.specs import HEAD
from kit.traced import assert_messages_agree, run_traced
from recmas_compiler.lowering.choose_layers import score_layers
from recmas_compiler.lowering.named_layers import best_layers
from recmas_compiler.lowering.reference import load_backbones
from recmas_export.replan import Replanner
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import open_bundle
from test_messages_agree import RECORDS

# Rows of two links that other layers see, of one those that the build chooses; the receiver thinks
# and writes behind them.
LAYERS = f"""{HEAD}
backbones: {{small: {{source: llama}}}}
rounds: 2
agents:
  left:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "Left {{{{ context }}}}"
      then: "Left {{{{ context }}}} {{{{ latent.solver }}}}"
  solver:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "{{{{ latent.left }}}} {{{{ question }}}}"
      then: "{{{{ latent.left }}}} {{{{ latent.solver }}}} {{{{ question }}}}"
links:
  left -> solver: {{carries: cache, layers: 0.4}}
  solver -> solver: {{carries: cache, rows: [context, thoughts], layers: [0, 2], feedback: true}}
  solver -> left: {{carries: written, max_tokens: 4, feedback: true, init: random}}
answer: {{agent: solver, max_new_tokens: 10}}
"""


@pytest.fixture(scope="module")
def build_small(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> BuildTiny:
    """Build a spec over `llama`; once per text."""
    folder = tmp_path_factory.mktemp("small")
    write_tiny_backbone(folder / "llama", "llama")
    return tiny_builder(folder, made_once, lambda: tmp_path_factory.mktemp("bundles") / "bundle")


def test_engines_and_reference_agree(build_small: BuildTiny, tmp_path: Path) -> None:
    built = build_small(LAYERS)
    single, messages = run_traced(built.system, tmp_path / "one", RECORDS, batch=1)
    ragged, _ = run_traced(built.system, tmp_path / "many", RECORDS, batch=len(RECORDS))
    reference = built.reference(RECORDS)
    texts = [answer.answer for answer in single]
    assert texts == [answer.answer for answer in ragged]
    assert texts == reference.texts
    assert [a.usage for a in single] == [a.usage for a in ragged]
    assert_messages_agree(messages, reference)


def test_a_build_chooses_layers_and_says_by_what(build_small: BuildTiny) -> None:
    built = build_small(LAYERS)
    (scores,) = built.system.manifest.layer_scores.values()
    layers = built.system.plan.links["left->solver"].layers
    assert layers == best_layers(scores, 0.4)
    entry = built.system.manifest.backbones["small"]
    assert {layer for group in entry.masked_layers for layer in group} == {0, 1, 2} - (
        {0, 2} & set(layers)
    )
    assert Replanner(open_bundle(built.bundle)).plan(rounds=2) == built.system.plan
    # Chosen again, they are the same: nothing is drawn.
    backbones = load_backbones(built.program, progress=Silent())
    again = score_layers(backbones["small"])
    assert best_layers(again, 0.4) == layers
    np.testing.assert_allclose(again.attention, scores.attention, atol=1e-5)
