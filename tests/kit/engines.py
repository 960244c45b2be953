"""Tiny backbones, exported once per run, and their engines as plain ONNX Runtime sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from kit.files import MadeOnce
from kit.models import load_folder, load_tiny
from recmas_compiler.backbones.torch_model import TorchBackbone, weights_digest
from recmas_compiler.links.modules import make_link, randomize, save_link
from recmas_export.backbone_graph import CPU_DECODER, DECODER, EMBED, HEAD, export_backbone
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.engines.onnx.caches import CachePool, Memory
from recmas_runtime.formats.layers import cache_tensors
from recmas_runtime.formats.links import load_operands, stack_operands
from recmas_runtime.formats.manifest import BackboneEntry, LinkEntry

Operands = dict[str, NDArray[Any]]

_TWO: dict[str, Any] = {"num_hidden_layers": 2}
_GEMMA: dict[str, Any] = {**_TWO, "layer_types": ["sliding_attention", "full_attention"]}

# name -> (family, dimensions that are not the family's own). Windows are far below the test's 40
# positions, so a mask that forgets them is wrong by a lot; 4096 is a window beyond every sequence.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _TWO),
    "qwen2": ("qwen2", _TWO),
    "qwen2-mixed": (
        "qwen2",
        {**_TWO, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _TWO),
    "gemma3": ("gemma3", {**_GEMMA, "final_logit_softcapping": 5.0}),
    "mistral": ("mistral", _TWO),
    "mistral-all-slide": ("mistral", {**_TWO, "sliding_window": 8}),
    "phi3-all-slide": ("phi3", {**_TWO, "sliding_window": 8}),
    "phi3-wide-window": ("phi3", {**_TWO, "sliding_window": 4096}),
}


@dataclass
class Exported:
    """A backbone, its folder of graphs, and sessions over them.

    Attributes:
        was_changed: Whether the export changed the model in any way that can be seen.
    """

    backbone: TorchBackbone
    folder: Path
    was_changed: bool

    def __post_init__(self) -> None:
        self.decoder, self.embed_session, self.head = (
            session(self.folder / name) for name in (DECODER, EMBED, HEAD)
        )

    @property
    def width(self) -> int:
        return self.backbone.facts.width

    def new_cache(self, batch: int, *, capacity: int = 64, fill: float = 1e4) -> Operands:
        """Return a cache full of junk: what was not written must not be read."""
        return {
            t.name: np.full(t.whole(batch, capacity), 0 if t.is_state else fill, np.float32)
            for t in cache_tensors(self.backbone.facts.layers)
        }

    def embed(self, ids: torch.Tensor) -> NDArray[np.float32]:
        (embeds,) = self.embed_session.run(None, {"input_ids": ids.numpy()})
        return np.asarray(embeds)

    def call(
        self,
        cache: Operands,
        embeds: NDArray[np.float32],
        *,
        write_index: Sequence[int],
        last_index: Sequence[int] | None = None,
        inner: Operands | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run the decoder once; `cache` is updated."""
        batch, positions, _ = embeds.shape
        last = [positions - 1] * batch if last_index is None else last_index
        operands = self.no_link() if inner is None else inner
        feeds = {
            "inputs_embeds": embeds,
            "write_index": np.array(write_index, np.int64),
            "last_index": np.array(last, np.int64),
            **cache,
            **{f"inner.{name}": value for name, value in operands.items()},
        }
        names = [output.name for output in self.decoder.get_outputs()]
        found = dict(zip(names, self.decoder.run(None, feeds), strict=True))
        cache.update({n.removeprefix("present_"): v for n, v in found.items() if "present" in n})
        return found

    def no_link(self) -> Operands:
        """Return the operands, with the G axis, of an inner link that changes nothing."""
        return stack_operands([identity_link(self.width)])

    @torch.no_grad()
    def reference(self, ids: torch.Tensor) -> NDArray[np.float32]:
        """Hugging Face's hidden states of whole sequences, without a cache."""
        hidden = self.backbone.body(input_ids=ids, use_cache=False)
        return np.asarray(hidden.last_hidden_state.numpy())


def entry_of(backbone: TorchBackbone, **more: Any) -> BackboneEntry:
    """Return what a manifest would say of exported graphs, beside what is given."""
    facts = backbone.facts
    return BackboneEntry(
        source="tiny",
        digest="",
        model_type=facts.model_type,
        width=facts.width,
        layers=facts.layers,
        vocab_size=facts.vocab_size,
        max_positions=facts.max_positions,
        dtype="float32",
        bos_token=None,
        eos_token_ids=(),
        decoder=DECODER,
        embed=EMBED,
        head=HEAD,
        weights="",
        tokenizer="",
        chat_template="",
        **more,
    )


def make_engine(
    case: Exported,
    *,
    shared: bool = True,
    for_cpu: bool = False,
    masked_layers: tuple[tuple[int, ...], ...] = (),
) -> BackboneEngine:
    """Return a backbone's engines, over the portable decoder or over the one for the CPU."""
    entry = entry_of(
        case.backbone, cpu_decoder=CPU_DECODER if for_cpu else None, masked_layers=masked_layers
    )
    engine = BackboneEngine(entry, case.folder, threads=1)
    if not shared:
        engine.memory = Memory("cpu", shared=False)
        engine.caches = CachePool(engine.decoder, entry, engine.memory)
    return engine


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export_tiny(made_once: MadeOnce, name: str) -> Exported:
    """Return the exported backbone of a case; files in its folder are shared by the test run."""
    family, dims = CASES[name]

    def make(new: Path) -> None:
        backbone = load_tiny(new / "source", family, **dims)
        before = _appearance(backbone)
        export_backbone(backbone, new / "graphs")
        (new / "was_changed").write_text(str(_appearance(backbone) != before))

    folder = made_once(f"exported case {name}", make)
    return Exported(
        load_folder(folder / "source"),
        folder / "graphs",
        was_changed=(folder / "was_changed").read_text() == "True",
    )


@torch.no_grad()
def _appearance(backbone: TorchBackbone) -> list[object]:
    model = backbone.model
    logits = model(input_ids=random_ids(backbone, 1, 20)).logits
    configs = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    modules = {name: id(module) for name, module in model.named_modules()}
    return [logits.tolist(), configs, modules, model.training, weights_digest(model)]


def random_ids(
    backbone: TorchBackbone, batch: int, positions: int, *, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, backbone.facts.vocab_size, (batch, positions), generator=generator)


def identity_link(width: int) -> Operands:
    """Return the operands of y = x, without the G axis."""
    zeros = np.zeros
    return {
        "pre_norm": zeros((1, 1), bool),
        "pre_scale": zeros((1, width), np.float32),
        "pre_bias": zeros((1, width), np.float32),
        "w1": zeros((width, 1), np.float32),
        "b1": zeros((1, 1), np.float32),
        "w2": zeros((1, width), np.float32),
        "w3": np.eye(width, dtype=np.float32),
        "bias": zeros((1, width), np.float32),
        "post_norm": zeros((1, 1), bool),
        "post_scale": zeros((1, width), np.float32),
        "post_bias": zeros((1, width), np.float32),
    }


def random_link(
    folder: Path, kind: Any, role: Any, in_dim: int, out_dim: int, *, seed: int = 0
) -> tuple[nn.Module, Operands]:
    """Return a link as a module and, through its file, as operands without the G axis."""
    link = make_link(kind, role, in_dim, out_dim)
    randomize(link, link_id=f"{kind}.{role}.{in_dim}.{out_dim}", seed=seed)
    with torch.no_grad():
        for name, parameter in link.named_parameters():
            if "ln" in name:  # norms start neutral, which would hide a missing scale or bias
                parameter.add_(torch.linspace(-0.3, 0.3, len(parameter)))
    path = folder / f"{kind}-{role}-{in_dim}-{out_dim}-{seed}.safetensors"
    save_link(path, link)
    entry = LinkEntry(
        file=path.name, kind=kind, role=role, in_dim=in_dim, out_dim=out_dim, init="random"
    )
    return link, load_operands(path, entry)


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def weights_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of distinct memory."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors.values()}.values())
