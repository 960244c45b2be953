"""Values back to YAML: the expanded spec, the same text for the same meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recmas_compiler.spec.document.scalars import fits_literal_block, literal_header, write_scalar
from recmas_compiler.spec.schema.sections import SpecDocument


def resolved_yaml(document: SpecDocument) -> str:
    """Return the spec with its pattern expanded and every default written out.

    The text is deterministic and loads back to an equal spec. Empty lists and mappings are left
    out.
    """
    values = document.model_dump(mode="python", exclude_none=True)
    return "".join(_mapping(values, indent=""))


def _mapping(values: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        if value in ({}, ()):
            continue
        head = f"{indent}{write_scalar(key)}:"
        if isinstance(value, Mapping):
            lines += [f"{head}\n", *_mapping(value, indent + "  ")]
        elif isinstance(value, str) and fits_literal_block(value):
            lines += [f"{head} {literal_header(value)}\n", *_block(value, indent + "  ")]
        else:
            lines.append(f"{head} {_inline(value)}\n")
    return lines


def _inline(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        # flow collections give `,` and brackets a meaning; quoted text is safe from it
        return f"[{', '.join(write_scalar(item, quoted=True) for item in value)}]"
    return write_scalar(value)


def _block(text: str, indent: str) -> list[str]:
    body = text.removesuffix("\n")
    return [f"{indent}{line}\n" if line else "\n" for line in body.split("\n")]
