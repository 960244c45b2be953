"""A backbone becomes ONNX graphs over one weights file.

decoder.onnx      inputs_embeds, write_index, last_index, caches, inner link
                  -> hidden, thought, next_embeds, caches
decoder.cpu.onnx  the same in operators of ONNX Runtime's CPU provider, where there are any for it
embed.onnx        input_ids -> inputs_embeds
head.onnx         hidden -> logits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
from onnx_ir.tape import Tape

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_export.graph.export_torch import BATCH, trace_body, trace_embed, trace_head
from recmas_export.graph.links import append_link, constant, operand_inputs
from recmas_export.graph.weights_file import externalize_weights
from recmas_export.passes import clean
from recmas_export.passes.grouped_attention import use_grouped_attention
from recmas_export.passes.tidy import check_operators, multiply_as_stored, strip, tidy
from recmas_export.precision.narrow import narrow_weights
from recmas_export.precision.quantize import quantize
from recmas_runtime.core.errors import fail

DECODER, EMBED, HEAD = "decoder.onnx", "embed.onnx", "head.onnx"
CPU_DECODER = "decoder.cpu.onnx"
WEIGHTS, TOKENIZER, CHAT_TEMPLATE = "weights.safetensors", "tokenizer.json", "chat_template.jinja"
INNER_PREFIX: Final = "inner."


def export_backbone(backbone: TorchBackbone, folder: Path, *, precision: str = "float32") -> None:
    """Write a backbone's graphs, weights, tokenizer and chat template into `folder`.

    The model is left as it was. Equal weights give equal bytes.

    Args:
        backbone: A loaded backbone; its weights are float32 numbers that its `dtype` holds.
        folder: Created if needed; nothing else should be in it.
        precision: `float32` writes the portable graphs; `int8` and `int4` the form of them that
            ONNX Runtime's CPU provider runs fastest.

    Raises:
        RecmasError: RM203 for layers the portable graph has no operator for, RM300 where the model
            cannot be traced.
        OSError: A file cannot be written.
    """
    model, facts = backbone.model, backbone.facts
    _refuse_unsupported(model, facts)
    decoder, head = trace_body(model, facts), trace_head(model, facts)
    multiply_as_stored(head.graph)
    graphs = {DECODER: decoder, EMBED: trace_embed(model, facts), HEAD: head}
    for graph in graphs.values():
        tidy(graph)
    clean(decoder)
    _add_latent_step(decoder.graph, facts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in graphs.items():
        strip(graph, name=name.removesuffix(".onnx"))
        check_operators(graph)
    for_cpu = decoder.clone()
    if use_grouped_attention(for_cpu, max_positions=facts.max_positions):
        graphs[CPU_DECODER] = for_cpu
    quantize(graphs, precision, tables=frozenset({EMBED, HEAD}))
    narrow_weights(list(graphs.values()), backbone.dtype)
    externalize_weights(list(graphs.values()), folder / WEIGHTS)
    for name, graph in graphs.items():
        ir.save(graph, folder / name)
    (folder / TOKENIZER).write_text(backbone.tokenizer_json, encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(backbone.chat_template, encoding="utf-8")


def _refuse_unsupported(model: Any, facts: BackboneFacts) -> None:
    linear = [i for i, kind in enumerate(facts.attention) if kind == "linear"]
    if linear:
        raise fail(
            "RM203",
            f"backbone {facts.source!r} ({facts.model_type}) keeps a linear state in "
            f"{len(linear)} of its {facts.num_layers} layers (the first is layer {linear[0]}), "
            "which target 'onnx' cannot run.",
            hint="Use a backbone whose layers all have softmax attention, full or sliding.",
        )
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    if dtypes != ["float32"]:
        raise fail(
            "RM300",
            f"backbone {facts.source!r} has weights in {', '.join(dtypes)}; "
            "the export takes float32.",
            hint="Load it with `load_backbone`, which widens weights.",
        )
    for rope_type in sorted(_rotary_types(model.config)):
        if "dynamic" in rope_type or rope_type == "longrope":
            raise fail(
                "RM300",
                f"backbone {facts.source!r} ({facts.model_type}) has rotary embeddings of type "
                f"{rope_type!r}: their frequencies change with the length of the input.",
                hint="Use a backbone whose rotary frequencies are fixed.",
            )
    assert not model.training, "a backbone is frozen and in evaluation mode"


def _rotary_types(config: Any) -> set[str]:
    """Return the kinds of rotary scaling; some models have one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    tables = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    return {str(table["rope_type"]) for table in tables if "rope_type" in table}


def _add_latent_step(graph: ir.Graph, facts: BackboneFacts) -> None:
    """Add to the decoder: thought = hidden at last_index, next_embeds = R(thought).

    The operands have one group per agent of the batch; rows are agent-major, so a group's samples
    are neighbours and [B, 1, d] is [G, B/G, d] in another shape.
    """
    width = facts.width
    tape = Tape()
    last_index = ir.Value(
        name="last_index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((BATCH,))
    )
    inner = operand_inputs(width, width, prefix=INNER_PREFIX)
    hidden = graph.outputs[0]
    assert hidden.name == "hidden"

    index_column = tape.op("Unsqueeze", (last_index, constant(tape, [-1], "thought.last_axis")))
    row_BD = tape.op("GatherND", (hidden, index_column), {"batch_dims": 1})
    thought = tape.op("Unsqueeze", (row_BD, constant(tape, [1], "thought.position_axis")))
    groups = tape.op("Shape", (inner["w1"],), {"start": 0, "end": 1})
    grouped = tape.op("Concat", (groups, constant(tape, [-1, width], "thought.rest")), {"axis": 0})
    next_grouped = append_link(
        tape, tape.op("Reshape", (thought, grouped)), inner, prefix=INNER_PREFIX
    )
    single = constant(tape, [-1, 1, width], "thought.single")
    next_embeds = tape.op("Reshape", (next_grouped, single))
    for value, name in ((thought, "thought"), (next_embeds, "next_embeds")):
        value.name = name
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape((BATCH, 1, width))

    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    graph.extend(tape.nodes)
    embeds, write_index, *caches = graph.inputs
    graph.inputs[:] = [embeds, write_index, last_index, *caches, *inner.values()]
    graph.outputs[1:1] = [thought, next_embeds]
