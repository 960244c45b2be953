"""`answer.stop_when` and `answer.tools`: what is refused where, what is warned of, defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.specs import PAIR, at, write_config
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats.plan import PythonPlan, SearchPlan, StopPlan, ToolsPlan

# id: (code, what stands in `answer` besides the agent); `@@` marks the place
MALFORMED = {
    "no_cosine": ("RM104", "@@stop_when: {}"),
    "blank_stop": ("RM105", "stop_when: @@~"),
    "stop_number": ("RM105", "stop_when: @@0.9"),
    "cosine_zero": ("RM105", "stop_when: {cosine: @@0}"),
    "cosine_above_one": ("RM105", "stop_when: {cosine: @@1.01}"),
    "cosine_nan": ("RM105", "stop_when: {cosine: @@.nan}"),
    "cosine_text": ("RM105", "stop_when: {cosine: @@high}"),
    "misspelt_cosine": ("RM103", "stop_when: {cosine: 0.9, @@cosin: 0.8}"),
    "blank_tools": ("RM105", "tools: @@~"),
    "tools_list": ("RM105", "tools: @@[search]"),
    "no_tool": ("RM105", "@@tools: {}"),
    "only_bounds": ("RM105", "@@tools: {max_calls: 3}"),
    "ask_off": ("RM105", "@@tools: {ask: false}"),
    "misspelt_tool": ("RM103", "tools: {ask: true, @@serch: {corpus: a}}"),
    "search_text": ("RM105", "tools: {search: @@passages.jsonl}"),
    "nothing_to_search": ("RM105", "tools: {@@search: {}}"),
    "blank_corpus": ("RM105", "tools: {search: {corpus: @@~}}"),
    "two_to_search": ("RM105", "tools: {search: {corpus: a, @@backend: tavily}}"),
    "unknown_backend": ("RM105", "tools: {search: {backend: @@google}}"),
    "top_k_zero": ("RM105", "tools: {search: {corpus: a, top_k: @@0}}"),
    "top_k_huge": ("RM105", "tools: {search: {corpus: a, top_k: @@51}}"),
    "python_true": ("RM105", "tools: {python: @@true}"),
    "blank_python": ("RM105", "tools: {python: @@~}"),
    "no_memory": ("RM105", "tools: {python: {memory_mb: @@1}}"),
    "too_much_memory": ("RM105", "tools: {python: {memory_mb: @@65537}}"),
    "ask_yes": ("RM105", "tools: {ask: @@yes}"),
    "functions_text": ("RM105", "tools: {functions: @@lookup}"),
    "function_upper_case": ("RM105", "tools: {functions: [@@Lookup]}"),
    "function_with_space": ("RM105", 'tools: {functions: [a, @@"look up"]}'),
    "function_search": ("RM105", "tools: {functions: [@@search]}"),
    "function_result": ("RM105", "tools: {functions: [a, @@result]}"),
    "function_tool_call": ("RM105", "tools: {functions: [@@tool_call]}"),
    "function_twice": ("RM105", "tools: {functions: [a, b, @@a]}"),
    "no_calls": ("RM105", "tools: {ask: true, max_calls: @@0}"),
    "calls_text": ("RM105", "tools: {ask: true, max_calls: @@many}"),
    "no_time": ("RM105", "tools: {ask: true, timeout_s: @@0}"),
    "endless": ("RM105", "tools: {ask: true, timeout_s: @@.inf}"),
    "too_long": ("RM105", "tools: {ask: true, timeout_s: @@601}"),
    "no_result": ("RM105", "tools: {ask: true, max_result_chars: @@0}"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refused_at_its_place(name: str) -> None:
    code, setting = MALFORMED[name]
    text = PAIR.replace("{agent: solver}", f"{{agent: solver, {setting}}}")
    before = text[: text.index("@@")].split("\n")
    with pytest.raises(RecmasError) as refused:
        parse_spec(text.replace("@@", ""))
    found = [at(problem) for problem in refused.value.problems]
    assert found == [(code, len(before), len(before[-1]) + 1)], str(refused.value)


def test_wrong_tools_hide_nothing_else() -> None:
    text = PAIR.replace("{agent: solver}", "{agent: solver, tools: {max_calls: 0}}")
    text = text.replace("with {{ latent.planner }}", "with {{ latent.plannr }}")
    with pytest.raises(RecmasError) as refused:
        parse_spec(text)
    assert [problem.code for problem in refused.value.problems] == ["RM111", "RM105"]


@pytest.mark.parametrize(
    ("rounds", "feedback", "warned"),
    [(1, True, True), (2, True, True), (3, True, True), (4, True, False), (4, False, True)],
)
def test_an_early_end_that_can_never_come(rounds: int, feedback: bool, warned: bool) -> None:
    text = PAIR.replace("{agent: solver}", "{agent: solver, stop_when: {cosine: 0.99}}")
    text = text.replace("rounds: 2", f"rounds: {rounds}")
    if not feedback:
        text = text.replace("  solver -> planner: {feedback: true}\n", "")
        text = text.replace(
            "prompt:\n      first: Plan {{ question }}\n      then: Plan {{ question }} again "
            "{{ latent.solver }}",
            "prompt: Plan {{ question }}",
        )
    warnings = [at(w) for w in parse_spec(text).warnings if w.code == "RM153"]
    assert bool(warnings) is warned
    if warnings:
        line = text.split("\n").index("answer: {agent: solver, stop_when: {cosine: 0.99}}") + 1
        assert warnings == [("RM153", line, 25)]


def test_into_the_system(tmp_path: Path) -> None:
    write_config(tmp_path / "small")
    (tmp_path / "texts").mkdir()
    answer = (
        "{agent: solver, stop_when: {cosine: 1}, tools: {search: {corpus: texts, top_k: 5}, "
        "python: {}, functions: [a, b-2], timeout_s: 3}}"
    )
    spec = parse_spec(PAIR.replace("{agent: solver}", answer), base_dir=tmp_path)
    system = build_topology(spec).system
    assert system.stop_when == StopPlan(cosine=1.0)
    assert system.tools == ToolsPlan(
        search=SearchPlan(backend="local", corpus="tools/search.jsonl", top_k=5),
        python=PythonPlan(memory_mb=256),
        ask=False,
        functions=("a", "b-2"),
        max_calls=4,
        timeout_s=3.0,
        max_result_chars=2000,
    )
    assert system.search_corpus == str(tmp_path / "texts")
    assert parse_spec(spec.resolved_yaml(), base_dir=tmp_path) == spec


def test_a_web_search_needs_no_file(tmp_path: Path) -> None:
    write_config(tmp_path / "small")
    answer = "{agent: solver, tools: {search: {backend: tavily}}}"
    spec = parse_spec(PAIR.replace("{agent: solver}", answer), base_dir=tmp_path)
    system = build_topology(spec).system
    assert system.tools is not None
    assert system.tools.search == SearchPlan(backend="tavily", corpus=None, top_k=3)
    assert system.search_corpus is None


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    write_config(tmp_path / "small")
    answer = "{agent: solver, tools: {search: {corpus: passages.jsonl}}}"
    text = PAIR.replace("{agent: solver}", answer)
    with pytest.raises(RecmasError) as refused:
        build_topology(parse_spec(text, base_dir=tmp_path))
    (problem,) = refused.value.problems
    assert at(problem) == ("RM123", 18, 50)
    assert refused.value.exit_code == Exit.SPEC_INVALID
    (tmp_path / "passages.jsonl").write_text("")
    build_topology(parse_spec(text, base_dir=tmp_path))


def test_overrides_reach_the_tools() -> None:
    overrides = ["answer.tools.ask=true", "answer.stop_when.cosine=0.5", "rounds=4"]
    answer = parse_spec(PAIR, overrides=overrides).document.answer
    assert answer.tools is not None
    assert answer.tools.ask
    assert answer.stop_when is not None
    assert answer.stop_when.cosine == 0.5
