"""A backbone becomes ONNX graphs over one weights file.

decoder.onnx      inputs_embeds, write_index, last_index, caches, inner link
                  -> hidden, thought, next_embeds, caches; with `hidden_rows` behind the caches
                  where rows can be hidden from layers
decoder.cpu.onnx  the same in operators of ONNX Runtime's CPU provider, where there are any for it
embed.onnx        input_ids -> inputs_embeds
head.onnx         hidden -> logits
head.cpu.onnx     the same for a CPU, where the others compute in 16 bits
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_export import pipeline
from recmas_export.bundle.engine_files import (
    CHAT_TEMPLATE,
    CPU_DECODER,
    CPU_HEAD,
    DECODER,
    EMBED,
    HEAD,
    TOKENIZER,
    WEIGHTS,
)
from recmas_export.export_torch import trace_body, trace_embed, trace_head
from recmas_export.passes.prompt_branch import choose_by_length
from recmas_export.passes.row_products import QuantizeRows
from recmas_export.pipeline import run_passes
from recmas_export.rounding import input_peaks
from recmas_export.weights_file import externalize_weights
from recmas_runtime.core.errors import fail
from recmas_runtime.formats.precisions import (
    AUTO,
    PRECISIONS,
    TARGETS,
    DecoderForm,
)

_TABLES: Final = frozenset({EMBED, HEAD})
# What a CPU computes in another form where graphs compute in 16 bits.
_WIDE_FORMS: Final = {CPU_DECODER: DECODER, CPU_HEAD: HEAD}
_LAST: Final = {DECODER: pipeline.PORTABLE, CPU_DECODER: pipeline.FOR_CPU}


def export_backbone(
    backbone: TorchBackbone,
    folder: Path,
    *,
    precision: str = "float32",
    device: str = AUTO,
    decoders: Sequence[DecoderForm] = TARGETS["onnx"].decoders,
    masked_layers: Sequence[Sequence[int]] = (),
    prompts: ir.Model | None = None,
) -> None:
    """Write a backbone's graphs, weights, tokenizer and chat template into `folder`.

    The model is left as it was. Equal weights give equal bytes. Blocks of integers are in the form
    that ONNX Runtime's CPU provider runs fastest; a decoder for the CPU is written besides the
    portable one where it has layers for it, or where graphs for the device that the backbone is
    made for compute in 16 bits, which a CPU does in its own way. Decoders have a mask for each
    group of masked layers. What `prompt_decoder` has returned computes prompts on the CPU; it is
    used up.

    Raises:
        RecmasError: RM300 where the model cannot be traced.
        OSError: A file cannot be written.
    """
    model, facts = backbone.model, backbone.facts
    _refuse_unsupported(model, facts)
    decoder = trace_body(model, facts, masked_layers)
    graphs = {DECODER: decoder, EMBED: trace_embed(model, facts), HEAD: trace_head(model, facts)}
    portable = {DECODER: pipeline.DECODER, EMBED: pipeline.EMBED, HEAD: pipeline.HEAD}
    for name, graph in graphs.items():
        run_passes(portable[name], graph)
    row = PRECISIONS[precision]
    types = row.types[device]
    if "cpu" in decoders and types.is_wide:
        for_cpu = decoder.clone()
        for_grouped = pipeline.cpu_decoder(max_positions=facts.max_positions)
        if run_passes(for_grouped, for_cpu) or pipeline.has_own_operators(for_cpu):
            graphs[CPU_DECODER] = for_cpu
    run_passes(pipeline.STANDARD, decoder)
    layers, tables = pipeline.weight_passes(precision, backbone.dtype, types)
    if CPU_DECODER in graphs and row.cpu_products == "rows":
        _use_rows(backbone, graphs[CPU_DECODER])
    for name, graph in graphs.items():
        run_passes(tables if name in _TABLES else layers, graph)
    if not types.is_wide:
        graphs |= {name: graphs[of].clone() for name, of in _WIDE_FORMS.items()}
        for name in _WIDE_FORMS:
            run_passes(pipeline.ON_A_CPU, graphs[name])
    for name, passes in _LAST.items():
        if name in graphs:
            run_passes(passes, graphs[name])
    if CPU_DECODER in graphs and prompts is not None:
        run_passes((*layers, *pipeline.FOR_CPU), prompts)
        graphs[CPU_DECODER] = choose_by_length(prompts, graphs[CPU_DECODER])
    folder.mkdir(parents=True, exist_ok=True)
    externalize_weights(list(graphs.values()), folder / WEIGHTS)
    for name, graph in graphs.items():
        ir.save(graph, folder / name)
    (folder / TOKENIZER).write_text(backbone.tokenizer_json, encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(backbone.chat_template, encoding="utf-8")


def prompt_decoder(
    backbone: TorchBackbone,
    *,
    precision: str,
    device: str = AUTO,
    decoders: Sequence[DecoderForm] = TARGETS["onnx"].decoders,
    masked_layers: Sequence[Sequence[int]] = (),
) -> ir.Model | None:
    """Return the decoder that computes prompts on the CPU where one for steps would be slow.

    It has weights of its own, those that the backbone has now. None where the precision or the
    backbone has no such decoder.
    """
    row = PRECISIONS[precision]
    if row.cpu_products != "rows in prompts" or "cpu" not in decoders:
        return None
    if not row.types[device].is_wide:
        return None
    decoder = trace_body(backbone.model, backbone.facts, masked_layers)
    run_passes(pipeline.DECODER, decoder)
    if not run_passes(pipeline.cpu_decoder(max_positions=backbone.facts.max_positions), decoder):
        return None
    return decoder if _use_rows(backbone, decoder) else None


def _use_rows(backbone: TorchBackbone, decoder: ir.Model) -> bool:
    """Let a decoder multiply 8-bit integers by rows; returns whether it has products for that."""
    has_rows = run_passes((QuantizeRows(input_peaks(backbone)),), decoder)
    if has_rows:
        run_passes(pipeline.beside_rows(), decoder)
    return has_rows


def _refuse_unsupported(model: Any, facts: BackboneFacts) -> None:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    if dtypes != ["float32"]:
        raise fail(
            "RM300",
            f"backbone {facts.source!r} has weights in {', '.join(dtypes)}; "
            "the export takes float32.",
            hint="Load it with `load_backbone`, which widens weights.",
        )
    assert not model.training, "a backbone is frozen and in evaluation mode"
