"""Tracing: a transformers model becomes three raw ONNX graphs (decoder body, embedding, head).

A decoder is made to attend over a static cache without code per architecture. Five extension points
of transformers are used and nothing else: the attention interface (one ONNX `Attention` per layer),
the mask interface (the model's own mask rule, evaluated at each sample's own positions), the cache
class (one ONNX `TensorScatter` per tensor), the experts interface (three nodes that passes write in
operators) and the kernel functions of layers that keep a state (one `LinearAttention` each).

Shape legend: B samples, S new positions, C cache rows, H query heads, K key/value heads, D head
width, d width, V vocabulary; N = B S and k experts that each position takes.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim
from transformers.cache_utils import Cache, DummyLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.loaded.cache_argument import cache_argument
from recmas_compiler.backbones.loaded.own_head import body_of, head_of
from recmas_compiler.lowering.hidden_rows import rows_hidden
from recmas_compiler.lowering.static_cache import (
    RowsSeen,
    StaticRows,
    has_attention_interface,
    ragged_mask,
    use_added_masks,
)
from recmas_export.passes.experts import IN, OUT, SUM
from recmas_export.passes.tidy import OPSET, TRACED
from recmas_export.trace.capture import capture
from recmas_export.trace.repeat import LayersDifferError, find_repetition, repeat_layers
from recmas_export.trace.states import PortableStates, StateCache, StateTrace, portable_kernels
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.layers import (
    LayerShape,
    cache_tensors,
    has_states,
    hidden_rows_tensor,
)
from recmas_runtime.formats.plan import cache_capacity

BATCH, POSITIONS, CAPACITY = "batch", "positions", "capacity"

IMPLEMENTATION = "recmas_portable"

# What `_Body` calls the layers it runs.
_BODY = "body"

# What models pass to every attention implementation and what has no effect here: dropout is off in
# evaluation, windows and causality are in the explicit mask, positions are in the rotated keys.
_WITHOUT_EFFECT = frozenset({"dropout", "is_causal", "position_ids", "sliding_window", "use_cache"})

# Sizes of the example inputs. Any would do, but none may be 1: a traced size of 1 becomes a
# constant.
_B, _S, _C = 2, 3, 64


def trace_body(
    model: PreTrainedModel, facts: BackboneFacts, masked_layers: Sequence[Sequence[int]] = ()
) -> ir.Model:
    """Return the raw graph of the decoder layers over a static cache.

    inputs_embeds [B,S,d], write_index [B], caches -> hidden [B,S,d], caches; B, S and C are free.
    Where layers keep states, last_index [B] comes after write_index. Where rows can be hidden from
    M groups of layers, hidden_rows [B,M,C,1] comes last. The model is left as it was.

    Raises:
        RecmasError: RM300 where the model cannot be traced.
    """
    kinds = tuple(zip(facts.attention, _groups(masked_layers, facts), strict=True))
    repetition = find_repetition(body_of(model), facts.layers, kinds)
    if repetition is not None:
        first = replace(
            facts,
            num_layers=repetition.traced,
            layers=facts.layers[: repetition.traced],
            attention=facts.attention[: repetition.traced],
        )
        try:
            with repetition.first_layers():
                graph = _trace_layers(model, first, masked_layers)
            repeat_layers(graph, repetition, body=_BODY)
        except (RecmasError, LayersDifferError):
            pass
        else:
            return graph
    return _trace_layers(model, facts, masked_layers)


def _trace_layers(
    model: PreTrainedModel, facts: BackboneFacts, masked_layers: Sequence[Sequence[int]]
) -> ir.Model:
    kept = cache_tensors(facts.layers)
    masks = [hidden_rows_tensor(len(masked_layers))] if masked_layers else []
    tensors = [*kept, *masks]
    # Every cache is a tensor of its own: the exporter merges inputs that are the same object.
    caches = [
        torch.zeros(t.whole(_B, _C), dtype=torch.bool if t in masks else None) for t in tensors
    ]
    batch = Dim(BATCH, min=1)
    # Models have tables of positions, which end: so do the sequences of a bundle.
    positions = Dim(POSITIONS, min=1, max=max(facts.max_positions, _S))
    capacity = Dim(CAPACITY, min=1, max=max(cache_capacity(facts.max_positions), _C))
    cache_dims = [{0: batch} if tensor.is_state else {0: batch, 2: capacity} for tensor in tensors]
    names = [tensor.name for tensor in tensors]
    # Rows take what is filled up too, where the next call overwrites it; states must not.
    counts = ["last_index"] if has_states(facts.layers) else []
    indices = [torch.zeros(_B, dtype=torch.long) for _ in ("write_index", *counts)]
    with portable_attention(model), portable_kernels(model) as states:
        return _trace(
            _Body(model, facts, states, masked_layers),
            (torch.zeros(_B, _S, facts.width), indices, caches),
            facts=facts,
            dynamic_shapes=({0: batch, 1: positions}, [{0: batch} for _ in indices], cache_dims),
            inputs=["inputs_embeds", "write_index", *counts, *names],
            outputs=["hidden", *(f"present_{tensor.name}" for tensor in kept)],
        )


def trace_embed(model: PreTrainedModel, facts: BackboneFacts) -> ir.Model:
    """Return the raw graph of the input embedding: input_ids [B,S] -> inputs_embeds [B,S,d].

    Raises as `trace_body`.
    """
    return _trace(
        _Embed(model),
        (torch.zeros(_B, _S, dtype=torch.long),),
        facts=facts,
        dynamic_shapes=({0: Dim(BATCH, min=1), 1: Dim(POSITIONS, min=1)},),
        inputs=["input_ids"],
        outputs=["inputs_embeds"],
    )


def trace_head(model: PreTrainedModel, facts: BackboneFacts) -> ir.Model:
    """Return the raw graph of the head: hidden [B,d] -> logits [B,V]; raises as `trace_body`."""
    return _trace(
        _Head(model),
        (torch.zeros(_B, facts.width),),
        facts=facts,
        dynamic_shapes=({0: Dim(BATCH, min=1)},),
        inputs=["hidden"],
        outputs=["logits"],
    )


def _attention(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key_BKCD: torch.Tensor,
    value_BKCD: torch.Tensor,
    attention_mask: torch.Tensor | None,  # [B,1,S,C]; some models hand it over by this name
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attend over the whole cache under an explicit boolean mask: the attention interface.

    Args:
        s_aux: Attention sinks [H]: logits of one more key per head that has no value.
    """
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = sorted(given - _WITHOUT_EFFECT)
    if unknown or attention_mask is None:
        what = f"attention with {', '.join(unknown)}" if unknown else "attention without a mask"
        raise fail(
            "RM300",
            f"{type(module).__name__} uses {what}, which the portable graph has no operator for.",
            hint="Use a backbone with standard causal attention.",
        )
    scale = float(query_BHSD.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    if s_aux is not None:
        out_BHSD = _attention_with_sinks(
            query_BHSD, key_BKCD, value_BKCD, attention_mask, scale=scale, cap=softcap, sinks=s_aux
        )
        return out_BHSD.transpose(1, 2).contiguous(), None
    attrs = {"scale": scale} if not softcap else {"scale": scale, "softcap": float(softcap)}
    out_BHSD = torch.onnx.ops.symbolic(
        "Attention",
        (query_BHSD, key_BKCD, value_BKCD, attention_mask),
        attrs,
        dtype=query_BHSD.dtype,
        shape=(*query_BHSD.shape[:3], value_BKCD.shape[-1]),
        version=OPSET,
    )
    return out_BHSD.transpose(1, 2).contiguous(), None  # contiguous: some models take a view of it


def _attention_with_sinks(
    query_BHSD: torch.Tensor,
    key_BKCD: torch.Tensor,
    value_BKCD: torch.Tensor,
    mask_B1SC: torch.Tensor,
    *,
    scale: float,
    cap: float | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attend with one more column in the softmax; ONNX's `Attention` has no such input."""
    batch, heads, positions, width = query_BHSD.shape
    groups, rows = key_BKCD.shape[1:3]
    per_group = heads // groups
    query_BKGSD = query_BHSD.reshape(batch, groups, per_group, positions, width)
    key_BK1DC = key_BKCD.transpose(2, 3).unsqueeze(2)
    scores_BKGSC = _product(query_BKGSD * scale, key_BK1DC, rows)
    if cap:
        scores_BKGSC = torch.tanh(scores_BKGSC / cap) * cap
    scores_BKGSC = scores_BKGSC.masked_fill(~mask_B1SC.unsqueeze(1), float("-inf"))
    sinks_BKGS1 = sinks.reshape(1, groups, per_group, 1, 1).expand(
        batch, groups, per_group, positions, 1
    )
    weights_BKGSC = torch.cat([scores_BKGSC, sinks_BKGS1], dim=-1).softmax(dim=-1)[..., :rows]
    out_BKGSD = _product(weights_BKGSC, value_BKCD.unsqueeze(2), value_BKCD.shape[-1])
    return out_BKGSD.reshape(batch, heads, positions, value_BKCD.shape[-1])


def _product(left: torch.Tensor, right: torch.Tensor, columns: int) -> torch.Tensor:
    """Return ONNX's `MatMul`, which broadcasts; torch's would copy the keys for every query."""
    return torch.onnx.ops.symbolic(
        "MatMul",
        (left, right),
        dtype=left.dtype,
        shape=(*left.shape[:-1], columns),
        version=OPSET,
    )


def _experts(
    module: Any, hidden_Nd: torch.Tensor, taken_Nk: torch.Tensor, shares_Nk: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum of the experts that positions take: the experts interface.

    Traced are the three nodes of `passes.experts`, around what the model computes between them.
    """
    if module._is_expert_parallel:
        raise fail(
            "RM300",
            f"{type(module).__name__} holds a part of its experts, the others are elsewhere.",
            hint="Load the model without expert parallelism.",
        )
    num_pairs = taken_Nk.shape[0] * taken_Nk.shape[1]
    first = "gate_up" if module.has_gate else "up"
    inner = _experts_product(module, IN, first, (hidden_Nd, taken_Nk), num_pairs)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = _experts_product(module, OUT, "down", (inner, taken_Nk), num_pairs)
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    return torch.onnx.ops.symbolic(
        f"{TRACED}::{SUM}",
        (outputs, taken_Nk, shares_Nk.to(hidden_Nd.dtype)),
        dtype=hidden_Nd.dtype,
        shape=hidden_Nd.shape,
        version=1,
    )


def _experts_product(
    module: Any,
    operator: str,
    name: str,
    given: tuple[torch.Tensor, torch.Tensor],
    num_pairs: int | torch.SymInt,
) -> torch.Tensor:
    matrices = getattr(module, f"{name}_proj")
    if module.is_transposed:
        matrices = matrices.transpose(1, 2)
    bias = (getattr(module, f"{name}_proj_bias"),) if module.has_bias else ()
    return torch.onnx.ops.symbolic(
        f"{TRACED}::{operator}",
        (*given, matrices, *bias),
        dtype=given[0].dtype,
        shape=(num_pairs, matrices.shape[1]),
        version=1,
    )


class PortableLayer(StaticRows):
    """One layer of a static cache whose rows are written by ONNX's `TensorScatter`."""

    def get_seq_length(self) -> RowsSeen:
        """Return a number that models can reckon with."""
        return RowsSeen(self.write_index)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new rows and return the whole cache."""
        self.keys = self._scatter(self.keys, key_states)
        self.values = self._scatter(self.values, value_states)
        return self.keys, self.values

    def _scatter(self, cache_BKCD: torch.Tensor, new_BKSD: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache_BKCD, new_BKSD, self.write_index),
            {"axis": 2, "mode": "linear"},
            dtype=cache_BKCD.dtype,
            shape=cache_BKCD.shape,
            version=OPSET,
        )


class _RowsAndStates(PortableLayer, PortableStates):  # type: ignore[misc]  # both initialize
    """A layer that keeps both."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        write_index: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        length_B: torch.Tensor,
    ) -> None:
        PortableStates.__init__(self, states, length_B)
        PortableLayer.__init__(self, keys, values, write_index)


class PortableCache:
    """A transformers cache over tensors, in the order of `cache_tensors`.

    Args:
        states: What kernels are told, where layers keep states.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        tensors: Sequence[torch.Tensor],
        write_index: torch.Tensor,
        states: StateTrace | None = None,
    ) -> None:
        self._names = [tensor.name for tensor in cache_tensors(layers)]
        by_name = dict(zip(self._names, tensors, strict=True))
        made: list[Any] = []
        for i, layer in enumerate(layers):
            own = {state.name: by_name[f"{state.name}.{i}"] for state in layer.states}
            rows = [by_name[f"{kind}.{i}"] for kind in ("key", "value") if layer.rows is not None]
            if own:
                assert states is not None
                made.append(
                    _RowsAndStates(rows[0], rows[1], write_index, own, states.length_B)
                    if rows
                    else PortableStates(own, states.length_B)
                )
            else:
                made.append(PortableLayer(rows[0], rows[1], write_index) if rows else None)
        # Layers without rows read those of another one, whose positions are theirs too.
        any_rows = next((layer for layer in made if isinstance(layer, PortableLayer)), DummyLayer())
        held = [any_rows if layer is None else layer for layer in made]
        self.cache = Cache(layers=held) if states is None else StateCache(held, states)

    def tensors(self) -> list[torch.Tensor]:
        """Return what the tensors have become, in the same order."""
        found = []
        for name in self._names:
            kind, _, number = name.rpartition(".")
            layer = self.cache.layers[int(number)]
            own = {"key": "keys", "value": "values"}.get(kind)
            found.append(layer.state(kind) if own is None else getattr(layer, own))
        return found


def _groups(masked_layers: Sequence[Sequence[int]], facts: BackboneFacts) -> list[int | None]:
    """Return by layer the group of masked layers that it is in.

    A layer without attention sees no rows anyway.
    """
    groups = {layer: number for number, group in enumerate(masked_layers) for layer in group}
    return [
        None if kind == "none" else groups.get(layer) for layer, kind in enumerate(facts.attention)
    ]


@contextmanager
def portable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make `model` use portable attention, masks and experts inside the block, its own after it."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ragged_mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)
    body = body_of(model)
    configs = {
        id(m.config): m.config for m in body.modules() if isinstance(m, PreTrainedModel)
    }.values()
    before = [
        (config, config._attn_implementation, config._experts_implementation) for config in configs
    ]
    # Sequences are no longer than their frequencies are fixed.
    by_length: dict[Any, Any] = {m: m.rope_type for m in body.modules() if hasattr(m, "rope_type")}
    try:
        for module in by_length:
            module.rope_type = _fixed(module.rope_type)
        for config in configs:
            config._experts_implementation_internal = IMPLEMENTATION
        if has_attention_interface(body):
            body.set_attn_implementation(IMPLEMENTATION)
        else:
            use_added_masks(body)
        yield
    finally:
        for module, kind in by_length.items():
            module.rope_type = kind
        for config, attention, experts in before:
            config._attn_implementation_internal = attention
            config._experts_implementation_internal = experts


def _fixed(rope_type: Any) -> Any:
    """Return a type of rotary embeddings, or one for each type of layer, that stay as they are."""
    if isinstance(rope_type, dict):
        return dict.fromkeys(rope_type, "default")
    return "default"


class _Body(torch.nn.Module):
    """inputs_embeds [B,S,d], indices [B], caches and masks -> hidden [B,S,d], caches."""

    def __init__(
        self,
        model: PreTrainedModel,
        facts: BackboneFacts,
        states: StateTrace,
        masked_layers: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.body = body_of(model)  # by this name `_BODY`
        self._layers = facts.layers
        self._states = states
        self._masked = {
            layer: group
            for layer, group in enumerate(_groups(masked_layers, facts))
            if group is not None
        }
        self._cache_argument = cache_argument(self.body)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        indices: list[torch.Tensor],
        tensors: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the layers; hidden is after the final norm."""
        write_index, *last = indices
        for last_index in last:
            self._states.length_B = last_index + 1
        states = self._states if last else None
        count = len(cache_tensors(self._layers))
        cache = PortableCache(self._layers, tensors[:count], write_index, states)
        masks = {layer: tensors[-1][:, number, :, 0] for layer, number in self._masked.items()}
        with rows_hidden(self.body, masks):
            hidden = self.body(
                inputs_embeds=inputs_embeds,
                position_ids=write_index[:, None] + torch.arange(inputs_embeds.shape[1])[None],
                use_cache=True,
                **{self._cache_argument: cache.cache},
                **self._whole_mask(tensors[0]),
            ).last_hidden_state
        return hidden, cache.tensors()

    def _whole_mask(self, rows_BKCD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what code of its own counts positions of keys by: one for each row of a cache."""
        if has_attention_interface(self.body):
            return {}
        shape = (rows_BKCD.shape[0], rows_BKCD.shape[2])
        return {"attention_mask": torch.ones(shape, dtype=torch.long)}


class _Embed(torch.nn.Module):
    """input_ids [B,S] -> inputs_embeds [B,S,d]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.embedding = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up in the model's own module, with whatever scaling it applies."""
        embeds: torch.Tensor = self.embedding(input_ids)
        return embeds


class _Head(torch.nn.Module):
    """hidden [B,d] -> logits [B,V]: all that the causal model does after its body."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.head = head_of(model)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the head, with soft caps and scales where the model has them."""
        logits: torch.Tensor = self.head(inputs_embeds=hidden[:, None], use_cache=False).logits
        return logits[:, 0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about its own workings (missing torchvision, axis names)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Look for no dead cycles meanwhile: of millions of new objects nearly all live on.

    That is a tenth of an export's time. Only tracing is inside, which makes no arrays.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _trace(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    *,
    facts: BackboneFacts,
    dynamic_shapes: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
) -> ir.Model:
    try:
        with _quiet(), _without_collections(), torch.no_grad():
            # Captured here and not by the ONNX exporter, which answers a failure with three more
            # attempts and a flood of output.
            captured = capture(module, args, dynamic_shapes)
            program = torch.onnx.export(
                captured,
                dynamo=True,
                opset_version=OPSET,
                # Its own optimizer takes as long as the export; our passes do what is needed.
                optimize=False,
                verbose=False,
                dynamic_shapes=dynamic_shapes,
                input_names=inputs,
                output_names=outputs,
            )
    except RecmasError:
        raise
    # Tracing runs arbitrary model code and raises whatever that raises.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise fail(
            "RM300",
            f"backbone {facts.source!r} (model type {facts.model_type!r}) could not be traced: "
            f"{type(error).__name__}: {reason}",
            hint="Choose a backbone whose computation does not depend on the values it is given.",
        ) from error
    assert program is not None, "torch.onnx.export without a file returns a program"
    return program.model
