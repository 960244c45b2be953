"""How large things are: element types, caches, links; and how sizes are written for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.ir.ops import LinkWeights

# In which engines compute: activations, caches, link operands, and weights once they are in memory.
ENGINE_DTYPE = "float32"

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# The CPU's decoder has angles in tables up to here: 64 MiB for heads of 128. Tables for more
# positions would take more memory than its attention is worth.
MOST_TABLE_POSITIONS: Final = 2**17
# Heads of other widths its attention does not take.
HEAD_MULTIPLE: Final = 16

# Weights that share a scale. Blocks of 16 are more exact and in int4 take as long as int8.
BLOCK_SIZE: Final = 32


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bits per weight of a precision, without scales.

    Attributes:
        layers: The matrices of the decoder's layers.
        tables: Input embedding and head.
    """

    layers: int
    tables: int


# The precisions with weights in blocks of integers. Tables keep 8 bits in int4 too: no latent step
# reads them, and on SmolLM2 tables of 4 bits alone cost 0.09 nats, those of 8 bits nothing.
QUANTIZED: Final[dict[str, Bits]] = {
    "int8": Bits(layers=8, tables=8),
    "int4": Bits(layers=4, tables=8),
}


def weights_bytes(facts: BackboneFacts, *, precision: str, dtype: str = ENGINE_DTYPE) -> int:
    """Return the bytes of a backbone's weights.

    Args:
        facts: The backbone.
        precision: Of its engines.
        dtype: What float32 engines store; quantized weights take the same bytes from any.
    """
    if precision not in QUANTIZED:
        return facts.num_parameters * dtype_bytes(dtype)
    bits = QUANTIZED[precision]
    tables = facts.num_tables * facts.vocab_size * facts.width
    layers = facts.num_parameters - tables  # norms among them, one in a thousand
    return round(layers * _stored_bits(bits.layers) / 8 + tables * _stored_bits(bits.tables) / 8)


def angle_tables_bytes(facts: BackboneFacts) -> int:
    """Return the most that the tables of the CPU's decoder take.

    They hold a cosine and a sine for every position and every pair of a head's elements. A backbone
    whose heads are normed has no such decoder and takes less, which its facts do not say.
    """
    if facts.max_positions > MOST_TABLE_POSITIONS or facts.head_dim % HEAD_MULTIPLE:
        return 0
    if "full" not in facts.attention:
        return 0
    return facts.max_positions * facts.head_dim * dtype_bytes(ENGINE_DTYPE)


def _stored_bits(bits: int) -> float:
    """Return the bits a weight takes with its share of a float32 scale."""
    return bits + 32 / BLOCK_SIZE


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one element."""
    return DTYPE_BYTES[dtype]


def link_num_parameters(weights: LinkWeights, *, role: Literal["inner", "outer"]) -> int:
    """Return how many parameters a link has; the forms are those of the specs' README."""
    d_in, d_out = weights.in_dim, weights.out_dim
    skip = 0 if role == "inner" else d_in * d_out
    match weights.kind:
        case "residual":
            return d_in * d_out + d_out * d_out + skip
        case "ln_residual":
            hidden = d_out if role == "inner" else 2 * d_out
            biases = hidden + d_out + (0 if role == "inner" else d_out)
            return d_in * hidden + hidden * d_out + skip + biases + 2 * d_in + 2 * d_out
        case "projected":
            return d_in * d_out + d_out * d_out + d_in * d_out + 3 * d_out + 2 * d_in
