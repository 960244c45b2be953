"""Writes what OpenVINO GenAI makes of a GGUF file into a folder: `openvino_files.py GGUF FOLDER`.

It writes beside the file, so a copy of that is put into the folder first and goes behind.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import openvino_genai as genai

source, folder = map(Path, sys.argv[1:])
folder.mkdir()
copy = folder / "model.gguf"
shutil.copyfile(source, copy)
genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
copy.unlink()
