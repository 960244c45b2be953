"""`--set a.b.c=value`: changes to the plain YAML values before the schema looks at them."""

from __future__ import annotations

from collections.abc import Iterable

from recmas_compiler.spec.document.places import Places, SourcePosition
from recmas_compiler.spec.document.problems import SET_PREFIX, problem_at
from recmas_compiler.spec.document.yaml_source import Value, parse_yaml, resolve
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.formats.ids import canonical_link_name

_HINT = "Write --set PATH=VALUE, such as --set answer.max_new_tokens=64."


def apply_overrides(
    root: dict[str, Value], places: Places, overrides: Iterable[str]
) -> list[Problem]:
    """Set every `path=value` in `root`, in order; later ones win.

    The value is one YAML scalar or flow collection (`[a, b]`, `{a: 1}`). Sections on the way are
    created. What the schema refuses is reported later, at the place that is recorded here.
    """
    problems: list[Problem] = []
    for override in overrides:
        place = SourcePosition(file=f"{SET_PREFIX}{override}", line=1, column=1)
        path, equals, text = override.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            problems.append(problem_at(place, "RM122", "this is not PATH=VALUE.", hint=_HINT))
            continue
        try:
            value = _value(text.strip(), place.file)
        except RecmasError as error:
            message = f"the value cannot be read: {error.problems[0].message}"
            hint = "Put text that begins with a quote or a bracket into quotes."
            problems.append(problem_at(place, "RM122", message, hint=hint))
            continue
        if keys[0] == "links" and len(keys) > 1:
            keys[1] = canonical_link_name(keys[1]) or keys[1]
        problems += _set(root, places, keys, value, place)
    return problems


def _value(text: str, file: str) -> Value:
    """Read a value; text without quotes and brackets is one scalar, whatever else it holds."""
    if text.startswith(("[", "{", '"', "'")):
        return parse_yaml(text, file=file).value
    return resolve(text)


def _set(
    root: dict[str, Value], places: Places, keys: list[str], value: Value, place: SourcePosition
) -> list[Problem]:
    section = root
    for depth, key in enumerate(keys[:-1], start=1):
        loc = tuple(keys[:depth])
        if loc not in places.values:
            places.overwrite(loc, place)
        inside = section.setdefault(key, {})
        if inside is None and loc[0] == "links":
            inside = section[key] = {}
        if not isinstance(inside, dict):
            message = f"`{'.'.join(loc)}` is not a mapping, so it has no `{keys[depth]}`."
            hint = f"Set `{'.'.join(loc)}` as a whole."
            return [problem_at(place, "RM122", message, hint=hint)]
        section = inside
    places.overwrite(tuple(keys), place)
    section[keys[-1]] = value
    return []
