"""The JSON schema of the language, for editors, and the key tables of `specs/README.md`."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

from recmas_compiler.spec.schema.document import SECTIONS, SpecDocument
from recmas_compiler.spec.schema.sections import PATTERN_NAMES
from recmas_runtime.core.errors import CODES

SCHEMA_FILE: Final = "recmas.v1.json"

_CODES = re.compile(r"(<!-- codes -->\n).*?(<!-- end of codes -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- keys of (\S+) -->\n).*?(<!-- end of keys -->)", re.DOTALL)

# A pattern fills these in, so they are required only where there is none.
_FILLED_IN_BY_PATTERNS: Final = {
    "required": ["agents", "answer"],
    "properties": {
        "agents": {"additionalProperties": {"required": ["backbone", "prompt"]}},
        "answer": {"required": ["agent"]},
    },
}


def json_schema() -> dict[str, Any]:
    """Return the schema of a spec as it is written, before patterns are expanded."""
    schema: dict[str, Any] = _simplified(SpecDocument.model_json_schema())
    definitions = schema["$defs"]
    prompt = definitions["PromptSection"]
    definitions["PromptSection"] = {
        "description": prompt.pop("description"),
        "anyOf": [{"type": "string", "minLength": 1}, prompt],
    }
    links = schema["properties"]["links"]
    links["additionalProperties"] = {"anyOf": [links["additionalProperties"], {"type": "null"}]}
    for name in ("InnerSection", "LinkSection"):
        definitions[name]["not"] = {"required": ["init", "weights"]}
    definitions["PatternSection"]["oneOf"] = [{"required": [name]} for name in PATTERN_NAMES]
    definitions["SearchSection"]["oneOf"] = [{"required": [key]} for key in ("corpus", "backend")]
    del definitions["AgentSection"]["required"], definitions["AnswerSection"]["required"]
    schema["required"] = ["recmas", "name", "backbones"]
    schema["if"] = {"not": {"required": ["pattern"]}}
    schema["then"] = _FILLED_IN_BY_PATTERNS
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "recmas spec, version 1",
        **schema,
    }


def schema_text() -> str:
    """Return the content of the schema's file."""
    return json.dumps(json_schema(), indent=2) + "\n"


class KeyRow(NamedTuple):
    """A key of a section in words: its type and bounds, its default, its meaning."""

    key: str
    type: str
    default: str
    meaning: str


def key_rows(name: str) -> list[KeyRow]:
    """Return the keys of a section, such as `answer` or `agents.*`, in the schema's order."""
    path = () if name == "spec" else tuple(name.split("."))
    section = json_schema() if not path else _definition(SECTIONS[path].__name__)
    required = set(SECTIONS[path].model_json_schema().get("required", ()))
    return [
        KeyRow(
            key,
            _type(value),
            "**required**" if key in required else _default(value),
            " ".join(value["description"].split()),
        )
        for key, value in section["properties"].items()
    ]


def key_table(name: str) -> str:
    """Return a Markdown table of the keys of a section."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{row.key}` | {row.type} | {row.default} | {row.meaning} |" for row in key_rows(name)
    ]
    return "\n".join(lines) + "\n"


def _code_table() -> str:
    """Return a Markdown table of what can be wrong with a spec and its backbones."""
    codes = {code: meaning for code, (_, meaning) in CODES.items() if code < "RM204"}
    lines = ["| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in codes.items()]
    return "\n".join(lines) + "\n"


def _definition(name: str) -> dict[str, Any]:
    definition: dict[str, Any] = json_schema()["$defs"][name]
    return definition["anyOf"][1] if "anyOf" in definition else definition


def _type(value: dict[str, Any]) -> str:
    """Return type and bounds in words."""
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if value.get("$ref", "").endswith("/PromptSection"):
        return "text or mapping"
    if "$ref" in value or "additionalProperties" in value:
        return "mapping"
    if "anyOf" in value:
        return " or ".join(_type(choice) for choice in value["anyOf"])
    names = {"integer": "whole number", "number": "number", "boolean": "true or false"}
    if value["type"] == "array":
        return f"list, at most {value['maxItems']}"
    if value["type"] == "string":
        return "name" if value.get("maxLength") == 64 else "text"
    low, above, high = (value.get(k) for k in ("minimum", "exclusiveMinimum", "maximum"))
    bounds = "" if high is None else f", {'above ' if low is None else ''}{low or above or 0:g}"
    return names[value["type"]] + bounds + ("" if high is None else f" to {high:,}")


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    return "" if default in (None, "", [], {}) else f"`{json.dumps(default)}`".replace('"', "")


def _simplified(node: Any) -> Any:
    """Drop what only repeats the key, nulls that are refused anyway, and open key patterns."""
    if isinstance(node, list):
        return [_simplified(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _simplified(value) for key, value in node.items()}
    if isinstance(node.get("title"), str):
        del node["title"]
    if "description" in node and isinstance(node["description"], str):
        node["description"] = " ".join(node["description"].split())
    choices = [choice for choice in node.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del node["anyOf"]
        node |= choices[0]
    elif choices:
        node["anyOf"] = choices
    if node.get("default", 0) is None:
        del node["default"]
    if "patternProperties" in node:
        ((pattern, item),) = node.pop("patternProperties").items()
        node |= {"propertyNames": {"pattern": pattern}, "additionalProperties": item}
    return node


def with_tables(text: str) -> str:
    """Return `text` with every table between `<!-- ... -->` marks made anew."""
    text = _TABLE.sub(lambda m: f"{m.group(1)}{key_table(m.group(2))}{m.group(3)}", text)
    return _CODES.sub(lambda m: f"{m.group(1)}{_code_table()}{m.group(2)}", text)
