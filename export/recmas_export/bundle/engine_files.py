"""Names of files that the engines of a bundle are made of."""

from __future__ import annotations

from typing import Final

# Of a backbone, in its folder.
DECODER: Final = "decoder.onnx"
CPU_DECODER: Final = "decoder.cpu.onnx"
EMBED: Final = "embed.onnx"
HEAD: Final = "head.onnx"
CPU_HEAD: Final = "head.cpu.onnx"
WEIGHTS: Final = "weights.safetensors"
TOKENIZER: Final = "tokenizer.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"

# Of all backbones together, in the bundle.
LINK_ENGINE: Final = "links/link.onnx"
PROBE: Final = "parity/probe.onnx"
