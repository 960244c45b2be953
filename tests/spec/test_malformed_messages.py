"""Messages that nobody can send: each refused with its code at its place, its cause and a remedy.

A case replaces pieces of a sound spec; `@@` marks the place that the error must name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.specs import at, write_config
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import Exit, RecmasError

SOUND = """\
recmas: 1
name: demo
rounds: 2
latent_steps: 4
backbones:
  small: {source: small}
agents:
  reader:
    backbone: small
    prompt: Read {{ passage }} for {{ question }}
  scribe:
    backbone: small
    prompt:
      first: Note {{ question }}
      then: Note {{ question }} {{ latent.solver }}
  solver:
    backbone: small
    prompt: "{{ latent.reader }} Solve {{ question }} with {{ latent.scribe }}"
links:
  reader -> solver: {carries: cache}
  scribe -> solver: {carries: written, max_tokens: 8}
  solver -> scribe: {carries: context, of: question, feedback: true}
answer: {agent: solver}
"""
OTHER = ("  small: {source: small}\n", "  small: {source: small}\n  other: {source: other}\n")
READER = "reader -> solver: {carries: cache}"
SCRIBE = "scribe -> solver: {carries: written, max_tokens: 8}"
BACK = "{carries: context, of: question, feedback: true}"
SOLVER = "{{ latent.reader }} Solve {{ question }} with {{ latent.scribe }}"

Edits = tuple[tuple[str, str], ...]


def reader(settings: str) -> Edits:
    return ((READER, f"reader -> solver: {{{settings}}}"),)


def scribe(settings: str) -> Edits:
    return ((SCRIBE, f"scribe -> solver: {{{settings}}}"),)


def back(settings: str) -> Edits:
    return ((BACK, f"{{{settings}, feedback: true}}"),)


def solver(prompt: str) -> Edits:
    return ((SOLVER, prompt),)


# id: (code, edits, what the cause says)
CASES: dict[str, tuple[str, Edits, str]] = {
    # values
    "kind_misspelt": ("RM105", reader("carries: @@cashe"), "Did you mean `cache`?"),
    "carries_empty": ("RM105", reader("carries: @@"), "empty"),
    "carries_list": ("RM105", reader("carries: @@[cache, text]"), "a list"),
    "rows_misspelt": ("RM105", reader("carries: cache, rows: @@contex"), "`context`"),
    "row_misspelt": ("RM105", reader("carries: cache, rows: [context, @@wrote]"), '"wrote"'),
    "no_rows": ("RM105", reader("carries: cache, rows: @@[]"), "must not be empty"),
    "three_rows": (
        "RM105",
        reader("carries: cache, rows: @@[context, thoughts, written]"),
        "more than 2",
    ),
    "every_one": ("RM105", back("carries: context, every: @@1"), "at least 2"),
    "every_text": ("RM105", back("carries: context, every: @@often"), "a whole number"),
    "pool_number": ("RM105", back("carries: context, pool: @@4"), "true or false"),
    "of_list": ("RM105", back("carries: context, of: @@[question]"), "text"),
    "of_expression": ("RM105", back("carries: context, of: @@question.text"), "`facts[0]`"),
    "no_tokens": ("RM105", scribe("carries: written, max_tokens: @@0"), "at least 1"),
    "key_misspelt": ("RM103", scribe("carries: written, @@max_token: 8"), "`max_tokens`"),
    # keys of another kind
    "of_on_cache": ("RM127", reader("carries: cache, @@of: passage"), "carry `context`"),
    "every_on_written": ("RM127", scribe("carries: written, @@every: 2"), "carry `context`"),
    "pool_on_text": ("RM127", scribe("carries: text, @@pool: true"), "carry `context`"),
    "tokens_of_thoughts": ("RM127", scribe("@@max_tokens: 8"), "`thoughts`, the default"),
    "tokens_of_context": ("RM127", back("carries: context, @@max_tokens: 8"), "`written`"),
    "tokens_of_rows": (
        "RM127",
        reader("carries: cache, @@max_tokens: 8"),
        "add `written` to `rows`",
    ),
    "rows_of_text": ("RM127", scribe("carries: text, @@rows: written"), "carry `cache`"),
    "layers_of_context": ("RM127", back("carries: context, @@layers: [0]"), "carry `cache`"),
    "kind_of_text": ("RM127", scribe("carries: text, @@kind: residual"), "`text`"),
    "init_of_cache": ("RM127", reader("carries: cache, @@init: random"), "`cache`"),
    "weights_of_cache": ("RM127", reader("carries: cache, @@weights: a.safetensors"), "`cache`"),
    # what the sender does not have
    "of_no_field": ("RM127", back("carries: context, of: @@passage"), "does not show"),
    "of_misspelt": ("RM127", back("carries: context, of: @@questoin"), "Did you mean `question`?"),
    "of_field_of_another": (
        "RM127",
        (*back("carries: context, of: @@passage"), (SOLVER, SOLVER + " {{ hint }}")),
        "the prompt of `solver`",
    ),
    "of_only_in_first": (
        "RM127",
        (
            ("      first: Note {{ question }}\n", "      first: Note {{ hint }} {{ question }}\n"),
            *scribe("carries: context, of: @@hint"),
        ),
        "the prompt `then` of `scribe`",
    ),
    "every_and_pool": (
        "RM127",
        back("carries: context, every: 2, @@pool: true"),
        "in two ways",
    ),
    "pool_of_no_steps": (
        "RM127",
        (
            *back("carries: context, @@pool: true"),
            (
                "  solver:\n    backbone: small\n",
                "  solver:\n    backbone: small\n    latent_steps: 0\n",
            ),
        ),
        "which are 0",
    ),
    "rows_of_one_thought": (
        "RM127",
        (
            *reader("carries: cache, rows: @@[context, thoughts]"),
            (
                "  reader:\n    backbone: small\n",
                "  reader:\n    backbone: small\n    latent_steps: 1\n",
            ),
        ),
        "Raise its `latent_steps`",
    ),
    "rows_twice": ("RM127", reader("carries: cache, rows: @@[context, context]"), "twice"),
    "rows_in_one_place": (
        "RM127",
        reader("carries: cache, rows: @@[thoughts, written]"),
        "the same place",
    ),
    "rows_turned_round": (
        "RM127",
        reader("carries: cache, rows: @@[written, context]"),
        "[context, written]",
    ),
    "layer_twice": ("RM127", reader("carries: cache, layers: @@[0, 1, 0]"), "twice"),
    "layer_that_is_not_there": (
        "RM127",
        reader("carries: cache, layers: @@[0, 2]"),
        "layers 0 to 1, not 2",
    ),
    "tokens_differ": (
        "RM127",
        (
            *scribe("carries: written"),
            (
                "  reader:\n    backbone: small\n    prompt: Read",
                "  reader:\n    backbone: small\n    prompt: Read {{ latent.scribe }}",
            ),
            ("links:\n", "links:\n  scribe -> reader: {carries: text, max_tokens: 8}\n"),
            ("carries: written}", "carries: @@written}"),
        ),
        "`scribe -> reader` takes at most 8 tokens of it, and this one 64",
    ),
    "messages_fill_prompt": (
        "RM105",
        (
            *scribe("carries: written, max_tokens: 512"),
            ("  solver:\n    backbone", "  @@solver:\n    backbone"),
        ),
        "or `max_tokens`",
    ),
    # where rows go
    "two_backbones": (
        "RM127",
        (
            OTHER,
            ("  reader:\n    backbone: small", "  reader:\n    backbone: other"),
            *reader("carries: @@cache"),
        ),
        "carry `context`, `written` or `text`",
    ),
    "slot_behind_text": (
        "RM127",
        solver("Solve @@{{ latent.reader }} {{ question }} {{ latent.scribe }}"),
        "stands behind text",
    ),
    "slot_behind_field": (
        "RM127",
        solver("{{ question }} @@{{ latent.reader }} {{ latent.scribe }}"),
        "behind the field `question`",
    ),
    "slot_behind_vectors": (
        "RM127",
        solver("{{ latent.scribe }} @@{{ latent.reader }} {{ question }}"),
        "the message of `scribe`, which is vectors",
    ),
    "slot_behind_message_of_text": (
        "RM127",
        (
            *scribe("carries: text"),
            *solver("{{ latent.scribe }} @@{{ latent.reader }} {{ question }}"),
        ),
        "which is text",
    ),
    "slot_twice": (
        "RM127",
        solver("{{ latent.reader }}@@{{ latent.reader }} {{ question }} {{ latent.scribe }}"),
        "come once",
    ),
    "slot_last_in_first": (
        "RM127",
        (
            (
                "      first: Note {{ question }}\n",
                "      first: Note {{ question }} @@{{ latent.reader }}\n",
            ),
            ("      then: Note", '      then: "{{ latent.reader }} Note'),
            ("{{ latent.solver }}\n", '{{ latent.solver }}"\n'),
            ("links:\n", "links:\n  reader -> scribe: {carries: cache}\n"),
        ),
        "behind text",
    ),
    "no_slot_for_rows": (
        "RM114",
        (
            *solver("Solve {{ question }} with {{ latent.scribe }}"),
            ("  reader -> solver", "  @@reader -> solver"),
        ),
        "no slot",
    ),
    "states_are_no_rows": (
        "RM127",
        (("{source: small}", "{source: states}"), *reader("carries: @@cache")),
        "keep a state",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_at_its_place(name: str, tmp_path: Path) -> None:
    code, edits, cause = CASES[name]
    text = SOUND
    for piece, other in edits:
        assert text.count(piece) == 1, f"{piece!r} must stand once in the spec"
        text = text.replace(piece, other)
    before = text[: text.index("@@")]
    place = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    with pytest.raises(RecmasError) as refused:
        read(text.replace("@@", ""), tmp_path)
    (problem,) = refused.value.problems
    assert at(problem) == (code, *place), str(refused.value)
    assert cause in str(problem)
    assert str(problem).endswith((".", "?"))
    assert refused.value.exit_code == Exit.SPEC_INVALID


def test_the_sound_one_is_read(tmp_path: Path) -> None:
    read(SOUND, tmp_path)


def read(text: str, folder: Path) -> None:
    """Check a spec as `recmasc check` does, beside three backbones."""
    write_config(folder / "small")
    write_config(folder / "other", hidden_size=48)
    write_config(
        folder / "states",
        model_type="qwen3_5_text",
        architectures=["Qwen3_5ForCausalLM"],
        num_hidden_layers=4,
    )
    build_topology(parse_spec(text, base_dir=folder, file="spec.yaml"))
