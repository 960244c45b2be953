"""The sections of the language but `train`: every key with its type, default, bounds and meaning.

The JSON schema and the tables of `specs/README.md` are made from these classes, so descriptions
here are what users read. All models are frozen and refuse unknown keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args

from msgspec import structs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from recmas_compiler.spec.document.problems import form_tag
from recmas_runtime.formats.ids import LINK_PATTERN, SLUG_PATTERN
from recmas_runtime.formats.link_kinds import (
    DEFAULT_INIT,
    DEFAULT_KIND,
    LATENTMAS_KIND,
    LinkInit,
    LinkKind,
)
from recmas_runtime.formats.messages import MAX_EVERY, MAX_LAYERS, Carries, MessageForm, RowsOf
from recmas_runtime.formats.plan import (
    FIELD_PATTERN,
    MAX_DRAFT,
    MAX_LATENT_STEPS,
    MAX_MATCH,
    MAX_NEW_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    ConversationPart,
    History,
    SpeculationMethod,
    parse_day,
)
from recmas_runtime.formats.precisions import PrecisionName, TargetName

MAX_AGENTS: Final = 64

# Of a text that is handed over, where a link does not say.
DEFAULT_MAX_TOKENS: Final = 64

PATH_PATTERN: Final = r"^[^\x00-\x1f]+$"

Slug = Annotated[str, StringConstraints(pattern=f"^{SLUG_PATTERN}$", max_length=64)]
FilePath = Annotated[str, StringConstraints(pattern=PATH_PATTERN, max_length=4096)]

_T = TypeVar("_T")


def _refuse_blank(value: object) -> object:
    """Refuse `key:` with nothing after it, which is a slip and not a wish for the default."""
    if value is None:
        raise PydanticCustomError("blank", "is empty")
    return value


Given = Annotated[_T | None, BeforeValidator(_refuse_blank)]
"""An optional value which, where its key is written, must be given."""


class Section(BaseModel):
    """A mapping of the language."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Task = Literal["general", "math", "choice", "code", "search"]

Specialists = Annotated[
    tuple[Slug, ...], Field(strict=False, min_length=1, max_length=MAX_AGENTS - 1)
]
Chain = Annotated[tuple[Slug, ...], Field(strict=False, min_length=1, max_length=MAX_AGENTS)]


class MixtureSection(Section):
    """Specialists side by side, and a summarizer that brings their thoughts together."""

    specialists: Specialists
    """Agents that think about the question independently of each other."""

    summarizer: Slug
    """The agent that sees all their thoughts, writes the answer and feeds back to each of them."""


class DistillationSection(Section):
    """An expert and the learner that it guides."""

    expert: Slug
    """The agent that thinks first, usually on the larger backbone."""

    learner: Slug
    """The agent that sees its thoughts, writes the answer and feeds back to it."""


class DeliberationSection(Section):
    """A reflector and a caller, which may use tools."""

    reflector: Slug
    """The agent that thinks about what is known and what is to be done."""

    caller: Slug
    """The agent that sees its thoughts, calls tools (see `answer.tools`), writes the answer and
    feeds back to it."""


class PatternSection(Section):
    """A macro that writes agents, links and `answer`; what is written out wins over it.

    Exactly one arrangement, and a task.
    """

    sequential: Given[Chain] = None
    """Agents in a chain; the last one writes the answer and feeds back to the first."""

    mixture: Given[MixtureSection] = None
    """Parallel specialists and a summarizer."""

    distillation: Given[DistillationSection] = None
    """An expert and a learner."""

    deliberation: Given[DeliberationSection] = None
    """A reflector and a caller of tools."""

    task: Task = "general"
    """What the prompts ask for: an answer in the last line (`general`), a number in `\\boxed{}`
    (`math`), the letter of one of the record's `choices` (`choice`), a block of Python (`code`), a
    short answer (`search`)."""

    carries: Carries = "thoughts"
    """What its links carry, unless they say so themselves. Untrained `thoughts`, `context` and
    `written` mislead the answer agent; `cache` does not, needs one backbone, and adds a link from
    each agent to all that come after it in a round."""

    @model_validator(mode="after")
    def _name_one_pattern(self) -> Self:
        if len(self.given) != 1:
            raise PydanticCustomError("one_pattern", "should name one", {"given": self.given})
        return self

    @property
    def given(self) -> tuple[str, ...]:
        """The patterns that are named, in the order of the schema; exactly one once checked."""
        return tuple(name for name in PATTERN_NAMES if getattr(self, name) is not None)


PATTERN_NAMES: Final = tuple(
    name for name in PatternSection.model_fields if name not in ("task", "carries")
)


class StopSection(Section):
    """When the recursion may end before its last round."""

    cosine: float = Field(gt=0.0, le=1.0)
    """A record has converged once every message of a round has at least this mean cosine to the
    same link's message of the round before; its next round is then its last. 0.999 is a start."""


class SearchSection(Section):
    """The tool `search`; exactly one of `corpus` and `backend`."""

    corpus: Given[FilePath] = None
    """Passages to search: a file of JSON lines `{id, title, text}` or a folder of `.txt` and `.md`
    files, relative to the spec. It is copied into the bundle."""

    backend: Given[Literal["tavily"]] = None
    """A web service instead of a corpus: `tavily`, with its key in `TAVILY_API_KEY`."""

    top_k: int = Field(default=3, ge=1, le=50)
    """Passages that a search returns."""


class PythonSection(Section):
    """The tool `python`: code that the model wrote, in a sandbox or not at all."""

    memory_mb: int = Field(default=256, ge=16, le=65_536)
    """Most memory of the program, in MiB."""


class ToolsSection(Section):
    """What the answer agent may call while it writes, and the bounds of it."""

    search: Given[SearchSection] = None
    """Lets it search: `<search>words</search>`."""

    python: Given[PythonSection] = None
    """Lets it run programs: `<python>code</python>`. `{}` takes the defaults."""

    ask: bool = False
    """Lets it ask a human: `<ask>question</ask>`."""

    functions: tuple[Slug, ...] = Field(default=(), strict=False, max_length=32)
    """Functions that the caller of the runtime provides, by name: `<NAME>argument</NAME>`."""

    max_calls: int = Field(default=4, ge=1, le=64)
    """Most calls of one answer; later ones are answered with a refusal."""

    timeout_s: float = Field(default=10.0, gt=0.0, le=600.0)
    """Most seconds of one call."""

    max_result_chars: int = Field(default=2000, ge=1, le=100_000)
    """Most characters of a result; a longer one says how much was left out."""

    @property
    def are_on(self) -> bool:
        """Whether there is any tool."""
        return bool(self.search or self.python or self.ask or self.functions)


class SpeculationSection(Section):
    """Speculative decoding: greedy text is drafted, and a draft is verified by one engine call.

    The text stays the same.
    """

    method: SpeculationMethod = "prompt_lookup"
    """`prompt_lookup` drafts what followed the last tokens where they stood before, in the prompt
    or in the text."""

    max_draft: int = Field(default=12, ge=1, le=MAX_DRAFT)
    """Most tokens of a draft; a match of n tokens drafts at most 2^n."""

    min_match: int = Field(default=1, ge=1, le=MAX_MATCH)
    """So many last tokens at least must have stood there."""


class AnswerSection(Section):
    """Which agent writes the text, and how its tokens are chosen."""

    agent: Slug
    """The agent that writes the answer in the last round."""

    max_new_tokens: int = Field(default=256, ge=1, le=MAX_NEW_TOKENS)
    """Most tokens of an answer."""

    temperature: float = Field(default=0.0, ge=0.0, le=MAX_TEMPERATURE)
    """0 takes the likeliest token; higher is more varied."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the likeliest tokens that together have this probability."""

    top_k: int = Field(default=0, ge=0, le=MAX_TOP_K)
    """Sample from the k likeliest tokens; 0 keeps all."""

    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Drop tokens below this share of the likeliest one's probability."""

    repetition_penalty: float = Field(default=1.0, gt=0.0, le=MAX_REPETITION_PENALTY)
    """Above 1 makes tokens that were already written less likely."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the first record of a batch; record i uses seed + i."""

    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(
        default=(), strict=False, max_length=MAX_STOPS
    )
    """Texts that end the answer; they are not part of it."""

    stop_when: Given[StopSection] = None
    """Early end of the recursion; without it all rounds run."""

    speculation: Given[SpeculationSection] = None
    """Speculative decoding of all text that is greedy, hand-over texts included; without it each
    token is a call of its own."""

    tools: Given[ToolsSection] = None
    """Tools of the answer agent; without it there are none."""


# The `template` that stands for plain text.
NO_TEMPLATE: Final = "none"

# Variables of the chat template that rendering itself sets.
RESERVED_TEMPLATE_VARIABLES: Final = frozenset({"messages", "add_generation_prompt"})

LinkName = Annotated[str, StringConstraints(pattern=LINK_PATTERN)]
FieldName = Annotated[str, StringConstraints(pattern=f"^{FIELD_PATTERN}$", max_length=256)]
TemplateVariable = Annotated[str, StringConstraints(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
PromptText = Annotated[str, StringConstraints(min_length=1, max_length=100_000)]


def blank_is_default(value: object) -> object:
    """Read `a -> b:` with nothing after it as a link with all defaults."""
    return {} if value is None else value


def _plain_value(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("template_value", "should be true, false, a number or text")
    return value


def _day(value: object) -> object:
    if isinstance(value, str):
        try:
            parse_day(value)
        except ValueError:
            raise PydanticCustomError("day", "should be a day of the form YYYY-MM-DD") from None
    return value


Day = Annotated[str, AfterValidator(_day), WithJsonSchema({"type": "string", "format": "date"})]
TemplateValue = Annotated[bool | int | float | str, BeforeValidator(_plain_value)]


class WeightsSection(Section):
    """Where a link's weights come from: a file, or a start."""

    kind: Given[LinkKind] = None
    """Form of the link: `projected`, `residual` (the paper), `ln_residual` (the released weights),
    `biased_residual` (the released trainer's default; a file of it may stand where the spec says
    `residual`) or `rescaled` (results of one length). Without it: `projected`, with `init:
    latentmas` `rescaled`, or with `weights` the kind of the file."""

    init: Given[LinkInit] = None
    """Start of a link without `weights`: `aligned` (the default) solves for it in closed form when
    the system is built, `latentmas` does so for an inner link by the rule of LatentMAS, `random` is
    for training."""

    weights: Given[FilePath] = None
    """A safetensors file with the link's weights, relative to the spec."""

    @model_validator(mode="before")
    @classmethod
    def _make_start_explicit(cls, data: object) -> object:
        return cls.with_start(data)

    @staticmethod
    def with_start(data: object) -> object:
        """Write out the defaults, so that the resolved spec says what is meant."""
        if isinstance(data, dict) and "weights" not in data:
            kind = LATENTMAS_KIND if data.get("init") == "latentmas" else DEFAULT_KIND
            return {"kind": kind, "init": DEFAULT_INIT} | data
        return data


class InnerSection(WeightsSection):
    """An inner link: hidden states of an agent back to its own input embeddings."""


_ROWS: Final = list(get_args(RowsOf))
_ROWS_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"enum": _ROWS, "type": "string"},
        {"items": {"enum": _ROWS, "type": "string"}, "minItems": 1, "maxItems": 2, "type": "array"},
    ]
}
_LAYER: Final = {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_LAYERS}
_LAYERS_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"const": "all", "type": "string"},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"items": _LAYER, "minItems": 1, "maxItems": MAX_LAYERS, "type": "array"},
    ]
}


def _as_rows(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Rows = Annotated[
    tuple[RowsOf, ...], BeforeValidator(_as_rows), Field(strict=False, min_length=1, max_length=2)
]
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=MAX_LAYERS)], ...],
    Field(strict=False, min_length=1, max_length=MAX_LAYERS),
]
# Of all layers, those that a build chooses.
LayerShare = Annotated[float, Field(gt=0, lt=1)]


def _which_layers(value: object) -> str:
    """Tell which of its forms `layers` has, so that errors are about that one alone."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return form_tag("share" if is_number else "all" if isinstance(value, str) else "list")


LayersKey = Annotated[
    Annotated[Layers, Tag(form_tag("list"))]
    | Annotated[LayerShare, Tag(form_tag("share"))]
    | Annotated[Literal["all"], Tag(form_tag("all"))],
    Discriminator(_which_layers),
    WithJsonSchema(_LAYERS_SCHEMA),
]


class LinkSection(WeightsSection):
    """An outer link: messages of one agent to another one's prompt."""

    feedback: bool = False
    """Its message is seen in the next round. Every cycle needs at least one such link."""

    carries: Carries = "thoughts"
    """What a message is made of. `thoughts`: the hidden states of the sender's latent steps.
    `context`: those at the positions of its prompt. `written`: those at the tokens that it writes.
    `text`: what it writes, as text. `cache`: rows of its key/value cache, which come before the
    receiver's whole prompt; both agents are on one backbone, and the slot stands first."""

    of: Given[FieldName] = None
    """For `context`: only the tokens of this field, or of `facts[0]`, an entry of a list, wherever
    the sender's prompt shows it."""

    every: Given[Annotated[int, Field(ge=2, le=MAX_EVERY)]] = None
    """For `context`: only each so many-th position, counted back from the last."""

    pool: Given[bool] = None
    """For `context`: the means over as many equal spans of positions as the sender has latent
    steps."""

    max_tokens: Given[Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]] = None
    """Most tokens that the sender writes (default 64), where the message is made of what it
    writes."""

    rows: Given[Annotated[Rows, WithJsonSchema(_ROWS_SCHEMA)]] = None
    """For `cache`: `context` (the sender's prompt without the generation prompt; the default),
    `prompt` (all of it), `thoughts`, `written`, or one of the first two with one of the others as a
    list."""

    layers: Given[LayersKey] = None
    """For `cache`: `all` (the default), or a list of the layers that get the rows, the first of
    which is 0, or a share such as `0.3`: the build then chooses so many, by how much attention each
    pays to a text it has read. Of a prompt the others see the first row alone, and positions go on
    behind all of them."""

    @model_validator(mode="before")
    @classmethod
    def _make_start_explicit(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("carries") in ("text", "cache"):
            return data  # goes through no link weights
        return WeightsSection.with_start(data)

    @property
    def layer_share(self) -> float | None:
        """The share of layers whose rows are handed over; None where it says which."""
        return self.layers if isinstance(self.layers, float) else None

    @property
    def form(self) -> MessageForm:
        """What its messages are made of, with every default in place but layers that are chosen."""
        rows = self.rows or (("context",) if self.carries == "cache" else ())
        form = MessageForm(
            carries=self.carries,
            of=self.of,
            every=self.every or 1,
            pool=self.pool is True,
            rows=rows,
            layers=self.layers if isinstance(self.layers, tuple) else None,
        )
        if not form.needs_text:
            return form
        return structs.replace(form, max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS)


class PromptSection(Section):
    """What an agent is asked; a plain text means `then` alone.

    `{{ field }}` is a field of the input record, `{{ field[0] }}` the first entry of one that is a
    list, `{{ latent.AGENT }}` a slot for that agent's message. Nothing else of Jinja is allowed.
    """

    first: Given[PromptText] = None
    """Prompt while a slot has no message yet, that is in round 1 of an agent that a feedback link
    feeds; such an agent needs it."""

    then: PromptText
    """Prompt with all slots."""

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_text(cls, data: object) -> object:
        if not isinstance(data, str | dict | cls):
            raise PydanticCustomError(
                "prompt", "should be text, or a mapping of `first` and `then`"
            )
        return {"then": data} if isinstance(data, str) else data

    @model_serializer
    def _write_plain_text(self) -> str | dict[str, str]:
        return self.then if self.first is None else {"first": self.first, "then": self.then}


class AgentSection(Section):
    """A role on a backbone."""

    backbone: Slug
    """Name of a backbone. An agent on one behind an API takes and gives `text` alone, and takes no
    latent steps."""

    system: Given[Annotated[str, StringConstraints(max_length=100_000)]] = None
    """System text. It may hold `{{ field }}` and `{{ field[0] }}`, but no slots. Without it there
    is no system message."""

    prompt: PromptSection
    """Text, or a mapping of `first` and `then`."""

    inner: InnerSection = Field(default_factory=lambda: InnerSection.model_validate({}))
    """The agent's inner link."""

    latent_steps: Given[Annotated[int, Field(ge=0, le=MAX_LATENT_STEPS)]] = None
    """Latent steps of this agent instead of the spec's `latent_steps`."""

    chat_template: dict[TemplateVariable, TemplateValue] = Field(default_factory=dict)
    """Extra variables for the backbone's chat template, such as `enable_thinking: true`."""


class ServeSection(Section):
    """What becomes of a conversation, where a built system is served.

    Besides `history` its keys are fields of the record: `FIELD: last_user` takes the last user
    message, `FIELD: system` the text of all system messages.
    """

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            "additionalProperties": {"enum": list(get_args(ConversationPart)), "type": "string"},
        },
    )
    __pydantic_extra__: dict[str, ConversationPart] = Field(init=False)

    history: History = "transcript"
    """What becomes of earlier messages, and of system messages that no field takes: a `transcript`
    before the last question, in the same field; `turns` of their own before the answer agent's
    prompt; or `refuse`."""

    @property
    def taken(self) -> dict[str, ConversationPart]:
        """The part of a conversation that each field takes."""
        return dict(self.__pydantic_extra__)


class BuildSection(Section):
    """What to build, and the limits to build it for."""

    target: TargetName = "onnx"
    """Kind of engine: `onnx` runs anywhere; `tensorrt` adds engines for the GPU that it is built
    on, and needs TensorRT there."""

    precision: PrecisionName = "float32"
    """How engines hold weights: `float32`, or `int8` or `int4` in blocks, which are smaller
    and faster and lose a little. This version builds these three."""

    loss_text: Given[FilePath] = None
    """A text file, relative to the spec, over which a build measures what `int8` or `int4` loses.
    Without it a text that ships with recmas is taken."""

    max_prompt_tokens: int = Field(default=512, ge=1, le=1_048_576)
    """Most positions of one agent's prompt, messages included. Longer prompts are refused."""

    max_batch: int = Field(default=8, ge=1, le=1024)
    """Most records in one batch."""
