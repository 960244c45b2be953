"""Where chat templates run: Jinja's immutable sandbox, with a budget for each rendering.

A template is foreign code. It sees only plain values, and what one rendering may do is bounded:

- turns of all its loops and calls of macros, functions and methods together;
- characters of all the text that it makes on the way, kept or not, where an element of a list or
  dict counts as `ELEMENT_CHARS`. What can make much of little (products, powers, padding, joins,
  replacements, formats, indentation) is counted before it is made, everything else right after:
  it takes but a small multiple of what it was made from.

Not bounded is time in seconds: a turn may search all of the text that the budget allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, Final

import jinja2
import jinja2.ext
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from recmas_runtime.prompts.template_costs import (
    FILTER_COSTS,
    METHOD_COSTS,
    operator_cost,
    size_of,
)

# Far beyond any prompt that fits a bundle, far below what hurts.
MAX_TURNS: Final = 200_000
MAX_MADE_CHARS: Final = 64_000_000

# What an output within a loop takes in the list of outputs.
_OUTPUT_CHARS: Final = 8
_MAX_INDENT: Final = 100
_MAX_TIME_FORMAT: Final = 1000

# They write HTML, or for debugging, and make much of little.
_LEFT_OUT: Final = ("pprint", "urlize", "xmlattr")

# No template can spell these.
_TURNS: Final = "turns of a loop"
_JOINED: Final = "operands of ~"
_KEPT: Final = "a new value"


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._turns_left = MAX_TURNS
        self._chars_left = MAX_MADE_CHARS

    def turn(self) -> None:
        """Count a loop's turn or a call.

        Raises:
            OverflowError: If that was one too many.
        """
        self._turns_left -= 1
        if self._turns_left < 0:
            raise OverflowError(f"more than {MAX_TURNS} loop turns and calls")

    def charge(self, num_chars: int, *, what: str = "text") -> None:
        """Count characters.

        Raises:
            OverflowError: If there are too many.
        """
        self._chars_left -= max(0, num_chars)
        if self._chars_left < 0:
            raise OverflowError(f"{what!r} makes it more than {MAX_MADE_CHARS} characters")

    def kept(self, value: Any) -> Any:
        """Count what a value takes and return it; an iterator's values as they come."""
        if isinstance(value, Iterator):
            return map(self.kept, value)
        self.charge(size_of(value, most=self._chars_left))
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
            self.filters[name] = _budgeted(name, function)
        self.filters |= {_TURNS: _turns, _JOINED: _joined, _KEPT: _kept}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _Dict()

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result may be large."""
        budget = _BUDGET.get()
        budget.charge(operator_cost(operator, left, right), what=operator)
        return budget.kept(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a macro, a function or a method; the names leave all others to keywords."""
        budget = _BUDGET.get()
        budget.turn()
        budget.kept((args, kwargs))
        if isinstance(__obj, LoopContext):  # a recursive loop's next level
            args = tuple(_turns(__context, iterable) for iterable in args)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `str.format`
        owner = getattr(method, "__self__", None)
        name = getattr(method, "__name__", "") if isinstance(owner, str | int) else ""
        if (cost := METHOD_COSTS.get(name)) is not None:
            args = _without_iterators(args)
            budget.charge(cost(owner, *args, **kwargs), what=name)
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
    """Sends through a filter what Jinja's own hooks do not reach."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For():
                outputs = sum(len(output.nodes) for output in node.find_all(nodes.Output))
                node.iter = _filtered(node.iter, _TURNS, nodes.Const(outputs))
            case nodes.Concat():
                return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
            case nodes.Tuple(ctx="load") | nodes.List() | nodes.Dict():
                return _filtered(node, _KEPT)
            case nodes.Getitem(arg=nodes.Slice()):
                return _filtered(node, _KEPT)
        return node


def _filtered(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(
        node, name, list(args), [], None, None, lineno=node.lineno, environment=node.environment
    )


# These get the context because Jinja computes nothing beforehand that does.


@pass_context
def _turns(_: Context, iterable: Iterable[Any], outputs: int = 1) -> Iterator[Any]:
    budget = _BUDGET.get()
    for item in iterable:
        budget.turn()
        budget.charge(_OUTPUT_CHARS * outputs)
        yield item


@pass_context
def _joined(context: Context, operands: list[Any]) -> str:
    _BUDGET.get().kept(operands)
    join: Callable[[list[Any]], str] = markup_join if context.eval_ctx.autoescape else str_join
    return join(operands)


@pass_context
def _kept(_: Context, value: Any) -> Any:
    return _BUDGET.get().kept(value)


def _budgeted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts its result and, if it has a cost, what it is about to make."""
    cost = FILTER_COSTS.get(name)
    # Some filters get Jinja's environment or context first.
    start = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def budgeted(*args: Any, **kwargs: Any) -> Any:
        # Without a budget, that is at compile time, Jinja takes the error and leaves it for later.
        budget = _BUDGET.get()
        if cost is not None:
            args = (*args[:start], *_without_iterators(args[start:]))
            budget.charge(cost(*args[start:], **kwargs), what=name)
        return budget.kept(function(*args, **kwargs))

    return budgeted


def _without_iterators(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return the values with lists for iterators, which can be looked at only once."""
    return tuple(list(v) if isinstance(v, Iterator) else v for v in values)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, closed to names that reach into Python's internals."""

    def __init__(*args: Any, **attributes: Any) -> None:
        jinja2.utils.Namespace.__init__(*args, **attributes)
        for name in dict(*args[1:], **attributes):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Namespaces that hold each other would be written out once for every way to reach them.
        return "<Namespace>"


class _Dict:
    """Jinja's `dict` without the attributes of a Python type."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > _MAX_INDENT:
        raise OverflowError(f"indentation of more than {_MAX_INDENT}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    # Piece by piece, because indentation grows with depth.
    return "".join(map(_BUDGET.get().kept, encoder.iterencode(value)))


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_TIME_FORMAT:
        raise OverflowError(f"a format of time with more than {_MAX_TIME_FORMAT} characters")
    return datetime.now().strftime(format)
