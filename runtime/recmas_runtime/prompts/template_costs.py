"""What the operators, filters and methods of a chat template would make, known before they do.

Costs are characters, and upper bounds but for constant factors. Only what can make much of little
is here; see `template_sandbox`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any, Final, NoReturn

from jinja2.exceptions import SecurityError

# About what an element of a list takes beside its own text.
ELEMENT_CHARS: Final = 64

_CONTAINERS: Final = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
# Larger integers Python does not write either, and products of millions of bits take minutes.
_MAX_BITS: Final = 2**14
# Widths and precisions in formats of both kinds; harmless numbers now and then.
_WIDTH: Final = re.compile(r"\d+(?=[.,_%}a-zA-Z])")

Cost = Callable[..., int]


def size_of(value: object, *, most: int) -> int:
    """Return about how many characters a value is written with; anything above `most` may be less.

    What is reached in several ways counts several times, as it would be written.
    """
    size = 0
    waiting = [value]
    while waiting and size <= most:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 8
        elif isinstance(item, dict):
            size += 2 * ELEMENT_CHARS * len(item)
            waiting += (*item.keys(), *item.values())
        elif isinstance(item, _CONTAINERS):
            size += ELEMENT_CHARS * len(item)
            waiting += item
    return size


def operator_cost(operator: str, left: Any, right: Any) -> int:
    """Return what a binary operator would make.

    Raises:
        OverflowError: For integers that are too large.
    """
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        if (bits * right if operator == "**" else bits + right.bit_length()) > _MAX_BITS:
            what = f"power of {right}" if operator == "**" else "product"
            raise OverflowError(f"a {what} with more than {_MAX_BITS} bits")
    elif operator == "*":
        for repeated, times in ((left, right), (right, left)):
            if hasattr(repeated, "__len__") and isinstance(times, int):
                each = 1 if isinstance(repeated, str) else ELEMENT_CHARS
                return each * len(repeated) * times
    elif operator == "%" and isinstance(left, str):
        return _format(left, *right) if isinstance(right, tuple) else _format(left, right)
    return 0


def _format(text: str, *args: Any, **kwargs: Any) -> int:
    """Return what `text % args` makes at most: every field may be every argument."""
    widths = sum(map(int, _WIDTH.findall(text)))
    stars = text.count("*") * max((arg for arg in args if isinstance(arg, int)), default=0)
    fields = text.count("%") + text.count("{")
    return len(text) + widths + stars + fields * _size((args, kwargs))


def _format_fields(text: str, *args: Any, **kwargs: Any) -> int:
    """Return what `str.format` makes at most.

    Raises:
        SecurityError: For fields whose size the text does not tell.
    """
    for _, name, spec, _ in string.Formatter().parse(text):
        if name and ("." in name or "[" in name):
            raise SecurityError(f"format field {name!r}")
        if spec and "{" in spec:
            raise SecurityError(f"format {spec!r}")
    return _format(text, *args, **kwargs)


def _size(value: object) -> int:
    return size_of(value, most=2**40)


def _width(_: object, width: int = 80, *__: object) -> int:
    return width


def _tabs(text: str, tabsize: int = 8) -> int:
    return text.count("\t") * tabsize


def _joined(parts: Iterable[Any], d: str = "", attribute: object = None) -> int:
    found = list(parts)
    return _size(found) + _size(d) * len(found)


def _joined_by(separator: str, parts: Iterable[Any]) -> int:
    return _joined(parts, separator)


def _replaced(text: object, old: object, new: object, count: object = None) -> int:
    return str(text).count(str(old)) * _size(new)


def _translated(text: str, table: Mapping[int, Any]) -> int:
    return len(text) * max(map(_size, table.values()), default=0)


def _indented(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    return (len(s.splitlines()) + 1) * (len(width) if isinstance(width, str) else width)


def _wrapped(
    s: str,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> int:
    return len(s) * len(wrapstring or "\n")


def _filled(value: object, linecount: int, fill_with: object = None) -> int:
    return 0 if fill_with is None else ELEMENT_CHARS * linecount


def _sliced(value: object, slices: int, fill_with: object = None) -> int:
    return ELEMENT_CHARS * slices


def _rounded(value: object, precision: int = 0, method: str = "common") -> int:
    return precision**2  # powers of ten, and the time that they take


def _summed(iterable: object, attribute: object = None, start: object = 0) -> int:
    if not isinstance(start, int | float):
        raise SecurityError("a sum that does not start with a number")
    return 0


def _bytes(*_: object, **__: object) -> NoReturn:
    raise SecurityError("bytes in a chat template")


# What is taken goes first, then the arguments by the names that Jinja gives them.
FILTER_COSTS: Final[dict[str, Cost]] = {
    "batch": _filled,
    "center": _width,
    "format": _format,
    "indent": _indented,
    "join": _joined,
    "replace": _replaced,
    "round": _rounded,
    "slice": _sliced,
    "sum": _summed,
    "wordwrap": _wrapped,
}

# Of strings and integers.
METHOD_COSTS: Final[dict[str, Cost]] = {
    "center": _width,
    "encode": _bytes,
    "expandtabs": _tabs,
    "format": _format_fields,
    "format_map": _format_fields,
    "join": _joined_by,
    "ljust": _width,
    "replace": _replaced,
    "rjust": _width,
    "to_bytes": _bytes,
    "translate": _translated,
    "zfill": _width,
}
