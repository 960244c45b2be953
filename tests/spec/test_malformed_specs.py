"""Malformed specs: every one is refused with its code at its place, and with nothing else.

A case replaces a piece of a sound spec; `@@` marks the place that the error must name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.specs import CHAIN, PAIR, at
from recmas_compiler.spec.document.yaml_source import MAX_BYTES
from recmas_compiler.spec.spec import load_spec, parse_spec
from recmas_runtime.core.errors import Exit, RecmasError

# id: (code, piece of PAIR, what stands there instead)
CASES: dict[str, tuple[str, str, str]] = {
    # YAML
    "unclosed_quote": ("RM101", "name: demo\n", 'name: @@"demo\n'),
    "unclosed_bracket": ("RM101", "answer: {agent: solver}\n", "answer: {agent: solver\n@@"),
    "tab_indent": ("RM101", "  small: {source", "@@\tsmall: {source"),
    "colon_in_text": ("RM101", "name: demo", "name: a@@: b"),
    "wrong_indent": (
        "RM101",
        "    backbone: small\n    prompt:\n",
        "    backbone: small\n   @@prompt:\n",
    ),
    "unquoted_slot": ("RM101", "Solve {{ question }} with {{", "{{ question }} @@with {{"),
    "unquoted_field": ("RM101", "first: Plan {{ question }}", "first: {@@{ question }}"),
    "list_as_key": ("RM101", "name: demo", "? @@[a, b]\n: c\nname: demo"),
    "python_tag": ("RM101", "name: demo", "name: @@!!python/object/apply:os.system [ls]"),
    "string_tag": ("RM101", "rounds: 2", "rounds: @@!!str 2"),
    "local_tag": ("RM101", "rounds: 2", "rounds: @@!mine 2"),
    "unknown_alias": ("RM101", "rounds: 2", "rounds: @@*two"),
    "alias_of_itself": ("RM101", "answer: {agent: solver}", "answer: &a [@@*a]"),
    "second_document": (
        "RM101",
        "answer: {agent: solver}\n",
        "answer: {agent: solver}\n@@---\na: 1\n",
    ),
    "too_deep": ("RM101", "name: demo", "name: " + "[" * 31 + "@@[" + "]" * 32),
    "nul_byte": ("RM100", "name: demo", "name: de@@\0mo"),
    "escape_byte": ("RM100", "name: demo", "# @@\x1b[0m\nname: demo"),
    "lone_surrogate": ("RM100", "name: demo", "name: @@\ud800"),
    # duplicates
    "key_twice": ("RM102", "rounds: 2\n", "rounds: 2\n@@rounds: 3\n"),
    "agent_twice": ("RM102", "links:\n", "  @@solver: {}\nlinks:\n"),
    "link_twice": ("RM102", "answer:", "  @@planner->solver: {}\nanswer:"),
    "key_twice_in_flow": ("RM102", "{agent: solver}", "{agent: solver, @@agent: planner}"),
    # unknown keys
    "misspelt_section": ("RM103", "rounds: 2", "rounds: 2\n@@latent_stps: 4"),
    "misspelt_setting": ("RM103", "{agent: solver}", "{agent: solver, @@temprature: 1}"),
    "setting_elsewhere": ("RM103", "rounds: 2", "rounds: 2\n@@temperature: 1"),
    "unknown_in_agent": ("RM103", "  solver:\n", "  solver:\n    @@model: x\n"),
    "unknown_in_prompt": ("RM103", "      first:", "      @@last: x\n      first:"),
    "unknown_in_link": ("RM103", "{feedback: true}", "{feedback: true, @@delay: 1}"),
    "unknown_in_inner": ("RM103", "  solver:\n", "  solver:\n    inner: {@@rank: 3}\n"),
    "merged_key": ("RM103", "{agent: solver}", "{agent: solver, <<: {@@seeds: 1}}"),
    # missing keys
    "no_version": ("RM104", "recmas: 1\nname", "@@name"),
    "no_name": ("RM104", "recmas: 1\nname: demo", "@@recmas: 1"),
    "no_answer": (
        "RM104",
        "recmas: 1\n",
        "@@recmas: 1\n",
    ),
    "no_answer_agent": ("RM104", "answer: {agent: solver}", "@@answer: {}"),
    "no_source": ("RM104", "  small: {source: ./small}", "  @@small: {dtype: float32}"),
    "no_backbone_of_agent": ("RM104", "  solver:\n    backbone: small\n", "  @@solver:\n"),
    "no_then": (
        "RM104",
        "    prompt:\n      first: Plan {{ question }}\n      then:",
        "    @@prompt:\n      first:",
    ),
    # types and bounds
    "list_as_spec": ("RM105", PAIR, "@@- recmas: 1\n"),
    "text_as_spec": ("RM105", PAIR, "@@recmas\n"),
    "name_upper_case": ("RM105", "name: demo", "name: @@Demo"),
    "name_space": ("RM105", "name: demo", "name: @@my demo"),
    "name_number": ("RM105", "name: demo", "name: @@17"),
    "name_empty": ("RM105", "name: demo", "name:@@"),
    "name_path": ("RM105", "name: demo", "name: @@../demo"),
    "name_too_long": ("RM105", "name: demo", "name: @@" + "a" * 65),
    "agent_name": ("RM105", "links:\n", "  @@Big One: {backbone: small, prompt: x}\nlinks:\n"),
    "no_rounds": ("RM105", "rounds: 2", "rounds: @@0"),
    "too_many_rounds": ("RM105", "rounds: 2", "rounds: @@65"),
    "rounds_text": ("RM105", "rounds: 2", 'rounds: @@"2"'),
    "rounds_real": ("RM105", "rounds: 2", "rounds: @@2.0"),
    "rounds_true": ("RM105", "rounds: 2", "rounds: @@true"),
    "rounds_list": ("RM105", "rounds: 2", "rounds: @@[2]"),
    "rounds_empty": ("RM105", "rounds: 2", "rounds:@@"),
    "rounds_huge": ("RM105", "rounds: 2", "rounds: @@" + "9" * 5000),
    "negative_steps": ("RM105", "rounds: 2", "rounds: 2\nlatent_steps: @@-1"),
    "too_many_steps": ("RM105", "  solver:\n", "  solver:\n    latent_steps: @@4097\n"),
    "blank_steps": ("RM105", "  solver:\n", "  solver:\n    latent_steps: @@~\n"),
    "temperature_infinite": ("RM105", "{agent: solver}", "{agent: solver, temperature: @@.inf}"),
    "temperature_nan": ("RM105", "{agent: solver}", "{agent: solver, temperature: @@.nan}"),
    "temperature_negative": ("RM105", "{agent: solver}", "{agent: solver, temperature: @@-0.1}"),
    "top_p_zero": ("RM105", "{agent: solver}", "{agent: solver, top_p: @@0}"),
    "top_k_real": ("RM105", "{agent: solver}", "{agent: solver, top_k: @@1e300}"),
    "no_new_tokens": ("RM105", "{agent: solver}", "{agent: solver, max_new_tokens: @@0}"),
    "seed_huge": ("RM105", "{agent: solver}", "{agent: solver, seed: @@9223372036854775808}"),
    "stop_text": ("RM105", "{agent: solver}", "{agent: solver, stop: @@end}"),
    "stop_empty": ("RM105", "{agent: solver}", '{agent: solver, stop: [a, @@""]}'),
    "stop_number": ("RM105", "{agent: solver}", "{agent: solver, stop: [@@1]}"),
    "feedback_yes": ("RM105", "{feedback: true}", "{feedback: @@yes}"),
    "unknown_dtype": ("RM105", "{source: ./small}", "{source: ./small, dtype: @@float8}"),
    "unknown_target": ("RM105", "answer:", "build: {target: @@openvino}\nanswer:"),
    "build_list": ("RM105", "answer:", "build: @@[]\nanswer:"),
    "batch_zero": ("RM105", "answer:", "build: {max_batch: @@0}\nanswer:"),
    "prompt_number": (
        "RM105",
        "prompt: Solve {{ question }} with {{ latent.planner }}",
        "prompt: @@12",
    ),
    "prompt_empty": ("RM105", "Solve {{ question }} with {{ latent.planner }}", '@@""'),
    "prompt_blank": ("RM105", "Plan {{ question }}\n", "@@~\n"),
    "no_agents": ("RM105", PAIR[PAIR.index("agents:") :], "agents: @@{}\nanswer: {agent: a}\n"),
    "agents_list": ("RM105", PAIR[PAIR.index("agents:") :], "agents: @@[a]\nanswer: {agent: a}\n"),
    "source_number": ("RM105", "{source: ./small}", "{source: @@5}"),
    "source_line_break": ("RM105", "{source: ./small}", '{source: @@"a\\nb"}'),
    "unknown_kind": ("RM105", "solver: {}", "solver: {kind: @@linear}"),
    "weights_and_init": ("RM105", "solver: {}", "solver: {weights: a.safetensors, @@init: random}"),
    "template_list": ("RM105", "  solver:\n", "  solver:\n    chat_template: {a: @@[1]}\n"),
    "template_name": ("RM105", "  solver:\n", "  solver:\n    chat_template: {@@a-b: 1}\n"),
    "template_reserved": (
        "RM105",
        "  solver:\n",
        "  solver:\n    chat_template: {@@messages: 1}\n",
    ),
    "messages_fill_prompt": (
        "RM105",
        "rounds: 2\nbackbones",
        "rounds: 2\nlatent_steps: 512\nbackbones",
    ),
    # versions
    "newer_version": ("RM106", "recmas: 1", "recmas: @@2"),
    "version_text": ("RM106", "recmas: 1", 'recmas: @@"1"'),
    "version_true": ("RM106", "recmas: 1", "recmas: @@true"),
    # names
    "unknown_backbone": (
        "RM110",
        "  solver:\n    backbone: small",
        "  solver:\n    backbone: @@smal",
    ),
    "unknown_link_source": ("RM111", "answer:", "  @@critic -> solver: {}\nanswer:"),
    "unknown_link_target": ("RM111", "answer:", "  @@solver -> critic: {}\nanswer:"),
    "unknown_answer_agent": ("RM111", "{agent: solver}", "{agent: @@solvr}"),
    "unknown_slot": ("RM111", "with {{ latent.planner }}", "with @@{{ latent.plannr }}"),
    "unused_backbone": ("RM112", "agents:\n", "  @@big: {source: ./big}\nagents:\n"),
    "unused_agent": ("RM112", "links:\n", "  @@idle: {backbone: small, prompt: x}\nlinks:\n"),
    "slot_without_link": ("RM113", "with {{", "by @@{{ latent.solver }} with {{"),
    "link_without_slot": ("RM114", " with {{ latent.planner }}", ""),
    "cycle": ("RM115", "  solver -> planner: {feedback: true}", "  @@solver -> planner: {}"),
    "no_first": (
        "RM116",
        "    prompt:\n      first: Plan {{ question }}\n      then:",
        "    @@prompt:\n      then:",
    ),
    "slot_in_first": (
        "RM116",
        "first: Plan {{ question }}",
        "first: Plan {{ question }} @@{{ latent.solver }}",
    ),
    # prompts
    "logic": ("RM117", "Solve {{", "Solve @@{% if x %} {{"),
    "comment": ("RM117", "Solve {{", "Solve @@{# x #} {{"),
    "filter": ("RM117", "Solve {{ question }}", "Solve @@{{ question | upper }}"),
    "expression": ("RM117", "Solve {{ question }}", "Solve @@{{ 1 + 1 }}"),
    "attribute": ("RM117", "Solve {{ question }}", "Solve @@{{ meta.level }}"),
    "bare_latent": ("RM117", "Solve {{ question }}", "Solve @@{{ latent }}"),
    "empty_field": ("RM117", "Solve {{ question }}", "Solve @@{{ }}"),
    "unclosed_field": ("RM117", "with {{ latent.planner }}", "with @@{{ latent.planner }"),
    "slot_in_system": ("RM117", "  solver:\n", "  solver:\n    system: A @@{{ latent.planner }}\n"),
    "in_block": (
        "RM117",
        "prompt: Solve {{ question }}",
        "prompt: |\n      One\n\n        two @@{% x %} {{ question }}",
    ),
    "in_folded_block": (
        "RM117",
        "prompt: Solve {{ question }}",
        "prompt: >-\n      One\n      two @@{% x %} {{ question }}",
    ),
    "in_quotes": (
        "RM117",
        "prompt: Solve {{ question }} with {{ latent.planner }}",
        "prompt: '{{ latent.planner }} @@{% x %}'",
    ),
    # link names
    "link_arrow": (
        "RM119",
        "  planner -> solver: {}",
        "  planner -> solver: {}\n  @@planner => solver: {}",
    ),
    "link_one_end": (
        "RM119",
        "  planner -> solver: {}",
        "  planner -> solver: {}\n  @@planner: {}",
    ),
    "link_three_ends": (
        "RM119",
        "  planner -> solver: {}",
        "  planner -> solver: {}\n  @@a -> b -> c: {}",
    ),
    # what this version does not support
    "int8_tensorrt": (
        "RM121",
        "answer:",
        "build: {target: tensorrt, precision: @@int8}\nanswer:",
    ),
    "float16_on_a_cpu": (
        "RM121",
        "  small: {source: ./small}",
        "  small: {source: ./small, device: cpu, precision: @@float16}",
    ),
    "device_without_engines": (
        "RM121",
        "  small: {source: ./small}",
        "  small: {source: ./small, device: @@tensorrt}",
    ),
    "device_unknown": (
        "RM105",
        "  small: {source: ./small}",
        "  small: {source: ./small, device: @@gpu}",
    ),
    "train_incomplete": ("RM104", "answer:", "@@train: {data: x.jsonl}\nanswer:"),
}
# Cases whose place cannot be marked in the piece itself.
PLACES = {
    "no_answer": (1, 1),
    "messages_fill_prompt": (8, 3),
    "link_without_slot": (16, 3),
    "name_empty": (2, 6),
    "rounds_empty": (3, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_at_its_place(name: str) -> None:
    code, piece, other = CASES[name]
    assert PAIR.count(piece) == 1, f"{piece!r} must stand once in the spec"
    text = PAIR.replace(piece, other)
    if name == "no_answer":
        text = text.replace("answer: {agent: solver}\n", "")
    place = PLACES.get(name) or mark(text)
    with pytest.raises(RecmasError) as refused:
        parse_spec(text.replace("@@", ""))
    found = {at(problem) for problem in refused.value.problems}
    expected = {(code, *place)}
    if name == "messages_fill_prompt":
        expected.add((code, 13, 3))
    assert found == expected, str(refused.value)
    assert refused.value.exit_code == Exit.SPEC_INVALID
    assert all(p.message.endswith((".", "?")) for p in refused.value.problems)


def mark(text: str) -> tuple[int, int]:
    before = text[: text.index("@@")]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


# id: (code, what follows `pattern: `); `@@` marks the place
PATTERNS = {
    "blank": ("RM105", ""),
    "list": ("RM105", "@@[a, b]"),
    "text": ("RM105", "@@sequential"),
    "no_pattern": ("RM118", "{}"),
    "only_a_task": ("RM118", "{task: math}"),
    "two_patterns": (
        "RM118",
        "{sequential: [a], @@mixture: {specialists: [b], summarizer: c}}",
    ),
    "unknown_pattern": ("RM103", "{@@sequental: [a, b]}"),
    "unknown_task": ("RM105", "{sequential: [a, b], task: @@maths}"),
    "task_list": ("RM105", "{sequential: [a, b], task: @@[math]}"),
    "task_inside": ("RM103", "{mixture: {specialists: [a], summarizer: b, @@task: math}}"),
    "blank_task": ("RM105", "{sequential: [a, b], task: @@~}"),
    "two_of_a_name": ("RM118", "{sequential: [a, b, @@a]}"),
    "bad_name": ("RM105", "{sequential: [a, @@B]}"),
    "number_as_name": ("RM105", "{sequential: [a, @@1]}"),
    "no_agents": ("RM105", "{sequential: @@[]}"),
    "chain_text": ("RM105", "{sequential: @@a}"),
    "mixture_list": ("RM105", "{mixture: @@[a, b]}"),
    "blank_mixture": ("RM105", "{mixture: @@~}"),
    "no_summarizer": ("RM104", "{@@mixture: {specialists: [a, b]}}"),
    "no_specialists": ("RM105", "{mixture: {specialists: @@[], summarizer: b}}"),
    "specialist_text": ("RM105", "{mixture: {specialists: @@a, summarizer: b}}"),
    "summarizer_list": ("RM105", "{mixture: {specialists: [a], summarizer: @@[b]}}"),
    "summarizer_too": ("RM118", "{mixture: {specialists: [a, b], summarizer: @@b}}"),
    "specialist_twice": ("RM118", "{mixture: {specialists: [a, @@a], summarizer: b}}"),
    "misspelt_specialists": (
        "RM103",
        "{mixture: {specialists: [a], @@specialist: [b], summarizer: c}}",
    ),
    "no_learner": ("RM104", "{@@distillation: {expert: a}}"),
    "expert_is_learner": ("RM118", "{distillation: {expert: a, learner: @@a}}"),
    "blank_expert": ("RM105", "{distillation: {expert: @@~, learner: a}}"),
    "no_caller": ("RM104", "{@@deliberation: {reflector: a}}"),
    "caller_is_reflector": ("RM118", "{deliberation: {reflector: a, caller: @@a}}"),
    "caller_upper_case": ("RM105", "{deliberation: {reflector: a, caller: @@Bob}}"),
    "tools_inside": ("RM103", "{deliberation: {reflector: a, caller: b, @@tools: {ask: true}}}"),
}
# Where the mark would change the YAML, or what is missing stands at a key outside.
PATTERN_PLACES = {"blank": (4, 9), "no_pattern": (4, 1), "only_a_task": (4, 1)}


@pytest.mark.parametrize("name", PATTERNS)
def test_malformed_patterns(name: str) -> None:
    code, pattern = PATTERNS[name]
    text = CHAIN.replace("{sequential: [planner, critic, solver]}", pattern)
    place = PATTERN_PLACES.get(name) or mark(text)
    with pytest.raises(RecmasError) as refused:
        parse_spec(text.replace("@@", ""))
    assert [at(problem) for problem in refused.value.problems] == [(code, *place)]


# id: (bytes of the file, line, column)
FILES = {
    "empty": (b"", 1, 1),
    "only_comments": (b"# nothing\n\n", 1, 1),
    "only_null": (b"~\n", 1, 1),
    "latin1": ("recmas: 1\nname: caf\xe9\n".encode("latin-1"), 2, 10),
    "utf16": ("recmas: 1\n".encode("utf-16"), 1, 1),
    "cut_character": ("name: caf\xe9".encode()[:-1], 1, 10),
    "too_large": (b"# " + b"x" * MAX_BYTES, 1, 1),
    "binary": (bytes(range(256)), 2, 118),
}


@pytest.mark.parametrize("name", FILES)
def test_unreadable_files(name: str, tmp_path: Path) -> None:
    content, line, column = FILES[name]
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(RecmasError) as refused:
        load_spec(path)
    (problem,) = refused.value.problems
    assert (problem.code, problem.line, problem.column) == ("RM100", line, column)
    assert problem.file == str(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(RecmasError) as refused:
            load_spec(path)
        assert refused.value.problems[0].code == "RM100"
        assert refused.value.problems[0].file == str(path)


def test_aliases_are_bounded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(RecmasError) as refused:
        parse_spec("\n".join(lines))
    assert refused.value.problems[0].code == "RM101"
    assert "aliases" in refused.value.problems[0].message


def test_aliases_work() -> None:
    text = PAIR.replace("backbone: small\n    prompt:\n", "backbone: &b small\n    prompt:\n")
    text = text.replace("backbone: small\n    prompt: Solve", "backbone: *b\n    prompt: Solve")
    assert parse_spec(text) == parse_spec(PAIR)


def test_all_problems_at_once_in_the_order_of_the_file() -> None:
    text = PAIR.replace("rounds: 2", "rounds: 200").replace("with {{ latent.planner }}", "{% x %}")
    text = text.replace("planner -> solver: {}", "planner -> slver: {}")
    text = text.replace("{agent: solver}", "{agent: solver, top_q: 1}")
    with pytest.raises(RecmasError) as refused:
        parse_spec(text)
    assert [at(problem) for problem in refused.value.problems] == [
        ("RM105", 3, 9),
        ("RM117", 14, 34),
        ("RM111", 16, 3),
        ("RM103", 18, 25),
    ]
