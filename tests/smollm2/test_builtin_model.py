"""What recmas knows of the embedded model without loading it, against its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recmas_compiler.analysis.token_count import TokenCounter, read_gguf_values
from recmas_compiler.backbones.facts import count_parameters
from recmas_compiler.backbones.sources import BUILTINS, SMOLLM2, resolve_source
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.spec.patterns.starter_specs import starter_spec
from recmas_compiler.spec.spec import parse_spec

pytestmark = pytest.mark.smollm2


def test_facts_of_the_builtin_are_those_of_its_file() -> None:
    resolved = resolve_source(SMOLLM2, base_dir=Path())
    values = read_gguf_values(resolved.folder / str(resolved.gguf_file))
    facts = BUILTINS[SMOLLM2].facts
    assert {
        "embedding_length": facts.width,
        "block_count": facts.num_layers,
        "attention.head_count": facts.num_heads,
        "attention.head_count_kv": facts.num_kv_heads,
        "rope.dimension_count": facts.head_dim,
        "vocab_size": facts.vocab_size,
        "context_length": facts.max_positions,
    }.items() <= {key.removeprefix("llama."): value for key, value in values.items()}.items()
    mlp_width = values["llama.feed_forward_length"]
    assert facts.num_parameters == count_parameters(
        width=facts.width,
        num_layers=facts.num_layers,
        attention_width=facts.num_heads * facts.head_dim,
        kv_width=facts.num_kv_heads * facts.head_dim,
        mlp_width=mlp_width,
        vocab_size=facts.vocab_size,
        is_tied=True,
    )


def test_tokens_of_the_builtin_are_counted_as_transformers_does() -> None:
    spec = parse_spec(starter_spec("sequential"))
    counter = TokenCounter(build_topology(spec).system)
    resolved = resolve_source(SMOLLM2, base_dir=Path())
    reference = AutoTokenizer.from_pretrained(resolved.folder, gguf_file=resolved.gguf_file)
    for text in (
        "What is 7 * 8?",
        "Tom's 16 eggs\n\n  cost  2/5 of $3.14",
        "caf\u00e9 \U0001f600",
        "",
    ):
        assert counter("smol", text) == len(reference(text, add_special_tokens=False)["input_ids"])
