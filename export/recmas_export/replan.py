"""Other plans for the engines of a bundle: the same system with other rounds or latent steps.

A plan of fewer rounds is not a part of the longer one: which prompt comes first, which steps the
answer depends on and which agents run as one batch all change. So the compiler makes it, from the
bundle's own spec. That takes no weights and none of the files the bundle was built from: engines
have the same dimensions whatever the plan, and the manifest says them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from recmas_compiler.backbones.config.layer_types import AttentionKind
from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.ops import SEARCH_CORPUS
from recmas_compiler.links.trained import without_link_files
from recmas_compiler.lowering.named_layers import name_layers
from recmas_compiler.lowering.plan import build_plan
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import Spec, load_spec
from recmas_runtime.core.errors import fail
from recmas_runtime.formats.bundle import Bundle, inside
from recmas_runtime.formats.consistency import check_consistency
from recmas_runtime.formats.manifest import SPEC_NAME, BackboneEntry
from recmas_runtime.formats.plan import Plan

# What a bundle's engines attend to are rows of a cache, in a window or not.
_ROWS: Final[tuple[AttentionKind, ...]] = ("full",)

_CORPUS: Final = f"answer.tools.search.corpus={SEARCH_CORPUS}"


class Replanner:
    """Makes plans for a bundle's engines.

    Raises:
        RecmasError: RM400 if the bundle's spec does not compile to its plan: another version of
            recmas built it.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        search = None if bundle.plan.tools is None else bundle.plan.tools.search
        has_corpus = search is not None and search.corpus is not None
        self._overrides = (_CORPUS,) if has_corpus else ()
        self.spec = self._load()
        if self._compile(self.spec) != bundle.plan:
            raise fail(
                "RM400",
                "the spec in the bundle does not compile to the bundle's plan",
                file=str(bundle.root / SPEC_NAME),
                hint="Another version of recmas built it; build it again with this one.",
            )

    def plan(self, *, rounds: int, latent_steps: int | None = None) -> Plan:
        """Return the plan of the same spec with other rounds and latent steps.

        Latent steps are of all agents that have none of their own; None keeps the spec's.

        Raises:
            RecmasError: RM1xx for values that the spec refuses, RM506 for a plan that uses links
                the bundle does not hold.
        """
        overrides = [f"rounds={rounds}"]
        if latent_steps is not None:
            overrides.append(f"latent_steps={latent_steps}")
        plan = self._compile(self._load(*overrides))
        problems = check_consistency(self._bundle.manifest, plan)
        if problems:
            raise fail(
                "RM506",
                f"the bundle cannot run {' '.join(overrides)}: {problems[0].message}",
                hint="Build the bundle with the most rounds that you want to measure.",
            )
        return plan

    def _load(self, *overrides: str) -> Spec:
        file = inside(self._bundle.root, SPEC_NAME)
        return load_spec(file, overrides=(*self._overrides, *overrides))

    def _compile(self, spec: Spec) -> Plan:
        # Links keep their widths without their files, and only widths are in a plan.
        known = without_link_files(spec, lambda *_: "projected")
        # The text that the build measured losses over is in no bundle.
        build = known.document.build.model_copy(update={"loss_text": None})
        known = replace(known, document=known.document.model_copy(update={"build": build}))
        program = run_pipeline(build_topology(known, known=self._facts(spec)))
        return build_plan(name_layers(program, self._bundle.manifest.layer_scores))

    def _facts(self, spec: Spec) -> Mapping[str, BackboneFacts]:
        """Return the dimensions of the spec's backbones.

        Backbones that the build found equal have one entry, and so one identity again. One that
        only dead agents use is in no bundle; it is in no plan either, so that any dimensions do.
        """
        entries = self._bundle.manifest.backbones
        shared = {
            section.backbone: self._bundle.plan.agents[name].backbone
            for name, section in spec.document.agents.items()
            if name in self._bundle.plan.agents
        }
        anything = next(iter(entries), "")
        return {
            name: _facts(shared.get(name, name), entries[shared.get(name, anything)])
            for name, section in spec.document.backbones.items()
            if not section.is_remote
        }


def _facts(identity: str, entry: BackboneEntry) -> BackboneFacts:
    """Return what plans depend on; the rest says nothing of the model."""
    return BackboneFacts(
        source=entry.source,
        identity=identity,
        model_type=entry.model_type,
        width=entry.width,
        num_layers=entry.num_layers,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=entry.vocab_size,
        max_positions=entry.max_positions,
        attention=_ROWS * entry.num_layers,
        layers=entry.layers,
        sliding_window=None,
        num_parameters=0,
    )
