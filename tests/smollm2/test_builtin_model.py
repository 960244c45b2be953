"""What recmas knows of the embedded model without loading it, against its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kit.texts import texts_to_compare
from llama_cpp_ids import DIGESTS, digest
from recmas_compiler.analysis.token_count import TokenCounter
from recmas_compiler.backbones.gguf_files.header import read_header
from recmas_compiler.backbones.gguf_files.tokenizer import make_tokenizer
from recmas_compiler.backbones.sources import (
    BUILTINS,
    SMOLLM2,
    describe_backbone,
    resolve_source,
)
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.spec.patterns.starter_specs import starter_spec
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.progress import Silent
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.tokenizer import Tokenizer

pytestmark = pytest.mark.smollm2


def test_facts_of_the_builtin_are_those_of_its_file() -> None:
    resolved = resolve_source(SMOLLM2, base_dir=Path())
    described = describe_backbone(f"gguf:{resolved.gguf_path}", base_dir=Path())
    known = {"source": SMOLLM2, "identity": SMOLLM2, "folder": None}
    assert replace(described, **known) == BUILTINS[SMOLLM2].facts


@pytest.fixture(scope="module")
def smollm2() -> TorchBackbone:
    return load_backbone(describe_backbone(SMOLLM2, base_dir=Path()), progress=Silent())


# Made with llama.cpp (llama_tokenize without special tokens) on the same file: it reads the split
# that the file names.
LLAMA_CPP_IDS = {
    "What is 7 * 8?": "1780 314 216 39 1672 216 40 47",
    "Tom's 16 eggs\n\n  cost  2/5 of $3.14": (
        "24960 506 216 33 38 5246 8866 1708 256 34 31 37 282 1885 35 30 33 36"
    ),
    "It costs 1234567 dollars.\n\n12\n3": (
        "1589 3499 216 33 34 35 36 37 38 39 8358 30 1116 33 34 198 35"
    ),
    "caf\xe9 \U0001f600 \u0663\xbd": "83 1939 2756 40303 218 216 164 113 16738",
    "    return x1 ** 2\n\n\n\tend": "333 1003 1792 33 1903 216 34 16506 197 486",
}


@pytest.mark.parametrize("text", LLAMA_CPP_IDS)
def test_tokens_of_the_builtin_are_those_of_llama_cpp(text: str, smollm2: TorchBackbone) -> None:
    expected = [int(i) for i in LLAMA_CPP_IDS[text].split()]
    template = ChatTemplate(smollm2.chat_template)
    spec = parse_spec(starter_spec("sequential"))
    assert TokenCounter(build_topology(spec).system)("smol", text) == len(expected)
    resolved = resolve_source(SMOLLM2, base_dir=Path())
    assert resolved.gguf_path is not None
    counted = make_tokenizer(read_header(resolved.gguf_path).values)
    assert counted.encode(text).ids == expected
    assert list(Tokenizer(smollm2.tokenizer_json, template).encode(text)) == expected
    assert smollm2.tokenizer(text, add_special_tokens=False).input_ids == expected


def test_a_thousand_texts_have_the_tokens_of_llama_cpp(smollm2: TorchBackbone) -> None:
    tokenizer = Tokenizer(smollm2.tokenizer_json, ChatTemplate(smollm2.chat_template))
    expected = json.loads(DIGESTS.read_text())["smollm2"]
    found = [digest(tokenizer.encode(text)) for text in texts_to_compare()]
    assert len(expected) == 1000
    assert [
        i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs
    ] == []


def test_rows_of_the_builtin_can_be_moved(smollm2: TorchBackbone) -> None:
    positions = smollm2.row_positions
    (rotation,) = positions.rotations
    assert (rotation.layout, rotation.start, len(rotation.inv_freq)) == ("halves", 0, 32)
    assert rotation.inv_freq[-1] == pytest.approx(1e5 ** (-31 / 32), rel=1e-6)
    assert positions.tensors == {f"key.{i}": 0 for i in range(30)}
