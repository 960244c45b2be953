"""Templates that make much of little are refused, and counting changes nothing of the others."""

from __future__ import annotations

import tracemalloc

import pytest

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.prompts import template_sandbox
from recmas_runtime.prompts.chat_template import ChatTemplate


def render(text: str) -> str:
    return ChatTemplate(text).render(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )


# One operator, filter or method that multiplies: by a number, or by a text of a long text's length.
HUGE = "400000000"
LONG = "('x' * 100000)"
MULTIPLIED = [
    f"'x' | center({HUGE})",
    f"'x' | center(width={HUGE})",
    rf"'x\ny' | indent({HUGE})",
    rf"('x\n' * 100000) | indent({LONG})",
    f"'%0{HUGE}d' | format(1)",
    f"'%0{HUGE}d' % 1",
    f"'%.{HUGE}f' % 1",
    f"'%*d' % ({HUGE}, 1)",
    f"('%(a)s' * 100000) % {{'a': {LONG}}}",
    f"'{{:>{HUGE}}}'.format(1)",
    f"'{{:.{HUGE}f}}'.format(1)",
    f"'{{:{{w}}}}'.format(1, w={HUGE})",
    f"'{{x:>{HUGE}}}'.format_map({{'x': 1}})",
    "'{0.a}'.format(namespace(a=1))",
    f"('{{0}}' * 100000).format({LONG})",
    f"'x'.ljust({HUGE})",
    f"'x'.rjust({HUGE})",
    f"'x'.center({HUGE})",
    f"'1'.zfill({HUGE})",
    rf"'\t'.expandtabs({HUGE})",
    f"{LONG}.replace('x', {LONG})",
    f"{LONG} | replace('x', {LONG})",
    f"{LONG}.translate({{120: {LONG}}})",
    f"{LONG}.join(range(100000))",
    f"range(100000) | join({LONG})",
    f"range(100000) | map('string') | join({LONG})",
    f"('x ' * 100000) | wordwrap(1, true, {LONG})",
    f"[1] | batch({HUGE}, 'x') | list",
    f"[1] | slice({HUGE}) | list",
    "[[1], [2]] | sum(start=[])",
    f"1 | round({HUGE}, 'ceil')",
    f"1 | round(-{HUGE})",
    f"(1).to_bytes({HUGE}, 'big')",
    f"'x'.encode().center({HUGE})",
    f"[1] | tojson(indent={HUGE})",
    f"strftime_now('%{HUGE}Y' * 1000)",
    "lipsum(100000)",
]

# Twice as much in every turn of a loop.
DOUBLED = [
    "ns.x ~ ns.x",
    "ns.x + ns.x",
    "[ns.x, ns.x]",
    "(ns.x, ns.x)",
    "{'a': ns.x, 'b': ns.x}",
    "dict(a=ns.x, b=ns.x)",
    "[ns.x, ns.x] | batch(2) | first",
    "'%s%s' % (ns.x, ns.x)",
    "'{}{}'.format(ns.x, ns.x)",
    "[ns.x, ns.x] | join",
    "ns.x | replace('x', 'xx')",
]

OTHERS = {
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "powers": "{{ (((9 ** 64) ** 64) ** 64) % 7 }}",
    "blocks": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(99) }}",
    "arguments": "{% macro m() %}{{ varargs }}{% endmacro %}{% set a = 'x' * 9999999 %}"
    "{{ m(a, a, a, a, a, a, a) }}",
    "one text many times": "{% set a = 'x' * 9999999 %}{{ [a, a, a, a, a, a, a] }}",
    "many slices": "{% set ns = namespace(x=[]) %}{% set a = 'x' * 999999 %}"
    "{% for i in range(999) %}{% set ns.x = [ns.x, a[1:]] %}{% endfor %}",
    "loops over one list": "{% set l = range(2000) | list %}"
    "{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for a in [1, 2] recursive %}"
    "{% if loop.depth < 40 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "one level of a recursive loop": "{% set l = range(2000) | list %}{% for a in l recursive %}"
    "{% if loop.depth < 2 %}{{ loop(l) }}{% endif %}{% endfor %}",
    "outputs": "{% set x %}{% for a in range(9999) %}"
    + "{{ a }}" * 1000
    + "{% endfor %}{% endset %}",
}


@pytest.mark.parametrize(
    "text",
    [
        *(f"{{{{ ({expression}) | length }}}}" for expression in MULTIPLIED),
        *(
            "{% set ns = namespace(x='x') %}{% for i in range(40) %}"
            f"{{% set ns.x = {expression} %}}{{% endfor %}}"
            for expression in DOUBLED
        ),
    ],
    ids=[*MULTIPLIED, *DOUBLED],
)
def test_much_of_little_is_refused(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RecmasError, match="RM206"):
            render(text)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 200e6


@pytest.mark.parametrize("name", OTHERS)
def test_much_that_comes_little_by_little_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_TURNS", 20_000)
    with pytest.raises(RecmasError, match="RM206"):
        render(OTHERS[name])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "{% for x in 'abc' %}{{ loop.index }}{{ loop.last }}{{ loop.length }} {% endfor %}",
            "1False3 2False3 3True3 ",
        ),
        (
            "{% for x in 'abc' %}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.revindex }}"
            "{% endfor %}",
            "b3ac2b1",
        ),
        ("{% for x in [1, 2, 3] if x != 2 %}{{ x }}{{ loop.length }}{% endfor %}", "1232"),
        ("{% for x in [] %}{% else %}none{% endfor %}{% for x in no %}{% endfor %}", "none"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        (
            "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}"
            "{% endfor %}",
            "123",
        ),
        ("{% for m in messages[::-1] %}{{ m.role }}{{ loop.first }}{% endfor %}", "userTrue"),
        ("{{ 'a' ~ 1 ~ none ~ [1, 'b'] }}", "a1None[1, 'b']"),
        ("{% autoescape true %}{{ '<' ~ ('<' | safe) }}{% endautoescape %}", "&lt;<"),
        (
            "{{ [1, 2] + [3] }}{{ 'a' + 'b' }}{{ (1, 2) }}{{ 7 % 4 }}{{ 2 ** 10 }}",
            "[1, 2, 3]ab(1, 2)31024",
        ),
        (
            "{{ '%-4s|%05.1f' % ('a', 2.25) }}{{ '{:>3}{x!r}'.format(1, x='b') }}",
            "a   |002.2  1'b'",
        ),
        (
            r"{{ 'a\nb' | indent(2) }}{{ 'a' | center(3) }}{{ 2.25 | round(1, 'floor') }}",
            "a\n  b a 2.2",
        ),
        (
            "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2] | slice(2) | list }}",
            "[[1, 2], [3, 0]][[1], [2]]",
        ),
        ("{{ messages | map(attribute='role') | join(', ') }}{{ [1, 2] | sum }}", "user3"),
        (
            "{{ 'a-b'.split('-') | join('+') }}{{ ','.join(['x', 'y']) }}{{ 'b'.ljust(3) }}|",
            "a+bx,yb  |",
        ),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}", "a1B"),
        (
            "{% macro m(a, b='c') %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}"
            "{% call m('d') %}e{% endcall %}",
            "dce",
        ),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}", "aba"),
        # From within a loop or block, Jinja hands the names in scope to every call.
        (
            "{% for x in ['a-b'] %}{{ x.replace('-', '+') }}{{ '{}'.format(x) }}{{ x.center(5) }}|"
            "{{ '-'.join(x) }}{% endfor %}{% block b %}{{ 'a'.replace('a', 'b') }}{% endblock %}",
            "a+ba-b a-b |a---bb",
        ),
    ],
)
def test_counting_changes_nothing(text: str, expected: str) -> None:
    assert render(text) == expected
