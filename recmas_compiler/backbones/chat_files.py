"""A backbone's chat template and tokenizer, from its files alone: without torch or transformers.

A build takes what transformers loads. Here the same files are read, to say early what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers

from recmas_compiler.backbones.gguf_files.header import read_values
from recmas_compiler.backbones.gguf_files.tokenizer import check_tokenizer, special_tokens
from recmas_compiler.backbones.sources import ResolvedSource, gguf_errors
from recmas_compiler.spec.document.places import SourcePosition, is_file, path_of
from recmas_compiler.spec.document.problems import problem_at, show
from recmas_compiler.spec.schema.sections import NO_TEMPLATE
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.prompts.chat_template import ChatTemplate, read_template
from recmas_runtime.prompts.tokenizer import Tokenizer, read_tokenizer

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
_GGUF_TEMPLATE: Final = "tokenizer.chat_template"
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


def check_rows(
    tokenizer: tokenizers.Tokenizer,
    chat_template: str,
    *,
    special: Mapping[str, str],
    num_rows: int,
    source: str,
) -> None:
    """Refuse a tokenizer that can write a token for which the embedding table has no row.

    A special token that no template writes is harmless: where a text spells it, it is spelled with
    ordinary tokens. Some models have such tokens, for inputs that are not text.

    Args:
        special: Texts of the special tokens that a template may write without spelling them.

    Raises:
        RecmasError: RM202 if it can.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if max(vocabulary.values(), default=0) < num_rows:
        return
    template = ChatTemplate(chat_template)
    unwritten = {
        token.content
        for token in tokenizer.get_added_tokens_decoder().values()
        if token.special and not any(token.content in text for text in template.literals)
    }
    unwritten -= {text for name, text in special.items() if name in chat_template}
    beyond = {
        i: token for token, i in vocabulary.items() if i >= num_rows and token not in unwritten
    }
    if beyond:
        first = min(beyond)
        tokens = "a token" if len(beyond) == 1 else f"{len(beyond)} tokens"
        raise fail(
            "RM202",
            f"the tokenizer of backbone {source!r} has {tokens} beyond the {num_rows} rows of the "
            f"embedding table, such as {show(beyond[first])} with the id {first}",
            hint="Resize the model's embeddings to its tokenizer, or take the tokenizer that the "
            "model was trained with.",
        )


def read_chat_template(
    source: ResolvedSource,
    *,
    template: str | None,
    num_rows: int,
    position: SourcePosition,
    is_complete: bool,
) -> ChatTemplate | None:
    """Return a backbone's compiled template after looking at its tokenizer; None if not at hand.

    Args:
        template: Text that the spec gives instead of the backbone's own.
        num_rows: Of the embedding table.
        is_complete: Whether the folder holds everything there is; else what is missing may come.

    Raises:
        RecmasError: RM200 without a tokenizer, RM202 for a malformed one, RM206 without a chat
            template or for one that is not valid.
    """
    try:
        return _read(source, template, num_rows)
    except _MissingError as found:
        if not is_complete:
            return None
        raise RecmasError(
            problem_at(position, found.code, found.message, hint=found.hint)
        ) from found
    except RecmasError as error:
        (problem,) = error.problems
        if problem.code == "RM202":  # of the model's own files, not of a template
            raise RecmasError(
                problem_at(position, "RM202", f"{problem.message}.", hint=problem.hint)
            ) from error
        message = f"backbone `{source.source}`: {problem.message}."
        raise RecmasError(problem_at(position, "RM206", message, hint=problem.hint)) from error


def own_template_text(source: ResolvedSource) -> str | None:
    """Return the text of a backbone's own chat template; None if it has none that is at hand.

    Raises:
        RecmasError: RM401 or RM404 for a file that cannot be read or is no template.
    """
    if source.gguf_path is not None:
        found = _gguf_values(source).get(_GGUF_TEMPLATE)
        return found if isinstance(found, str) else None
    return _own_template(source.folder, _config(source.folder))


def _read(source: ResolvedSource, template: str | None, num_rows: int) -> ChatTemplate:
    text = own_template_text(source) if template is None else template
    if text is None:
        message = f"backbone `{source.source}` has no chat template."
        raise _MissingError("RM206", message, GIVE_A_TEMPLATE)
    if source.gguf_path is not None:
        values = _gguf_values(source)
        with gguf_errors(source.source):
            check_tokenizer(values)
        return ChatTemplate(text, _USUAL_TOKENS | special_tokens(values))
    special = _special_tokens(_config(source.folder))
    compiled = ChatTemplate(text, _USUAL_TOKENS | special)
    _check_tokenizer(source, compiled)
    if is_file(source.folder / _TOKENIZER):
        tokenizer = read_tokenizer(source.folder / _TOKENIZER)
        check_rows(tokenizer, text, special=special, num_rows=num_rows, source=source.source)
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


def _gguf_values(source: ResolvedSource) -> Mapping[str, Any]:
    assert source.gguf_path is not None, "asked for GGUF files only"
    with gguf_errors(source.source):
        return read_values(source.gguf_path)
