"""The front door: a YAML file or text becomes a checked `Spec`, or all of its problems at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from recmas_compiler.spec.checks.table import run_checks
from recmas_compiler.spec.document.places import Places, SourcePosition
from recmas_compiler.spec.document.problems import in_reading_order
from recmas_compiler.spec.document.yaml_source import parse_mapping, read_text, write_yaml
from recmas_compiler.spec.overrides import apply_overrides
from recmas_compiler.spec.patterns.layouts import expand_pattern
from recmas_compiler.spec.schema.declared import Declared, normalize_link_names
from recmas_compiler.spec.schema.sections import SpecDocument
from recmas_compiler.spec.schema.validate import SPECS, validate
from recmas_runtime.core.errors import Problem, RecmasError


def resolved_yaml(document: SpecDocument) -> str:
    """Return the spec with its pattern expanded and every default written out.

    Equal documents give equal text, and the text loads back to an equal spec.
    """
    return write_yaml(document.model_dump(mode="python", exclude_none=True))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A checked spec. Two specs are equal if they mean the same, wherever they are written.

    Attributes:
        document: Typed content: the pattern expanded, all defaults filled in.
        path: The file, or None for a spec from text.
        base_dir: Folder that relative paths in the spec start from.
        places: Where everything stands.
        warnings: Findings that stop nothing.
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
        """The sha256 of `system_yaml`, hexadecimal: how a system is trained does not change it."""
        return hashlib.sha256(self.system_yaml().encode()).hexdigest()


def load_spec(path: str | Path, *, overrides: Iterable[str] = ()) -> Spec:
    """Read and check a spec file; no backbone or link file is touched.

    Args:
        path: The YAML file.
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
        text: YAML.
        file: What to call it in messages.
        base_dir: Folder that relative paths in the spec start from.
        overrides: `a.b.c=value`, as given to `--set`.
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
    if errors:
        raise RecmasError(errors)
    assert document is not None, "no document and no error"
    warnings = in_reading_order(problems)
    return Spec(document=document, path=path, base_dir=base_dir, places=places, warnings=warnings)
