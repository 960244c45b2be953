"""Every kind of link can start from its closed form, said or not."""

from __future__ import annotations

import pytest

from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError

SPEC = """\
recmas: 1
name: pair
backbones: {tiny: {source: tiny}}
agents:
  planner: {backbone: tiny, inner: @, prompt: "Plan {{ question }}"}
  solver: {backbone: tiny, inner: @, prompt: "{{ question }} {{ latent.planner }}"}
links:
  planner -> solver: @
answer: {agent: solver}
"""


@pytest.mark.parametrize("said", ["", ", init: aligned"])
@pytest.mark.parametrize("kind", ["projected", "residual", "ln_residual"])
def test_aligned_links_of_every_kind(kind: str, said: str) -> None:
    spec = parse_spec(SPEC.replace("@", f"{{kind: {kind}{said}}}"))
    assert spec.warnings == ()
    links = [spec.document.agents["planner"].inner, spec.document.links["planner -> solver"]]
    assert [(link.kind, link.init) for link in links] == [(kind, "aligned")] * 2


def test_the_rule_of_latentmas_is_for_inner_links() -> None:
    text = SPEC.replace("@", "{init: latentmas}", 2)
    spec = parse_spec(text.replace("@", "{}"))
    assert spec.warnings == ()
    said = spec.document.agents["planner"].inner
    assert (said.kind, said.init) == ("rescaled", "latentmas")
    with pytest.raises(RecmasError, match=r"RM105.*rule for inner links"):
        parse_spec(text.replace("@", "{init: latentmas}"))
    with pytest.raises(RecmasError, match=r"RM105.*link of kind `projected`"):
        parse_spec(SPEC.replace("@", "{kind: projected, init: latentmas}", 1).replace("@", "{}"))
