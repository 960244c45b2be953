"""The parts of a bundle that only the reference can make: engines, links, cases, losses.

Nothing else of a build imports torch, so that one which finds these parts in the cache loads
neither torch nor a model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from torch import nn

from recmas_compiler.backbones.own_tokenizer import other_ids, own_tokenizer_file
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.links.modules import load_link
from recmas_compiler.lowering.materialize import MaterializedLink
from recmas_compiler.lowering.prompt_parity import tokenizer_again
from recmas_export.backbone_graph import export_backbone, prompt_decoder
from recmas_export.bundle.engine_files import LINK_ENGINE, PROBE, TOKENIZER
from recmas_export.bundle.refused import OTHER_TEXTS, refuse
from recmas_export.bundle.texts import MessagePath, Texts
from recmas_export.parity import link_cases, make_case, make_message, measure_loss, passages_of
from recmas_export.rounding import rounded_layers
from recmas_export.written_graphs import write_link_graph, write_probe
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.formats.ids import is_inner, link_file_name
from recmas_runtime.formats.link_kinds import LinkRole, kind_named
from recmas_runtime.formats.links import load_operands
from recmas_runtime.formats.manifest import BackboneEntry, LinkEntry, LossEntry
from recmas_runtime.formats.precisions import PRECISIONS, DecoderForm
from recmas_runtime.formats.safetensors_file import write_tensors


def texts_of(backbone: TorchBackbone) -> Texts:
    """Return what prompts for a backbone are made with."""
    tokens = dict(backbone.tokenizer.special_tokens_map)
    with tempfile.TemporaryDirectory(prefix="recmas-") as folder:
        file = Path(folder) / TOKENIZER
        file.write_text(backbone.tokenizer_json, encoding="utf-8")
        again = tokenizer_again(file, tokens)
    is_same = (
        dict(again.special_tokens_map) == tokens
        and again.backend_tokenizer.to_str() == backbone.tokenizer_json
    )
    return Texts(
        chat_template=backbone.chat_template,
        special_tokens=backbone.special_tokens,
        bos_token=backbone.bos_token,
        eos_token_ids=backbone.eos_token_ids,
        tokenizer_tokens=tokens if is_same else None,
    )


def write_engines(
    backbone: TorchBackbone,
    folder: Path,
    *,
    name: str,
    precision: str,
    device: str,
    decoders: Sequence[DecoderForm],
    masked_layers: Sequence[Sequence[int]],
    progress: Progress,
) -> None:
    """Write a backbone's graphs, weights and texts; refuse a tokenizer that gives other ids.

    Raises:
        RecmasError: RM300 where it cannot be traced, RM301 for the tokenizer.
    """
    wanted: dict[str, Any] = {
        "precision": precision,
        "device": device,
        "decoders": decoders,
        "masked_layers": masked_layers,
    }
    # Of the weights as they are: rounding is for what steps read.
    prompts = prompt_decoder(backbone, **wanted)
    with rounded_layers(backbone, precision=precision, progress=progress):
        export_backbone(backbone, folder, prompts=prompts, **wanted)
    found = other_ids(
        folder / TOKENIZER, backbone.tokenizer, own_file=own_tokenizer_file(backbone.facts)
    )
    refuse([(f"backbone {name!r}", found)] if found else [], hint=OTHER_TEXTS)


def write_common_graphs(folder: Path) -> None:
    """Write the graph of all links, and the probe."""
    for name, write in ((LINK_ENGINE, write_link_graph), (PROBE, write_probe)):
        (folder / name).parent.mkdir()
        write(folder / name)


def write_link(link_id: str, link: MaterializedLink, folder: Path) -> LinkEntry:
    """Write a link's weights into a folder; return what the manifest says of it."""
    start = link.weights.file
    file = link_file_name(link_id)
    entry = LinkEntry(
        file=f"links/{file}",
        kind=link.weights.kind,
        role=link.role,
        in_dim=link.weights.in_dim,
        out_dim=link.weights.out_dim,
        init=link.init if start is None else PurePath(start).name,
        cosine=link.cosine,
    )
    weights = link.module.state_dict()
    write_tensors(
        folder / file,
        {name: weight.detach().float().numpy() for name, weight in weights.items()},
        {"kind": entry.kind, "in_dim": str(entry.in_dim), "out_dim": str(entry.out_dim)},
    )
    return entry


def write_case(
    backbones: Mapping[str, TorchBackbone],
    name: str,
    path: Path,
    *,
    links: Mapping[str, tuple[Path, LinkEntry]],
    inner: Sequence[str],
    outer: Mapping[str, str],
    message: MessagePath | None,
    capacity: int,
    masked_layers: Sequence[Sequence[int]],
) -> None:
    """Write a backbone's parity case: its own, and that of the links that start on it.

    Args:
        links: By id, the file of each link that is named, and what the manifest says of it.
        inner: Inner links of its agents, of which the first is that of the case.
        outer: Outer links by id, with the inner link of the agent that sends.
        capacity: Positions of the longest sequence of the system.
    """
    modules = {link: _load(file, link, entry) for link, (file, entry) in links.items()}
    message_Md = None
    if message is not None:
        message_Md = make_message(
            backbones[message.backbone], inner=modules[message.inner], outer=modules[message.outer]
        )
    case = make_case(
        backbones[name],
        inner=modules[inner[0]],
        message_Md=message_Md,
        capacity=capacity,
        masked_layers=masked_layers,
    )
    case |= link_cases(
        case["hidden"][0, -4:],
        inner={link: modules[link] for link in inner},
        outer={link: (source, modules[link]) for link, source in outer.items()},
    )
    write_tensors(path, case, {"inner": inner[0]})


def loss_of(
    backbone: TorchBackbone,
    entry: BackboneEntry,
    folder: Path,
    *,
    link: LinkEntry,
    text: Path,
    name: str,
) -> LossEntry:
    """Measure what the precision of a backbone's engines costs over a text.

    Args:
        folder: The bundle's.
        link: One of the backbone's inner links: engines want one.
        name: How the manifest names the text.
    """
    inner = load_operands(folder / link.file, link)
    passages = passages_of(backbone, text)
    engine = BackboneEngine(entry, folder)
    # Where prompts are computed otherwise, what steps lose is what counts.
    by_position = PRECISIONS[entry.precision].cpu_products == "rows in prompts"
    return measure_loss(backbone, engine, inner, passages, text=name, by_position=by_position)


def _load(path: Path, link_id: str, entry: LinkEntry) -> nn.Module:
    kind = kind_named(entry.kind)
    assert kind is not None, "it was written as one of a known kind"
    role: LinkRole = "inner" if is_inner(link_id) else "outer"
    return load_link(path, kind, role, entry.in_dim, entry.out_dim)
