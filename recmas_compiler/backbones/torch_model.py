"""Load a backbone's weights, tokenizer and chat template with torch and transformers."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recmas_compiler.backbones.chat_files import (
    GIVE_A_TEMPLATE,
    PLAIN_TEMPLATE,
    check_rows,
    puts_first,
)
from recmas_compiler.backbones.config.rotary import ROWS_STAY_HINT
from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.fetching.hub import Fetch
from recmas_compiler.backbones.gguf_files.header import GgufHeader, read_header
from recmas_compiler.backbones.gguf_files.loading import transformers_parts, transformers_tokenizer
from recmas_compiler.backbones.loaded.own_head import body_of, head_of
from recmas_compiler.backbones.loaded.own_layers import layers_of
from recmas_compiler.backbones.loaded.row_positions import RowsStayError, row_positions_of
from recmas_compiler.backbones.loaded.text_model import text_model, wraps_text_model
from recmas_compiler.backbones.loaded.whole_gradients import with_whole_gradients
from recmas_compiler.backbones.own_tokenizer import TOKENIZER_FILE, load_tokenizer
from recmas_compiler.backbones.sources import (
    ADAPTER_CONFIG,
    ResolvedSource,
    files_of,
    gguf_errors,
    joined,
    model_files,
)
from recmas_runtime.core.errors import RecmasError, fail, how_to_install, is_out_of_memory
from recmas_runtime.core.progress import Progress
from recmas_runtime.core.text import first_line
from recmas_runtime.formats.layers import LayerShape, RowPositions

# The self-check compares two ways of computing the same numbers in float32; a head or an embedding
# that does something unknown (a logit scale, say) is off by far more than rounding.
SELF_CHECK_RELATIVE = 1e-4

# What every `from_pretrained` of a model's folder gets.
_LOAD: Final[Mapping[str, Any]] = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True, kw_only=True)
class TorchBackbone:
    """A frozen causal language model in float32, ready to run.

    Attributes:
        dtype: Element type that its weights were rounded to. They are float32 numbers all the same.
        model: The text model with its head, in eval mode, without gradients.
        tokenizer_json: The same tokenizer in the format of the `tokenizers` library.
        special_tokens: What the template may name: `bos_token`, `eos_token`, ...
        bos_token: Text of the token that starts a sequence, if the backbone has one.
        eos_token_ids: Ids that end an answer, ascending.
    """

    facts: BackboneFacts
    dtype: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    tokenizer_json: str
    chat_template: str
    special_tokens: dict[str, str]
    bos_token: str | None
    eos_token_ids: tuple[int, ...]

    @property
    def body(self) -> nn.Module:
        """The decoder layers and the final norm, without the head."""
        body: nn.Module = body_of(self.model)
        return body

    @property
    def embedding(self) -> nn.Module:
        """The input-embedding module, with whatever scaling it applies."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def embed(self, ids: Tensor) -> Tensor:
        """Return the input embeddings [..., d] of token ids [...]."""
        embeds: Tensor = self.embedding(ids)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., d], as the model's own code does."""
        rows_1Nd = hidden.reshape(1, -1, hidden.shape[-1])
        logits_1NV: Tensor = self._head(inputs_embeds=rows_1Nd, use_cache=False).logits
        return logits_1NV.reshape(*hidden.shape[:-1], -1)

    @cached_property
    def row_positions(self) -> RowPositions:
        """How rows of its cache are moved to other positions, found by running it at some.

        Raises:
            RecmasError: RM202 if they cannot be moved.
        """
        facts = self.facts
        try:
            return row_positions_of(self.model, facts.layers, max_positions=facts.max_positions)
        except RowsStayError as error:
            raise fail(
                "RM202",
                f"rows of the cache of backbone {facts.source!r} ({facts.model_type}) cannot be "
                f"moved to other positions: {error}",
                hint=ROWS_STAY_HINT,
            ) from error

    @cached_property
    def _head(self) -> Any:
        return head_of(self.model)


def load_backbone(
    facts: BackboneFacts,
    *,
    progress: Progress,
    dtype: str = "float32",
    template: str | None = None,
) -> TorchBackbone:
    """Load the backbone that `facts` describes, to compute in float32.

    Args:
        dtype: Element type that weights are rounded to.
        template: Text of a chat template instead of its own.

    Raises:
        RecmasError: RM200 if files are missing, RM201 if a package is, RM202 if recmas cannot run
            it (quantized, not causal, weights missing or beyond `dtype`), RM206 without a chat
            template.
    """
    resolved = joined(files_of(facts, fetch=Fetch(progress=progress)), progress=progress)
    title = f"loading {facts.source}"
    if resolved.gguf_file is None and not (resolved.folder / TOKENIZER_FILE).is_file():
        title += f" (no {TOKENIZER_FILE}: transformers makes one of its vocabulary)"
    with (
        progress.stage(title),
        _quiet_libraries(),
        _named_errors(facts.source),
        gguf_errors(facts.source),
        model_only(resolved) as folder,
    ):
        if resolved.gguf_path is None:
            model = _load_model(resolved, folder)
        else:
            header = read_header(resolved.gguf_path)
            model = _load_gguf_model(resolved, header)
        _check_layers(model, facts)
        _check_weights(model, facts.source)
        _round_weights(model, dtype, facts.source)
        if resolved.gguf_path is None:
            tokenizer = load_tokenizer(folder, _LOAD, source=facts.source)
        else:
            tokenizer = transformers_tokenizer(header)
    chat_template = template or _chat_template(tokenizer, facts.source)
    check_rows(
        tokenizer.backend_tokenizer,
        chat_template,
        special=_named_tokens(tokenizer),
        num_rows=model.get_input_embeddings().weight.shape[0],
        source=facts.source,
    )
    backbone = TorchBackbone(
        facts=facts,
        dtype=dtype,
        model=model,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=chat_template,
        special_tokens=_special_tokens(tokenizer, chat_template),
        bos_token=tokenizer.bos_token,
        eos_token_ids=_eos_token_ids(model, tokenizer),
    )
    _check_itself(backbone)
    return backbone


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of all weights: names, types, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        flat = weight.detach().cpu().contiguous().view(torch.uint8).flatten()
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def _load_model(resolved: ResolvedSource, folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, **_LOAD)
    _check_config(config, resolved)
    loader = AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and wraps_text_model(config):
        loader = AutoModelForImageTextToText
    model, info = loader.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with the shapes
        use_safetensors=True,
        **_LOAD,
    )
    return _loaded(model, info, resolved)


def _load_gguf_model(resolved: ResolvedSource, header: GgufHeader) -> Any:
    config, weights = transformers_parts(header)
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return _loaded(model, info, resolved)


def _loaded(model: Any, info: Mapping[str, Any], resolved: ResolvedSource) -> Any:
    """Return the text model that was loaded, after looking at what the loading said."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise fail(
            "RM202",
            f"backbone {resolved.source!r} has {name!r} of shape {list(found)}, but its "
            f"config.json says {list(wanted)}",
            hint="Give weights and config.json of one model.",
        )
    _refuse_unused(model, info["unexpected_keys"], resolved.source)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise fail(
            "RM202",
            f"backbone {resolved.source!r} lacks {len(missing)} weights, such as {missing[0]!r}",
            hint="Download it again, or choose the complete model rather than an adapter.",
        )
    return with_whole_gradients(text_model(model)).requires_grad_(False).eval()


def _check_layers(model: Any, facts: BackboneFacts) -> None:
    """Refuse a model whose layers keep something else than its config says: plans count it."""
    found = layers_of(model)
    # The last layers of some models keep nothing, and have no place in a cache at all.
    found += (LayerShape(),) * (facts.num_layers - len(found))
    for i, (told, kept) in enumerate(zip_longest(facts.layers, found)):
        if told is None or kept is None or _unordered(told) != _unordered(kept):
            raise fail(
                "RM202",
                f"backbone {facts.source!r} ({facts.model_type}) keeps {kept} in layer {i}, where "
                f"its config.json tells of {told}",
                hint="Write what the config leaves out into its config.json.",
            )


def _unordered(layer: LayerShape) -> object:
    """Return what tells layers apart: transformers has the axes of some states in another order."""
    return layer.rows, [(state.name, sorted(state.shape)) for state in layer.states]


def _refuse_unused(model: Any, names: Iterable[str], source: str) -> None:
    """Refuse tensors that belong to a layer of the model and that it has no place for.

    They are biases that the config denies, scales of quantized weights, adapters: without them the
    layer computes something else. Tensors of parts that the model does not have are no loss.
    """
    layers = {
        name for name, module in model.named_modules() if name and not list(module.children())
    }
    unused = sorted(
        name
        for name in names
        if any(parent in layers for parent in accumulate(name.split("."), "{}.{}".format))
    )
    if unused:
        raise fail(
            "RM202",
            f"backbone {source!r} has {len(unused)} tensors that its config.json has no place for, "
            f"such as {unused[0]!r}",
            hint="Give weights and config.json of one model: unquantized, with adapters merged.",
        )


def _check_weights(model: Any, source: str) -> None:
    """Refuse weights that are not numbers: whatever is computed with them is not one, either."""
    for name, weight in model.named_parameters():
        # Both are NaN where one weight is. No table of answers as large as the weights is made.
        ends = torch.stack(weight.aminmax()) if weight.numel() else torch.zeros(2)
        if not bool(torch.isfinite(ends).all()):
            raise fail(
                "RM202",
                f"backbone {source!r} has weights that are NaN or infinite, in {name!r}",
                hint="Download it again; if they were trained, training diverged.",
            )


def _round_weights(model: Any, dtype: str, source: str) -> None:
    """Make every weight a number that `dtype` holds."""
    if dtype == "float32":
        return
    for name, weight in model.named_parameters():
        rounded = weight.detach().to(getattr(torch, dtype)).to(torch.float32)
        if not bool(torch.isfinite(rounded).all()):
            raise fail(
                "RM202",
                f"backbone {source!r} has weights that {dtype} cannot hold, in {name!r}",
                hint="Set its `dtype` to float32 or bfloat16.",
            )
        # Not in place: the weight may be a read-only map of its file.
        weight.data = rounded


def _check_config(config: Any, resolved: ResolvedSource) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "unknown")
        raise fail(
            "RM202",
            f"backbone {resolved.source!r} is quantized ({method})",
            hint="Name the unquantized model; recmas quantizes engines itself.",
        )
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = list(getattr(config, "architectures", None) or [])
    is_causal = not known.isdisjoint(architectures) or wraps_text_model(config)
    if config.is_encoder_decoder or (architectures and not is_causal):
        shape = ", ".join(architectures) or config.model_type
        raise fail(
            "RM202",
            f"backbone {resolved.source!r} is not a causal language model ({shape})",
            hint="Choose a decoder-only text model, one whose architecture ends in ForCausalLM.",
        )


def _chat_template(tokenizer: Any, source: str) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise fail(
            "RM206",
            f"backbone {source!r} has no chat template",
            hint=GIVE_A_TEMPLATE,
        ) from error
    return template


def _named_tokens(tokenizer: Any) -> dict[str, str]:
    """Return the special tokens that a chat template may write without spelling them."""
    named = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: str(getattr(tokenizer, name)) for name in named}


def _special_tokens(tokenizer: Any, template: str) -> dict[str, str]:
    """Return what a template may name; for plain text only what the tokenizer itself puts first."""
    found = dict(tokenizer.special_tokens_map)
    if template == PLAIN_TEMPLATE and not puts_first(
        tokenizer.backend_tokenizer, found.get("bos_token")
    ):
        found.pop("bos_token", None)
    return found


def _eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the union of what generation config, config and tokenizer call the end.

    Repositories disagree here: a config may know only the end of a document, the tokenizer only
    the end of a turn. Ids outside the vocabulary are left out (placeholders such as -1 exist).
    """
    found: set[int] = set()
    for ids in (
        model.generation_config.eos_token_id,
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ):
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return tuple(sorted(i for i in found if 0 <= i < model.config.get_text_config().vocab_size))


@torch.no_grad()
def _check_itself(backbone: TorchBackbone) -> None:
    """Refuse a model that computes something between embedding, body and head unknown to us."""
    ids = torch.arange(3, 7)[None] % backbone.facts.vocab_size
    expected = backbone.model(input_ids=ids, use_cache=False).logits
    hidden = backbone.body(inputs_embeds=backbone.embed(ids), use_cache=False).last_hidden_state
    error = (backbone.logits(hidden) - expected).abs().max() / expected.abs().max()
    if not error <= SELF_CHECK_RELATIVE:
        raise fail(
            "RM202",
            f"backbone {backbone.facts.source!r} ({backbone.facts.model_type}) transforms its "
            f"embeddings or logits in a way recmas does not know (relative error {error:.1e})",
            hint="Choose a backbone of another architecture.",
        )


@contextmanager
def model_only(resolved: ResolvedSource) -> Iterator[Path]:
    """Give a folder with nothing but the model's own files.

    That is its folder itself, unless it also holds an adapter: an `adapter_config.json` makes
    transformers look for PEFT weights, and fail where it describes something else.
    """
    if not (resolved.folder / ADAPTER_CONFIG).exists():
        yield resolved.folder
        return
    with tempfile.TemporaryDirectory(prefix="recmas-model-") as name:
        for path in model_files(resolved.folder):
            (Path(name) / path.name).symlink_to(path.resolve())
        yield Path(name)


@contextmanager
def _named_errors(source: str) -> Iterator[None]:
    """Turn what transformers raises into errors that name the backbone."""
    try:
        yield
    except RecmasError:
        raise
    except ImportError as error:
        raise fail(
            "RM201",
            f"loading backbone {source!r} needs a package that is not installed: "
            f"{first_line(error)}",
            hint=how_to_install("compile"),
        ) from error
    except (ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"backbone {source!r} does not fit: {first_line(error)}") from error
        raise fail(
            "RM202",
            f"backbone {source!r} cannot be loaded: {first_line(error)}",
            hint="Choose a causal language model that this version of transformers knows.",
        ) from error
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise fail(
            "RM200",
            f"files of backbone {source!r} are missing or unreadable: {first_line(error)}",
            hint="Check the folder or download the model again.",
        ) from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the progress bars, warnings and logs of libraries off the terminal."""
    log = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()
