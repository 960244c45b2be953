"""What chat templates run in: Jinja's sandbox with the functions of transformers, and a budget.

A template is foreign code. It runs in Jinja's immutable sandbox, sees only plain values, and has a
budget for each rendering that bounds

- the turns of all loops and the calls of macros, functions and methods, together;
- the characters of all text that is made on the way, kept or not, where an element of a list or
  dict counts as `ELEMENT_CHARS`. Where a short text can become a long one (`_FILTER_COSTS`,
  `_METHOD_COSTS`, some operators), the result is counted before it is made; all other results are
  small multiples of what they are made from, and counted afterwards.

Time in seconds is not bounded: a turn may search all of the text that the budget allows.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime, time
from functools import wraps
from typing import Any, Final

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Far beyond any prompt that fits a bundle, far below what hurts.
MAX_TURNS: Final = 200_000
MAX_MADE_CHARS: Final = 64_000_000
MAX_OUTPUT_CHARS: Final = 16_000_000

# About what an element of a list takes beside its own text, and an output in a list of outputs.
ELEMENT_CHARS: Final = 64
_OUTPUT_CHARS: Final = 8

# Larger integers Python does not write either, and products of millions of bits take minutes.
_MAX_BITS: Final = 2**14
_MAX_TIME_FORMAT: Final = 1000

# They write HTML, or for debugging, and a short text can become a long one.
_LEFT_OUT: Final = ("pprint", "urlize", "xmlattr")
# No template can spell these filters.
_TURNS: Final = "turns of a loop"
_KEPT: Final = "a new value"
# The names in scope, which Jinja passes with every call from within a loop or block.
_SCOPES: Final = ("_loop_vars", "_block_vars")

Cost = Callable[..., int]


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._turns_left = MAX_TURNS
        self._chars_left = MAX_MADE_CHARS

    def turn(self) -> None:
        """Count a loop's turn or a call; OverflowError if it was one too many."""
        self._turns_left -= 1
        if self._turns_left < 0:
            raise OverflowError(f"more than {MAX_TURNS} loop turns and calls")

    def charge(self, num_chars: int, what: str = "text") -> None:
        """Count characters; OverflowError if there are too many."""
        self._chars_left -= max(0, num_chars)
        if self._chars_left < 0:
            raise OverflowError(f"{what!r} makes it more than {MAX_MADE_CHARS} characters")

    def kept(self, value: Any) -> Any:
        """Count what a value takes and return it; an iterator's values as they come."""
        if isinstance(value, Iterator):
            return map(self.kept, value)
        self.charge(_size(value))
        return value


_BUDGET: Final[ContextVar[Budget]] = ContextVar("budget")


@contextmanager
def rendering_budget() -> Iterator[None]:
    """Give what is rendered within the block a budget of its own; nothing renders without one."""
    token = _BUDGET.set(Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """What templates run in: the settings, filters and functions that transformers gives them."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        self.filters["tojson"] = _to_json
        for name in _LEFT_OUT:
            del self.filters[name]
        for name, function in self.filters.items():
            self.filters[name] = _counted(name, function)
        self.filters |= {_TURNS: _turns, _KEPT: lambda value: _BUDGET.get().kept(value)}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuse bytes, which nobody counts, and methods of `dict` that would change a value."""
        if attr in ("encode", "to_bytes") or (isinstance(obj, type) and attr != "fromkeys"):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result may be large."""
        budget = _BUDGET.get()
        budget.charge(_operator_cost(operator, left, right), operator)
        return budget.kept(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a macro, a function or a method; the names leave all others to keywords."""
        budget = _BUDGET.get()
        budget.turn()
        named = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        budget.kept((args, named))
        if isinstance(__obj, LoopContext):  # a recursive loop's next level
            args = tuple(map(_turns, args))
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | int):
            args = _priced(_METHOD_COSTS, method.__name__, (owner, *args), named)[1:]
        return budget.kept(super().call(__context, __obj, *args, **kwargs))

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a macro or a block has put out."""
        found = list(parts)
        _BUDGET.get().charge(sum(map(len, found)))
        return "".join(found)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        _Counting().visit(source)
        return super()._generate(source, *args, **kwargs)


class _Counting(NodeTransformer):
    """Sends through a filter what Jinja's own hooks do not reach.

    Jinja runs filters on constants when it compiles; without a budget they fail there, and it
    leaves them for the rendering.
    """

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For():
                outputs = sum(len(output.nodes) for output in node.find_all(nodes.Output))
                node.iter = _filtered(node.iter, _TURNS, nodes.Const(outputs))
            case nodes.Concat():
                return _filtered(nodes.List(node.nodes, lineno=node.lineno), "join")
            case nodes.Tuple(ctx="load") | nodes.List() | nodes.Dict():
                return _filtered(node, _KEPT)
            case nodes.Getitem(arg=nodes.Slice()):
                return _filtered(node, _KEPT)
        return node


def _filtered(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(
        node, name, list(args), [], None, None, lineno=node.lineno, environment=node.environment
    )


def _turns(iterable: Iterable[Any], outputs: int = 1) -> Iterator[Any]:
    budget = _BUDGET.get()
    for item in iterable:
        budget.turn()
        budget.charge(_OUTPUT_CHARS * outputs)
        yield item


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts its result, before it is made if the filter has a cost."""
    # Some filters get Jinja's environment or context first.
    start = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        args = (*args[:start], *_priced(_FILTER_COSTS, name, args[start:], kwargs))
        return _BUDGET.get().kept(function(*args, **kwargs))

    return counted


def _priced(
    costs: Mapping[str, Cost], name: str, args: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Count what a call is about to make, if it has a cost; return its arguments."""
    if name in costs:
        # Iterators become lists, because they can be read only once.
        args = tuple(list(v) if isinstance(v, Iterator) else v for v in args)
        _BUDGET.get().charge(costs[name](*args, **named), name)
    return args


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call, as in transformers: what the body sets is not seen outside of it.
        written = self.call_method("_written")
        return nodes.CallBlock(written, [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, closed to names that reach into Python's internals."""

    def __init__(self, /, *args: Any, **attributes: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Namespaces that hold each other would be written out once for every way to reach them.
        return "<Namespace>"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    # Piece by piece, because indentation grows with depth.
    return "".join(map(_BUDGET.get().kept, encoder.iterencode(value)))


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def strftime_on(day: date) -> Callable[[str], str]:
    """Return what templates call `strftime_now`, on a day that stays; its time is midnight."""

    def strftime_now(format: str) -> str:
        if len(format) > _MAX_TIME_FORMAT:
            raise OverflowError(f"a format of time with more than {_MAX_TIME_FORMAT} characters")
        return datetime.combine(day, time.min).strftime(format)

    return strftime_now


# Costs: about how many characters something makes at most, known before it does.


def _size(value: object) -> int:
    """Return about how many characters a value is written with; beyond the budget, just so much.

    What is reached in several ways counts several times, as it would be written.
    """
    size = 0
    waiting = [value]
    while waiting and size <= MAX_MADE_CHARS:
        match waiting.pop():
            case str(text):
                size += len(text)
            case int(number):
                size += number.bit_length() // 8
            case dict(items):
                size += 2 * ELEMENT_CHARS * len(items)
                waiting += (*items.keys(), *items.values())
            case list() | tuple() | Set() | ValuesView() as items:
                size += ELEMENT_CHARS * len(items)
                waiting += items
    return size


def _operator_cost(operator: str, left: Any, right: Any) -> int:
    if operator == "%":
        values = right if isinstance(right, tuple) else (right,)
        return _formatted(left, *values) if isinstance(left, str) else 0
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        if (bits * right if operator == "**" else bits + right.bit_length()) > _MAX_BITS:
            what = f"power of {right}" if operator == "**" else "product"
            raise OverflowError(f"a {what} with more than {_MAX_BITS} bits")
        return 0
    repeated, times = (right, left) if isinstance(left, int) else (left, right)
    return _size(repeated) * times if operator == "*" and isinstance(times, int) else 0


def _spread(*values: Any, **named: Any) -> int:
    """Cost where each character may become as many as all numbers and lengths multiplied."""
    found = (*values, *named.values())
    return math.prod(1 + (abs(v) if isinstance(v, int) else _size(v)) for v in found)


def _formatted(text: str, *args: Any, **kwargs: Any) -> int:
    """Cost where every field may be every argument, and of every width that can be found."""
    widths = sum(map(int, re.findall(r"\d+(?=[.,_%}a-zA-Z])", text)))
    stars = text.count("*") * max((arg for arg in args if isinstance(arg, int)), default=0)
    fields = text.count("%") + text.count("{")
    return len(text) + widths + stars + fields * _size((args, kwargs))


def _formatted_fields(text: str, *args: Any, **kwargs: Any) -> int:
    for _, name, spec, _ in string.Formatter().parse(text):
        if "{" in (spec or "") or not {".", "["}.isdisjoint(name or ""):
            raise SecurityError(f"format field {name!r} of a size that the text does not tell")
    return _formatted(text, *args, **kwargs)


def _joined(parts: Iterable[Any], d: str = "", attribute: object = None) -> int:
    found = list(parts)
    return _size(found) + _size(d) * len(found)


def _replaced(text: object, old: object, new: object, count: object = None) -> int:
    return str(text).count(str(old)) * _size(new)


# What is taken goes first, then the arguments by the names that Jinja gives them.
_FILTER_COSTS: Final[dict[str, Cost]] = {
    **dict.fromkeys(("batch", "center", "indent", "slice", "wordwrap"), _spread),
    "format": _formatted,
    "join": _joined,
    "replace": _replaced,
    # Powers of ten, and the time that they take.
    "round": lambda value, precision=0, method="common": precision**2,
    # Without its `start`, which could be a list.
    "sum": lambda values, attribute=None: 0,
    "tojson": lambda value, ensure_ascii=False, indent=None, **_: _spread(value, indent),
}

# Of strings and integers.
_METHOD_COSTS: Final[dict[str, Cost]] = {
    **dict.fromkeys(("center", "expandtabs", "ljust", "rjust", "translate", "zfill"), _spread),
    "format": _formatted_fields,
    "format_map": _formatted_fields,
    "join": lambda separator, parts: _joined(parts, separator),
    "replace": _replaced,
}
