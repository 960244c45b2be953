"""The graph passes of each engine form, in order, on one screen."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.passes import InPlacePass, Sequential

from recmas_export.element_types import ComputeWide, UseElementTypes
from recmas_export.passes.experts import ExpandExperts, StoreExperts, UseMixtureOperator
from recmas_export.passes.grouped_attention import UseGroupedAttention
from recmas_export.passes.linear_attention import ExpandLinearAttention
from recmas_export.passes.operators import UseStandardOperators
from recmas_export.passes.products import PackProducts, SplitAfterHeads
from recmas_export.passes.tidy import (
    MICROSOFT,
    CheckOperators,
    DropNoOps,
    FixShapes,
    FoldConstants,
    MultiplyAsStored,
    StoreTransposed,
    Strip,
)
from recmas_export.quantize import QuantizeWeights
from recmas_export.weights_file import NarrowWeights
from recmas_export.written_graphs import AddLatentStep
from recmas_runtime.formats.precisions import GATED_BLOCK, PRECISIONS, ElementTypes

Passes = tuple[InPlacePass, ...]

# What every traced graph begins with.
TIDY: Final[Passes] = (
    StoreTransposed(),  # folding takes small constants only, so no transpose of a large weight
    FoldConstants(),  # before all that looks for constants: shapes, ends of slices, factors of one
    common.IdentityEliminationPass(),  # what folding leaves
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.RemoveUnusedNodesPass(),  # before sharing, which would compare what is dead too
    common.DeduplicateInitializersPass(),  # before sharing: equal nodes read one and the same value
    common.CommonSubexpressionEliminationPass(),  # before CLEAN: all layers rotate by equal angles
    common.RemoveUnusedNodesPass(),
)

# The same numbers from fewer, larger operators. After TIDY: while shapes and casts of weights are
# computed, no norm, rotation or product to pack is found.
CLEAN: Final[Passes] = (
    DropNoOps(),
    common.IdentityEliminationPass(),  # what that leaves; it hides transposes from SplitAfterHeads
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    FixShapes(),
    UseStandardOperators(),  # before heads: norms of queries and keys come between the transposes
    PackProducts(),  # before heads: it writes the split that moves
    SplitAfterHeads(),
    common.RemoveUnusedNodesPass(),
    common.DeduplicateInitializersPass(),  # every layer has brought the same sizes and shapes
    common.CommonSubexpressionEliminationPass(),  # and halved the same tables of angles
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
    StoreExperts(),  # before there are two decoders, which read the same bytes
    common.RemoveUnusedNodesPass(),  # and matrices in an order that nothing reads any more
    AddLatentStep(),  # after cleaning: it is written as it should run
    Strip("decoder"),
)
# What the portable decoder goes through when that for the CPU has become another graph.
STANDARD: Final[Passes] = (
    ExpandLinearAttention(),
    CheckOperators(),
)
# What both decoders go through when their weights have the form that they are stored in.
PORTABLE: Final[Passes] = (ExpandExperts(look_up=True),)
FOR_CPU: Final[Passes] = (ExpandExperts(look_up=False),)
# What graphs that compute in 16 bits go through for a CPU, before experts are written out: their
# matrices are then float32 outside of the loops that read them.
ON_A_CPU: Final[Passes] = (ComputeWide(),)


def cpu_decoder(*, max_positions: int) -> Passes:
    """Return the passes that make a clone of DECODER's graph that of ONNX Runtime's CPU provider.

    A clone, for the operators are not standard ones; it shares the weights' memory, so that both
    graphs point to the same bytes.
    """
    return (
        UseGroupedAttention(max_positions),
        UseMixtureOperator(),
        common.RemoveUnusedNodesPass(),  # masks and angles, and the attention that was replaced
    )


def weight_passes(precision: str, dtype: str, types: ElementTypes) -> tuple[Passes, Passes]:
    """Return the passes that write weights as they are stored: for decoders, and for tables.

    They come last of all. Graphs that may share weights go through the same passes, which keep what
    they have made of each. Weights that stay float32 numbers are stored in `dtype`.
    """
    row = PRECISIONS[precision]
    size, narrow = row.block_size, UseElementTypes(types)
    layers, tables = (
        (
            # Its blocks are of float32.
            QuantizeWeights(bits=bits, block_size=own_size, expert_block_size=size),
            narrow,  # of blocks their scales, else the weights
            NarrowWeights(dtype),  # what is still float32
        )
        for bits, own_size in (
            (row.layer_bits, row.layer_block_size or size),
            (row.table_bits, size),
        )
    )
    return layers, tables


def beside_rows() -> Passes:
    """Return the passes that store the weights of products that have not become ones by rows."""
    return (QuantizeWeights(bits=8, block_size=GATED_BLOCK),)


def has_own_operators(model: ir.Model) -> bool:
    """Tell whether a graph has operators that only ONNX Runtime has."""
    return any(node.domain == MICROSOFT for node in model.graph)


def run_passes(passes: Passes, model: ir.Model) -> bool:
    """Run passes on a graph in place; returns whether any of them has changed it."""
    return Sequential(*passes)(model).modified
