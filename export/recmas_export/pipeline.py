"""The graph passes of each engine form, in order, on one screen."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.passes import InPlacePass, Sequential

from recmas_export.passes.grouped_attention import UseGroupedAttention
from recmas_export.passes.operators import UseStandardOperators
from recmas_export.passes.products import PackProducts, SplitAfterHeads
from recmas_export.passes.tidy import (
    CheckOperators,
    DropNoOps,
    FixShapes,
    FoldConstants,
    MultiplyAsStored,
    StoreTransposed,
    Strip,
)
from recmas_export.precision.quantize import QuantizeWeights
from recmas_export.precision.weights_file import NarrowWeights
from recmas_export.written_graphs import AddLatentStep
from recmas_runtime.formats.precisions import PRECISIONS

Passes = tuple[InPlacePass, ...]

# What every traced graph begins with.
TIDY: Final[Passes] = (
    StoreTransposed(),  # folding takes small constants only and leaves transposes of weights
    FoldConstants(),  # before all that looks for constants: shapes, ends of slices, factors of one
    common.IdentityEliminationPass(),  # before sharing: an Identity hides that inputs are equal
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.RemoveUnusedNodesPass(),  # before sharing, which would compare the dead too
    common.DeduplicateInitializersPass(),  # equal nodes read the same value, not an equal one
    common.CommonSubexpressionEliminationPass(),
    common.RemoveUnusedNodesPass(),
)

# The same numbers from fewer, larger operators; of a tidied decoder, where shapes are folded and
# weights are constants: without that, no norm, rotation or packed product is found.
CLEAN: Final[Passes] = (
    DropNoOps(),  # before operators, whose patterns have no factors of one
    common.IdentityEliminationPass(),  # what dropped operators leave
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    FixShapes(),
    UseStandardOperators(),  # before heads: it brings transposes next to the products' reshapes
    PackProducts(),  # before heads: its split is the one that moves
    SplitAfterHeads(),
    common.RemoveUnusedNodesPass(),
    common.DeduplicateInitializersPass(),  # every layer has brought the same sizes and shapes
    common.CommonSubexpressionEliminationPass(),  # all layers rotate by the same tables
    common.RemoveUnusedNodesPass(),
)

# The portable graphs: standard ONNX operators, for any engine.
EMBED: Final[Passes] = (
    *TIDY,
    Strip("embed"),
    CheckOperators(),  # last, of what is written; its message has the name that Strip gives
)
HEAD: Final[Passes] = (
    MultiplyAsStored(),  # first: StoreTransposed would store a tied table a second time
    *TIDY,
    Strip("head"),
    CheckOperators(),
)
DECODER: Final[Passes] = (
    *TIDY,
    *CLEAN,
    AddLatentStep(),  # after cleaning: the link's form is written as engines run it
    Strip("decoder"),
    CheckOperators(),
)


def cpu_decoder(*, max_positions: int) -> Passes:
    """Return the passes that make a clone of DECODER's graph that of ONNX Runtime's CPU provider.

    A clone, for the operators are not standard ones; it shares the weights' memory, so that both
    graphs point to the same bytes.
    """
    return (
        UseGroupedAttention(max_positions),
        common.RemoveUnusedNodesPass(),  # masks and angles; a rule removes what has one result
    )


def weights(*, bits: int, block_size: int | None, dtype: str) -> Passes:
    """Return the passes that write weights as they are stored, last of all for each graph.

    Graphs that may share weights go through the same passes, which keep what they have made.
    """
    return (
        QuantizeWeights(bits=bits, block_size=block_size),  # its blocks are made of float32
        NarrowWeights(dtype),  # what is not in blocks
    )


def weight_passes(precision: str, dtype: str) -> tuple[Passes, Passes]:
    """Return `weights` for decoders, and for the embedding and the head."""
    row = PRECISIONS[precision]
    layers, tables = (
        weights(bits=bits, block_size=row.block_size, dtype=dtype)
        for bits in (row.layer_bits, row.table_bits)
    )
    return layers, tables


def run_passes(passes: Passes, model: ir.Model) -> bool:
    """Run passes on a graph in place; returns whether any of them has changed it."""
    return Sequential(*passes)(model).modified
