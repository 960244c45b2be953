"""The manifest: what a bundle holds, what it was made from, and how to know it is whole."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from msgspec import Meta, field

from recmas_runtime.formats.codec import Count, Dim, Finite, Size, StrictStruct
from recmas_runtime.formats.layers import MOST_LAYERS, LayerShape, RowPositions
from recmas_runtime.formats.messages import Layers

# A parity case runs as a batch of sequences of unequal length.
PARITY_ROWS: Final = 2

MANIFEST_VERSION = 2
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
SPEC_NAME = "spec.yaml"


class FileEntry(StrictStruct, frozen=True, kw_only=True):
    """A file of the bundle, by its path relative to the bundle with forward slashes.

    Its SHA-256 digest is in lower-case hexadecimal.
    """

    sha256: str
    size_bytes: Size


class BackboneEntry(StrictStruct, frozen=True, kw_only=True):
    """A backbone's engines and dimensions. Paths are relative to the bundle.

    Attributes:
        source: Where its weights came from, as the spec names it.
        layers: What each layer keeps of a sequence.
        max_positions: Longest sequence that the backbone was made for.
        bos_token: Surface form, or None.
        dtype: Element type of activations and caches.
        precision: `float32`, or `int8` or `int4` for weights in blocks of integers.
        eos_token_ids: Tokens that end an answer.
        decoder: `decoder.onnx`: inputs_embeds, write_index, last_index, caches, inner link ->
            hidden, thought, next_embeds, caches. Standard operators, but for quantized weights.
        cpu_decoder: The same in operators of ONNX Runtime's CPU provider; None if there is none.
            Behind cached rows it takes one sample at a time, or one position of each.
        embed: `embed.onnx`: input_ids -> inputs_embeds.
        head: `head.onnx`: hidden -> logits.
        weights: The one file with the weights all three graphs point into.
        special_tokens: Named special tokens that the chat template may refer to.
        masked_layers: Groups of layers from which rows of a cache can be hidden, see
            `messages.masked_layers`; the decoder has a mask for each in its input `hidden_rows`.
            Empty where it has no such input.
        row_positions: How rows of its cache are moved to other positions; None where none is.
    """

    source: str
    digest: str
    model_type: str
    width: Dim
    layers: Annotated[tuple[LayerShape, ...], Meta(min_length=1, max_length=MOST_LAYERS)]
    vocab_size: Count
    max_positions: Annotated[int, Meta(ge=1, le=2**31)]
    dtype: str
    bos_token: str | None
    eos_token_ids: tuple[Annotated[int, Meta(ge=0, le=2**24)], ...]
    decoder: str
    embed: str
    head: str
    weights: str
    tokenizer: str
    chat_template: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    precision: str = "float32"
    cpu_decoder: str | None = None
    masked_layers: Annotated[tuple[Layers, ...], Meta(max_length=MOST_LAYERS)] = ()
    row_positions: RowPositions | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.layers)

    def decoder_on(self, device: str) -> str:
        """Return the decoder that runs on a device."""
        return self.cpu_decoder if device == "cpu" and self.cpu_decoder else self.decoder


class LinkEntry(StrictStruct, frozen=True, kw_only=True):
    """A link's weights.

    Attributes:
        file: safetensors file, relative to the bundle.
        kind: `residual`, `biased_residual`, `ln_residual` or `projected`.
        role: `inner` or `outer`.
        init: How the weights came to be: `aligned`, `random` or the file they were read from.
        cosine: Held-out cosine of an aligned link to its targets; None where it does not apply.
    """

    file: str
    kind: str
    role: str
    in_dim: Dim
    out_dim: Dim
    init: str
    cosine: Finite | None = None


class LossEntry(StrictStruct, frozen=True, kw_only=True):
    """What a backbone's precision costs, measured at build over a text, against float32.

    Every position is teacher-forced; losses are mean -log p of the next token, in nats.

    Attributes:
        text: Name of the file, or `recmas's text` for the one that ships with recmas.
        hidden_cosine: Mean cosine of final hidden states to the reference's.
        greedy_agreement: Share of positions where the likeliest token is the reference's.
    """

    text: str
    num_tokens: Annotated[int, Meta(ge=1, le=2**32)]
    hidden_cosine: Annotated[float, Meta(ge=-1.0, le=1.0)]
    greedy_agreement: Annotated[float, Meta(ge=0.0, le=1.0)]
    reference_loss: Finite
    loss: Finite


class ParityEntry(StrictStruct, frozen=True, kw_only=True):
    """A teacher-forced case: the engine's own error against the reference, measured at build.

    Attributes:
        file: safetensors file with inputs and expected outputs, relative to the bundle.
        figures: Measured differences by the names of `precisions.TOLERANCES`.
        loss: What the precision costs; None in float32.
    """

    file: str
    backbone: str
    figures: dict[str, Finite]
    greedy_tokens_equal: bool
    loss: LossEntry | None = None


class LayerScores(StrictStruct, frozen=True, kw_only=True):
    """What layers were chosen by that get handed rows, where a spec says only how many.

    Attributes:
        attention: By layer, the attention that a question's positions pay to a text before it, the
            mean over heads and positions; None for a layer without rows.
        scores: What they were ranked by, likewise.
    """

    attention: Annotated[tuple[Finite | None, ...], Meta(max_length=MOST_LAYERS)]
    scores: Annotated[tuple[Finite | None, ...], Meta(max_length=MOST_LAYERS)]


class Manifest(StrictStruct, frozen=True, kw_only=True):
    """The whole manifest.

    Attributes:
        fingerprint: sha256 over the printed program, options and weights: equal for equal inputs.
        precision: Of the build; a backbone's own counts.
        tools: Versions of what built it.
        link_engine: `links/link.onnx`, relative to the bundle.
        probe: `parity/probe.onnx`, the known-answer probe.
        files: Every file of the bundle but the manifest itself.
        prompt_digests: sha256 of the tokens of each agent's prompts, by `first` and `then`, and
            behind turns where a plan shows them; see `prompts.samples`. Empty in bundles of
            earlier builds.
        token_digests: sha256 of the ids that each backbone's tokenizer gives texts in which
            tokenizers differ; likewise.
    """

    newest_version: ClassVar = MANIFEST_VERSION

    version: int = MANIFEST_VERSION
    name: str
    fingerprint: str
    spec_digest: str
    precision: str
    tools: dict[str, str]
    backbones: dict[str, BackboneEntry]
    links: dict[str, LinkEntry]
    link_engine: str
    probe: str
    parity: tuple[ParityEntry, ...]
    files: dict[str, FileEntry]
    prompt_digests: dict[str, dict[str, str]] = field(default_factory=dict)
    token_digests: dict[str, str] = field(default_factory=dict)
    layer_scores: dict[str, LayerScores] = field(default_factory=dict)
