"""Gemma 3 270M, the second embedded model, alone and in one system with SmolLM2.

It comes in packages of 253 MB that `make setup` does not install.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kit.commands import run_recmasc
from kit.texts import texts_to_compare
from llama_cpp_ids import DIGESTS, digest
from recmas_compiler.backbones.sources import (
    BUILTINS,
    GEMMA3,
    describe_backbone,
    joined,
    resolve_source,
)
from recmas_compiler.backbones.torch_model import load_backbone
from recmas_runtime import load
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.tokenizer import Tokenizer

SPEC = Path(__file__).parents[2] / "examples/two_models/spec.yaml"
_LINKS = ("agents.reader.inner", "agents.writer.inner", "links.reader -> writer")
_LINKS += ("links.writer -> reader",)

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        resolve_source(GEMMA3, base_dir=Path())
    except RecmasError as error:
        pytest.skip(str(error))


def test_facts_of_gemma_are_those_of_its_file() -> None:
    whole = joined(resolve_source(GEMMA3, base_dir=Path()), progress=Silent())
    described = describe_backbone(f"gguf:{whole.gguf_path}", base_dir=Path())
    assert replace(described, source=GEMMA3, identity=GEMMA3, folder=None) == BUILTINS[GEMMA3].facts


def test_a_thousand_texts_have_the_tokens_of_llama_cpp() -> None:
    facts = describe_backbone(GEMMA3, base_dir=Path())
    gemma = load_backbone(facts, progress=Silent(), template="{{ messages[0].content }}")
    tokenizer = Tokenizer(gemma.tokenizer_json, ChatTemplate(gemma.chat_template))
    expected = json.loads(DIGESTS.read_text())["gemma3"]
    texts = list(texts_to_compare())
    assert len(expected) == len(texts) == 1000
    different = [
        text
        for text, theirs in zip(texts, expected, strict=True)
        if digest(tokenizer.encode(text)) != theirs
    ]
    assert different == []


def test_two_real_models_in_one_system(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    # aligned links take minutes more: Gemma makes up texts over a vocabulary of 262,144 tokens
    starts = [part for link in _LINKS for part in ("--set", f"{link}.init=random")]
    built = run_recmasc("build", SPEC, "-o", folder, *starts)
    assert built.exit_code == 0, built.output
    assert "builtin:gemma3-270m is under the Gemma Terms of Use" in built.stdout
    parity = {entry.backbone: entry for entry in open_bundle(folder).manifest.parity}
    assert set(parity) == {"gemma", "smol"}
    for entry in parity.values():
        assert entry.greedy_tokens_equal
        assert all(error <= TOLERANCES[name] for name, error in entry.figures.items())
    system = load(folder)
    (answer,) = system.run(["What is 7 * 8?"])
    assert answer.answer.strip()
    assert system.plan.rounds == 2
