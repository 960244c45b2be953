"""What recmas reads out of a config, and fills in, is what transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from config_defaults import table_text
from kit.zoo import ZOO
from recmas_compiler.backbones.config.defaults import DEFAULTS_FILE, family_defaults
from recmas_compiler.backbones.config.layer_types import LAYER_KINDS
from recmas_compiler.backbones.config.unsupported import why_unsupported
from recmas_compiler.backbones.sources import describe_backbone
from recmas_runtime.core.errors import RecmasError

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 500,
}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3")
KINDS = {
    "full": "full_attention",
    "sliding": "sliding_attention",
    "linear": "linear_attention",
    "none": "mlp",
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few_heads": {"num_key_value_heads": 2},
    "window": {"sliding_window": 64},
    "no_window": {"sliding_window": None},
    "window_used": {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
}


# Gemma always has a window, whatever its config says.
CASES = [(f, v) for f in FAMILIES for v in VARIANTS if not (f[:5] == "gemma" and v == "no_window")]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_families(family: str, variant: str, tmp_path: Path) -> None:
    given = SMALL | VARIANTS[variant]
    if family not in ("qwen2", "qwen3"):
        given = {k: v for k, v in given.items() if not k.startswith(("use_", "max_window"))}
    config = CONFIG_MAPPING[family](**given)
    sparse = given | {
        "model_type": family,
        "architectures": ["SomeForCausalLM"],
        # what published configs of every family state
        "max_position_embeddings": config.max_position_embeddings,
        "intermediate_size": config.intermediate_size,
    }
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    head_dim = getattr(config, "head_dim", None)
    assert facts.num_kv_heads == config.num_key_value_heads
    assert facts.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    assert facts.max_positions == config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    types = (
        getattr(config, "layer_types", None)
        or ["full_attention" if window is None else "sliding_attention"] * 12
    )
    assert [KINDS[kind] for kind in facts.attention] == list(types)
    if "sliding" in facts.attention:
        assert facts.sliding_window == window


@pytest.mark.parametrize(
    "family", ["glm", "glm4", "ernie4_5", "ministral", "starcoder2", "vaultgemma", "gpt2"]
)
def test_heads_that_a_file_leaves_out(family: str, tmp_path: Path) -> None:
    names = CONFIG_MAPPING[family].attribute_map
    given = {"hidden_size": 256, "num_attention_heads": 16, "num_hidden_layers": 2}
    given = {names.get(name, name): value for name, value in given.items()} | {"vocab_size": 500}
    config = CONFIG_MAPPING[family](**given)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **given}))
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert facts.num_kv_heads == heads
    assert facts.head_dim == (getattr(config, "head_dim", None) or 256 // 16)


EXPERTS = (
    *("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "flex_olmo", "phimoe", "glm4_moe"),
    *("ernie4_5_moe", "exaone_moe", "minimax_m2", "gpt_oss", "granitemoe", "afmoe", "solar_open"),
)


@pytest.mark.parametrize("family", EXPERTS)
def test_all_experts_are_counted(family: str, tmp_path: Path) -> None:
    """In the size that the class of the config has, of which a file states the least."""
    config = CONFIG_MAPPING[family]()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    sparse = {name: getattr(config, name) for name in names}
    given = json.dumps(sparse | {"model_type": family, "architectures": [type(model).__name__]})
    (tmp_path / "config.json").write_text(given)
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    assert facts.num_parameters == pytest.approx(model.num_parameters(), rel=0.01)
    assert 0.3 < facts.num_expert_parameters / facts.num_parameters < 1


def test_the_table_of_defaults_is_that_of_transformers() -> None:
    """Of the version that recmas is tested with: others know more families, or fewer."""
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().split()
    if f"transformers=={transformers.__version__}" not in pins:
        pytest.skip(f"the table is another version's than {transformers.__version__}")
    wanted, found = table_text(), DEFAULTS_FILE.read_text()
    assert found == wanted, "run `python tests/with_torch/config_defaults.py`"


# They list their layers by further values, or under names that no target knows.
LISTED = [
    name
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if {"num_attention_heads", "layer_cycle"} <= family_defaults(name).keys()
    and why_unsupported(name, family_defaults(name)) is None
    and KINDS.keys() >= {LAYER_KINDS.get(kind) for kind in family_defaults(name)["layer_cycle"]}
    and family_defaults(name)["layer_cycle"]
    # of those with states a file says more than a small one here
    and "linear" not in {LAYER_KINDS[kind] for kind in family_defaults(name)["layer_cycle"]}
    and family_defaults(name).get("code") != "state"
    and name != "moshi"  # see below
]


@pytest.mark.parametrize("family", LISTED)
def test_layers_of_every_family(family: str, tmp_path: Path) -> None:
    names = CONFIG_MAPPING[family].attribute_map
    config = CONFIG_MAPPING[family](**{names.get("num_hidden_layers", "num_hidden_layers"): 13})
    if not hasattr(config, "layer_types"):
        pytest.skip(f"{family} does not list its layers in {transformers.__version__}")
    sparse = SMALL | {"model_type": family, "num_hidden_layers": 13}
    sparse |= {"max_position_embeddings": 2048, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    assert [KINDS[kind] for kind in facts.attention] == [
        KINDS[LAYER_KINDS[kind]] for kind in config.layer_types
    ]


def test_a_window_that_the_code_leaves_alone(tmp_path: Path) -> None:
    given = SMALL | {"model_type": "moshi", "max_position_embeddings": 2048, "sliding_window": 64}
    (tmp_path / "config.json").write_text(json.dumps(given))
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    assert (facts.attention, facts.sliding_window) == (("full",) * 12, None)


def test_a_family_without_a_rule_must_list_its_layers(tmp_path: Path) -> None:
    sparse = SMALL | {"model_type": "beam"}
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    with pytest.raises(RecmasError, match=r"its config\.json has no `layer_types`") as refused:
        describe_backbone(str(tmp_path), base_dir=tmp_path)
    assert refused.value.problems[0].code == "RM202"
    listed = sparse | {"layer_types": ["sliding_attention"] * 11 + ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(listed))
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    assert facts.attention == ("sliding",) * 11 + ("full",)


@pytest.mark.parametrize(
    ("family", "entries", "reason"),
    [
        *((f, {}, "keeps a state") for f in ("xlstm", "recurrent_gemma", "rwkv", "zaya")),
        ("gpt_neo", {}, "cuts its windows out of a table"),
        ("mpt", {}, "cuts its position biases out of a table"),
        ("openai-gpt", {}, "takes no cache"),
        ("dbrx", {}, "loops over the experts that tokens chose"),
        ("git", {}, "makes one mask for an image and a text"),
        (
            "gemma4_unified_assistant",
            {"text_config": {"model_type": "gemma4_unified_text"}},
            "drafts for another model",
        ),
        ("roberta", {}, "is an encoder"),
        ("falcon", {"alibi": True}, "position biases in bfloat16"),
        ("doge", {"keep_window_size": 512}, "its layers choose which keys they see"),
        (
            "minimax_m3_vl",
            {
                "text_config": {
                    "model_type": "minimax_m3_vl_text",
                    "num_hidden_layers": 2,
                    "sparse_attention_config": {"sparse_attention_freq": [0, 1]},
                }
            },
            "its layers are of type `minimax_m3_sparse`",
        ),
        ("gemma3n_text", {"intermediate_size": [64, 64]}, "inputs of their own for every token"),
    ],
)
def test_what_no_target_runs_is_told_from_the_config(
    family: str, entries: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """As files of these families are: with few entries, under whatever names."""
    given = {"model_type": family, "architectures": ["SomeForCausalLM"], **entries}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(RecmasError, match=reason) as refused:
        describe_backbone(str(tmp_path), base_dir=tmp_path)
    assert refused.value.problems[0].code == "RM203"


@pytest.mark.parametrize(
    ("entries", "most"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 512}, 512),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 1024,
                }
            },
            1024,
        ),
    ],
)
def test_sequences_end_where_frequencies_change(
    entries: dict[str, Any], most: int, tmp_path: Path
) -> None:
    given = {"model_type": "phi3", **SMALL, "max_position_embeddings": 8192, **entries}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert describe_backbone(str(tmp_path), base_dir=tmp_path).max_positions == most


@pytest.mark.parametrize(
    ("entries", "heads"),
    [
        ({}, 1),
        ({"multi_query": False}, 4),
        # its heads share keys, but its code stores them once for every head
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4),
    ],
)
def test_heads_of_falcon(entries: dict[str, Any], heads: int, tmp_path: Path) -> None:
    given = {"model_type": "falcon", **SMALL, "num_key_value_heads": None, **entries}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert describe_backbone(str(tmp_path), base_dir=tmp_path).num_kv_heads == heads


def test_a_text_model_without_a_class_of_its_own(tmp_path: Path) -> None:
    given = {"model_type": "some_vl", "architectures": ["SomeForConditionalGeneration"]}
    text = {"model_type": "some_vl_text", **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(given | {"text_config": text}))
    with pytest.raises(RecmasError, match=r"`some_vl_text`, its text model, has no causal class"):
        describe_backbone(str(tmp_path), base_dir=tmp_path)


def test_a_nested_text_config_leaves_out_what_its_class_fills_in(tmp_path: Path) -> None:
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": {}}))
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    text = CONFIG_MAPPING["gemma3"]().get_text_config()
    assert facts.model_type == text.model_type
    assert facts.width == text.hidden_size
    assert facts.num_layers == text.num_hidden_layers
    assert [KINDS[kind] for kind in facts.attention] == text.layer_types


# Files of these must list their layers: they are refused by the name of what is left out, or as
# what their class would make of them.
MUST_LIST = {"beam", "flint", "granitemoehybrid", "modernbert-decoder"}
MUST_LIST |= {"lfm3", "mimo_v2_flash", "nemotron_h", "gemma4_text", "gemma4_unified_text"}
# Of the others every layer keeps rows of one shape, which the two numbers of heads tell.
STATES = {"falcon_mamba", "mamba", "mamba2", "zamba", "zamba2"}
OF_ONE_SHAPE = sorted(
    family
    for family in {name.partition(" ")[0] for name in ZOO} - MUST_LIST - STATES
    if family_defaults(family).get("code") != "state"
    and "kv_lora_rank" not in family_defaults(family)
)


@pytest.mark.parametrize("family", OF_ONE_SHAPE)
def test_a_file_of_nothing_but_sizes_is_read_as_its_class_reads_it(
    family: str, tmp_path: Path
) -> None:
    """Heads, their width, kinds of layers and tied tables are what the class fills in."""
    config = CONFIG_MAPPING[family]()
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    names = config.attribute_map
    given = {names.get(name, name): getattr(config, name) for name in sizes}
    given |= {"max_position_embeddings": getattr(config, "max_position_embeddings", 1024)}
    given |= {"model_type": family, "architectures": [family_class(family)]}
    (tmp_path / "config.json").write_text(json.dumps(given))
    facts = describe_backbone(str(tmp_path), base_dir=tmp_path)
    filled = CONFIG_MAPPING[family](**{k: v for k, v in given.items() if k != "model_type"})
    heads = getattr(filled, "num_key_value_heads", None) or filled.num_attention_heads
    assert facts.num_kv_heads == (1 if getattr(filled, "multi_query", False) else heads)
    width = getattr(filled, "head_dim", None)
    assert facts.head_dim == (width or filled.hidden_size // filled.num_attention_heads)
    assert facts.num_tables == (1 if filled.tie_word_embeddings else 2)
    types = getattr(filled, "layer_types", None) or []
    assert list(facts.attention) == [LAYER_KINDS[kind] for kind in types] or not types


def family_class(family: str) -> str:
    """Return the name of the causal class of a model type."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
