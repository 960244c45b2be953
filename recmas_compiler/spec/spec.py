"""The front door: a YAML file or text becomes a checked `Spec`, or all of its problems at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from recmas_compiler.spec.checks.table import run_checks
from recmas_compiler.spec.document.places import Places, SourcePosition
from recmas_compiler.spec.document.problems import SET_PREFIX, in_reading_order, problem_at
from recmas_compiler.spec.document.yaml_source import (
    Value,
    parse_mapping,
    parse_yaml,
    read_text,
    resolve,
    write_yaml,
)
from recmas_compiler.spec.patterns.layouts import expand_pattern
from recmas_compiler.spec.schema.backbones import LOCAL_KEYS
from recmas_compiler.spec.schema.declared import Declared, normalize_link_names
from recmas_compiler.spec.schema.document import SPECS, SpecDocument, validate
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.formats.ids import canonical_link_name


def resolved_yaml(document: SpecDocument) -> str:
    """Return the spec with its pattern expanded and every default written out.

    Equal documents give equal text, and the text loads back to an equal spec.
    """
    values = document.model_dump(mode="python", exclude_none=True)
    remote = {name for name, section in document.backbones.items() if section.is_remote}
    for name, backbone in values["backbones"].items():
        for key in LOCAL_KEYS if name in remote else ():
            backbone.pop(key, None)
    for agent in values["agents"].values():
        if agent["backbone"] in remote:
            del agent["inner"]  # it has no states that a link could map
    return write_yaml(values)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A checked spec. Two specs are equal if they mean the same, wherever they are written.

    Attributes:
        path: The file, or None for a spec from text.
        base_dir: Folder that relative paths in the spec start from.
    """

    document: SpecDocument
    path: Path | None = field(compare=False)
    base_dir: Path = field(compare=False)
    places: Places = field(compare=False, repr=False)
    warnings: tuple[Problem, ...] = field(compare=False)

    @cached_property
    def declared(self) -> Declared:
        """The document with prompts parsed and links by their ends."""
        return Declared(self.document, self.places, self.base_dir)

    def position(self, *loc: str | int) -> SourcePosition:
        """Return where a part is declared: `position("agents", "solver")` is where its name stands.

        Scalars are found by their value. What is not written anywhere is found by the nearest thing
        around it.
        """
        return self.places.value(loc) if loc in self.places.spans else self.places.key(loc)

    def resolved_yaml(self) -> str:
        """Return the spec with its pattern expanded and all defaults written out."""
        return resolved_yaml(self.document)

    def system_yaml(self) -> str:
        """Return the resolved spec without `train`, which building does not look at."""
        return resolved_yaml(self.document.model_copy(update={"train": None}))

    @property
    def digest(self) -> str:
        """The sha256 of `system_yaml`, hexadecimal; how a system is trained does not change it."""
        return hashlib.sha256(self.system_yaml().encode()).hexdigest()


class SpecError(RecmasError):
    """What is wrong with a spec.

    Attributes:
        spec: What is known of it all the same, without the settings that are wrong, so that what
            only files tell can be found as well; None where the errors go too deep.
    """

    def __init__(self, problems: Iterable[Problem], spec: Spec | None) -> None:
        super().__init__(problems)
        self.spec = spec


def load_spec(path: str | Path, *, overrides: Iterable[str] = ()) -> Spec:
    """Read and check a spec file; no backbone or link file is touched.

    Args:
        overrides: `a.b.c=value`, as given to `--set`; later ones win.

    Raises:
        RecmasError: Everything that is wrong with the spec (RM1xx), in the order of the file.
    """
    path = Path(path)
    text = read_text(path, file=str(path), language=SPECS)
    return _check(text, file=str(path), path=path, base_dir=path.parent, overrides=overrides)


def parse_spec(
    text: str,
    *,
    file: str = "<string>",
    base_dir: str | Path = ".",
    overrides: Iterable[str] = (),
) -> Spec:
    """Check a spec given as text. See `load_spec`.

    Args:
        file: What to call it in messages.
        base_dir: Folder that relative paths in the spec start from.
    """
    return _check(text, file=file, path=None, base_dir=Path(base_dir), overrides=overrides)


def _check(
    text: str, *, file: str, path: Path | None, base_dir: Path, overrides: Iterable[str]
) -> Spec:
    root, places, problems = parse_mapping(text, file=file, language=SPECS)
    problems += normalize_link_names(root, places)
    problems += apply_overrides(root, places, overrides)
    unexpanded = expand_pattern(root, places)
    document, found = validate(root, places)
    problems += unexpanded + found
    if document is not None and not unexpanded:
        problems += run_checks(Declared(document, places, base_dir))
    errors = in_reading_order(p for p in problems if p.severity == "error")
    if document is None:
        raise SpecError(errors, None)
    warnings = in_reading_order(p for p in problems if p.severity == "warning")
    spec = Spec(document=document, path=path, base_dir=base_dir, places=places, warnings=warnings)
    if errors:
        raise SpecError(errors, spec)
    return spec


_HINT = "Write --set PATH=VALUE, such as --set answer.max_new_tokens=64."


def apply_overrides(
    root: dict[str, Value], places: Places, overrides: Iterable[str]
) -> list[Problem]:
    """Set every `path=value` in `root`, in order; later ones win.

    The value is one YAML scalar or flow collection (`[a, b]`, `{a: 1}`). Sections on the way are
    created. What the schema refuses is reported later, at the place that is recorded here.
    """
    problems: list[Problem] = []
    if isinstance(overrides, str):  # else it would be taken letter by letter
        overrides = (overrides,)
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
