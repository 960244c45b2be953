"""The schema of the language: every key with its type, default, bounds and meaning.

The JSON schema and the tables of `specs/README.md` are made from these classes, so descriptions
here are what users read. All models are frozen and refuse unknown keys.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from recmas_compiler.spec.document.problems import sections_of
from recmas_compiler.spec.schema.answer import AnswerSection
from recmas_compiler.spec.schema.pattern import PatternSection
from recmas_compiler.spec.schema.section import (
    MAX_AGENTS,
    FilePath,
    Given,
    Section,
    Slug,
)
from recmas_compiler.spec.schema.train import TrainSection
from recmas_runtime.formats.ids import LINK_PATTERN
from recmas_runtime.formats.link_kinds import DEFAULT_INIT, DEFAULT_KIND, LinkInit, LinkKind
from recmas_runtime.formats.precisions import Dtype, PrecisionName
from recmas_runtime.formats.targets import TargetName

LANGUAGE_VERSION: Final = 1

# Variables of the chat template that rendering itself sets.
RESERVED_TEMPLATE_VARIABLES: Final = frozenset({"messages", "add_generation_prompt"})

LinkName = Annotated[str, StringConstraints(pattern=LINK_PATTERN)]
TemplateVariable = Annotated[str, StringConstraints(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
PromptText = Annotated[str, StringConstraints(min_length=1, max_length=100_000)]


def _blank_is_default(value: object) -> object:
    """Read `a -> b:` with nothing after it as a link with all defaults."""
    return {} if value is None else value


def _plain_value(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("template_value", "should be true, false, a number or text")
    return value


TemplateValue = Annotated[bool | int | float | str, BeforeValidator(_plain_value)]


class BackboneSection(Section):
    """A frozen causal language model that agents run on."""

    source: FilePath
    """Where its weights are: `builtin:smollm2-135m-instruct`, `hf:ORG/NAME@REVISION`, or a folder
    with `config.json`, relative to the spec."""

    dtype: Dtype = "float32"
    """Element type that its weights are rounded to and stored in. Engines compute in float32
    whatever it is; `bfloat16` and `float16` halve the bundle."""

    precision: Given[PrecisionName] = None
    """Precision of this backbone's engines instead of `build.precision`."""


class WeightsSection(Section):
    """Where a link's weights come from: a file, or a start."""

    kind: Given[LinkKind] = None
    """Form of the link: `projected`, `residual` (the paper) or `ln_residual` (the released
    weights). Without it: `projected`, or with `weights` the kind of the file."""

    init: Given[LinkInit] = None
    """Start of a link without `weights`: `aligned` (the default) solves for it in closed form when
    the system is built, `random` is for training."""

    weights: Given[FilePath] = None
    """A safetensors file with the link's weights, relative to the spec."""

    @model_validator(mode="before")
    @classmethod
    def _make_start_explicit(cls, data: object) -> object:
        """Write out the defaults, so that the resolved spec says what is meant."""
        if isinstance(data, dict) and "weights" not in data:
            return {"kind": DEFAULT_KIND, "init": DEFAULT_INIT} | data
        return data


class InnerSection(WeightsSection):
    """An inner link: hidden states of an agent back to its own input embeddings."""


class LinkSection(WeightsSection):
    """An outer link: thoughts of one agent to input embeddings of another."""

    feedback: bool = False
    """Its message is seen in the next round. Every cycle needs at least one such link."""


class PromptSection(Section):
    """What an agent is asked; a plain text means `then` alone.

    `{{ field }}` is a field of the input record, `{{ latent.AGENT }}` a slot for that agent's
    message. Nothing else of Jinja is allowed.
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
    """Name of a backbone."""

    system: Given[Annotated[str, StringConstraints(max_length=100_000)]] = None
    """System text. It may hold `{{ field }}`, but no slots. Without it there is no system
    message."""

    prompt: PromptSection
    """Text, or a mapping of `first` and `then`."""

    inner: InnerSection = Field(default_factory=lambda: InnerSection.model_validate({}))
    """The agent's inner link."""

    latent_steps: Given[Annotated[int, Field(ge=0, le=4096)]] = None
    """Latent steps of this agent instead of the spec's `latent_steps`."""

    chat_template: dict[TemplateVariable, TemplateValue] = Field(default_factory=dict)
    """Extra variables for the backbone's chat template, such as `enable_thinking: true`."""


class BuildSection(Section):
    """What to build, and the limits to build it for."""

    target: TargetName = "onnx"
    """Kind of engine: `onnx` runs anywhere; `tensorrt` adds engines for the GPU that it is built
    on, and needs TensorRT there."""

    precision: PrecisionName = "float32"
    """How engines hold weights: `float32`, or `int8` or `int4` in blocks of 32, which are smaller
    and faster and lose a little. This version builds these three."""

    loss_text: Given[FilePath] = None
    """A text file, relative to the spec, over which a build measures what `int8` or `int4` loses.
    Without it a text that ships with recmas is taken."""

    max_prompt_tokens: int = Field(default=512, ge=1, le=1_048_576)
    """Most positions of one agent's prompt, messages included. Longer prompts are refused."""

    max_batch: int = Field(default=8, ge=1, le=1024)
    """Most records in one batch."""


class SpecDocument(Section):
    """A latent multi-agent system."""

    recmas: int = Field(
        ge=LANGUAGE_VERSION, le=LANGUAGE_VERSION, json_schema_extra={"const": LANGUAGE_VERSION}
    )
    """Version of the language."""

    name: Slug
    """Name of the system."""

    rounds: int = Field(default=1, ge=1, le=64)
    """Passes over the agents. The answer is written in the last one."""

    latent_steps: int = Field(default=16, ge=0, le=4096)
    """Latent steps of every agent that does not say otherwise; 0 sends empty messages."""

    pattern: Given[PatternSection] = None
    """A known arrangement of agents, instead of writing it out."""

    backbones: dict[Slug, BackboneSection] = Field(min_length=1, max_length=MAX_AGENTS)
    """The language models, by name. Agents may share one."""

    agents: dict[Slug, AgentSection] = Field(min_length=1, max_length=MAX_AGENTS)
    """The agents, by name."""

    links: dict[LinkName, Annotated[LinkSection, BeforeValidator(_blank_is_default)]] = Field(
        default_factory=dict, max_length=MAX_AGENTS**2
    )
    """Who sends thoughts to whom, as `source -> target`."""

    answer: AnswerSection
    """Which agent writes the text, and how."""

    build: BuildSection = Field(default_factory=BuildSection)
    """What to build, and for which limits."""

    train: Given[TrainSection] = None
    """What to train the links on, and how; only `recmasc train` needs it."""


SECTIONS: Final = sections_of(SpecDocument)
"""Every mapping with fixed keys, by its path."""

# Mappings whose keys are names that the user chooses.
NAMED: Final[dict[tuple[str, ...], str]] = {
    ("backbones",): "backbone",
    ("agents",): "agent",
    ("links",): "link",
    ("agents", "*", "chat_template"): "template variable",
    ("train", "targets"): "agent",
}
