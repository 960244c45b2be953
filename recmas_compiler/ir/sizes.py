"""How large things are: element types, caches, links; and how sizes are written for people."""

from __future__ import annotations

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.links.files import LinkWeights
from recmas_runtime.formats.link_kinds import FORMS, LinkRole
from recmas_runtime.formats.precisions import DTYPE_BYTES, PRECISIONS
from recmas_runtime.formats.targets import HEAD_MULTIPLE, MOST_TABLE_POSITIONS

# In which engines compute: activations, caches, link operands, and weights once they are in memory.
ENGINE_DTYPE = "float32"


def weights_bytes(facts: BackboneFacts, *, precision: str, dtype: str = ENGINE_DTYPE) -> int:
    """Return the bytes of a backbone's weights.

    Args:
        facts: The backbone.
        precision: Of its engines.
        dtype: What float32 engines store; quantized weights take the same bytes from any.
    """
    bits = PRECISIONS[precision]
    if not bits.is_quantized:
        return facts.num_parameters * dtype_bytes(dtype)
    tables = facts.num_tables * facts.vocab_size * facts.width
    layers = facts.num_parameters - tables  # norms among them, one in a thousand
    return round(layers * bits.layer_weight_bits / 8 + tables * bits.table_weight_bits / 8)


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


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one element."""
    return DTYPE_BYTES[dtype]


def link_num_parameters(weights: LinkWeights, role: LinkRole) -> int:
    """Return how many parameters a link has."""
    return FORMS[weights.kind, role].num_parameters(weights.in_dim, weights.out_dim)
