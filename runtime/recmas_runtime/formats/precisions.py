"""What can be built: every target, and every precision that engines can hold weights in.

One row each, and nothing else says so. A new precision is a row here and, where its weights need
another form than blocks of integers, a graph pass in `recmas_export`. A new target is a row here,
its name in the column `targets` of the precisions and, where it needs engines of its own, the
package that opens them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

from recmas_runtime.core.errors import fail

if TYPE_CHECKING:  # help shall not wait for the formats
    from recmas_runtime.formats.manifest import LossEntry

Dtype = Literal["float32", "bfloat16", "float16"]
PrecisionName = Literal["float32", "bfloat16", "float16", "int8", "int4"]

# Element types that weights are stored in, with the bytes of one.
DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}

TargetName = Literal["onnx", "tensorrt"]
TARGET_NAMES: Final[tuple[str, ...]] = get_args(TargetName)

# A decoder that is exported: in standard operators, or in those of ONNX Runtime's CPU provider.
DecoderForm = Literal["portable", "cpu"]

TENSORRT: Final = "tensorrt"
AUTO: Final = "auto"
# What a bundle can be run on: ONNX Runtime's devices, the engines built for one machine, or `auto`.
DEVICES: Final = (AUTO, "cpu", "cuda", TENSORRT)

# CUDA devices have a number; without one it is the first.
DEVICE_PATTERN: Final = r"^(auto|cpu|cuda(:[0-9]{1,2})?|tensorrt)$"


class DeviceName(NamedTuple):
    """A device: its kind, of `DEVICES`, and its number."""

    kind: str
    number: int


def device_named(device: str) -> DeviceName:
    """Return what a name means.

    Raises:
        RecmasError: RM504 if it is none.
    """
    if re.fullmatch(DEVICE_PATTERN, device) is None:
        hint = f"Choose one of: {', '.join(DEVICES)}; cuda:1 is the second CUDA device."
        raise fail("RM504", f"unknown device {device!r}", hint=hint)
    kind, _, index = device.partition(":")
    return DeviceName(kind, int(index or 0))


# Limits of the decoder for ONNX Runtime's CPU provider. Angles are in tables up to here: 64 MiB for
# heads of 128. Tables for more positions would take more memory than its attention is worth.
MOST_TABLE_POSITIONS: Final = 2**17
# Heads of other widths its attention does not take.
HEAD_MULTIPLE: Final = 16
# Beside products by rows, those behind gates have blocks of 8 bits with so many weights to a scale.
GATED_BLOCK: Final = 128

# Limits in float32. "Relative" compares max |difference| with max |expected|: hidden states are
# taken after the final norm, where entries differ in size by orders of magnitude.
TOLERANCES: Final[Mapping[str, float]] = {
    # Input embeddings: a table lookup and at most one multiplication.
    "embeds_relative": 1e-6,
    # One backbone call on equal inputs, max |difference| / max |expected|. Two correct float32
    # implementations of 30 layers differ by rounding only: 1e-6 to 1e-5 measured.
    "hidden_relative": 1e-4,
    # A link on equal inputs: three matrix products, the same bound with less depth.
    "link_relative": 1e-5,
    # Logits on equal hidden states: one matrix product of width d.
    "logits_relative": 1e-5,
    # Messages of whole programs, absolute, after rounds x steps of free-running recursion.
    # Rounding differences feed back through the recursion, so this is looser than one step.
    "message_absolute": 1e-3,
    # How unlikely a text is behind a prompt: float32 logits of a hidden state per token.
    "text_loss_relative": 1e-4,
    # The attention probe has an answer that is exact in float32 but for the softmax.
    "probe_absolute": 1e-6,
    # Rows moved by up to 1000 positions beside those that a model computes there. Its angles are
    # products in float32, off by 6e-8 of themselves: 2e-6 to 4e-5 measured. Another layout or
    # another table of frequencies gives 0.1 and more.
    "moved_rows_relative": 1e-4,
}


@dataclass(frozen=True, kw_only=True)
class ElementTypes:
    """What the graphs of a backbone compute in; where types meet there is a Cast.

    Attributes:
        products: Operands and results of products with weights, of attention, of rotations by
            angles and of gates. Weights that are numbers of their own are stored so.
        caches: Keys and values. Layer states are float32 always.
        norms: Norms, sums over layers (residuals), softmax outside of attention, angles, the choice
            of experts. A token whose state is a thousand times the others' loses these first.
        borders: What engines take and give: input vectors, hidden states, thoughts, logits; links
            and messages. The host sees nothing else.
    """

    products: Dtype = "float32"
    caches: Dtype = "float32"
    norms: Dtype = "float32"
    borders: Dtype = "float32"

    @property
    def is_wide(self) -> bool:
        """Whether everything is float32."""
        return self == ElementTypes()


def _in(dtype: Dtype) -> ElementTypes:
    return ElementTypes(products=dtype, caches=dtype)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How engines hold a backbone's weights, and what they compute in.

    Attributes:
        layer_bits: Per weight of the matrices of the decoder's layers, without scales.
        block_size: Weights that share a scale; None where weights are floating-point numbers.
        layer_block_size: The same for the layers' matrices, other than those of experts; None where
            it is no other.
        cpu_products: What products of the decoder for ONNX Runtime's CPU provider read: the same
            blocks as the portable one, or rows of 8-bit integers, which have faster products; or
            blocks in steps, and in prompts rows of a second copy of the weights.
        targets: Those of `TARGETS` that can build it.
        refusals: By each other target, why its engines cannot have it.
        types: What graphs compute in, by the device that a backbone is made for, of `DEVICES`;
            `auto` where the spec names none.
        device_refusals: By each other device, why no backbone is made for it so.
        tolerances: Allowed differences from the float32 reference, by figure. Where weights are
            quantized, such a figure tells a kernel that computes something else (errors of 1 and
            more, or no number at all) from rounding, which random and small models show most.
        loss_limits: What it may cost, by the names of `loss_figures`; a build that loses
            more fails. Empty where nothing is lost, and so nothing measured.
        draft_margin: Where the largest logit is ahead of the second by at least this much, a call
            of several positions chooses the token that calls of one position do. None where the
            two differ by too much for drafts of text to be verified.
    """

    layer_bits: int
    table_bits: int
    block_size: int | None = None
    layer_block_size: int | None = None
    cpu_products: Literal["blocks", "rows", "rows in prompts"] = "blocks"
    targets: frozenset[str] = frozenset()
    refusals: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, ElementTypes] = field(default_factory=dict)
    device_refusals: Mapping[str, str] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)
    loss_limits: Mapping[str, float] = field(default_factory=dict)
    draft_margin: float | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether weights are held in blocks of integers."""
        return self.block_size is not None

    @property
    def has_losses(self) -> bool:
        """Whether something is lost, so that builds measure how much."""
        return bool(self.loss_limits)

    def layer_weight_bits(self, device: str = AUTO) -> float:
        """Return the bits that a weight of the layers takes, with its share of a scale."""
        return self.layer_bits + self._scale_bits(device, self.layer_block_size or self.block_size)

    def expert_weight_bits(self, device: str = AUTO) -> float:
        """Return the bits that a weight of experts takes, with its share of a scale."""
        return self.layer_bits + self._scale_bits(device, self.block_size)

    def table_weight_bits(self, device: str = AUTO) -> float:
        """Return the bits that a weight of the tables takes, with its share of a scale."""
        return self.table_bits + self._scale_bits(device, self.block_size)

    def _scale_bits(self, device: str, block_size: int | None) -> float:
        if block_size is None:
            return 0.0
        return 8 * DTYPE_BYTES[self.types[device].products] / block_size


_NARROW_ON_CPU: Final = (
    "a CPU computes it in float32 with a rounding behind every operator, in no less time and memory"
)
# Blocks are read by MatMulNBits, whose scales have the type of its activations. On CUDA those are
# float16: half the bytes, and tensor cores for prompts (ONNX Runtime's kernels take blocks of 16 to
# 128 of 4 and of 8 bits there, those for tensor cores of 32, 64 and 128).
_BLOCKS: Final[Mapping[str, ElementTypes]] = {
    AUTO: ElementTypes(),
    "cpu": ElementTypes(),
    "cuda": _in("float16"),
}

# Loss limits: SmolLM2, with 135M parameters among the models that lose most, costs 0.001, 0.05 and
# 0.005 nats in int8, 0.02, 0.17 and 0.04 in int4. Limits are a multiple of that: beyond them
# something is broken for a model, or it is no use in this precision.
#
# Blocks of 16 are more exact than those of 32 and in int4 take as long as int8.
PRECISIONS: Final[dict[str, Precision]] = {
    "float32": Precision(
        layer_bits=32,
        table_bits=32,
        targets=frozenset({"onnx", TENSORRT}),
        types=dict.fromkeys(DEVICES, ElementTypes()),
        tolerances=TOLERANCES,
        # Logits of SmolLM2 differ by up to 5e-5 (their sizes are up to 40), cache rows included.
        draft_margin=2e-3,
    ),
    # Rounded to 8 and to 11 bits wherever a product, a gate or a cache is. Figures are those of the
    # CPU's form, which rounds where the graph says so; no GPU has been held against them yet.
    "bfloat16": Precision(
        layer_bits=16,
        table_bits=16,
        targets=frozenset({"onnx", TENSORRT}),
        types=dict.fromkeys((AUTO, "cuda", TENSORRT), _in("bfloat16")),
        device_refusals={"cpu": _NARROW_ON_CPU},
        # A number keeps 8 bits, so it is off by 2^-9 of itself: 2e-3 measured for tables, 4e-3
        # after few layers, 0.11 where a random model takes another expert for it. SmolLM2 costs a
        # cosine of 4e-5, 2 % of likeliest tokens and 0.003 nats.
        tolerances={
            **TOLERANCES,
            "embeds_relative": 1e-2,
            "hidden_relative": 0.2,
            "logits_relative": 2e-2,
        },
        loss_limits={
            "1 - hidden cosine": 1e-3,
            "1 - greedy agreement": 0.1,
            "loss increase": 0.03,
        },
    ),
    "float16": Precision(
        layer_bits=16,
        table_bits=16,
        targets=frozenset({"onnx", TENSORRT}),
        types=dict.fromkeys((AUTO, "cuda", TENSORRT), _in("float16")),
        device_refusals={"cpu": _NARROW_ON_CPU},
        # An eighth of bfloat16's: a number keeps 11 bits. Numbers beyond 65504 have no place in it:
        # weights are refused then, and activations fail the comparison with the reference.
        tolerances={
            **TOLERANCES,
            "embeds_relative": 1.25e-3,
            "hidden_relative": 2.5e-2,
            "logits_relative": 2.5e-3,
        },
        loss_limits={
            "1 - hidden cosine": 1e-4,
            "1 - greedy agreement": 0.03,
            "loss increase": 0.01,
        },
    ),
    "int8": Precision(
        layer_bits=8,
        table_bits=8,
        block_size=32,
        cpu_products="rows",
        targets=frozenset({"onnx"}),
        refusals={"tensorrt": "such weights are packed for ONNX Runtime"},
        types=_BLOCKS,
        device_refusals={TENSORRT: "such weights are packed for ONNX Runtime"},
        # A weight is off by half of 1/128 of its block's largest: 3e-3 measured for the tables of
        # SmolLM2, 3e-2 after its 30 layers, 1e-2 where the head rounds its input too. Small and
        # random models reach three times that.
        tolerances={
            **TOLERANCES,
            "embeds_relative": 1e-2,
            "hidden_relative": 0.2,
            "logits_relative": 3e-2,
        },
        loss_limits={
            "1 - hidden cosine": 0.01,
            "1 - greedy agreement": 0.15,
            "loss increase": 0.05,
        },
    ),
    "int4": Precision(
        layer_bits=4,
        # Tables keep 8 bits: no latent step reads them, and on SmolLM2 tables of 4 bits alone cost
        # 0.09 nats, those of 8 bits nothing.
        table_bits=8,
        block_size=32,
        layer_block_size=64,
        cpu_products="rows in prompts",
        targets=frozenset({"onnx"}),
        refusals={"tensorrt": "such weights are packed for ONNX Runtime"},
        types=_BLOCKS,
        device_refusals={TENSORRT: "such weights are packed for ONNX Runtime"},
        # As for int8 with 1/8 in the layers: 0.27 measured. Tables have 8 bits.
        tolerances={
            **TOLERANCES,
            "embeds_relative": 1e-2,
            "hidden_relative": 0.8,
            "logits_relative": 3e-2,
        },
        loss_limits={
            "1 - hidden cosine": 0.12,
            "1 - greedy agreement": 0.4,
            "loss increase": 0.4,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of engine.

    Attributes:
        decoders: Those that are exported, each by its pipeline in `recmas_export.pipeline`.
        machine_engines: Engines that are built from the portable graphs for the machine that the
            build runs on, which must have what they need; None where graphs are all there is.
        other_precision: What to do instead where it cannot build a precision, after a list of those
            it can.
    """

    layers: frozenset[str]
    decoders: tuple[DecoderForm, ...]
    machine_engines: Literal["tensorrt"] | None = None
    other_precision: str


TARGETS: Final[dict[str, Target]] = {
    "onnx": Target(
        layers=frozenset({"full", "sliding", "linear", "none"}),
        decoders=("portable", "cpu"),
        other_precision=". To store float32 in half the bytes, set `dtype`.",
    ),
    "tensorrt": Target(
        # Its engines write caches where they read them, which a state does not survive.
        layers=frozenset({"full", "sliding", "none"}),
        # Its bundles run on machines without a GPU too.
        decoders=("portable", "cpu"),
        machine_engines=TENSORRT,
        other_precision=", or target `onnx`.",
    ),
}


def buildable(target: str | None = None) -> tuple[str, ...]:
    """Return the precisions that a target can build, or any target where none is given."""
    return tuple(
        name
        for name, precision in PRECISIONS.items()
        if (precision.targets if target is None else target in precision.targets)
    )


def beyond_tolerance(figures: Mapping[str, float], *, precision: str) -> Iterator[str]:
    """Yield what is wrong with each figure that is not a number within its tolerance."""
    allowed = PRECISIONS[precision].tolerances
    for name, value in figures.items():
        if not value <= allowed[name]:
            yield f"{name} is {value:.2e}, allowed is {allowed[name]:.0e}"


def beyond_loss_limits(loss: LossEntry, *, precision: str) -> Iterator[str]:
    """Yield what is wrong with each figure of a loss that a precision must not reach."""
    figures = loss_figures(loss)
    for name, limit in PRECISIONS[precision].loss_limits.items():
        if not figures[name] <= limit:
            yield (
                f"{name} of {precision} is {figures[name]:.3g} over {loss.text}, "
                f"allowed is {limit:g}"
            )


def loss_figures(loss: LossEntry) -> dict[str, float]:
    """Return what a precision costs, each figure the smaller the better and 0 for nothing lost."""
    return {
        "1 - hidden cosine": 1 - loss.hidden_cosine,
        "1 - greedy agreement": 1 - loss.greedy_agreement,
        "loss increase": loss.loss - loss.reference_loss,
    }


def precision_hint(target: str) -> str:
    """Return what to use where a target cannot build a precision."""
    return f"Use {_one_of(buildable(target))}{TARGETS[target].other_precision}"


def device_hint(kind: str) -> str:
    """Return what to use where a precision cannot be had on a device."""
    able = [name for name, precision in PRECISIONS.items() if kind in precision.types]
    return f"Use {_one_of(able)}, or another device."


def _one_of(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
