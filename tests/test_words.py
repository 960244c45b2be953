"""Words: the field's terms, and each with one meaning. docs/glossary.md says which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "specs/**/*.md",
        "specs/**/*.yaml",
        "examples/**/*.py",
        "benchmarks/**/*.py",
        "recmas_compiler/**/*.py",
        "recmas_compiler/**/*.yaml",
        "export/**/*.py",
        "runtime/**/*.py",
    )
    for path in ROOT.glob(pattern)
)

# What must not be said -> what is said instead.
BANNED = {
    r"\bLanes?\b": "SequenceBatch",
    r"\bScribe\b": "TextGenerator",
    r"\bVoices?\b": "DecoderSettings",
    r"\bMachinery\b": "LoadedBundle",
    r"\bbegin_like\b|\bbegins? alike\b|\bmost alike\b": "a shared prefix",
    r"\b[Mm]end(s|ed)?\b": "fixed, fixes",
    r"\b[Tt]old (of|about)\b": "receives progress, is called",
    r"\bvouch(es|ed|ing)?\b": "verify, a hash in the receipt",
    r"\bleft aside\b": "ignored",
    r"\bin the way\b": "already exists",
    r"\bstrangers\b": "unresolved references",
    r"\bgive_back\b": "release",
    r"\bfrozen[ -]links?\b(?!\")": "untrained links",
    r"\bheard\b|\bhears\b": "received, consumed",
}
# Names of version 0.1 that are still taken, and what is about weights or sound.
ALLOWED = {
    "recmas_compiler/backbones/torch_model.py": {"hears"},  # a model with ears
    "recmas_compiler/released/templates/sequential.yaml": {"mend"},  # a prompt: words of a task
}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_words_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
    found = {
        match[0]: instead
        for pattern, instead in BANNED.items()
        for match in re.finditer(pattern, text)
        if match[0] not in allowed
    }
    # The glossary of what is not said would ban itself.
    assert not found, "say instead: " + ", ".join(f"{old} -> {new}" for old, new in found.items())


def test_the_glossary_has_each_word_once() -> None:
    words = re.findall(r"^\| ([a-z][^|]*?) \|", (ROOT / "docs/glossary.md").read_text(), re.M)
    words = [word for word in words if word != "word"]
    assert len(words) == len(set(words)) > 40
