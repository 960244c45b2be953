"""Which rows of a sender's cache can be handed over together."""

from __future__ import annotations

import pytest

from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError

SPEC = """\
recmas: 1
name: pair
latent_steps: 3
backbones: {tiny: {source: tiny}}
agents:
  planner: {backbone: tiny, prompt: "Plan {{ question }}"}
  solver: {backbone: tiny, prompt: "{{ latent.planner }}{{ question }}"}
links:
  planner -> solver: {carries: cache, rows: @}
answer: {agent: solver}
"""


@pytest.mark.parametrize("rows", ["prompt", "[prompt]", "[prompt, thoughts]", "[prompt, written]"])
def test_a_prompt_and_what_lies_behind_it(rows: str) -> None:
    (link,) = parse_spec(SPEC.replace("@", rows)).document.links.values()
    assert link.form.rows == tuple(rows.strip("[]").split(", "))


@pytest.mark.parametrize(
    ("rows", "told", "hint"),
    [
        ("[context, prompt]", "the first is the beginning of the second", "Keep one"),
        ("[prompt, context]", "the first is the beginning of the second", "Keep one"),
        ("[thoughts, prompt]", "`thoughts` before `prompt`", "Write `[prompt, thoughts]`"),
        ("[written, context]", "`written` before `context`", "Write `[context, written]`"),
    ],
)
def test_rows_that_do_not_lie_so(rows: str, told: str, hint: str) -> None:
    with pytest.raises(RecmasError) as caught:
        parse_spec(SPEC.replace("@", rows), file="f.yaml")
    (problem,) = caught.value.problems
    assert problem.code == "RM127"
    assert told in problem.message
    assert hint in problem.hint
    assert (problem.line, problem.column) == (9, 45)
