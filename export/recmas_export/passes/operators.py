"""Operators of opset 23 in the place of what they are traced into.

Shape legend: B samples, S positions, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

_END = 2**63 - 1


class UseStandardOperators(InPlacePass):
    """Write what models are traced into as the operator that it computes.

    1. A root-mean-square norm is one RMSNormalization (`RootMeanSquareNorm`).
    2. Norms of queries and keys come after the transpose of heads (`TransposeBeforeNorm`).
    3. A rotation by angles is one RotaryEmbedding (`Rotation`), of a head's first part too
       (`PartialRotation`).
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place, each rule in the graph that those before it leave."""
        rule_sets = (
            RewriteRuleSet([RootMeanSquareNorm.rule()], commute=True),  # 1
            RewriteRuleSet([TransposeBeforeNorm.rule()]),  # 2: of the norms that 1 has written
            RewriteRuleSet([Rotation.rule()]),  # 3
            RewriteRuleSet([PartialRotation.rule()]),  # of the rotations that 3 has written
        )
        counts = [rules.apply_to_model(model) for rules in rule_sets]
        return PassResult(model, any(counts))


class RootMeanSquareNorm(RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript is untyped
    """x / sqrt(mean(x^2) + epsilon) * scale, over the last axis."""

    def pattern(self, op: Any, x: Any, scale: Any, epsilon: Any, power: Any) -> Any:
        """Return what the exporter writes; `commute` adds the other orders of factors."""
        # not `2.0`: floats of a pattern are compared with a tolerance
        mean = op.ReduceMean(op.Pow(x, power), [-1], keepdims=1, _allow_other_attributes=True)
        return op.Mul(op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))), scale)

    def check(
        self,
        _context: Any,
        x: ir.Value,
        scale: ir.Value,
        epsilon: ir.Value,
        power: ir.Value,
        **_others: Any,
    ) -> MatchResult:
        """Take only a scale that is one number per entry of the last axis."""
        result = MatchResult()
        if _number(power) != 2:
            return result.fail("it is no square")
        if x.shape is None or scale.shape is None or list(scale.shape) != [x.shape[-1]]:
            return result.fail("the scale is no vector of the last axis")
        if epsilon.const_value is None or epsilon.const_value.size != 1:
            return result.fail("epsilon is no constant")
        return result

    def rewrite(
        self, op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_others: Any
    ) -> Any:
        """Return the operator."""
        return op.RMSNormalization(x, scale, axis=-1, epsilon=_number(epsilon))


class TransposeBeforeNorm(RewriteRuleClassBase):  # type: ignore[misc]
    """Norms of queries and keys commute with the transpose of heads; transposes come first."""

    def pattern(self, op: Any, x: Any, scale: Any) -> Any:
        """Return a norm of heads [B, S, H, D] that is then made [B, H, S, D]."""
        normed = op.RMSNormalization(
            x, scale, axis=-1, _allow_other_attributes=True, _outputs=["normed"]
        )
        return op.Transpose(normed, perm=[0, 2, 1, 3])

    def rewrite(
        self, op: Any, x: ir.Value, scale: ir.Value, normed: ir.Value, **_others: Any
    ) -> Any:
        """Return the norm of the transposed heads."""
        norm = normed.producer()
        assert norm is not None
        heads = op.Transpose(x, perm=[0, 2, 1, 3])
        return op.RMSNormalization(heads, scale, **norm.attributes)


class Rotation(RewriteRuleClassBase):  # type: ignore[misc]
    """x * cos + rotate_half(x) * sin, with the same angles in both halves of a head."""

    def __init__(self) -> None:
        # All layers share the tables, so what is matched cannot be removed with one of them.
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, axes: Any, half: Any, end: Any) -> Any:
        """Return the form of transformers' `apply_rotary_pos_emb` on heads [B, H, S, D]."""
        low = op.Slice(x, [0], half, [3], [1])
        high = op.Slice(x, half, end, [3], [1])
        turned = op.Concat(op.Neg(high), low, axis=-1)
        return op.Add(op.Mul(x, op.Unsqueeze(cos, axes)), op.Mul(turned, op.Unsqueeze(sin, axes)))

    def check(
        self,
        _context: Any,
        x: ir.Value,
        cos: ir.Value,
        sin: ir.Value,
        axes: ir.Value,
        half: ir.Value,
        end: ir.Value,
        **_others: Any,
    ) -> MatchResult:
        """Take only whole heads and tables [B, S, D] whose halves are equal."""
        result = MatchResult()
        if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
            return result.fail("x is not [B, H, S, D] with a known D")
        width = x.shape[3]
        if _number(axes) != 1 or 2 * _number(half) != width or _number(end) < width:
            return result.fail("the halves are not those of a head")
        if any(t.shape is None or len(t.shape) != 3 for t in (cos, sin)):
            return result.fail("the tables are not [B, S, D]")
        if not (_repeats(cos) and _repeats(sin)):
            return result.fail("the angles of the two halves are not the same")
        return result

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_others: Any) -> Any:
        """Return the operator; its tables [B, S, D/2] are computed once per call."""
        return op.RotaryEmbedding(x, _first_half(op, cos), _first_half(op, sin))


class PartialRotation(RewriteRuleClassBase):  # type: ignore[misc]
    """A rotation of the first part of each head; the rest stays as it is."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, width: Any) -> Any:
        """Return the form of models with a partial rotary factor."""
        part = op.Slice(x, [0], width, [3], [1])
        rest = op.Slice(x, width, [_END], [3], [1])
        return op.Concat(op.RotaryEmbedding(part, cos, sin), rest, axis=-1)

    def check(self, _context: Any, width: ir.Value, **_others: Any) -> MatchResult:
        """Take only a width that is known."""
        result = MatchResult()
        return result if width.const_value is not None else result.fail("the width is not known")

    def rewrite(
        self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, width: ir.Value, **_others: Any
    ) -> Any:
        """Return the operator with the width that it rotates."""
        return op.RotaryEmbedding(x, cos, sin, rotary_embedding_dim=int(_number(width)))


def _number(value: ir.Value) -> float:
    """Return a constant of one element; not a number where it is none."""
    tensor = value.const_value
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else float("nan")


def _elementwise(value: ir.Value) -> tuple[ir.Node, list[ir.Value]] | None:
    """Return a cosine, a sine or a product with a scalar, and its inputs; None for the rest."""
    node = value.producer()
    if node is None or node.op_type not in ("Cos", "Sin", "Mul"):
        return None
    inputs = [i for i in node.inputs if i is not None]
    scaled = node.op_type == "Mul" and _number(inputs[1]) == _number(inputs[1])
    return (node, inputs) if scaled or len(inputs) == 1 else None


def _repeats(table: ir.Value) -> bool:
    """Whether the second half of a table's last axis is computed as the first one is."""
    if (step := _elementwise(table)) is not None:
        return _repeats(step[1][0])
    node = table.producer()
    if node is None or node.op_type != "Concat" or node.attributes["axis"].as_int() not in (-1, 2):
        return False
    return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


def _first_half(op: Any, table: ir.Value) -> ir.Value:
    """Return what `_repeats` found the halves of a table to be."""
    step = _elementwise(table)
    if step is None:
        repeated = table.producer()
        assert repeated is not None
        assert repeated.inputs[0] is not None
        return repeated.inputs[0]
    node, (source, *scale) = step
    half: ir.Value = getattr(op, node.op_type)(_first_half(op, source), *scale)
    return half
