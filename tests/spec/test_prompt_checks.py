"""What is said of prompts before anything is built: their own text, and under a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.hand_bundle import make_tokenizer
from kit.specs import write_config
from recmas_compiler.api import Program, compile
from recmas_compiler.backbones.chat_files import PLAIN_TEMPLATE
from recmas_compiler.ir.printer import print_graph, prompt_text
from recmas_compiler.spec.schema.declared import parse_prompt
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.prompts.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate

PLAIN = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
)
SPEC = """\
recmas: 1
name: pair
backbones:
  small: {source: model}
agents:
  planner:
    backbone: small
    system: Be brief.
    prompt: "{{ question }} Plan."
  solver:
    backbone: small
    prompt: |
      {{ question }}
      A plan: {{ latent.planner }}
links:
  planner -> solver: {}
answer: {agent: solver}
build: {max_prompt_tokens: 100}
"""


def write_model(
    folder: Path, *, template: str | None = PLAIN, tokenizer: str | None = None, **config: object
) -> None:
    write_config(folder)
    (folder / "tokenizer.json").write_text(tokenizer or make_tokenizer().to_str())
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def compiled(folder: Path, *changes: tuple[str, str]) -> Program:
    text = SPEC
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return compile(parse_spec(text, file="spec.yaml", base_dir=folder))


def refused(folder: Path, *changes: tuple[str, str]) -> Problem:
    with pytest.raises(RecmasError) as caught:
        compiled(folder, *changes)
    (problem,) = caught.value.problems
    return problem


def test_prompts_that_render_are_right(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    assert compiled(tmp_path).spec.warnings == ()


def test_a_refused_system_text_has_its_place(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=REFUSES)
    problem = refused(tmp_path)
    assert (problem.code, problem.line, problem.column) == ("RM206", 8, 5)
    assert problem.message.startswith("agent `planner`: the chat template failed: no system")
    compiled(tmp_path, ("    system: Be brief.\n", ""))


def test_a_template_that_fails_on_a_prompt_has_its_place(tmp_path: Path) -> None:
    template = "{% if 'A plan' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + PLAIN
    write_model(tmp_path / "model", template=template)
    problem = refused(tmp_path)
    assert (problem.code, problem.line, problem.column) == ("RM206", 12, 5)
    assert "agent `solver`: the chat template failed: division by zero" in problem.message


def test_targets_are_rendered_where_the_spec_trains(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    write_model(tmp_path / "model", template=template)
    compiled(tmp_path)
    train = "train: {data: data.jsonl, targets: {solver: text}, outer: {mode: rollout}}\n"
    problem = refused(tmp_path, ("build:", f"{train}build:"))
    assert "agent `solver`: the chat template leaves out the assistant's text" in problem.message


@pytest.mark.parametrize(
    ("file", "content", "code", "message"),
    [
        ("tokenizer.json", None, "RM200", "backbone `model` has no tokenizer.json."),
        ("tokenizer.json", "{}", "RM202", "the tokenizer.json of backbone `model` is"),
        ("chat_template.jinja", None, "RM206", "backbone `model` has no chat template."),
        ("chat_template.jinja", "{% if %}", "RM206", "is not valid Jinja"),
        ("chat_template.jinja", "x" * (MAX_TEMPLATE_CHARS + 1), "RM206", "more than 65536"),
        ("chat_template.jinja", b"\xff", "RM206", "is not UTF-8"),
        ("chat_template.jinja", r"{{ '\ud800' }}", "RM206", "surrogates"),
    ],
)
def test_files_that_no_build_could_use_are_told_of(
    tmp_path: Path, file: str, content: str | bytes | None, code: str, message: str
) -> None:
    write_model(tmp_path / "model")
    path = tmp_path / "model" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RecmasError) as caught:
        compiled(tmp_path)
    problem = caught.value.problems[0]
    assert problem.code == code
    assert message in problem.message
    assert problem.line is not None
    assert problem.hint


def test_a_config_alone_serves_to_plan_with(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        if path.name != "config.json":
            path.unlink()
    compiled(tmp_path)


@pytest.mark.parametrize(
    "place", ["config", "named", "additional_chat_templates/default.jinja"], ids=str
)
def test_templates_are_found_where_transformers_looks(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    if place == "config":
        write_model(folder, template=None, chat_template=REFUSES)
    elif place == "named":
        named = [{"name": "tool_use", "template": PLAIN}, {"name": "default", "template": REFUSES}]
        write_model(folder, template=None, chat_template=named)
    else:
        write_model(folder, template=None)
        (folder / place).parent.mkdir()
        (folder / place).write_text(REFUSES)
    assert "no system" in refused(tmp_path).message


def test_special_tokens_are_those_of_the_folder(tmp_path: Path) -> None:
    template = "{% if eos_token != '<|end|>' or bos_token != '<|user|>' %}{{ 1 / 0 }}{% endif %}"
    write_model(
        tmp_path / "model",
        template=template + PLAIN,
        eos_token="<|end|>",
        bos_token={"content": "<|user|>", "lstrip": False},
    )
    compiled(tmp_path)


# A template of the spec

OWN = ("{source: model}", "{source: model, template: own.jinja}")
NONE = ("{source: model}", "{source: model, template: none}")


def test_a_spec_may_bring_its_own_template(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=REFUSES)
    (tmp_path / "own.jinja").write_text(PLAIN)
    program = compiled(tmp_path, OWN)
    assert program.graph.system.backbones["small"].template == PLAIN
    printed = print_graph(program.graph)
    (tmp_path / "own.jinja").write_text(PLAIN + "!")
    assert print_graph(compiled(tmp_path, OWN).graph) != printed


def test_plain_text_needs_no_template(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=None)
    assert compiled(tmp_path, NONE).graph.system.backbones["small"].template == PLAIN_TEMPLATE
    template = ChatTemplate(PLAIN_TEMPLATE, {"eos_token": "</s>"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sum:"}]
    assert template.render(messages, add_generation_prompt=True) == "Be brief.\n\nSum:"
    messages.append({"role": "assistant", "content": " 7"})
    with_bos = ChatTemplate(PLAIN_TEMPLATE, {"eos_token": "</s>", "bos_token": "<s>"})
    rendered = with_bos.render(messages, add_generation_prompt=False)
    assert rendered == "<s>Be brief.\n\nSum: 7</s>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file is missing"),
        (b"\xff", "not UTF-8"),
        (b"x" * (MAX_TEMPLATE_CHARS + 1), "more than"),
        (b"{% if %}", "not valid Jinja"),
    ],
)
def test_a_template_of_the_spec_that_cannot_be_used_has_its_place(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    write_model(tmp_path / "model")
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    problem = refused(tmp_path, OWN)
    assert (problem.code, problem.line) == ("RM206", 4)
    assert message in problem.message


def test_backbones_under_other_templates_are_two(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    two = (
        "agents:\n  planner:\n    backbone: small",
        "  same: {source: model, template: none}\nagents:\n  planner:\n    backbone: same",
    )
    backbones = compiled(tmp_path, two).graph.system.backbones
    assert [b.shared_as for b in backbones.values()] == ["small", "same"]


# Dates

DATED = "{% set today = strftime_now('%Y') %}{{ today }}" + PLAIN


def test_an_open_date_is_a_warning_at_the_backbone(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template=DATED)
    (warning,) = compiled(tmp_path).spec.warnings
    assert (warning.code, warning.severity, warning.line) == ("RM155", "warning", 4)
    assert "(today)" in warning.message
    fixed = compiled(tmp_path, ("name: pair\n", "name: pair\ndate: 2026-11-30\n"))
    assert fixed.spec.warnings == ()
    assert fixed.graph.system.date == "2026-11-30"
    assert "2026-11-30" in print_graph(fixed.graph)


@pytest.mark.parametrize(
    "day", ["2026-02-30", "30.11.2026", "today", "2026-11-30T00:00:00", "2026"]
)
def test_a_date_that_is_none_is_refused(day: str) -> None:
    with pytest.raises(RecmasError) as caught:
        parse_spec(SPEC.replace("name: pair\n", f"name: pair\ndate: {day}\n"), file="spec.yaml")
    problem = caught.value.problems[0]
    assert (problem.code, problem.line) == ("RM105", 3)


# Entries of lists


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("{{ facts[0] }}", "facts[0]"),
        ("{{facts[12]}}", "facts[12]"),
        ("{{ facts [ 1 ] }}", "facts[1]"),
        ("{{ facts[999] }}", "facts[999]"),
    ],
)
def test_an_entry_of_a_list_is_a_field(written: str, value: str) -> None:
    prompt = parse_prompt(f"Read {written} and {{{{ facts }}}}")
    assert prompt.issues == ()
    assert [(p.kind, p.value) for p in prompt.parts] == [
        ("text", "Read "),
        ("field", value),
        ("text", " and "),
        ("field", "facts"),
    ]
    assert parse_prompt(prompt_text(prompt.parts)).parts == prompt.parts


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{{ facts[-1] }}", '"-1" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts[] }}", '"" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts[1.0] }}", '"1.0" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts[01] }}", '"01" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts[0:2] }}", '"0:2" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts[n] }}", '"n" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts['a'] }}", "\"'a'\" is no entry of `facts`: not a whole number from 0."),
        ("{{ facts[0][1] }}", '"0][1" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts[\u0661] }}", '"\u0661" is no entry of `facts`: not a whole number from 0.'),
        ("{{ facts[1000] }}", "entry 1000 of `facts` is beyond 999."),
        ("{{ facts[9999999999] }}", '"9999999999" is no entry of `facts`: not a whole number'),
        ("{{ id[0] }}", "the `id` of a record is no list."),
        ("{{ facts[0 }}", "`{{ facts[0 }}` is neither a field nor a slot."),
        ("{{ facts.0 }}", "`{{ facts.0 }}` is neither a field nor a slot."),
        ("{{ latent[0] }}", "`{{ latent[0] }}` is neither a field nor a slot."),
        ("{{ latent.planner[0] }}", "`{{ latent.planner[0] }}` is neither a field nor a slot."),
    ],
)
def test_entries_that_are_none_are_refused_where_they_stand(written: str, message: str) -> None:
    quoted = json.dumps(f"{{{{ question }}}} {written} Plan.", ensure_ascii=False)
    text = SPEC.replace('"{{ question }} Plan."', quoted)
    with pytest.raises(RecmasError) as caught:
        parse_spec(text, file="spec.yaml")
    (problem,) = caught.value.problems
    assert (problem.code, problem.line, problem.column) == ("RM117", 9, 29)
    assert problem.message.startswith(message)
    assert "`{{ f" in (problem.hint or "") or "`{{ id" in (problem.hint or "")


def test_a_link_may_carry_the_tokens_of_an_entry() -> None:
    text = SPEC.replace("Plan.", "{{ facts[1] }}").replace(
        "solver: {}", "solver: {carries: context, of: 'OF'}"
    )
    link = parse_spec(text.replace("OF", "facts[1]"), file="spec.yaml").document.links
    assert [one.of for one in link.values()] == ["facts[1]"]
    for other, code in (("facts[0]", "RM127"), ("facts", "RM127"), ("facts[-1]", "RM105")):
        with pytest.raises(RecmasError) as caught:
            parse_spec(text.replace("OF", other), file="spec.yaml")
        (problem,) = caught.value.problems
        assert (problem.code, problem.line) == (code, 16)


# Braces, and fields that nobody shows


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('x^{{ "{{" }}2}}', "x^{{2}}"),
        ("{{ '{#' }}1}", "{#1}"),
        ('{% raw %}[{{"a": 1}}] {% if %} {# #}{% endraw %}', '[{{"a": 1}}] {% if %} {# #}'),
        ('{{ "}}" }}', "}}"),
        ('a {{ " " }}', "a  "),
        ("{ x } {x} }} %} #}", "{ x } {x} }} %} #}"),
    ],
)
def test_braces_can_be_written_as_text(written: str, shown: str) -> None:
    prompt = parse_prompt(written + "{{ q }}")
    assert prompt.issues == ()
    assert [(p.kind, p.value) for p in prompt.parts] == [("text", shown), ("field", "q")]
    assert parse_prompt(prompt_text(prompt.parts)).parts == prompt.parts


@pytest.mark.parametrize(
    "written", ["{% raw %} {{ x", "{{ 'x\" }}", '{{ "a" ~ "b" }}', "{% endraw %}"]
)
def test_escapes_that_are_none_are_refused_with_what_to_write(written: str) -> None:
    prompt = parse_prompt(written)
    assert prompt.issues
    assert "`{% raw %}`" in prompt.issues[0].hint


def warned(prompt: str) -> list[str]:
    text = SPEC.replace('"{{ question }} Plan."', json.dumps(prompt))
    return [w.message for w in parse_spec(text, file="spec.yaml").warnings if w.code == "RM156"]


def test_an_entry_in_single_braces_is_told_of() -> None:
    assert warned("{facts[0]} Plan. {{ question }}") == [
        "`{facts[0]}` is text: the model sees the braces and the name."
    ]


def test_a_field_in_single_braces_is_told_of() -> None:
    assert warned("{question} Plan. {{ question }}") == [
        "`{question}` is text: the model sees the braces and the name."
    ]
    text = SPEC.replace("{{ question }}", "{question}")
    warnings = parse_spec(text, file="spec.yaml").warnings
    assert [(w.code, w.line) for w in warnings] == [("RM156", 9), ("RM156", 13)]
    assert "`{{ question }}`" in warnings[0].hint


@pytest.mark.parametrize(
    "prompt",
    [
        r"\boxed{question} {{ question }}",
        r"\frac{a}{question} {{ question }}",
        "{other} {{ question }}",
        "x_{question} {{ question }}",
        "{% raw %}{{question}}{% endraw %} {{ question }}",
    ],
)
def test_other_braces_are_no_fields(prompt: str) -> None:
    assert warned(prompt) == []


def test_prompts_without_any_field_are_told_of() -> None:
    text = SPEC.replace("{{ question }}", "Think.")
    (warning,) = parse_spec(text, file="spec.yaml").warnings
    assert (warning.code, warning.line) == ("RM156", 12)
    assert "no prompt shows a field" in warning.message


def test_the_advice_for_a_slot_without_a_link_closes_no_cycle() -> None:
    text = SPEC.replace("{{ question }} Plan.", "{{ question }} Plan. {{ latent.solver }}")
    with pytest.raises(RecmasError) as caught:
        parse_spec(text, file="spec.yaml")
    (problem,) = caught.value.problems
    assert problem.code == "RM113"
    assert "`solver -> planner: {feedback: true}`" in problem.hint
    alone = SPEC.replace("links:\n  planner -> solver: {}\n", "")
    with pytest.raises(RecmasError) as caught:
        parse_spec(alone, file="spec.yaml")
    hints = " ".join(problem.hint for problem in caught.value.problems)
    assert "`planner -> solver: {}`" in hints


def test_tokens_that_only_a_tokenizer_class_names_may_be_written(tmp_path: Path) -> None:
    write_model(tmp_path / "model", template="{{ bos_token + '' }}" + PLAIN + "{{ eos_token }}")
    compiled(tmp_path)


def test_a_system_text_that_is_refused_beside_tools_is_told_of(tmp_path: Path) -> None:
    template = (
        "{% if tools and messages[0].role == 'system' %}{{ raise_exception('system and tools') }}"
        "{% endif %}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + PLAIN
    )
    write_model(tmp_path / "model", template=template)
    system = ("    prompt: |\n", "    system: Be exact.\n    prompt: |\n")
    compiled(tmp_path, system)
    tools = ("{agent: solver}", "{agent: solver, tools: {ask: true}}")
    problem = refused(tmp_path, system, tools)
    assert problem.message.startswith("agent `solver`: the chat template failed: system and tools")
