"""What the compiler knows of a backbone: its `config.json`, read without transformers.

Configs leave out what equals the default of their family; a table made from transformers' classes
holds those defaults. Layers are told apart by how they attend, because that is what a target can or
cannot run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from recmas_compiler.backbones.config.defaults import family_defaults
from recmas_compiler.backbones.config.layer_shapes import layer_shapes
from recmas_compiler.backbones.config.layer_types import (
    LAYER_KINDS,
    STATEFUL,
    AttentionKind,
    layer_types,
)
from recmas_compiler.backbones.config.loops import LOOP_HINT, unrolled, why_looped
from recmas_compiler.backbones.config.parameters import (
    count_expert_parameters,
    count_parameters,
    experts_of,
)
from recmas_compiler.backbones.config.rotary import longest_fixed
from recmas_compiler.backbones.config.unsupported import why_unsupported
from recmas_compiler.spec.document.places import UNKNOWN, SourcePosition
from recmas_compiler.spec.document.problems import problem_at, show
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.layers import MOST_LAYERS, LayerShape
from recmas_runtime.formats.precisions import (
    AUTO,
    DTYPE_BYTES,
    GATED_BLOCK,
    HEAD_MULTIPLE,
    MOST_TABLE_POSITIONS,
    PRECISIONS,
)

# Of a model whose states have seen any number of positions: what is long enough for all uses.
_NO_LIMIT: Final = 1 << 20

_LARGEST_CONFIG_BYTES = 16 << 20
_LARGEST_DIMENSION = 1 << 31

# Engines compute in float32: activations, caches, link operands, and weights once in memory.
ENGINE_ELEMENT_BYTES: Final = DTYPE_BYTES["float32"]

# A config states its size itself. Only where it is part of another one transformers writes no more
# than what differs from the defaults.
_SIZES: Final = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")

# Causal models whose class is not called so.
_OTHER_CAUSAL: Final = frozenset({"GPT2LMHeadModel", "CTRLLMHeadModel", "OpenAIGPTLMHeadModel"})


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Dimensions and identity of a backbone, read from its config without torch.

    Attributes:
        source: As the spec names it, e.g. `builtin:smollm2-135m-instruct`.
        identity: Equal for equal weights: the source with its revision resolved, or a digest of
            the folder's files. Link files made for others are refused.
        folder: Where a source that is a path is found from anywhere: a folder's absolute path, or
            `gguf:` and that of a file; None for other sources.
        width: Hidden width, d. Input embeddings have the same width.
        vocab_size: Rows of the embedding table.
        max_positions: Longest sequence the backbone was made for, as far as its rotary embeddings
            do not change with the length.
        layers: What each layer keeps of a sequence; `len(layers) == num_layers`.
        attention: Kind of each layer, in order; likewise.
        sliding_window: Window of the sliding layers in positions; None if there are none.
        num_parameters: Parameters, embedding table included once, and all experts.
        num_tables: Tables of the vocabulary among them: 1 where head and embedding are tied, else
            2.
        num_expert_parameters: Those of experts among them, of which a token takes a part.
        expert_width: Hidden width of an expert; 0 for a model without.
    """

    source: str
    identity: str
    model_type: str
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerShape, ...]
    attention: tuple[AttentionKind, ...]
    sliding_window: int | None
    num_parameters: int
    num_tables: int = 1
    num_expert_parameters: int = 0
    expert_width: int = 0
    folder: str | None = None

    @property
    def num_layer_parameters(self) -> int:
        """Those of all layers, experts among them, and of norms: all but tables."""
        return self.num_parameters - self.num_tables * self.vocab_size * self.width


def read_config_facts(
    folder: Path, *, source: str, identity: str, position: SourcePosition = UNKNOWN
) -> BackboneFacts:
    """Return what `config.json` in `folder` says.

    Raises:
        RecmasError: RM202 for a model that is quantized, not a causal language model, or described
            by a config that makes no sense; RM203 for layers of an unknown type.
    """
    reader = _Reader(source=source, position=position)
    return reader.facts(reader.load(folder / "config.json"), identity)


def config_facts(
    config: dict[str, Any], *, source: str, identity: str, position: SourcePosition = UNKNOWN
) -> BackboneFacts:
    """Return what a config says that was not read from a `config.json`. See `read_config_facts`."""
    return _Reader(source=source, position=position).facts(config, identity)


def stored_dtype(folder: Path, *, source: str) -> str | None:
    """Return the element type that `config.json` says its weights have, if it says so.

    Raises:
        RecmasError: RM202 if it is malformed.
    """
    config = _Reader(source=source, position=UNKNOWN).load(folder / "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):  # as newer and older writers call it
            if isinstance(part.get(key), str):
                return str(part[key])
    return None


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads one config; knows how to name it in errors."""

    source: str
    position: SourcePosition

    def facts(self, config: dict[str, Any], identity: str) -> BackboneFacts:
        self._check_kind(config)
        text = self._text_part(config)
        usual_type = family_defaults(str(config.get("model_type"))).get("text_config", "")
        model_type = str(text.get("model_type") or usual_type)
        defaults = family_defaults(model_type)
        filled = {k: v for k, v in defaults.items() if text is not config or k not in _SIZES}
        given = _given(text)
        for name, other in defaults.get("names", {}).items():
            if other in given:
                given.setdefault(name, given[other])
        values = unrolled(model_type, filled | given)
        why = why_looped(model_type, values)
        if why is not None:
            raise self._unusable(why, hint=LOOP_HINT)
        if text is not config and not defaults:
            raise self._unsupported(
                f"`{model_type}`, its text model, has no causal class of its own"
            )
        if not model_type:
            raise self._unusable("its config.json names no `model_type`")
        if not defaults:
            raise self._unusable(
                f"its `model_type` is `{model_type}`, which has no causal class in transformers",
                hint="Choose a causal language model that transformers has code for.",
            )
        why = why_unsupported(model_type, values)
        if why is not None:
            raise self._unsupported(why)
        types = self._types(values, defaults.get("layer_cycle"))
        attention, num_layers = tuple(LAYER_KINDS[name] for name in types), len(types)
        attends = not {"full", "sliding"}.isdisjoint(attention)
        width = self._dimension(values, "hidden_size")
        num_heads = self._dimension(values, "num_attention_heads", default=None if attends else 1)
        one_for_all = values.get("multi_query") is True and not values.get(
            "new_decoder_architecture"
        )
        num_kv_heads = self._dimension(
            values, "num_key_value_heads", default=1 if one_for_all else num_heads
        )
        head_dim = self._dimension(values, "head_dim", default=width // num_heads or None)
        vocab_size = self._dimension(values, "vocab_size")
        if num_heads % num_kv_heads != 0:
            raise self._unusable(
                f"{num_heads} query heads cannot share {num_kv_heads} key/value heads"
            )
        layers = layer_shapes(
            values, types, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        for layer, name in zip(layers, types, strict=True):
            if name in STATEFUL and not layer.states:
                raise self._unsupported(
                    f"`{model_type}` keeps a state of a shape that is not known"
                )
        most = self._dimension(
            values, "max_position_embeddings", default=None if attends else _NO_LIMIT
        )
        self._dimension(values, "intermediate_size", default=1)
        experts = experts_of(model_type, values, given, types)
        is_sliding = "sliding" in attention
        is_tied = bool(values.get("tie_word_embeddings", False))
        return BackboneFacts(
            source=self.source,
            identity=identity,
            model_type=model_type,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_positions=min(most, longest_fixed(values) or most),
            layers=layers,
            attention=attention,
            sliding_window=self._dimension(values, "sliding_window") if is_sliding else None,
            num_expert_parameters=count_expert_parameters(experts, width) if experts else 0,
            expert_width=experts.width if experts else 0,
            num_parameters=count_parameters(
                model_type,
                values,
                types=types,
                layers=layers,
                num_heads=num_heads,
                head_dim=head_dim,
                num_tables=1 if is_tied else 2,
                experts=experts,
            ),
            num_tables=1 if is_tied else 2,
        )

    def load(self, path: Path) -> dict[str, Any]:
        try:
            with path.open("rb") as stream:
                raw = stream.read(_LARGEST_CONFIG_BYTES)
            config = json.loads(raw)
        except OSError as error:
            message = f"cannot read {path}: {error.strerror or error}."
            problem = problem_at(
                self.position, "RM200", message, hint="Check the file's permissions."
            )
            raise RecmasError(problem) from error
        except (ValueError, RecursionError) as error:
            raise self._unusable(f"its config.json is not JSON ({error})") from error
        if not isinstance(config, dict):
            raise self._unusable("its config.json is not a JSON object")
        return config

    def _check_kind(self, config: dict[str, Any]) -> None:
        quantization = config.get("quantization_config")
        if quantization is not None:
            named = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise self._unusable(
                f"it is quantized ({named or 'unknown method'})",
                hint="Name the unquantized model; recmas quantizes engines itself.",
            )
        architectures = config.get("architectures") or []
        names = [str(name) for name in architectures] if isinstance(architectures, list) else []
        wraps_text = "text_config" in config
        is_causal = any(
            name.endswith("ForCausalLM")
            or name in _OTHER_CAUSAL
            or (wraps_text and name.endswith("ForConditionalGeneration"))
            for name in names
        )
        if (names and not is_causal) or config.get("is_encoder_decoder") is True:
            shape = ", ".join(names) or str(config.get("model_type"))
            raise self._unusable(
                f"it is not a causal language model ({shape})",
                hint="Choose a decoder-only text model: its architecture ends in ForCausalLM.",
            )

    def _text_part(self, config: dict[str, Any]) -> dict[str, Any]:
        """Models that also see or hear keep their language model's values one level down."""
        text = config.get("text_config", config)
        if not isinstance(text, dict):
            raise self._unusable("`text_config` of its config.json is not an object")
        if text is config:
            return text
        # the head is the whole's, which says whether it is tied, if it says anything
        tied = config.get("tie_word_embeddings")
        told = {} if tied is None else {"tie_word_embeddings": tied}
        return text | told | {"outer_type": config.get("model_type")}

    def _dimension(
        self,
        values: dict[str, Any],
        key: str,
        *,
        default: int | None = None,
        limit: int = _LARGEST_DIMENSION,
    ) -> int:
        value = values.get(key, default)
        if value is None:
            raise self._unusable(f"its config.json has no `{key}`")
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not 0 < value <= limit:
            raise self._unusable(f"`{key}` in its config.json is {show(value)}")
        return int(value)

    def _types(self, values: dict[str, Any], cycle: list[str] | None) -> list[str]:
        """Return the type of each layer, all of them known."""
        listed = layer_types(values, None, cycle)
        default = len(listed) if listed is not None else None
        num_layers = self._dimension(
            values, "num_hidden_layers", default=default, limit=MOST_LAYERS
        )
        types = listed if listed is not None else layer_types(values, num_layers, cycle)
        if types is None:
            raise self._unusable("its config.json has no `layer_types`")
        if len(types) != num_layers:
            raise self._unusable(
                f"`layer_types` in its config.json does not name {num_layers} layers"
            )
        unknown = [str(name) for name in types if name not in LAYER_KINDS]
        if unknown:
            raise self._unsupported(f"its layers are of type `{unknown[0]}`")
        return types

    def _unusable(self, why: str, *, hint: str = "Choose another backbone.") -> RecmasError:
        message = f"recmas cannot use the backbone `{self.source}`: {why}."
        return RecmasError(problem_at(self.position, "RM202", message, hint=hint))

    def _unsupported(self, why: str) -> RecmasError:
        message = f"no target can run the backbone `{self.source}`: {why}."
        hint = "Choose a backbone with full or sliding-window attention."
        return RecmasError(problem_at(self.position, "RM203", message, hint=hint))


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its nulls, but for the window: there null means that it has none."""
    return {k: v for k, v in config.items() if v is not None or k == "sliding_window"}


def weights_bytes(
    facts: BackboneFacts, *, precision: str, dtype: str = "float32", device: str = AUTO
) -> int:
    """Return the bytes of a backbone's weights.

    Args:
        dtype: What float32 engines store; others take the same bytes from any. Experts are
            quantized where both of their widths are whole numbers of blocks.
        device: The kind of device that engines are made for.
    """
    bits = PRECISIONS[precision]
    if bits.block_size is None:
        stored = bits.types[device].products
        return facts.num_parameters * DTYPE_BYTES[dtype if stored == "float32" else stored]
    tables = facts.num_tables * facts.vocab_size * facts.width
    experts = facts.num_expert_parameters
    layers = facts.num_layer_parameters - experts  # norms among them, one in a thousand
    has_blocks = has_expert_blocks(facts, bits.block_size)
    expert_bits = bits.expert_weight_bits(device) if has_blocks else 8 * DTYPE_BYTES[dtype]
    num_bits = layers * bits.layer_weight_bits(device) + tables * bits.table_weight_bits(device)
    return round((num_bits + experts * expert_bits) / 8)


def step_bytes(facts: BackboneFacts, *, precision: str, device: str = AUTO) -> int:
    """Return the bytes of weights that a step of one position reads: no tables, all experts."""
    row = PRECISIONS[precision]
    return round(max(facts.num_layer_parameters, 0) * row.layer_weight_bits(device) / 8)


def row_weights_bytes(facts: BackboneFacts, *, precision: str) -> int:
    """Return the most that a bundle stores for the CPU's decoder beside the blocks of others.

    In memory it has these in place of blocks, which take more, or for prompts beside them.
    """
    is_blocks = PRECISIONS[precision].cpu_products == "blocks"
    if is_blocks or facts.num_expert_parameters or not angle_tables_bytes(facts):
        return 0
    return round(facts.num_layer_parameters * (1 + ENGINE_ELEMENT_BYTES / GATED_BLOCK))


def has_expert_blocks(facts: BackboneFacts, block_size: int) -> bool:
    """Whether experts are quantized: both of their widths must be whole numbers of blocks."""
    return not any(width % block_size for width in (facts.width, facts.expert_width))


def angle_tables_bytes(facts: BackboneFacts) -> int:
    """Return the most that the tables of the CPU's decoder take.

    They hold a cosine and a sine for every position and every pair of a head's elements; layers
    with windows may turn by other angles than those without.
    """
    if facts.max_positions > MOST_TABLE_POSITIONS or facts.head_dim % HEAD_MULTIPLE:
        return 0
    num_kinds = len({"full", "sliding"}.intersection(facts.attention))
    return num_kinds * facts.max_positions * facts.head_dim * ENGINE_ELEMENT_BYTES
