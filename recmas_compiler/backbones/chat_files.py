"""A backbone's chat template and tokenizer, from its files alone: without torch or transformers.

A build takes what transformers loads. Here the same files are read, to say early what is wrong.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers

from recmas_compiler.backbones.sources import ResolvedSource
from recmas_compiler.spec.document.places import SourcePosition, is_file, path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import NO_TEMPLATE
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.prompts.chat_template import ChatTemplate, read_template
from recmas_runtime.prompts.tokenizer import Tokenizer

# What models without a template were trained on; a tokenizer that puts no token before its texts
# has no `bos_token` here.
PLAIN_TEMPLATE: Final = """{{- bos_token -}}
{%- for message in messages -%}
    {%- if not loop.first and message.role != 'assistant' -%}{{- '\\n\\n' -}}{%- endif -%}
    {{- message.content -}}
    {%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
"""

_TOKENIZER: Final = "tokenizer.json"
# transformers makes a tokenizer of these, too.
_OTHER_TOKENIZERS: Final = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_TEMPLATE: Final = "chat_template.jinja"
_MORE_TEMPLATES: Final = "additional_chat_templates"
_CONFIG: Final = "tokenizer_config.json"
# Names that a tokenizer's class, or a GGUF file's vocabulary, may give a token to.
_USUAL_TOKENS: Final = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
_GGUF_TEMPLATE: Final = b"tokenizer.chat_template"
_GGUF_STRING: Final = 8
GIVE_A_TEMPLATE: Final = (
    "Choose its instruction-tuned form, or give the backbone a `template`: a Jinja file, or `none` "
    "for plain text."
)


@dataclass(eq=False)
class _MissingError(Exception):
    code: str
    message: str
    hint: str


def puts_first(tokenizer: tokenizers.Tokenizer, token: str | None) -> bool:
    """Tell whether a tokenizer puts a token before every text."""
    if token is None:
        return False
    return tokenizer.encode("x").tokens[:1] == [token]


def template_text(name: str, base_dir: Path) -> str:
    """Return the text of what a spec names as `template`.

    Raises:
        RecmasError: RM401 or RM404 for a file that cannot be read or is no template.
    """
    if name == NO_TEMPLATE:
        return PLAIN_TEMPLATE
    return read_template(path_of(name, base_dir), file=name)


def read_chat_template(
    source: ResolvedSource,
    *,
    template: str | None,
    position: SourcePosition,
    is_complete: bool,
) -> ChatTemplate | None:
    """Return a backbone's compiled template after looking at its tokenizer; None if not at hand.

    Args:
        template: Text that the spec gives instead of the backbone's own.
        is_complete: Whether the folder holds everything there is; else what is missing may come.

    Raises:
        RecmasError: RM200 without a tokenizer, RM202 for a malformed one, RM206 without a chat
            template or for one that is not valid.
    """
    try:
        return _read(source, template)
    except _MissingError as found:
        if not is_complete:
            return None
        raise RecmasError(
            problem_at(position, found.code, found.message, hint=found.hint)
        ) from found
    except RecmasError as error:
        (problem,) = error.problems
        message = f"backbone `{source.source}`: {problem.message}."
        raise RecmasError(problem_at(position, "RM206", message, hint=problem.hint)) from error


def own_template_text(source: ResolvedSource) -> str | None:
    """Return the text of a backbone's own chat template; None if it has none that is at hand.

    Raises:
        RecmasError: RM401 or RM404 for a file that cannot be read or is no template.
    """
    if source.gguf_file is not None:
        return _gguf_template(source.folder / source.gguf_file)
    return _own_template(source.folder, _config(source.folder))


def _read(source: ResolvedSource, template: str | None) -> ChatTemplate:
    text = own_template_text(source) if template is None else template
    if text is None:
        message = f"backbone `{source.source}` has no chat template."
        raise _MissingError("RM206", message, GIVE_A_TEMPLATE)
    if source.gguf_file is not None:
        return ChatTemplate(text, _USUAL_TOKENS)
    compiled = ChatTemplate(text, _USUAL_TOKENS | _special_tokens(_config(source.folder)))
    _check_tokenizer(source, compiled)
    return compiled


def _check_tokenizer(source: ResolvedSource, template: ChatTemplate) -> None:
    file = source.folder / _TOKENIZER
    if is_file(file):
        try:
            Tokenizer(file, template)
        except RecmasError as error:
            (problem,) = error.problems
            message = f"the {_TOKENIZER} of backbone `{source.source}` is a {problem.message}."
            hint = "Copy it anew from where the model is."
            raise _MissingError("RM202", message, hint) from error
    elif not any(is_file(source.folder / name) for name in _OTHER_TOKENIZERS):
        message = f"backbone `{source.source}` has no {_TOKENIZER}."
        hint = "Put the tokenizer of the model beside its weights; trained ones have the base's."
        raise _MissingError("RM200", message, hint)


def _config(folder: Path) -> Mapping[str, Any]:
    if not is_file(folder / _CONFIG):
        return {}
    try:
        found = json.loads((folder / _CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _own_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the default template, where transformers looks for it."""
    for name in (_TEMPLATE, f"{_MORE_TEMPLATES}/default.jinja"):
        if is_file(folder / name):
            return read_template(folder / name, file=name)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _gguf_template(path: Path) -> str | None:
    """Return the template in the header of a GGUF file without reading the vocabulary before it."""
    # In front of a key stands its length, behind it the kind of its value.
    key = struct.pack("<Q", len(_GGUF_TEMPLATE)) + _GGUF_TEMPLATE + struct.pack("<I", _GGUF_STRING)
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw,
        ):
            at = raw.find(key)
            if at < 0:
                return None
            (size,) = struct.unpack_from("<Q", raw, at + len(key))
            start = at + len(key) + 8
            return raw[start : start + size].decode("utf-8", "replace")
    except (OSError, ValueError, struct.error):
        return None
