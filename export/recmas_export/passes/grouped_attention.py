"""Attention as ONNX Runtime's CPU provider runs it fastest: one operator instead of ten.

Its GroupQueryAttention splits heads, rotates them, writes the cache in place and attends over the
rows that are in use, where the standard operators attend over all of the capacity. It takes tables
instead of angles, and knows the causal rule and windows instead of a mask. Whether a graph's mask
is one of these is computed, not read off its nodes, and so are the tables. Rows that are hidden
besides become a bias.

Shape legend: B samples, S positions, C cache rows, D head width, P positions of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from recmas_export.passes.tidy import MICROSOFT, integers, take_over
from recmas_runtime.engines.onnx.session import onnx_runtime
from recmas_runtime.formats.layers import HIDDEN_ROWS
from recmas_runtime.formats.precisions import HEAD_MULTIPLE, MOST_TABLE_POSITIONS

_HEADS_FIRST: Final = [0, 2, 1, 3]
# What the operator's kernels take of a table; of heads they take multiples of `HEAD_MULTIPLE`.
_TABLE_MULTIPLE: Final = 8
# Positions that are computed at a time.
_CHUNK: Final = 1024
_ERRORS_ONLY: Final = 3
# What parts of a graph are computed with, from the first position: inputs with other numbers than
# indices lend them their sizes only.
_OF_INPUTS: Final[dict[str, Callable[[int], Any]]] = {
    "tensor(int64)": np.int64,
    "tensor(float)": lambda _: np.float32(0),
    "tensor(bool)": lambda _: np.bool_(False),
}


class UseGroupedAttention(InPlacePass):
    """Write causal attention over rotated, packed heads as one GroupQueryAttention.

    1. Each layer whose mask is the causal one, with a window or without, and whose heads have a
       width that the kernel takes, from its packed product to the input of the next product
       (`GroupedAttention`).
    2. Angles become tables of P rows, computed once for every position.
    3. Where a table would be too large, all layers stay as they are.
    4. Of a mask that is the causal one and another of hidden rows, the latter becomes a bias: the
       lowest number for rows that are not seen, beside which a score is as good as none.
    5. Norms of queries and keys stay operators of their own, before the attention: its kernel for
       the CPU refuses their weights, which its schema has.

    A call of several samples and several positions must then begin at row 0 of each sample's cache:
    behind cached rows, the operator takes a longer call of one sample only.
    """

    def __init__(self, max_positions: int) -> None:
        self._max_positions = max_positions

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite a cleaned decoder in place; nodes that are then unused stay."""
        if self._max_positions > MOST_TABLE_POSITIONS:  # 3
            return PassResult(model, modified=False)
        parts = _Parts(model.graph, self._max_positions)
        rules = [kind.rule(parts) for kind in (GroupedAttention, NormedGroupedAttention)]
        return PassResult(model, bool(RewriteRuleSet(rules).apply_to_model(model)))


class GroupedAttention(RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript is untyped
    """One layer's attention, from its packed product to the next product's input."""

    def __init__(self, parts: _Parts) -> None:
        # The cache is a result too and a pattern has one, so what is left over is a later pass's.
        super().__init__(remove_nodes=False)
        self._parts = parts

    def pattern(
        self,
        op: Any,
        packed: Any,
        heads: Any,
        sizes: Any,
        cos: Any,
        sin: Any,
        keys: Any,
        values: Any,
        write_index: Any,
        mask: Any,
        flat: Any,
    ) -> Any:
        """Return attention over a static cache of keys and values."""
        q, k, v = _split_heads(op, packed, heads, sizes)
        cache, angles = (keys, values, write_index), (cos, sin)
        return _attention(op, (q, k, v), cache=cache, angles=angles, mask=mask, flat=flat)

    def check(
        self,
        _context: Any,
        sizes: ir.Value,
        q: ir.Value,
        cos: ir.Value,
        mask: ir.Value,
        out: ir.Value,
        write_index: ir.Value,
        **_others: Any,
    ) -> MatchResult:
        """Take only what the operator computes too."""
        result = MatchResult()
        counts, attention = integers(sizes), out.producer()
        if counts is None or len(counts) != 3 or counts[1] != counts[2]:
            return result.fail("the heads are not counted")
        if q.shape is None or not _is_multiple(q.shape[-1], HEAD_MULTIPLE):
            return result.fail("the kernel does not take this head width")
        if attention is None or attention.attributes.keys() - {"scale", "softcap"}:
            return result.fail("the attention has other attributes")
        rule, _ = split_mask(mask)
        if write_index.name != "write_index" or self._parts.window(rule) is None:
            return result.fail("the mask is not the causal one, with a window or without")
        if not _is_multiple(self._parts.width(cos), _TABLE_MULTIPLE):
            return result.fail("the kernel does not take this width of angles")
        return result

    def rewrite(self, op: Any, packed: ir.Value, **matched: Any) -> Any:
        """Return the operator over the packed product."""
        return self._operator(op, (packed, None, None), **matched)

    def _operator(
        self,
        op: Any,
        inputs: tuple[ir.Value | None, ...],
        *,
        sizes: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        keys: ir.Value,
        values: ir.Value,
        mask: ir.Value,
        new_keys: ir.Value,
        new_values: ir.Value,
        out: ir.Value,
        **_others: Any,
    ) -> Any:
        attention, counts = out.producer(), integers(sizes)
        assert attention is not None
        assert counts is not None
        tables = self._parts.tables(cos, sin)
        rule, seen = split_mask(mask)
        bias = () if seen is None else (None, self._parts.bias(op, seen))  # 4
        window = self._parts.window(rule)
        joined, *cache = op.GroupQueryAttention(
            *(*inputs, keys, values, *self._parts.lengths(op), *tables, *bias),
            **{name: value.value for name, value in attention.attributes.items()},
            **({"local_window_size": window} if window else {}),
            num_heads=counts[0],
            kv_num_heads=counts[1],
            do_rotary=1,
            _domain=MICROSOFT,
            _version=1,
            _outputs=3,
        )
        for new, old in zip(cache, (new_keys, new_values), strict=True):
            take_over(new, old)
        return joined


class NormedGroupedAttention(GroupedAttention):
    """The same where queries and keys are normed, each head by itself, before they are rotated."""

    def pattern(  # type: ignore[override]
        self,
        op: Any,
        packed: Any,
        heads: Any,
        sizes: Any,
        query_scale: Any,
        key_scale: Any,
        cos: Any,
        sin: Any,
        keys: Any,
        values: Any,
        write_index: Any,
        mask: Any,
        flat: Any,
    ) -> Any:
        """Return attention with norms of heads."""
        q, k, v = _split_heads(op, packed, heads, sizes)
        any_epsilon: dict[str, Any] = {"axis": -1, "_allow_other_attributes": True}
        normed_q = op.RMSNormalization(q, query_scale, **any_epsilon, _outputs=["normed_q"])
        normed_k = op.RMSNormalization(k, key_scale, **any_epsilon, _outputs=["normed_k"])
        cache, angles, inputs = (keys, values, write_index), (cos, sin), (normed_q, normed_k, v)
        return _attention(op, inputs, cache=cache, angles=angles, mask=mask, flat=flat)

    def rewrite(self, op: Any, packed: ir.Value, **matched: Any) -> Any:
        """Return norms of heads where they lie, [B, S, H, D], and the operator behind them."""
        counts, shape = integers(matched["sizes"]), matched["q"].shape
        norms = [matched[name].producer() for name in ("normed_q", "normed_k")]
        assert counts is not None
        width = int(shape[-1])
        by_head = self._parts.constant(np.array([0, 0, -1, width]), f"heads.{width}")
        as_row = self._parts.constant(np.array([0, 0, -1]), "heads.row")
        columns = np.array(counts) * width
        name = "heads." + ".".join(str(number) for number in columns)
        parts = op.Split(packed, self._parts.constant(columns, name), axis=-1, _outputs=3)
        normed = []
        for part, norm in zip(parts, norms, strict=False):
            attributes = {name: value.value for name, value in norm.attributes.items()}
            found = op.RMSNormalization(op.Reshape(part, by_head), norm.inputs[1], **attributes)
            normed.append(op.Reshape(found, as_row))
        return self._operator(op, (*normed, parts[2]), **matched)


def _split_heads(op: Any, packed: Any, heads: Any, sizes: Any) -> Any:
    columns = op.Transpose(op.Reshape(packed, heads), perm=_HEADS_FIRST)
    return op.Split(columns, sizes, axis=1, _outputs=["q", "k", "v"])


def _attention(
    op: Any,
    inputs: tuple[Any, Any, Any],
    *,
    cache: tuple[Any, Any, Any],
    angles: tuple[Any, Any],
    mask: Any,
    flat: Any,
) -> Any:
    """Return the pattern of attention behind its heads: rotated, over what the cache then holds."""
    (q, k, v), (keys, values, write_index) = inputs, cache
    place: dict[str, Any] = {"axis": 2, "mode": "linear"}
    new_keys = op.TensorScatter(
        keys, op.RotaryEmbedding(k, *angles), write_index, **place, _outputs=["new_keys"]
    )
    new_values = op.TensorScatter(values, v, write_index, **place, _outputs=["new_values"])
    query = op.RotaryEmbedding(q, *angles)
    out = op.Attention(
        query, new_keys, new_values, mask, _allow_other_attributes=True, _outputs=["out"]
    )
    return op.Reshape(op.Transpose(out, perm=_HEADS_FIRST), flat)


class _Parts:
    """Computes parts of a decoder that depend on positions and on nothing else."""

    def __init__(self, graph: ir.Graph, max_positions: int) -> None:
        self._graph = graph
        self._inputs = {value.name: value for value in graph.inputs}
        self._max_positions = max_positions
        self._windows: dict[ir.Value, int | None] = {}
        self._lengths: tuple[ir.Value, ir.Value] | None = None
        self._tables: dict[ir.Value, ir.Value] = {}
        self._biases: dict[ir.Value, ir.Value] = {}

    def lengths(self, op: Any) -> tuple[ir.Value, ir.Value]:
        """Return the last row that each sample writes [B] and the rows of the longest one."""
        if self._lengths is None:  # layers are visited in order: the first one's serve the others
            one = self.constant(np.array(1), "lengths.one")
            positions = op.Shape(self._inputs["inputs_embeds"], start=1, end=2)
            rows_B = op.Add(self._inputs["write_index"], positions)
            last_B = op.Cast(op.Sub(rows_B, one), to=ir.DataType.INT32)
            longest = op.Cast(op.ReduceMax(rows_B, keepdims=0), to=ir.DataType.INT32)
            self._lengths = last_B, longest
        return self._lengths

    def bias(self, op: Any, seen_B11C: ir.Value) -> ir.Value:
        """Return what hides rows from all new positions, [B, 1, S, T]: T is the longest length."""
        if seen_B11C not in self._biases:
            numbers = {"zero": [0], "one": [1], "axis": [3]}
            zero, one, axis = (
                self.constant(np.array(number), f"bias.{name}.{len(self._biases)}")
                for name, number in numbers.items()
            )
            lowest = np.array(np.finfo(np.float32).min, np.float32)
            hides = self.constant(lowest, f"bias.lowest.{len(self._biases)}")
            shows = self.constant(np.array(0, np.float32), f"bias.none.{len(self._biases)}")
            positions = op.Shape(self._inputs["inputs_embeds"], start=1, end=2)
            longest = op.ReduceMax(op.Add(self._inputs["write_index"], positions), keepdims=1)
            cut = op.Slice(seen_B11C, zero, longest, axis)
            shape = op.Concat(one, one, positions, one, axis=0)
            self._biases[seen_B11C] = op.Expand(op.Where(cut, shows, hides), shape)
        return self._biases[seen_B11C]

    def window(self, mask_B1SC: ir.Value) -> int | None:
        """Return how many rows, its own the last, each position sees: 0 for all up to its own.

        None where a mask shows other rows than these.
        """
        if HIDDEN_ROWS in _numbers_in(mask_B1SC):
            return None  # what it is depends on what a run hides
        if mask_B1SC not in self._windows:
            self._windows[mask_B1SC] = self._find_window(mask_B1SC)
        return self._windows[mask_B1SC]

    def _find_window(self, mask_B1SC: ir.Value) -> int | None:
        most = self._max_positions
        columns = np.arange(most)

        def seen(start: int) -> NDArray[np.bool_]:
            mask = self._compute(mask_B1SC, start, 2, capacity=most)
            return np.asarray(mask[0, 0], np.bool_)

        window = int(seen(most - 2)[1].sum())
        # Windows show where they begin to cut, chunks of positions at multiples of their size.
        starts = [*np.linspace(0, most - 2, 16).astype(int).tolist(), window - 1, 2 * window - 1]
        for start in (place for place in starts if 0 <= place <= most - 2):
            rows = start + np.arange(2)[:, None]
            if not np.array_equal(seen(start), (columns <= rows) & (columns > rows - window)):
                return None
        return window if window < most else 0

    def width(self, angles_BSn: ir.Value) -> int:
        """Return the last size of cosines or sines."""
        return int(self._compute(angles_BSn, 0, 1).shape[-1])

    def tables(self, *angles: ir.Value) -> list[ir.Value]:
        """Return for cosines or sines [B, S, n] what they are at each position: tables [P, n]."""
        ends = [*range(_CHUNK, self._max_positions, _CHUNK), self._max_positions]
        for angle in angles:
            if angle not in self._tables:
                parts = [
                    self._compute(angle, start, end - start)[0]
                    for start, end in zip([0, *ends], ends, strict=False)
                ]
                name = f"{angle.name}.table"
                self._tables[angle] = self.constant(np.concatenate(parts), name)
        return [self._tables[angle] for angle in angles]

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """Return an initializer of the graph, the one of this name if there is one."""
        tape = Tape()
        if name not in self._graph.initializers:
            self._graph.register_initializer(tape.initializer(ir.tensor(array, name=name)))
        return self._graph.initializers[name]

    def _compute(
        self, value: ir.Value, start: int, positions: int, *, capacity: int = 1
    ) -> NDArray[Any]:
        """Return a value for one sample whose first position is `start`."""
        needed = _inputs_of(value)
        part = ir.convenience.extract(self._graph, needed, [value])
        settings = onnx_runtime().SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        model = ir.to_proto(ir.Model(part, ir_version=10))
        session = onnx_runtime().InferenceSession(model.SerializeToString(), settings)
        sizes = {"batch": 1, "positions": positions, "capacity": capacity}
        feeds = {}
        for given in session.get_inputs():
            shape = [size if isinstance(size, int) else sizes[size] for size in given.shape]
            feeds[given.name] = np.full(shape, _OF_INPUTS[given.type](start))
        (array,) = session.run(None, feeds)
        return np.asarray(array)


def split_mask(mask_B1SC: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return a mask without what is hidden, and the mask of that; None where there is none."""
    node = mask_B1SC.producer()
    if node is None or node.op_type != "And":
        return mask_B1SC, None
    parts = [(value, _numbers_in(value)) for value in node.inputs if value is not None]
    seen = [value for value, inputs in parts if inputs == {HIDDEN_ROWS}]
    others = [value for value, inputs in parts if HIDDEN_ROWS not in inputs]
    return (others[0], seen[0]) if seen and others else (mask_B1SC, None)


def _numbers_in(value: ir.Value) -> set[str | None]:
    """Return the names of the graph inputs whose numbers, and not sizes alone, a value has."""
    return {found.name for found in _inputs_of(value, beside=("Shape", "Size"))}


def _inputs_of(value: ir.Value, *, beside: Sequence[str] = ()) -> list[ir.Value]:
    """Return the graph inputs that a value is computed from, not through operators `beside`."""
    seen, waiting = set[ir.Value](), [value]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is not None and node.op_type not in beside:
            waiting += [i for i in node.inputs if i is not None]
    return [v for v in seen if v.is_graph_input()]


def _is_multiple(size: Any, of: int) -> bool:
    return isinstance(size, int) and size % of == 0
