"""Damage of every kind of file: random, small, and the same for the same random generator.

A mutator takes a generator and the contents, and returns other contents.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import numpy as np
import onnx
import yaml
from onnx import TensorProto, numpy_helper

Mutator = Callable[[Random, bytes], bytes]

ODD_TEXTS: Final = (
    "", " ", "\n", "a", "x" * 300, "y" * 70_000, "\x1b[31mred", "\x1b]0;title\x07", "\x9b2J",
    "\u202eright to left", "\ufeff", "\u2028", "\x00", "\x7f", "\ud800", "\U0001f600", "e\u0301",
    "..", "../..", "/etc/passwd", "/dev/zero", "/", "~", "a/b", "C:x", "a\\b", "-", "--help",
    "{{ question }}", "{% if x %}", "{{ latent.solver }}", "<|end|>", "<|user|>", "[/b]", "%s %d",
    "nan", "1e400", "null", "true", "planner", "solver", "one", "RM404", "\r", "\t",
)  # fmt: skip
ODD_NUMBERS: Final = (
    0, 1, -1, 2, 7, 63, 64, 65, 255, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64,
    10**30, -(10**30), 0.0, -0.0, 0.5, -0.5, 1.0, 1e-320, 1e308, -1e308,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def odd_value(random: Random) -> Any:
    """Return a value of any type."""
    makers: Sequence[Callable[[], Any]] = (
        lambda: random.choice(ODD_TEXTS),
        lambda: random.choice(ODD_NUMBERS),
        lambda: random.choice([None, True, False]),
        lambda: random.choice([[], {}, [None], [[]], {"a": 1}, {"": {}}, ["x"] * 100]),
        lambda: _nested(random.choice([3, 30, 60, 130])),
    )
    return random.choice(makers)()


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def changed_tree(random: Random, tree: Any) -> Any:
    """Return a copy of tables, lists and values with one to three places of it changed."""
    whole = {"": copy.deepcopy(tree)}
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = _places(whole)
        if not places:  # all of it was removed
            break
        parent, key = random.choice(places)
        random.choice(_CHANGES)(random, parent, key)
    return whole.get("")


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    left = [tree]
    while left:
        node = left.pop()
        pairs = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        for key, value in pairs:
            found.append((node, key))
            if isinstance(value, (dict, list)) and value:
                left.append(value)
    return found


def _replace(random: Random, parent: Any, key: Any) -> None:
    parent[key] = odd_value(random)


def _near(random: Random, parent: Any, key: Any) -> None:
    """Change a value into one that is nearly right."""
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = random.choice([not value, int(value), str(value)])
    elif isinstance(value, (int, float)):
        parent[key] = random.choice(
            [value + 1, value - 1, -value, value * 2, float(value), str(value), [value]]
        )
    elif isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        odd = random.choice(ODD_TEXTS)
        parent[key] = random.choice(
            [value[:cut] + odd + value[cut:], value[:cut], value.upper(), value * 2, [value]]
        )
    elif isinstance(value, list):
        parent[key] = dict.fromkeys(map(str, value))
    else:
        parent[key] = [value]


def _remove(random: Random, parent: Any, key: Any) -> None:
    del parent[key]


def _rename(random: Random, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[random.choice([*ODD_TEXTS, f"{key}s", str(key)[:-1]])] = parent.pop(key)
    else:
        parent.insert(random.randrange(len(parent) + 1), parent.pop(key))


def _double(random: Random, parent: Any, key: Any) -> None:
    value = copy.deepcopy(parent[key])
    if isinstance(parent, dict):
        parent[f"{key}2"] = value
    else:
        parent.insert(key, value)


def _exchange(random: Random, parent: Any, key: Any) -> None:
    other = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = copy.deepcopy(parent[other]), copy.deepcopy(parent[key])


def _wrap(random: Random, parent: Any, key: Any) -> None:
    parent[key] = random.choice([[parent[key]], {"a": parent[key]}, {str(key): parent[key]}])


_CHANGES: Final = (_replace, _replace, _near, _near, _remove, _rename, _double, _exchange, _wrap)


def other_bytes(random: Random, raw: bytes) -> bytes:
    """Flip, cut, repeat, overwrite: what disks, copies and editors do to a file."""
    if not raw:
        return random.randbytes(random.randrange(1, 64))
    changed = bytearray(raw)
    start = random.randrange(len(raw))
    end = min(len(raw), start + random.choice([1, 4, 64, 4096]))
    match random.randrange(9):
        case 0:
            changed[start] ^= 1 << random.randrange(8)
        case 1:
            del changed[start:]
        case 2:
            del changed[start:end]
        case 3:
            changed[start:start] = raw[start:end]
        case 4:
            changed[start:end] = random.randbytes(end - start)
        case 5:
            changed[start:end] = bytes(end - start)
        case 6:
            changed += random.randbytes(end - start)
        case 7:
            changed[start:start] = random.choice(
                [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"\xc3", b"[" * 2000]
            )
        case _:
            changed[:] = random.choice([b"", b"\n", b"{}", b"[]", b"null", b"0", b'"', b"\0" * 64])
    return bytes(changed)


def other_json(random: Random, raw: bytes) -> bytes:
    """Change a JSON document as a document, or as bytes."""
    try:
        tree = json.loads(raw)
    except ValueError:
        return other_bytes(random, raw)
    if random.random() < 0.15:
        return other_bytes(random, raw)
    # lone surrogates can only be written as escapes
    return json.dumps(changed_tree(random, tree), ensure_ascii=True).encode()


def other_yaml(random: Random, raw: bytes) -> bytes:
    """Change a YAML document as a document, by lines, in its syntax, or as bytes."""
    return random.choice((_yaml_tree, _yaml_tree, _yaml_line, _yaml_syntax, other_bytes))(
        random, raw
    )


def _yaml_tree(random: Random, raw: bytes) -> bytes:
    tree = yaml.safe_load(raw)
    changed = changed_tree(random, tree)
    return yaml.safe_dump(
        changed, sort_keys=False, allow_unicode=random.random() < 0.5, default_flow_style=None
    ).encode("utf-8", errors="surrogatepass")


def _yaml_line(random: Random, raw: bytes) -> bytes:
    lines = raw.decode().split("\n")
    at = random.randrange(len(lines))
    match random.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines.insert(random.randrange(len(lines)), lines[at])
        case 2:
            lines[at] = random.choice([" ", "  ", "\t", "- ", "? ", "# "]) + lines[at]
        case 3:
            lines[at] = lines[at][random.randrange(1, 4) :]
        case 4:
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            head, colon, _ = lines[at].partition(":")
            odd = random.choice([*map(str, ODD_NUMBERS), *ODD_TEXTS])
            lines[at] = f"{head}{colon} {odd}"
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")


_YAML_PIECES: Final = (
    "&a ", "*a ", "!!str ", "!!binary ", "!!python/name:os.system ", "!!set ", "!!float ", "! ",
    "<<: {rounds: 3}\n", "<<: *a\n", "? ", ": ", "- ", "---\n", "...\n", "%YAML 1.1\n", "|\n ",
    ">-\n ", "'", '"', "{", "}", "[", "]", ",", "#", "@", "`", "%", "\t", "\u2028", "\x85",
    '"\\ud800"', '"\\e[31m"', '"\\x00"', "0x10", "0o17", "1_000", "1:30", ".inf", ".nan", "~",
    "2026-11-30", "yes", "no", "on", "=", "<<", "&a [*a]", "\ufeff", "\r\n",
)  # fmt: skip


def _yaml_syntax(random: Random, raw: bytes) -> bytes:
    text = raw.decode()
    for _ in range(random.choice([1, 1, 2, 4])):
        # behind a colon, at the start of a line, anywhere
        marks = [i + 2 for i, c in enumerate(text) if c == ":"]
        starts = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
        at = random.choice([random.choice(marks or [0]), random.choice(starts)] * 2 + [0])
        text = text[:at] + random.choice(_YAML_PIECES) + text[at:]
    encoding = random.choice(["utf-8"] * 12 + ["utf-16", "latin-1", "utf-32", "utf-8-sig"])
    return text.encode(encoding, errors="surrogatepass" if "8" in encoding else "replace")


def other_safetensors(random: Random, raw: bytes) -> bytes:
    """Change header, length or data of a tensor file; the other parts stay as they are."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    match random.randrange(6):
        case 0:
            odd = random.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1, len(raw)])
            return odd.to_bytes(8, "little") + raw[8:]
        case 1:
            return raw[: 8 + length] + other_bytes(random, data)
        case 2:
            return raw[: 8 + length] + other_numbers(random, data)
        case 3:
            return other_bytes(random, raw)
        case _:
            header = other_json(random, header)
            return len(header).to_bytes(8, "little") + header + data


def other_numbers(random: Random, data: bytes) -> bytes:
    """Make numbers of float32 data infinite, huge, or none at all."""
    numbers = np.frombuffer(data[: len(data) // 4 * 4], np.float32).copy()
    if not numbers.size:
        return data
    share = random.choice([1, max(1, numbers.size // 100), numbers.size])
    at = np.random.default_rng(random.getrandbits(32)).integers(0, numbers.size, share)
    numbers[at] = random.choice([np.nan, np.inf, -np.inf, 3e38, 1e-40, 0.0, -1.0])
    return numbers.tobytes()


def other_onnx(random: Random, raw: bytes) -> bytes:
    """Change a graph: operators, names, attributes, constants, types, external data."""
    if random.random() < 0.2:
        return other_bytes(random, raw)
    model = onnx.load_model_from_string(raw)
    for _ in range(random.choice([1, 1, 2])):
        random.choice(_GRAPH_CHANGES)(random, model)
    return model.SerializeToString()


def _operator(random: Random, model: onnx.ModelProto) -> None:
    if not model.graph.node:
        return
    node = random.choice(model.graph.node)
    match random.randrange(5):
        case 0:
            node.op_type = random.choice(["Relu", "Add", "Gather", "NoSuchOperator", "", "Loop"])
        case 1:
            node.domain = random.choice(["com.microsoft", "no.such.domain", "\x1b[31m"])
        case 2 if node.input:
            node.input[random.randrange(len(node.input))] = random.choice(["", "nobody", "hidden"])
        case 3 if node.output:
            node.output[random.randrange(len(node.output))] = random.choice(["", "y", "hidden"])
        case _:
            del node.attribute[:]


def _nodes(random: Random, model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    if not nodes:
        return
    at = random.randrange(len(nodes))
    match random.randrange(3):
        case 0:
            del nodes[at]
        case 1:
            nodes.append(nodes[at])
        case _:
            random.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _constant(random: Random, model: onnx.ModelProto) -> None:
    if not model.graph.initializer:
        return
    constant = random.choice(model.graph.initializer)
    match random.randrange(5):
        case 0:
            constant.data_type = random.choice([0, 1, 2, 7, 10, 16, 99])
        case 1:
            del constant.dims[:]
            constant.dims.extend(random.choice([[], [0], [1], [3, 5], [-1], [2**20, 2**20]]))
        case 2:
            constant.name = random.choice(["", "nobody", "\x1b[31m"])
        case 3:
            array = np.full(random.choice([(1,), (2, 2), ()]), random.choice([0, -1, 99]))
            constant.CopyFrom(numpy_helper.from_array(array.astype(np.int64), constant.name))
        case _:
            _external(random, constant)


def _external(random: Random, constant: TensorProto) -> None:
    """Let a constant lie in a file that it should not, or where nothing is."""
    entries = {
        "location": random.choice(
            ["../../manifest.json", "/etc/passwd", "weights.safetensors", "no such file", "", "/",
             "\x1b[31m", "a\0b", "../" * 40 + "etc/passwd"]
        ),
        "offset": random.choice(["0", "-1", "1", str(2**63), "x", ""]),
        "length": random.choice(["4", "0", "-4", str(2**62), "x", ""]),
    }  # fmt: skip
    del constant.external_data[:]
    for key, value in entries.items():
        if random.random() < 0.9:
            constant.external_data.add(key=key, value=value)
    constant.ClearField("raw_data")
    constant.data_location = TensorProto.EXTERNAL


def _interface(random: Random, model: onnx.ModelProto) -> None:
    named = [*model.graph.input, *model.graph.output]
    if not named:
        return
    value = random.choice(named)
    match random.randrange(4):
        case 0:
            value.name = random.choice(["", "nobody", "hidden", "\x1b[31m", "\u202e"])
        case 1:
            value.type.tensor_type.elem_type = random.choice([0, 1, 7, 10, 11, 16, 99])
        case 2:
            shape = value.type.tensor_type.shape
            if shape.dim:
                shape.dim[random.randrange(len(shape.dim))].dim_value = random.choice([0, 1, 3, -5])
        case _:
            named = model.graph.input if value in model.graph.input else model.graph.output
            named.remove(value)


def _head(random: Random, model: onnx.ModelProto) -> None:
    match random.randrange(3):
        case 0:
            model.ir_version = random.choice([0, 1, 99, 2**31])
        case 1:
            del model.opset_import[:]
        case _:
            model.opset_import[0].version = random.choice([0, 1, 12, 99, 2**31])


_GRAPH_CHANGES: Final = (_operator, _operator, _nodes, _constant, _constant, _interface, _head)

_TEMPLATES: Final = (
    "{{ 'a' * 10 }}", "{% for m in messages %}{{ m }}{% endfor %}", "", "{{ messages }}",
    "{% for m in messages %}{{ m.content.replace('a', 'b').center(9) }}{% endfor %}",
    "{{ raise_exception('\x1b[31mno') }}", "{{ '\\ud800' }}", "{{ '\\u001b[2J' }}", "{{ x.y.z }}",
    "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", "{{ 'a' * 10 ** 10 }}", "{% if",
    "{{ messages[7].content }}", "{{ messages | tojson }}", "{{ ''.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{{ (1).bit_length() }}", "{{ 1 / 0 }}", "{{ [1] | sum(start='a') }}", "{{ dict(a=1).b.c }}",
    "{% for m in messages %}{{ m.content.split('e')[5] }}{% endfor %}", "{{ cycler }}",
    "{% set ns = namespace(a=1) %}{{ ns.b }}", "{{ '%s' % messages }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% for m in messages %}{{ m.content | reverse }}{% endfor %}", "{{ 10 ** 10 ** 3 }}",
    "{{ strftime_now('%Y') }}", "{% generation %}x{% endgeneration %}", "{% break %}", "{# #}",
    "{% for m in messages %}{{ '<|user|>' + m.content | trim }}{% endfor %}{{ bos_token }}",
)  # fmt: skip


def other_template(random: Random, raw: bytes) -> bytes:
    """Change a chat template, or put another one in its place."""
    if random.random() < 0.35:
        return other_bytes(random, raw)
    text = raw.decode()
    piece = random.choice(_TEMPLATES)
    at = random.randrange(len(text) + 1)
    return random.choice([piece, text + piece, text[:at] + piece + text[at:]]).encode()
