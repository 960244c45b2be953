"""The manifest: what a bundle holds, what it was made from, and how to know it is whole."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, get_args

from msgspec import Meta, field

from recmas_runtime.formats.codec import Count, Dim, Finite, Size, StrictStruct, Whole
from recmas_runtime.formats.layers import MOST_LAYERS, LayerShape, RowPositions
from recmas_runtime.formats.messages import Layers

# A parity case runs as a batch of sequences of unequal length.
PARITY_ROWS: Final = 2

MOST_POSITIONS: Final = 2**31

MANIFEST_VERSION = 2
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
SPEC_NAME = "spec.yaml"

# How a spec names such a model, before its name at the endpoint.
OPENAI: Final = "openai:"
# Where nothing else is said: the service that gave the form its name, and where its key is.
OPENAI_URL: Final = "https://api.openai.com/v1"
OPENAI_KEY: Final = "OPENAI_API_KEY"

VARIABLE_PATTERN: Final = r"^[A-Z_][A-Z0-9_]{0,127}$"
# Without a name, a password, a query or a fragment.
URL_PATTERN: Final = r"^https?://[^\s/?#@\\]+(?:/[^\s?#\\]*)?$"
MAX_RETRIES: Final = 16
MAX_TIMEOUT_S: Final = 3600.0
TIMEOUT_S: Final = 120.0
RETRIES: Final = 2
# Of what recmas says in a request, that which some models refuse.
LeftOut = Literal["max_completion_tokens", "seed", "stop", "temperature", "top_p"]
# All that it may say.
RESERVED: Final = frozenset(
    {
        *get_args(LeftOut),
        *("messages", "min_p", "model", "n", "repetition_penalty", "stream", "stream_options"),
        *("tools", "top_k"),
    }
)

BodyValue = bool | Whole | Finite | str


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
        dtype: Element type of what engines take and give: input vectors, hidden states, logits.
        cache_dtype: Element type of keys and values; layer states are float32.
        precision: One of `precisions.PRECISIONS`.
        device: What the spec has placed it on, of `formats.devices`.
        eos_token_ids: Tokens that end an answer.
        decoder: `decoder.onnx`: inputs_embeds, write_index, last_index, caches, inner link ->
            hidden, thought, next_embeds, caches. Standard operators, but for quantized weights.
        cpu_decoder: The same in operators of ONNX Runtime's CPU provider; None if there is none.
            Behind cached rows it takes one sample at a time, or one position of each. Where graphs
            compute in 16 bits: the same in float32, rounded where they are, and no such limit.
        embed: `embed.onnx`: input_ids -> inputs_embeds.
        head: `head.onnx`: hidden -> logits.
        cpu_head: The same for a CPU, where graphs compute in 16 bits; None if it is that one.
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
    max_positions: Annotated[int, Meta(ge=1, le=MOST_POSITIONS)]
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
    cpu_head: str | None = None
    cache_dtype: str = "float32"
    device: str = "auto"
    masked_layers: Annotated[tuple[Layers, ...], Meta(max_length=MOST_LAYERS)] = ()
    row_positions: RowPositions | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.layers)

    def decoder_on(self, device: str) -> str:
        """Return the decoder that runs on a device."""
        return self.cpu_decoder if device == "cpu" and self.cpu_decoder else self.decoder

    def head_on(self, device: str) -> str:
        """Return the head that runs on a device."""
        return self.cpu_head if device == "cpu" and self.cpu_head else self.head

    @property
    def is_narrow(self) -> bool:
        """Whether its graphs compute in 16 bits, which a CPU does in float32 with roundings."""
        return self.cache_dtype != "float32"


class Prices(StrictStruct, frozen=True, kw_only=True):
    """What a million tokens cost, in whatever currency the spec's author counts."""

    prompt: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    completion: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0


class RemoteEntry(StrictStruct, frozen=True, kw_only=True, omit_defaults=True):
    """A model behind an endpoint of OpenAI's form.

    Attributes:
        model: Its name there.
        base_url: The endpoint, up to and with its version, such as `http://127.0.0.1:8000/v1`.
        api_key_env: The environment variable that holds the key; None where there is none.
        timeout_s: Most seconds without a byte of the answer.
        max_retries: Further attempts where one fails for a reason that may pass.
        prices: None where they are not known.
        leave_out: What recmas would say in a request, and does not.
        body: Further keys of each request.
    """

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    base_url: Annotated[str, Meta(pattern=URL_PATTERN, max_length=2048)]
    api_key_env: Annotated[str, Meta(pattern=VARIABLE_PATTERN)] | None = None
    timeout_s: Annotated[float, Meta(gt=0.0, le=MAX_TIMEOUT_S)] = TIMEOUT_S
    max_retries: Annotated[int, Meta(ge=0, le=MAX_RETRIES)] = RETRIES
    prices: Prices | None = None
    leave_out: tuple[LeftOut, ...] = ()
    body: dict[str, BodyValue] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model as messages name it."""
        return f"{OPENAI}{self.model} at {self.base_url}"

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return what so many tokens cost; None without prices."""
        if self.prices is None:
            return None
        prices = self.prices
        return (prompt_tokens * prices.prompt + completion_tokens * prices.completion) / 1e6


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
        remotes: Models behind an API, by the names that agents have for them; no backbone is of the
            same name.
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
    remotes: dict[str, RemoteEntry] = field(default_factory=dict)

    @property
    def num_rows(self) -> dict[str, int]:
        """By backbone, the rows of its table of embeddings."""
        return {name: entry.vocab_size for name, entry in self.backbones.items()}

    def max_positions_of(self, model: str) -> int:
        """Return the longest sequence of a backbone; of a remote model that is its own matter."""
        entry = self.backbones.get(model)
        return MOST_POSITIONS if entry is None else entry.max_positions
