"""The language: the guide of `specs/README.md`, and every key as the schema has it."""

from __future__ import annotations

import re
from typing import Final

from recmas_compiler.spec.schema.json_schema import key_rows

_KEYS: Final = "## Every key\n"
_TABLE = re.compile(r"<!-- keys of (\S+) -->\n.*?<!-- end of keys -->\n", re.S)
_CODE_TABLE = re.compile(r"<!-- codes -->\n.*?<!-- end of codes -->\n", re.S)


def split(text: str) -> tuple[str, str]:
    """Return the guide and the page of keys; what stands behind the keys belongs to the guide."""
    before, _, rest = text.partition(_KEYS)
    keys, mark, behind = rest.partition("\n## ")
    listed = "[The error codes](../docs/errors.md) are listed on a page of their own.\n"
    guide = before + mark.lstrip("\n") + behind
    guide = guide.replace("- [Every key](#every-key)\n", "")
    return _CODE_TABLE.sub(listed, guide), _key_page(keys)


def _key_page(keys: str) -> str:
    """Return the page of keys: headings one level up, tables as lists with an anchor a key."""
    keys = re.sub(r"^###", "##", keys, flags=re.M)
    return "# Every key\n" + _TABLE.sub(lambda match: _key_list(match[1]), keys)


def _key_list(section: str) -> str:
    """Return the keys of a section as a list of definitions."""
    lines = []
    for key, kind, default, meaning in key_rows(section):
        anchor = f"key-{section}-{key}".replace(".", "-").replace("*", "name")
        told = default if default.startswith("**") else f"default {default}" if default else ""
        lines += [f"[`{key}`]{{#{anchor}}}", f": {kind}{'; ' if told else ''}{told}", ""]
        lines += [f"  {meaning}", ""]
    return "\n".join(lines)
