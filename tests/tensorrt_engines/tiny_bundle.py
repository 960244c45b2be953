"""A tiny system whose agents differ in all that engines' shapes depend on, as a bundle."""

from __future__ import annotations

from pathlib import Path

from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import load_spec
from recmas_export.build import build
from tiny_models import write_tiny_backbone

# Two agents run as one batch, their inner links have different hidden widths, and the third agent
# is on a backbone of its own, so that there is more than one.
SPEC = """
recmas: 1
name: trio
rounds: 2
latent_steps: 5
backbones:
  small: {source: models/small}
  other: {source: models/other}
agents:
  one:
    backbone: small
    prompt: {first: "{{ question }}", then: "{{ question }} {{ latent.solver }}"}
    inner: {kind: residual, init: random}
  two:
    backbone: small
    prompt: "Plan. {{ question }}"
    inner: {kind: ln_residual, init: random}
  solver:
    backbone: other
    prompt: "{{ question }} {{ latent.one }} {{ latent.two }}"
    inner: {kind: projected, init: random}
links:
  one -> solver: {init: random}
  two -> solver: {init: random}
  solver -> one: {feedback: true, init: random}
answer: {agent: solver, max_new_tokens: 12}
build: {max_prompt_tokens: 120, max_batch: 3}
"""


def write_spec(folder: Path) -> Path:
    """Write the spec and its two backbones; returns the spec's path."""
    write_tiny_backbone(folder / "models/small", "llama", num_hidden_layers=2)
    write_tiny_backbone(
        folder / "models/other",
        "gemma3",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size=48,
    )
    path = folder / "spec.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


def build_bundle(folder: Path) -> Path:
    """Build the system; returns its bundle."""
    spec = load_spec(write_spec(folder))
    out = folder / "bundle"
    build(run_pipeline(build_topology(spec)), spec=spec, out=out)
    return out
