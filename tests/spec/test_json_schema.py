"""The generated files are current, and the JSON schema agrees with the loader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from kit.specs import CHAIN, PAIR
from recmas_compiler.spec.document.yaml_source import parse_yaml
from recmas_compiler.spec.patterns.starter_specs import STARTERS, ready_specs, starter_spec
from recmas_compiler.spec.schema.document import SECTIONS
from recmas_compiler.spec.schema.json_schema import (
    json_schema,
    schema_text,
    with_tables,
)
from recmas_compiler.spec.spec import load_spec, parse_spec
from recmas_runtime.formats.messages import Carries
from test_malformed_specs import CASES

SPECS = Path(__file__).parents[2] / "specs"
UPDATE = "run: python -m recmas_compiler.spec.patterns.starter_specs"

# What a schema can find: shapes and bounds, but not names, links and prompts.
SHAPES = ("RM103", "RM104", "RM105", "RM106")
# Of these, what only the loader knows.
BEYOND_SCHEMA = {"messages_fill_prompt", "template_reserved", "rounds_real", "temperature_nan"}


def validator() -> Any:
    return jsonschema.Draft202012Validator(json_schema())


def test_generated_files_are_current() -> None:
    assert (SPECS / "schema" / "recmas.v1.json").read_text() == schema_text(), UPDATE
    readme = (SPECS / "README.md").read_text()
    assert with_tables(readme) == readme, UPDATE
    for name, text in ready_specs().items():
        assert (SPECS / name).read_text() == text, UPDATE


def test_it_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("text", [PAIR, CHAIN, *map(starter_spec, STARTERS)])
def test_sound_specs_fit(text: str) -> None:
    validator().validate(parse_yaml(text, file="f").value)
    resolved = parse_spec(text).resolved_yaml()
    validator().validate(parse_yaml(resolved, file="f").value)


@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case[0] in SHAPES and n not in BEYOND_SCHEMA]
)
def test_malformed_specs_do_not(name: str) -> None:
    _, piece, other = CASES[name]
    text = PAIR.replace(piece, other.replace("@@", ""))
    if name == "no_answer":
        text = text.replace("answer: {agent: solver}\n", "")
    assert not validator().is_valid(parse_yaml(text, file="f").value)


def test_every_key_says_what_it_means() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.get("properties", {}).items():
                assert len(value.get("description", "")) > 10, key
            for value in node.values():
                walk(value)

    definitions = json_schema()["$defs"]
    walk({"properties": json_schema()["properties"], "defs": definitions})
    assert len(definitions) == len(SECTIONS) - 1


def test_every_key_is_in_the_readme() -> None:
    readme = (SPECS / "README.md").read_text()
    for section in SECTIONS.values():
        for key in section.model_fields:
            assert f"| `{key}` |" in readme


def test_specs_of_the_readme_are_sound() -> None:
    blocks = (SPECS / "README.md").read_text().split("```yaml\n")[1:]
    specs = [block.split("```")[0] for block in blocks]
    whole = [text for text in specs if text.startswith("recmas: 1")]
    assert len(whole) == 2
    for text in whole:
        assert parse_spec(text).warnings == ()
    (part,) = [text for text in specs if text.startswith("agents:")]
    more = whole[1] + '  small: {source: "./small"}\n' + part
    others = "  critic: {backbone: smol}\n  solver: {backbone: smol}\n"
    assert parse_spec(more + others).document.agents["planner"].backbone == "small"


MESSAGES = """\
recmas: 1
name: messages
rounds: 2
backbones: {smol: {source: ./smol}}
agents:
  reader:
    backbone: smol
    prompt:
      first: Read {{ passage }}
      then: Read {{ passage }} {{ latent.solver }}
  critic: {backbone: smol, prompt: "Judge {{ question }}"}
  scribe: {backbone: smol, prompt: "Note {{ question }}"}
  judge: {backbone: smol, prompt: "Rate {{ question }}"}
  memory: {backbone: smol, prompt: "Recall {{ question }}"}
  solver:
    backbone: smol
    prompt: >-
      {{ latent.memory }} {{ question }} {{ latent.reader }} {{ latent.critic }}
      {{ latent.scribe }} {{ latent.judge }}
"""


def test_messages_of_the_readme_are_sound() -> None:
    blocks = (SPECS / "README.md").read_text().split("```yaml\n")[1:]
    (links,) = [block.split("```")[0] for block in blocks if block.startswith("links:")]
    spec = parse_spec(f"{MESSAGES}{links}answer: {{agent: solver}}\n")
    assert spec.warnings == ()
    carried = {link.carries for link in spec.document.links.values()}
    assert carried == set(get_args(Carries))


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_spec_is_sound(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema/recmas.v1.json\n")
    validator().validate(parse_yaml(text, file="f").value)
    spec = load_spec(path)
    assert spec.warnings == ()
    assert {b.source for b in spec.document.backbones.values()} == {"builtin:smollm2-135m-instruct"}
    assert f"]({path.name})" in (SPECS / "README.md").read_text()


def test_the_demo() -> None:
    spec = load_spec(SPECS / "sequential.yaml")
    document = spec.document
    assert (len(document.agents), document.rounds, document.latent_steps) == (3, 3, 16)
    assert document.answer.max_new_tokens == 128
    assert spec.warnings == ()
    assert {link.carries for link in document.links.values()} == {"cache"}, "of use untrained"


def test_checking_imports_no_framework() -> None:
    program = (
        "import sys\n"
        "from recmas_compiler.ir.build_topology import build_topology\n"
        "from recmas_compiler.spec.spec import load_spec\n"
        f"load_spec({str(SPECS / 'sequential.yaml')!r})\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gguf', 'onnx', 'onnxruntime'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
