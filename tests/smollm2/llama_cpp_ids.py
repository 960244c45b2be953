"""Makes llama_cpp_ids.json: digests of llama.cpp's token ids for the texts of `kit.texts`.

pip install xllamacpp==2026.10.11549      # llama.cpp b11549, in an environment of its own
PYTHONPATH=tests python tests/smollm2/llama_cpp_ids.py smollm2=FILE.gguf gemma3=FILE.gguf
"""

from __future__ import annotations

import hashlib
import json
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from kit.texts import texts_to_compare

DIGESTS = Path(__file__).with_name("llama_cpp_ids.json")


def digest(ids: Sequence[int]) -> str:
    """Return what stands for the ids of a text in the file."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:10]


def llama_cpp_digests(path: str) -> list[str]:
    """Tokenize all texts as llama.cpp does: no token before them, control tokens as plain text."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = path, 512, False
    server = xllamacpp.Server(settings)
    found = []
    for text in texts_to_compare():
        body = {"content": text, "add_special": False, "parse_special": False}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found.append(digest(json.load(answer)["tokens"]))
    return found


if __name__ == "__main__":
    named = dict(argument.split("=", 1) for argument in sys.argv[1:])
    table = {name: llama_cpp_digests(path) for name, path in named.items()}
    DIGESTS.write_text(json.dumps(table, indent=0) + "\n")
