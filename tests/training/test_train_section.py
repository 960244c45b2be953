"""The section `train`: defaults, presets, and what is refused at its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kit.training import SPEC, changed
from recmas_compiler.spec.schema.train import PRESET_KINDS, PRESETS
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError

# name -> code, piece of the spec, what stands there instead; `@@` marks the place of the finding
REFUSED = {
    "no_data": ("RM104", "train:\n  data: train.jsonl\n", "@@train:\n"),
    "no_targets": ("RM104", "train:\n  data: train.jsonl\n", "@@train:\n  data: train.jsonl\n"),
    "unknown_key": ("RM103", "  warmup_steps: 2", "  @@warmup: 2"),
    "unknown_stage_key": ("RM103", "{steps: 8, lr: 1e-3,", "{steps: 8, @@rate: 1e-3,"),
    "unknown_agent": ("RM111", "{planner: plan,", "{@@plannner: plan,"),
    "no_answer_target": ("RM124", "targets: {planner: plan, solver: solution}",
                         "@@targets: {planner: plan}"),
    "sender_without_target": ("RM124", "targets: {planner: plan, solver: solution}",
                              "@@targets: {solver: solution}"),
    "empty_targets": ("RM105", "{planner: plan, solver: solution}", "@@{}"),
    "target_no_text": ("RM105", "{planner: plan,", "{planner: @@7,"),
    "blank_target": ("RM105", "{planner: plan,", "{planner: @@,"),
    "held_out_half": ("RM105", "held_out: 0.25", "held_out: @@0.75"),
    "held_out_true": ("RM105", "held_out: 0.25", "held_out: @@true"),
    "held_out_is_data": ("RM124", "held_out: 0.25", "held_out: @@train.jsonl"),
    "no_steps": ("RM105", "{steps: 8,", "{steps: @@0,"),
    "negative_rate": ("RM105", "{steps: 8, lr: 1e-3,", "{steps: 8, lr: @@-1e-3,"),
    "unknown_mode": ("RM105", "{steps: 8,", "{mode: @@rolout, steps: 8,"),
    "unknown_frozen": ("RM111", "{steps: 8,",
                       '{freeze: [planner, @@"planer -> solver"], steps: 8,'),
    "frozen_number": ("RM105", "{steps: 8,", "{freeze: [@@7], steps: 8,"),
    "frozen_no_list": ("RM105", "{steps: 8,", "{freeze: @@planner, steps: 8,"),
    "unknown_rate": ("RM111", "{steps: 8,", "{rates: {inner: 0.1, @@planer: 0.1}, steps: 8,"),
    "rate_too_large": ("RM105", "{steps: 8,", "{rates: {inner: @@2}, steps: 8,"),
    "lone_mismatch": ("RM105", "{steps: 8, lr: 1e-3, batch_size: 4}",
                      "{@@mismatch: {}, batch_size: 1}"),
    "no_margin": ("RM105", "{steps: 8,", "{mismatch: {margin: @@0}, steps: 8,"),
    "unknown_teacher_key": ("RM103", "{steps: 8,", "{teacher: {@@warmth: 2}, steps: 8,"),
    "rising_mix": ("RM105", "{steps: 8,", "{@@mix: {start: 0.1, end: 0.5}, steps: 8,"),
    "mix_above_one": ("RM105", "{steps: 8,", "{mix: {start: @@1.5}, steps: 8,"),
    "negative_reconstruct": ("RM105", "{steps: 8,", "{reconstruct: @@-1, steps: 8,"),
    "blank_center": ("RM105", "{steps: 8,", "{center: @@, steps: 8,"),
    "unknown_preset": ("RM105", "  warmup_steps: 2", "  preset: @@papper"),
    "preset_not_text": ("RM105", "  warmup_steps: 2", "  preset: @@[paper]"),
    "preset_kinds": ("RM125", "  warmup_steps: 2", "  preset: @@paper"),
    "one_beta": ("RM105", "  warmup_steps: 2", "  betas: @@[0.9]"),
    "short_calls": ("RM105", "  warmup_steps: 2", "  max_length: @@4"),
    "empty_section": ("RM105", SPEC[SPEC.index("train:\n"):], "train:@@\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_its_place(name: str) -> None:
    code, piece, other = REFUSED[name]
    text = changed((piece, other))
    if name == "no_targets":
        text = text.replace("  targets: {planner: plan, solver: solution}\n", "")
    before = text[: text.index("@@")]
    place = before.count("\n") + 1, len(before) - before.rfind("\n")
    with pytest.raises(RecmasError) as refused:
        parse_spec(text.replace("@@", ""), file="spec.yaml")
    (problem,) = [p for p in refused.value.problems if p.severity == "error"]
    assert (problem.code, (problem.line, problem.column)) == (code, place), problem


def test_what_users_read(golden: Callable[..., None]) -> None:
    shown = ""
    for name in REFUSED:
        _, piece, other = REFUSED[name]
        text = changed((piece, other)).replace("@@", "")
        if name == "no_targets":
            text = text.replace("  targets: {planner: plan, solver: solution}\n", "")
        with pytest.raises(RecmasError) as refused:
            parse_spec(text, file="spec.yaml")
        shown += f"# {name}\n{refused.value}\n"
    golden(shown)


def test_a_link_without_biases_cannot_be_centred() -> None:
    text = changed(
        ("planner -> solver: {}", "planner -> solver: {kind: residual}"),
        ("{steps: 8,", "{center: true, steps: 8,"),
    )
    with pytest.raises(RecmasError) as refused:
        parse_spec(text)
    (problem,) = [p for p in refused.value.problems if p.severity == "error"]
    assert problem.code == "RM105"
    assert "`residual` has none" in problem.message
    parse_spec(text.replace("center: true", "center: false"))


def test_additions_are_off_by_default() -> None:
    train = parse_spec(SPEC).document.train
    assert train is not None
    assert not train.outer.has_additions
    added = ("mismatch: {}", "teacher: {}", "reconstruct: 1", "mix: {}", "center: true")
    for addition in added:
        train = parse_spec(changed(("{steps: 8,", f"{{{addition}, steps: 8,"))).document.train
        assert train is not None
        assert train.outer.has_additions, addition


def test_rollout_needs_only_the_answers_text() -> None:
    text = changed(
        ("targets: {planner: plan, solver: solution}", "targets: {solver: solution}"),
        ("{steps: 8,", "{mode: rollout, steps: 8,"),
    )
    train = parse_spec(text).document.train
    assert train is not None
    assert (train.outer.mode, train.outer.steps, train.inner.steps) == ("rollout", 8, 12)


def test_a_preset_fills_in_and_written_keys_win() -> None:
    kind = "kind: ln_residual, init: random"
    text = changed(
        ("planner -> solver: {}", f"planner -> solver: {{{kind}}}"),
        ("{feedback: true}", f"{{feedback: true, {kind}}}"),
        ("  warmup_steps: 2", "  preset: released\n  clip: 0.5"),
    ).replace("inner: {init: random}", f"inner: {{{kind}}}")
    train = parse_spec(text).document.train
    assert train is not None
    assert (train.warmup_steps, train.clip, train.betas) == (10, 0.5, (0.9, 0.95))
    assert train.outer.freeze_inner
    assert train.outer.lr == 1e-3, "written in the spec"
    assert PRESETS.keys() == PRESET_KINDS.keys()


def test_the_resolved_spec_shows_everything_and_loads_again() -> None:
    spec = parse_spec(SPEC)
    resolved = spec.resolved_yaml()
    assert "betas: [0.9, 0.95]" in resolved
    assert "max_length: 1024" in resolved
    assert parse_spec(resolved) == spec


def test_how_a_system_is_trained_does_not_change_what_it_is() -> None:
    spec = parse_spec(SPEC)
    assert parse_spec(SPEC, overrides=["train.outer.lr=0.5"]).digest == spec.digest
    assert parse_spec(SPEC[: SPEC.index("train:")]).digest == spec.digest
    assert parse_spec(SPEC, overrides=["latent_steps=4"]).digest != spec.digest
