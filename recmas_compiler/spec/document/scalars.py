"""YAML 1.2 scalars: what a plain word means, and how a value is written so that it reads back.

The core schema of YAML 1.2.2, chapter 10.3.2. It differs from what PyYAML resolves by itself
(YAML 1.1): `no` and `on` are text, `5e-4` is a number, `0o17` is octal and `017` is seventeen.
"""

from __future__ import annotations

import json
import math
import re

Scalar = None | bool | int | float | str

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_DECIMAL = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z")
_NAN = frozenset({".nan", ".NaN", ".NAN"})

# Python refuses to parse integers of thousands of digits. Numbers this long are out of every bound
# anyway, and as a float they still compare correctly with the bounds.
_LONGEST_INTEGER = 100

# Plain text that every YAML reader takes as text: words without indicators, or a link's name.
_WORD = "[A-Za-z0-9_./@:-]*[A-Za-z0-9_./@-]"
_PLAIN = re.compile(rf"[A-Za-z]({_WORD})?( (->|{_WORD}))*\Z")
# Words that readers of YAML 1.1 take for something else; quoted so that all readers agree.
_YAML_1_1_WORDS = frozenset({"y", "n", "yes", "no", "on", "off"})
# What a double-quoted scalar must escape beyond what JSON does.
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_LITERAL_LINE = re.compile(
    "[\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]*\\Z"
)


def resolve(text: str) -> Scalar:
    """Return the value of a plain scalar."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _DECIMAL.match(text):
        return int(text) if len(text) <= _LONGEST_INTEGER else float(text)
    if _OCTAL.match(text):
        return int(text[2:], 8) if len(text) <= _LONGEST_INTEGER else math.inf
    if _HEXADECIMAL.match(text):
        return int(text[2:], 16) if len(text) <= _LONGEST_INTEGER else math.inf
    if _FLOAT.match(text):
        return float(text)
    if _INFINITE.match(text):
        return float(text.replace(".", "").lower())
    if text in _NAN:
        return float("nan")
    return text


def write_scalar(value: Scalar, *, quoted: bool = False) -> str:
    """Return a one-line form that YAML 1.2 readers read back as `value`.

    Args:
        value: What to write.
        quoted: Quote text even where it could stand plain.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    is_plain = _PLAIN.match(value) and value.lower() not in _YAML_1_1_WORDS
    if is_plain and resolve(value) == value and not quoted:
        return value
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def fits_literal_block(text: str) -> bool:
    """Tell whether `text` can be written as a literal block (`|`) and read back unchanged."""
    lines = text.split("\n")
    if len(lines) < 2 or not lines[0] or lines[0].startswith(" "):
        return False
    return all(_LITERAL_LINE.match(line) for line in lines)


def literal_header(text: str) -> str:
    """Return the block header whose chomping keeps exactly the trailing line breaks of `text`."""
    if not text.endswith("\n"):
        return "|-"
    return "|+" if text.endswith("\n\n") else "|"
