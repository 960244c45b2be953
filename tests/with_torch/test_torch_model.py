"""Loading backbones: quietly, completely, or with an error that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from kit.models import COMMON_DIMS, FAMILIES, LoadTiny, load_folder, write_tiny_backbone
from recmas_compiler.backbones import own_tokenizer
from recmas_compiler.backbones.chat_files import PLAIN_TEMPLATE
from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone, weights_digest
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.layers import uniform_layers
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.exerciser import sample_texts
from recmas_runtime.prompts.render import Chat
from recmas_runtime.prompts.tokenizer import Tokenizer as RuntimeTokenizer


def facts_of(folder: Path, **changes: Any) -> BackboneFacts:
    """Return facts good enough to try loading a folder that the front end would refuse."""
    values: dict[str, Any] = {
        "source": str(folder),
        "identity": str(folder),
        "model_type": "llama",
        "width": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 282,
        "max_positions": 1024,
        "layers": uniform_layers(3, heads=2, key_width=16),
        "attention": ("full",) * 3,
        "sliding_window": None,
        "num_parameters": 1,
    }
    return BackboneFacts(**{**values, **changes})


def refusal(folder: Path) -> tuple[str, str]:
    """Return code and text of the error that loading raises."""
    with pytest.raises(RecmasError) as caught:
        load_backbone(facts_of(folder), progress=Silent())
    assert str(folder) in str(caught.value)
    return caught.value.problems[0].code, str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_was_written(tiny: LoadTiny, family: str) -> None:
    backbone = tiny(family)
    kind = FAMILIES[family]
    assert backbone.chat_template.strip() == kind.template.strip()
    assert backbone.bos_token == kind.bos
    tokens = {backbone.tokenizer.convert_ids_to_tokens(i) for i in backbone.eos_token_ids}
    assert tokens == {*kind.stops, kind.eos}
    assert backbone.special_tokens["eos_token"] == kind.eos
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert all(p.dtype == torch.float32 for p in backbone.model.parameters())
    num_parameters = sum(p.numel() for p in backbone.model.parameters())
    # the facts count matrices, and leave out what some families have of small vectors
    assert num_parameters == pytest.approx(backbone.facts.num_parameters, rel=0.01)
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = backbone.body(inputs_embeds=backbone.embed(ids)).last_hidden_state
    assert hidden.shape == (1, 4, backbone.facts.width)
    torch.testing.assert_close(
        backbone.logits(hidden), backbone.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


def test_loading_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_folder(write_tiny_backbone(tmp_path, "llama"))
    assert capfd.readouterr() == ("", "")


def test_equal_weights_have_equal_digests(tiny: LoadTiny, tmp_path: Path) -> None:
    digest = weights_digest(tiny("qwen3").model)
    assert digest == weights_digest(load_folder(write_tiny_backbone(tmp_path, "qwen3")).model)
    assert digest != weights_digest(tiny("qwen3", seed=1).model)
    assert len(digest) == 64


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "quantized (gptq)" in text


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    change_weights(tmp_path, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "lacks 1 weights, such as 'model.layers.1.mlp.up_proj.weight'" in text


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    assert refusal(tmp_path)[0] == "RM200"


def test_cut_weights_are_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(tmp_path)[0] in {"RM200", "RM202"}


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "config.json", intermediate_size=128)
    code, text = refusal(tmp_path)
    assert code == "RM202"
    shapes = "of shape [64, 96], but its config.json says [64, 128]"
    assert f"has 'model.layers.0.mlp.down_proj.weight' {shapes}" in text


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "not a causal language model (BertForMaskedLM)" in text


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "config.json", model_type="from_the_future", architectures=None)
    assert refusal(tmp_path)[0] == "RM202"


def test_code_in_the_repository_is_not_run(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    edit(
        tmp_path / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    assert refusal(tmp_path)[0] == "RM202"


def test_a_model_without_chat_template_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").unlink()
    code, text = refusal(tmp_path)
    assert code == "RM206"
    assert "no chat template" in text


def test_a_head_that_does_something_unknown_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_backbone(tmp_path, "llama")
    usual = TorchBackbone.logits
    # as where a model does something between its body and its head
    monkeypatch.setattr(TorchBackbone, "logits", lambda self, h: usual(self, h) * 8)
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "in a way recmas does not know" in text


def test_end_tokens_outside_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "generation_config.json", eos_token_id=[-1, 3, 9_999_999])
    backbone = load_folder(tmp_path)
    assert backbone.eos_token_ids == (3, backbone.tokenizer.eos_token_id)


def test_only_the_text_model_of_a_seeing_model_is_used(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "gemma3")
    text = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    seeing = Gemma3ForConditionalGeneration(config)
    seeing.model.language_model.load_state_dict(text.model.state_dict())
    seeing.save_pretrained(tmp_path)
    layers = uniform_layers(4, heads=2, key_width=16)
    backbone = load_backbone(
        facts_of(tmp_path, vocab_size=text.config.vocab_size, num_layers=4, layers=layers),
        progress=Silent(),
    )
    assert sum(p.numel() for p in backbone.model.parameters()) == text.num_parameters()
    ids = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 12, 13, 14]])
    torch.testing.assert_close(backbone.model(input_ids=ids).logits, text(input_ids=ids).logits)


def test_a_text_model_that_is_only_published_inside_another_one(tmp_path: Path) -> None:
    """Their class has no causal form, but that of the text model inside does."""
    write_tiny_backbone(tmp_path, "mistral")
    text = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(
        text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=False
    )
    config.architectures = ["Mistral3ForConditionalGeneration"]
    seeing = Mistral3ForConditionalGeneration(config)
    seeing.model.language_model.load_state_dict(text.model.state_dict())
    seeing.lm_head.load_state_dict(text.lm_head.state_dict())
    seeing.save_pretrained(tmp_path)
    backbone = load_folder(tmp_path)
    assert backbone.facts.model_type == "mistral"
    assert sum(p.numel() for p in backbone.model.parameters()) == text.num_parameters()
    ids = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 12, 13, 14]])
    with torch.no_grad():
        wanted = text(input_ids=ids).logits
        torch.testing.assert_close(backbone.model(input_ids=ids).logits, wanted)
        hidden = backbone.body(inputs_embeds=backbone.embed(ids)).last_hidden_state
        torch.testing.assert_close(backbone.logits(hidden), wanted)


def test_a_padded_vocabulary_loads(tmp_path: Path) -> None:
    backbone = load_folder(write_tiny_backbone(tmp_path, "qwen2", vocab_size=320))
    assert backbone.facts.vocab_size == 320
    assert len(backbone.tokenizer) < 320
    assert set(COMMON_DIMS) <= backbone.model.config.to_dict().keys()


LLAMA3_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_with_tokenizer(folder: Path, **settings: Any) -> Tokenizer:
    """Write a tiny model whose tokenizer joins three digits and line breaks; return that one."""
    write_tiny_backbone(folder, "llama", vocab_size=400)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = list(tokenizer.get_vocab(with_added_tokens=False))
    merges = [("1", "2"), ("12", "3"), ("\u010a", "\u010a"), ("4", "5"), ("2", "3")]
    vocab = {token: i for i, token in enumerate([*tokens, *(a + b for a, b in merges)])}
    special = FAMILIES["llama"].special
    own = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    own.decoder = decoders.ByteLevel()
    own.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    own.add_tokens([AddedToken("<extra>", normalized=False)])
    own.enable_truncation(5)
    own.enable_padding(length=5)
    own.save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", **settings)
    own.no_truncation()
    own.no_padding()
    return own


@pytest.mark.parametrize(
    "named",
    [
        "PreTrainedTokenizerFast",
        "GPT2Tokenizer",
        "LlamaTokenizer",
        "Qwen2Tokenizer",
        "GemmaTokenizer",
    ],
)
def test_the_tokenizer_is_that_of_the_models_own_file(named: str, tmp_path: Path) -> None:
    """transformers makes some classes anew from the vocabulary, with a split of their own."""
    own = write_with_tokenizer(tmp_path, tokenizer_class=named)
    backbone = load_folder(tmp_path)
    ours = RuntimeTokenizer(backbone.tokenizer_json, ChatTemplate(backbone.chat_template))
    for text in [*sample_texts(["<extra>", "<|eot_id|>"]), "It costs 1234567 dollars.\n\nNext"]:
        expected = own.encode(text, add_special_tokens=False).ids
        assert list(ours.encode(text)) == expected, text
        assert backbone.tokenizer(text, add_special_tokens=False).input_ids == expected
    assert backbone.special_tokens["eos_token"] == "<|eot_id|>"
    assert json.loads(backbone.tokenizer_json)["truncation"] is None
    assert json.loads(backbone.tokenizer_json)["padding"] is None


def test_tokens_that_the_settings_add_are_kept(tmp_path: Path) -> None:
    own = write_with_tokenizer(tmp_path, extra_special_tokens=["<more>"])
    assert own.token_to_id("<more>") is None
    backbone = load_folder(tmp_path)
    ours = RuntimeTokenizer(backbone.tokenizer_json, ChatTemplate(backbone.chat_template))
    assert ours.encode("<more>") == (own.get_vocab_size(),)


def test_a_tokenizer_that_is_not_its_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with_tokenizer(tmp_path)
    usual = own_tokenizer.PreTrainedTokenizerFast.from_pretrained

    def changed(*args: Any, **kwargs: Any) -> Any:
        """Give what a version of transformers with a split of its own would."""
        tokenizer = usual(*args, **kwargs)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer

    monkeypatch.setattr(own_tokenizer.PreTrainedTokenizerFast, "from_pretrained", changed)
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "is not that of its tokenizer.json: in " in text
    assert "in the place of" in text


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    rows = tokenizer.get_vocab_size()
    # as models have it for inputs that are not text; no text can spell it
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(path))
    assert load_folder(tmp_path).facts.vocab_size == rows
    tokenizer.add_tokens([AddedToken("<extra>", special=False)])
    tokenizer.save(str(path))
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert f"has a token beyond the {rows} rows of the embedding table" in text
    assert f'such as "<extra>" with the id {rows + 1}' in text


@pytest.mark.parametrize(
    ("settings", "template"),
    [({}, "{{ '<image>' }}"), ({"bos_token": "<image>"}, "{{ bos_token }}")],
)
def test_a_token_without_a_row_in_a_template_is_refused(
    settings: dict[str, str], template: str, tmp_path: Path
) -> None:
    write_tiny_backbone(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(path))
    edit(tmp_path / "tokenizer_config.json", **settings)
    if settings:
        load_folder(tmp_path)
    template_file = tmp_path / "chat_template.jinja"
    template_file.write_text(template + template_file.read_text())
    assert refusal(tmp_path)[0] == "RM202"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    # read into memory: the file must not change under a map of it
    weights = load(Path(folder / "model.safetensors").read_bytes())
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    change_weights(tmp_path, lambda w: w["model.layers.1.mlp.up_proj.weight"][0].fill_(value))
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "weights that are NaN or infinite, in 'model.layers.1.mlp.up_proj.weight'" in text


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
    ],
)
def test_tensors_that_a_layer_has_no_place_for_are_refused(name: str, tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    change_weights(tmp_path, lambda w: w.update({name: torch.ones(4)}))
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert f"has 1 tensors that its config.json has no place for, such as '{name}'" in text


def test_tensors_of_parts_that_the_model_does_not_have_are_no_loss(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    extra = {"mtp.layers.0.weight": torch.ones(4), "vision.patches.weight": torch.ones(4)}
    change_weights(tmp_path, lambda w: w.update(extra))
    load_folder(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "has its weights in pytorch_model.bin and in no safetensors file" in text


class Titles(Silent):
    """Keeps what is said of every stage."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, done: int = 0) -> Iterator[Any]:
        self.titles.append(title)
        with super().stage(title, total, done=done) as advance:
            yield advance


def test_a_vocabulary_without_a_tokenizer_file_is_said(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    own = json.loads(path.read_text())
    path.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(own["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in own["model"]["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    progress = Titles()
    backbone = load_backbone(facts_of(tmp_path), progress=progress)
    assert "no tokenizer.json: transformers makes one of its vocabulary" in progress.titles[0]
    ours = RuntimeTokenizer(backbone.tokenizer_json, ChatTemplate(backbone.chat_template))
    assert ours.encode("7<|im_end|>")[-1] == backbone.eos_token_ids[-1]


@pytest.mark.parametrize(("family", "puts_first"), [("llama", True), ("phi3", False)])
def test_plain_text_begins_with_what_the_tokenizer_itself_puts_first(
    tmp_path: Path, family: str, puts_first: bool
) -> None:
    folder = write_tiny_backbone(tmp_path / family, family, num_hidden_layers=1)
    (folder / "chat_template.jinja").unlink()
    layers = uniform_layers(1, heads=2, key_width=16)
    facts = facts_of(folder, num_layers=1, layers=layers)
    backbone = load_backbone(facts, progress=Silent(), template=PLAIN_TEMPLATE)
    assert backbone.bos_token is not None
    assert ("bos_token" in backbone.special_tokens) is puts_first
    chat = Chat.load(backbone.tokenizer_json, backbone.chat_template, backbone.special_tokens)
    rendered = chat.template.render(
        [{"role": "user", "content": "the plan"}], add_generation_prompt=True
    )
    assert list(chat.tokenizer.encode(rendered)) == backbone.tokenizer("the plan").input_ids
