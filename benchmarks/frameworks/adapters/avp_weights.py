"""Writes the weights of a GGUF file as a folder in float32, once: `avp_weights.py GGUF FOLDER`.

transformers takes a while to read the file, which is no part of the race.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf, folder = map(Path, sys.argv[1:])
where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
# A model that was read from GGUF counts as quantized, though its weights are not, and is not saved.
del read.config.quantization_config
model = AutoModelForCausalLM.from_config(read.config)
model.load_state_dict(read.state_dict())
AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
model.save_pretrained(folder)
