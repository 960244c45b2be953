"""Tiny random language models, one per family, as ordinary Hugging Face folders made on the spot.

Each has the parts that make its family special (tied or untied head, scaled embeddings, sliding
windows, a fused qkv matrix, biases), a byte-level tokenizer and a chat template of our own wording
in the manner of the family. Weights are random but scaled so that greedy text is varied and the
two best logits are far apart compared with rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from recmas_compiler.backbones.sources import describe_backbone
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone
from recmas_runtime.core.progress import Silent

# Pairs that the tokenizers join, in this order; `_` stands for a space (U+0120 in byte-level BPE).
_PAIRS = """
t h, i n, e r, a n, _ t, _ a, o n, _t h, th e, _th e, in g, an d, _ and, r e, s t, _ s, _ p, l an,
_p lan, e n
"""
MERGES = [(a, b) for a, b in (p.split() for p in _PAIRS.replace("_", "\u0120").split(","))]

LLAMA_TEMPLATE = r"""{{- bos_token -}}
{%- for message in messages -%}
    <|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""

QWEN2_TEMPLATE = r"""{% if messages[0].role != 'system' %}
<|im_start|>system
Answer in few words.<|im_end|>
{% endif %}
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

QWEN3_TEMPLATE = r"""{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}
<think>

</think>

{% endif %}
{% endif %}
"""

GEMMA_TEMPLATE = r"""{{ bos_token }}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = message.content | trim + '\n\n' -%}
    {%- else -%}
        {%- set role = 'model' if message.role == 'assistant' else message.role -%}
        {{- '<start_of_turn>' + role + '\n' -}}
        {{- ns.system + message.content | trim + '<end_of_turn>\n' -}}
        {%- set ns.system = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
"""

MISTRAL_TEMPLATE = r"""{{- bos_token }}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- set instructions = messages | selectattr('role', 'equalto', 'system') %}
{%- set system = instructions | map(attribute='content') | join %}
{%- for turn in turns %}
    {%- if turn.role != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('turns must alternate, user first; found ' + turn.role) }}
    {%- endif %}
    {%- if turn.role == 'assistant' %}
        {{- ' ' + turn.content + eos_token }}
    {%- elif loop.last and system %}
        {{- '[INST] ' + system + '\n\n' + turn.content + '[/INST]' }}
    {%- else %}
        {{- '[INST] ' + turn.content + '[/INST]' }}
    {%- endif %}
{%- endfor %}
"""

PHI3_TEMPLATE = r"""{% for message in messages %}
<|{{ message['role'] }}|>
{{ message['content'] }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% else %}
{{ eos_token }}
{%- endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells one family of models from another.

    Attributes:
        model_type: Hugging Face model type.
        dims: Config entries besides the common ones.
        special_first: Whether special tokens take the lowest ids (sentencepiece heritage).
        special: Special tokens.
        control: Added tokens that Hugging Face does not call special, but the template writes.
        bos: Token that starts every text, also without a template; None for none.
        stops: Tokens that end an answer, as generation_config.json lists them.
    """

    model_type: str
    template: str
    special: tuple[str, ...]
    eos: str
    stops: tuple[str, ...]
    pad: str
    bos: str | None = None
    unk: str | None = None
    control: tuple[str, ...] = ()
    special_first: bool = False
    nfc: bool = False
    dims: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        template=LLAMA_TEMPLATE,
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|pad|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eot_id|>"),
        pad="<|pad|>",
        dims={"tie_word_embeddings": False},
    ),
    "qwen2": Family(
        model_type="qwen2",
        template=QWEN2_TEMPLATE,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        nfc=True,
        dims={"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        model_type="qwen3",
        template=QWEN3_TEMPLATE,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        control=("<think>", "</think>"),
        eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        nfc=True,
        # head_dim is its own: heads x head_dim is wider than the model, as in the family
        dims={"tie_word_embeddings": False, "head_dim": 24},
    ),
    "gemma3": Family(
        model_type="gemma3_text",
        template=GEMMA_TEMPLATE,
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        special_first=True,
        bos="<bos>",
        eos="<eos>",
        unk="<unk>",
        stops=("<eos>", "<end_of_turn>"),
        pad="<pad>",
        dims={
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
            ],
            "sliding_window": 8,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
        },
    ),
    "mistral": Family(
        model_type="mistral",
        template=MISTRAL_TEMPLATE,
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        special_first=True,
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        stops=("</s>",),
        pad="</s>",
        dims={"tie_word_embeddings": False, "sliding_window": None, "head_dim": 16},
    ),
    "phi3": Family(
        model_type="phi3",
        template=PHI3_TEMPLATE,
        special=(
            "<unk>",
            "<s>",
            "<|endoftext|>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|end|>",
        ),
        special_first=True,
        bos="<s>",
        eos="<|endoftext|>",
        unk="<unk>",
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        pad="<|endoftext|>",
        dims={"tie_word_embeddings": False, "sliding_window": None},
    ),
}

LoadTiny = Callable[..., TorchBackbone]  # the type of the fixture `tiny`

COMMON_DIMS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def make_tokenizer(family: str) -> Tokenizer:
    """Return the byte-level BPE tokenizer of a family, with all its added tokens."""
    kind = FAMILIES[family]
    byte_level = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    added = [*kind.special, *kind.control]
    tokens = [*added, *byte_level] if kind.special_first else [*byte_level, *added]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in kind.special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in kind.control])
    if kind.bos is not None and family != "phi3":
        # plain tokenization starts with bos, which a piece of a rendered prompt must not do
        tokenizer.post_processor = TemplateProcessing(
            single=f"{kind.bos} $A",
            pair=f"{kind.bos} $A {kind.bos} $B",
            special_tokens=[(kind.bos, vocab[kind.bos])],
        )
    return tokenizer


def write_tiny_backbone(folder: Path, family: str, *, seed: int = 0, **dims: Any) -> Path:
    """Write a tiny random model of `family` and its tokenizer as a Hugging Face folder.

    Args:
        folder: Made if it is not there.
        family: A key of `FAMILIES`.
        seed: Of the weights.
        dims: Config entries that override the family's, such as `hidden_size=48`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = FAMILIES[family]
    tokenizer = make_tokenizer(family)
    ids = {token: tokenizer.token_to_id(token) for token in (*kind.special, *kind.control)}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(kind.template, encoding="utf-8")

    roles = {"bos": kind.bos, "eos": kind.eos, "pad": kind.pad, "unk": kind.unk}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in roles.items() if token is not None},
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)

    entries = {**COMMON_DIMS, "vocab_size": tokenizer.get_vocab_size(), **kind.dims, **dims}
    if "num_hidden_layers" in dims and "layer_types" not in dims:
        entries.pop("layer_types", None)
    config = AutoConfig.for_model(
        kind.model_type,
        bos_token_id=None if kind.bos is None else ids[kind.bos],
        eos_token_id=ids[kind.eos],
        pad_token_id=ids[kind.pad],
        **entries,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, seed=seed)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    stops = [ids[token] for token in kind.stops]
    _write_json(folder / "generation_config.json", {"eos_token_id": stops})
    weights = {name: w.contiguous() for name, w in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_folder(folder: Path) -> TorchBackbone:
    """Load a backbone as the compiler does, from its folder."""
    facts = describe_backbone(str(folder), base_dir=folder)
    return load_backbone(facts, progress=Silent())


def load_tiny(folder: Path, family: str, *, seed: int = 0, **dims: Any) -> TorchBackbone:
    """Write a tiny backbone and load it."""
    return load_folder(write_tiny_backbone(folder, family, seed=seed, **dims))


def _fill(model: PreTrainedModel, *, seed: int) -> None:
    """Give matrices a gain at which signals neither die out nor grow chaotic.

    Chaos would make rounding errors grow from step to step of a recursion, until two correct
    implementations disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    # Gemma multiplies embeddings by sqrt(width), and its norms have a scale of 1 + weight.
    is_gemma = "gemma" in model.config.model_type
    embedding_std, neutral = (0.2, 0.0) if is_gemma else (0.6, 1.0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if "embed_tokens" in name or "lm_head" in name:
                weight.copy_(noise * embedding_std)
            elif name == "model.norm.weight":
                # Random signs: a tied head would see the current token in its own embedding, and
                # every token would repeat for ever.
                weight.copy_(noise.sign() - 1.0 + neutral)
            elif weight.ndim == 1:  # other norms stay near their neutral value, biases near zero
                weight.add_(noise * 0.1)
            else:
                gain = 0.8 if "q_proj" in name or "k_proj" in name else 0.6
                weight.copy_(noise * gain / math.sqrt(weight.shape[1]))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_mixed_backbones(folder: Path) -> None:
    """Write tiny backbones of three families and widths: `llama`, `qwen3` and `gemma3`."""
    for seed, (family, width) in enumerate((("llama", 64), ("qwen3", 48), ("gemma3", 32))):
        write_tiny_backbone(folder / family, family, seed=seed, hidden_size=width)
