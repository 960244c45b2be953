"""The schema of `train`: the data, the two stages, and how the run goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BeforeValidator, Field, Strict, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from recmas_compiler.spec.schema.sections import MAX_AGENTS, FilePath, Given, Section, Slug
from recmas_runtime.core.text import listed
from recmas_runtime.formats.link_kinds import (
    FORMS,
    PAPER_KIND,
    RELEASED_KIND,
    LinkKind,
    LinkRole,
)

Preset = Literal["default", "released", "paper"]
Stage = Literal["inner", "outer", "all"]  # what `recmasc train --stage` takes
MethodName = Literal["lora", "sft", "text"]  # what may learn in the place of links
Mode = Literal["teacher_forced", "rollout"]
Supervise = Literal["final", "all"]
BackboneDtype = Literal["auto", "float32", "bfloat16"]

FieldName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
RateName = Annotated[str, StringConstraints(min_length=1, max_length=256)]

LARGEST_HELD_OUT: Final = 0.5

# What `outer.rates` may name besides single links: links by role.
LINK_GROUPS: Final[tuple[LinkRole, ...]] = get_args(LinkRole)

_WITH_BIASES: Final = [kind for kind in get_args(LinkKind) if FORMS[kind, "outer"].has_biases]
BIAS_HINT: Final = f"Links of kind {listed(f'`{kind}`' for kind in _WITH_BIASES)} have one."

# What a preset says instead of the defaults below; keys that the spec writes win over both.
PRESETS: Final[Mapping[Preset, Mapping[str, Any]]] = {
    "default": {},
    # As the trainer that came with the published weights.
    "released": {
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "warmup_steps": 10,
        "clip": 1.0,
        "inner": {"lr": 5e-4},
        "outer": {"lr": 5e-4, "freeze_inner": True},
    },
    "paper": {"inner": {"mse_weight": 0.0}, "outer": {"supervise": "final"}},
}

# The kind of link that a preset is for; None for any.
PRESET_KINDS: Final[Mapping[Preset, LinkKind | None]] = {
    "default": None,
    "released": RELEASED_KIND,
    "paper": PAPER_KIND,
}


def no_bias(link: str, kind: str) -> str:
    """Say why the messages of a link cannot be centred."""
    return f"`center` needs a bias, and the link `{link}` of kind `{kind}` has none."


def _fraction_or_file(value: object) -> object:
    is_fraction = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= LARGEST_HELD_OUT
    )
    if not is_fraction and not (isinstance(value, str) and value):
        raise PydanticCustomError("held_out", "should be a fraction from 0 to 0.5, or a file")
    return value


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError("pair", "should be a list of two numbers")
    return value


Fraction = Annotated[float, Field(ge=0.0, le=LARGEST_HELD_OUT)]
HeldOut = Annotated[Fraction | FilePath, BeforeValidator(_fraction_or_file)]
Beta = Annotated[float, Field(ge=0.0, le=0.9999)]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_pair)]


class InnerStageSection(Section):
    """The inner stage: every agent's inner link on its own, toward what the agent should think."""

    steps: int = Field(default=1000, ge=1, le=10_000_000)
    """Optimizer steps, for every agent."""

    lr: float = Field(default=5e-4, gt=0.0, le=1.0)
    """Learning rate at its highest."""

    batch_size: int = Field(default=8, ge=1, le=65_536)
    """Turns of one step, all devices together: one per record, two where feedback changes the
    prompt of later rounds."""

    mse_weight: float = Field(default=0.0, ge=0.0, le=1e6)
    """Weight of the mean squared error that is added to the cosine loss, which forgets lengths."""


Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Weight = Annotated[float, Field(gt=0.0, le=1e3)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class MismatchSection(Section):
    """The answer should be less likely with the messages of a record that has another answer."""

    weight: Weight = 1.0
    """Weight of the hinge beside the cross-entropy."""

    margin: float = Field(default=1.0, gt=0.0, le=100.0)
    """How much larger the mean loss of the answer's tokens should be with the other messages; where
    it is, nothing more is asked."""


class TeacherSection(Section):
    """The answer agent should say what it would say if it read text in the place of messages."""

    weight: Weight = 0.5
    """Weight of the divergence beside the cross-entropy."""

    temperature: float = Field(default=1.0, ge=0.1, le=100.0)
    """What both distributions are softened by; the divergence counts its square times."""


class MixSection(Section):
    """Messages are text in part, to begin with."""

    start: Share = 0.9
    """In the first step, this part of each message, from its end, is the embeddings of the text
    that it should say."""

    end: Share = 0.0
    """The same in the last step; in between it falls evenly."""


class OuterStageSection(Section):
    """The outer stage: the unrolled program, all links at once, toward the answer's text."""

    steps: int = Field(default=1000, ge=1, le=10_000_000)
    """Optimizer steps."""

    lr: float = Field(default=1e-4, gt=0.0, le=1.0)
    """Learning rate at its highest."""

    batch_size: int = Field(default=2, ge=1, le=65_536)
    """Records of one step, all devices together."""

    mode: Mode = "teacher_forced"
    """Where thoughts come from: `teacher_forced` takes the hidden states over each agent's target
    text, `rollout` generates them as a running system does."""

    supervise: Supervise = "final"
    """`final` counts the answer of the last round; `all` adds a tenth of the mean over the rounds
    before it."""

    freeze_inner: bool = False
    """Leave the inner links as they are."""

    freeze: Annotated[tuple[str, ...], Strict(False)] = Field(
        default=(), max_length=MAX_AGENTS**2 + MAX_AGENTS
    )
    """Links that stay as they are, by their names in `links`; an agent's name stands for its inner
    link."""

    rates: Given[dict[RateName, Rate]] = None
    """Learning rates at their highest of some links: of all `inner` ones, all `outer` ones, or one,
    named as in `freeze`, which wins. The others have `lr`."""

    mismatch: Given[MismatchSection] = None
    """Adds a hinge: the answer's loss with another record's messages should be `margin` larger."""

    teacher: Given[TeacherSection] = None
    """Adds the divergence from the answer agent that reads text in the place of its messages: the
    field that a message is made of, the sender's target, or what the sender reads."""

    reconstruct: Given[Weight] = None
    """Adds, with this weight, the loss of that text when the receiver writes it from a message
    alone, over all links of vectors."""

    mix: Given[MixSection] = None
    """A curriculum from text to messages."""

    center: Given[bool] = None
    """Subtract the running mean of each outer link's messages, which becomes part of the link's
    last bias: no constant is left that could be a soft prompt. Not for links `residual`, which have
    no biases."""

    @property
    def has_additions(self) -> bool:
        """Whether a step does more than lower the answer's cross-entropy."""
        added = self.mismatch, self.teacher, self.reconstruct, self.mix, self.center or None
        return any(addition is not None for addition in added)


class LoraSection(Section):
    """What `--method lora` trains: low-rank additions to the matrices of the answer agent alone.

    Steps, batches and data are those of the outer stage.
    """

    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of the additions."""

    alpha: float = Field(default=32.0, gt=0.0, le=65_536.0)
    """The additions count `alpha / rank` times."""

    lr: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Learning rate at its highest."""


class SftSection(Section):
    """All weights learn: `--method sft` for the answer agent alone, `text` for all agents.

    Steps, batches and data are those of the outer stage.
    """

    lr: float = Field(default=2e-5, gt=0.0, le=1.0)
    """Learning rate at its highest."""


class TrainSection(Section):
    """What the links are trained on, and how. Building does not look at it."""

    data: FilePath
    """Records as JSON lines, relative to the spec."""

    held_out: HeldOut = 0.05
    """What training never sees: a fraction of the records, drawn by `seed`, or a file of its own.
    0 measures nothing."""

    targets: dict[Slug, FieldName] = Field(min_length=1, max_length=MAX_AGENTS)
    """Agent to the record field with the text that it should think or say, or `facts[0]` for an
    entry of a list. The answer agent needs one; an agent without one can only be trained by
    `rollout`."""

    preset: Preset = "default"
    """Fills in defaults: `released` as the trainer of the published weights (links `ln_residual`),
    `paper` as the paper (links `residual`). Written keys win."""

    inner: InnerStageSection = Field(default_factory=lambda: InnerStageSection.model_validate({}))
    """The inner stage."""

    outer: OuterStageSection = Field(default_factory=lambda: OuterStageSection.model_validate({}))
    """The outer stage."""

    lora: LoraSection = Field(default_factory=lambda: LoraSection.model_validate({}))
    """For comparison: LoRA on the answer agent alone."""

    sft: SftSection = Field(default_factory=lambda: SftSection.model_validate({}))
    """For comparison: fine-tuning of the answer agent alone."""

    max_length: int = Field(default=1024, ge=8, le=1_048_576)
    """Most positions of one agent call. Records with a longer one are left out and counted, never
    cut."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the held-out part and of the order of the records."""

    warmup_steps: int = Field(default=10, ge=0, le=1_000_000)
    """Steps in which the learning rate rises to `lr`; after them it falls to zero along half a
    cycle of a cosine."""

    betas: Betas = Field(default=(0.9, 0.95), strict=False)
    """Decay of AdamW's two running means."""

    weight_decay: float = Field(default=0.0, ge=0.0, le=10.0)
    """AdamW's weight decay."""

    clip: float = Field(default=1.0, ge=0.0, le=1e6)
    """Longest gradient, over all links of a step; longer ones are shortened. 0 never does."""

    accumulation: int = Field(default=1, ge=1, le=65_536)
    """Pieces in which a device works through its share of a batch: more need less memory and give
    the same step."""

    eval_every: int = Field(default=100, ge=1, le=10_000_000)
    """Steps between measurements on the held-out records."""

    eval_records: int = Field(default=64, ge=1, le=1_000_000)
    """Most held-out records of a measurement, the first ones."""

    checkpoint_every: int = Field(default=100, ge=1, le=10_000_000)
    """Steps between checkpoints. The last two are kept."""

    links_dir: Given[FilePath] = None
    """Folder for the trained links, relative to the spec; `recmasc build` takes them from there.
    Without it: `links/NAME`."""

    backbone_dtype: BackboneDtype = "auto"
    """Element type of the frozen backbones while training: `auto` is `bfloat16` on a GPU that has
    it and on a processor that multiplies faster in it, `float32` elsewhere. Links are always
    `float32`."""

    checkpoint_calls: bool = False
    """Compute an agent's call again in the backward pass instead of keeping it: less memory, more
    time."""

    compile: bool = False
    """Compile the agent calls with torch.compile. It takes minutes, and on a CPU steps are then as
    fast as without (2.62 s against 2.63 s)."""

    cache_mb: int = Field(default=4096, ge=0, le=100_000_000)
    """Most MiB of hidden states that the inner stage keeps on disk; what does not fit is computed
    anew in every step."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: object) -> object:
        """Write out what the preset says, so that the resolved spec shows it."""
        preset = data.get("preset") if isinstance(data, dict) else None
        known = [name for name in PRESETS if name == preset]
        return _merged(PRESETS[known[0]], data) if known and isinstance(data, dict) else data


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, `above` winning key by key; what is no mapping where one belongs stays wrong."""
    merged = {**below, **above}
    for key, value in below.items():
        if isinstance(value, Mapping) and isinstance(merged[key], dict):
            merged[key] = {**value, **merged[key]}
    return merged
