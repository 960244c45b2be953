"""A backbone becomes ONNX graphs over one weights file.

decoder.onnx      inputs_embeds, write_index, last_index, caches, inner link
                  -> hidden, thought, next_embeds, caches; with `hidden_rows` behind the caches
                  where rows can be hidden from layers
decoder.cpu.onnx  the same in operators of ONNX Runtime's CPU provider, where there are any for it
embed.onnx        input_ids -> inputs_embeds
head.onnx         hidden -> logits
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
from recmas_runtime.formats.precisions import PRECISIONS, TARGETS, DecoderForm

_TABLES: Final = frozenset({EMBED, HEAD})
_LAST: Final = {DECODER: pipeline.PORTABLE, CPU_DECODER: pipeline.FOR_CPU}


def export_backbone(
    backbone: TorchBackbone,
    folder: Path,
    *,
    precision: str = "float32",
    decoders: Sequence[DecoderForm] = TARGETS["onnx"].decoders,
    masked_layers: Sequence[Sequence[int]] = (),
    prompts: ir.Model | None = None,
) -> None:
    """Write a backbone's graphs, weights, tokenizer and chat template into `folder`.

    The model is left as it was. Equal weights give equal bytes. Blocks of integers are in the form
    that ONNX Runtime's CPU provider runs fastest; a decoder for the CPU is written besides the
    portable one where it has layers for it. Decoders have a mask for each group of masked layers.
    What `prompt_decoder` has returned computes prompts on the CPU; it is used up.

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
    if "cpu" in decoders:
        for_cpu = decoder.clone()
        passes = pipeline.cpu_decoder(max_positions=facts.max_positions)
        if run_passes(passes, for_cpu) or pipeline.has_own_operators(for_cpu):
            graphs[CPU_DECODER] = for_cpu
    run_passes(pipeline.STANDARD, decoder)
    layers, tables = pipeline.weight_passes(precision, backbone.dtype)
    if CPU_DECODER in graphs and PRECISIONS[precision].cpu_products == "rows":
        _use_rows(backbone, graphs[CPU_DECODER])
    for name, graph in graphs.items():
        run_passes(tables if name in _TABLES else layers, graph)
        if name in _LAST:
            run_passes(_LAST[name], graph)
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
    decoders: Sequence[DecoderForm] = TARGETS["onnx"].decoders,
    masked_layers: Sequence[Sequence[int]] = (),
) -> ir.Model | None:
    """Return the decoder that computes prompts on the CPU where one for steps would be slow.

    It has weights of its own, those that the backbone has now. None where the precision or the
    backbone has no such decoder.
    """
    if PRECISIONS[precision].cpu_products != "rows in prompts" or "cpu" not in decoders:
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
