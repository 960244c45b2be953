"""The plan: the flat step list that the runtime follows, and the tables its steps refer to.

The exporter writes `plan.json` through these classes and the runtime reads it through them, so the
format lives here once. A plan holds no tensors; names in it are resolved by the manifest.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterable
from typing import Annotated, ClassVar, Final, Literal, NamedTuple, Protocol

from msgspec import Meta, field

from recmas_runtime.formats.codec import Count, Finite, Size, StrictStruct, Whole
from recmas_runtime.formats.messages import MessageForm, masked_layers

PLAN_VERSION = 2

Variant = Literal["first", "then"]
# Bounds of the language too: a plan of more would be unrolled into more steps than anyone runs.
MAX_ROUNDS: Final = 64
MAX_LATENT_STEPS: Final = 4096
Round = Annotated[int, Meta(ge=1, le=MAX_ROUNDS)]
LatentSteps = Annotated[int, Meta(ge=0, le=MAX_LATENT_STEPS)]

# Engines see few distinct capacities, and attention kernels want aligned lengths.
CACHE_ROWS_MULTIPLE = 64


def parse_day(text: str) -> datetime.date:
    """Return the day of `YYYY-MM-DD`.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(text, str) or len(text) != len("YYYY-MM-DD"):
        raise ValueError(f"{text!r} is not of the form YYYY-MM-DD")
    return datetime.date.fromisoformat(text)


def cache_capacity(rows: int) -> int:
    """Return the capacity of a cache that must hold `rows` positions per sample."""
    return -(-rows // CACHE_ROWS_MULTIPLE) * CACHE_ROWS_MULTIPLE


class PromptPart(StrictStruct, frozen=True, kw_only=True):
    """A piece of a prompt: literal text, a field of the input record, or a slot.

    Its value is the text, the field as prompts name it (see `field_place`), or the agent whose
    message goes here.
    """

    kind: Literal["text", "field", "slot"]
    value: str


# A longer list is no list of things that a prompt tells apart.
MAX_FIELD_INDEX: Final = 999
FIELD_PATTERN: Final = r"[A-Za-z_][A-Za-z0-9_]*(?:\[(?:0|[1-9][0-9]{0,2})\])?"


class FieldPlace(NamedTuple):
    """Where a record has what a prompt shows: a field, or an entry of one that is a list."""

    name: str
    entry: int | None


def is_field(value: str) -> bool:
    """Return whether this names a field, `facts`, or an entry of one, `facts[0]`."""
    return re.fullmatch(FIELD_PATTERN, value) is not None


def field_place(value: str) -> FieldPlace:
    """Return which field a part shows, and which entry of it; None is all of it."""
    name, bracket, index = value.partition("[")
    return FieldPlace(name, int(index.removesuffix("]")) if bracket else None)


def filled_fields(
    fields: Iterable[str], text: str, *, only: Collection[str] | None = None
) -> dict[str, object]:
    """Return a record with a text in all that prompts use, lists as long as they must be.

    Args:
        only: Fields to fill; None for all of them.
    """
    places = [field_place(value) for value in fields]
    places = [place for place in places if only is None or place.name in only]
    record: dict[str, object] = {name: text for name, _ in places}
    for name, entry in places:
        if entry is not None:
            entries = [place.entry for place in places if place.name == name]
            record[name] = [text] * (1 + max(e for e in entries if e is not None))
    return record


class AgentPlan(StrictStruct, frozen=True, kw_only=True):
    """What the runtime needs to know of an agent.

    Attributes:
        backbone: What it runs on: a backbone, or a remote model.
        system: System text, parts of kind text or field; empty for no system message.
        inner: Its inner link; empty for an agent on a remote model, which has none.
        first: Prompt while a slot has no message yet; None if it is never used.
        then: Prompt with all slots filled.
        chat_template: Extra variables for the chat template, such as `enable_thinking`.
    """

    backbone: str
    system: tuple[PromptPart, ...]
    first: tuple[PromptPart, ...] | None
    then: tuple[PromptPart, ...]
    inner: str
    latent_steps: LatentSteps
    chat_template: dict[str, bool | Whole | Finite | str] = field(default_factory=dict)

    def parts(self, variant: Variant) -> tuple[PromptPart, ...]:
        """Return the parts of a prompt; `first` is `then` where there is no other."""
        return self.first if variant == "first" and self.first is not None else self.then

    def slots(self, variant: Variant) -> tuple[str, ...]:
        """Return the agents whose messages a prompt has slots for, in order."""
        return tuple(part.value for part in self.parts(variant) if part.kind == "slot")


class LinkPlan(MessageForm, frozen=True, kw_only=True, omit_defaults=True):
    """A way on which messages go from one agent to another, whose prompt has the slot.

    Where messages are vectors, an outer link of the manifest of the same id maps them.
    """

    source: str
    target: str


def form_of(link: LinkPlan) -> MessageForm:
    """Return what the messages of a link are made of, without its ends."""
    return MessageForm(**{name: getattr(link, name) for name in MessageForm.__struct_fields__})


class CachePlan(StrictStruct, frozen=True, kw_only=True):
    """A key/value cache: rows for one agent, or for agents that run as one batch.

    Attributes:
        agents: The agents whose rows it holds, in row order (agent-major: all samples of the first
            agent, then all of the second).
        capacity: Rows per sample at the limits of the bundle, a multiple of 64. A run allocates
            only what its own prompts need.
        bytes_per_sample: Bytes at that capacity for one sample of the batch, all its agents.
    """

    backbone: str
    agents: tuple[str, ...]
    capacity: Annotated[int, Meta(ge=64, le=2**24)]
    bytes_per_sample: Size


class SnapshotPlan(StrictStruct, frozen=True, kw_only=True):
    """A copy of layer states, which cannot be cut back as rows can.

    Attributes:
        cache: The cache whose rows' states it holds.
        bytes_per_sample: Bytes for one sample of the batch, all agents of that cache.
    """

    cache: str
    bytes_per_sample: Size


class SentMessage(StrictStruct, frozen=True, kw_only=True):
    """A message, told apart from all others of a run.

    Where an early exit has left out its round, it is the latest one sent over the link.
    """

    link: str
    round: Round


class Message(StrictStruct, frozen=True, kw_only=True):
    """What fills a slot: a message, told apart as `SentMessage` says."""

    agent: str
    slot: str
    link: str
    round: Round


class PlanStep(
    StrictStruct,
    frozen=True,
    kw_only=True,
    tag_field="op",
    tag=lambda name: name.removesuffix("Step").lower(),
):
    """A step; in JSON `op` says which. Rounds count from 1."""

    round: Round

    @property
    def op(self) -> str:
        """The kind of the step, such as `prefill`."""
        return str(self.__struct_config__.tag)


class PrefillStep(PlanStep, frozen=True, kw_only=True):
    """Run the prompts of `agents` (one batch) into their cache.

    Attributes:
        variants: Which prompt each agent uses.
        messages: What fills the slots, in the order of agents and slots. A slot without a message
            stays empty: its agent takes no latent steps.
        reuse_prefix: Keep the cached rows of the leading prompt tokens that are equal to those of
            this agent's previous prefill, up to the first slot of either prompt.
        prefix_from: Id of the cache of other agents on the same backbone, filled before: its rows
            of leading tokens that are equal may be copied. None for none.
        restore: Id of the snapshot of layer states that stand behind the rows which are kept or
            copied. None for none: where layers keep states, the whole prompt then runs.
        snapshots: Ids of the snapshots to make, of the states behind the tokens that the prompts
            which restore them begin with.
    """

    agents: tuple[str, ...]
    variants: tuple[Variant, ...]
    messages: tuple[Message, ...]
    reuse_prefix: bool
    cache: str
    prefix_from: str | None = None
    restore: str | None = None
    snapshots: tuple[str, ...] = ()


class ThinkStep(PlanStep, frozen=True, kw_only=True):
    """Roll out the latent steps of `agents`, equally many, from their last prefill.

    If it is fused, the inner link runs inside the step graph; otherwise as a call of its own.
    """

    agents: tuple[str, ...]
    fused: bool
    cache: str


class AskStep(PlanStep, frozen=True, kw_only=True):
    """Have remote models write from the prompts of `agents`, which go there as chat messages.

    Attributes:
        variants: As of a prefill, and so are the messages, which are all of text.
        max_new_tokens: Most tokens of each text; None for as many as an answer may have.
        greedy: Ask for the likeliest tokens, whatever the answer's sampling is.
        exits: As of a decode, where it is the plan's last step and writes the answer.
    """

    agents: tuple[str, ...]
    variants: tuple[Variant, ...]
    messages: tuple[Message, ...] = ()
    max_new_tokens: Count | None = None
    greedy: bool = False
    exits: tuple[SentMessage, ...] = ()


class SendStep(PlanStep, frozen=True, kw_only=True):
    """Make messages of what the source has of this round, all of one form.

    Vectors go through the inner and the outer links; text and rows are handed over as they are.

    Attributes:
        targets: One or more receiving agents, served by one call (their widths are equal).
        apply_inner: Compute R_k(H) here; False where the fused think step has done so, and where
            messages are no vectors.
    """

    source: str
    targets: tuple[str, ...]
    links: tuple[str, ...]
    apply_inner: bool


class WriteStep(PlanStep, frozen=True, kw_only=True):
    """Write text from the last prefill of `agents`, to be handed to other agents.

    Attributes:
        max_new_tokens: Most tokens of each text; None for as many as an answer may have.
        greedy: Take the likeliest tokens, whatever the answer's sampling is.
        keeps_states: Have the states and rows of the written tokens behind the prompt, for messages
            of them.
    """

    agents: tuple[str, ...]
    cache: str
    max_new_tokens: Count | None = None
    greedy: bool = False
    keeps_states: bool = False


class DecodeStep(PlanStep, frozen=True, kw_only=True):
    """Write the answer's text from the agent's last prefill.

    Where a think step stands right before it, the text follows the thoughts.

    Attributes:
        exits: The messages that the last round takes from the round before it. A round that sent
            one over each of these links may be followed by the last one, as `stop_when` decides.
            Empty for fewer than three rounds, of which none can be left out.
    """

    agent: str
    cache: str
    exits: tuple[SentMessage, ...] = ()


Step = PrefillStep | ThinkStep | SendStep | WriteStep | DecodeStep | AskStep
# Those that read prompts, and those that work in a cache.
PromptStep = PrefillStep | AskStep
CacheStep = PrefillStep | ThinkStep | WriteStep | DecodeStep


def agents_of(step: Step) -> tuple[str, ...]:
    """Return the agents that a step runs; of a send the source, then the targets."""
    match step:
        case SendStep():
            return (step.source, *step.targets)
        case DecodeStep():
            return (step.agent,)
    return step.agents


# Bounds of sampling settings, wherever they are given: specs, command lines, callers.
MAX_NEW_TOKENS: Final = 32_768
MAX_TEMPERATURE: Final = 10.0
MAX_TOP_K: Final = 1_000_000
MAX_REPETITION_PENALTY: Final = 10.0
MAX_STOPS: Final = 16
# What clients call int64; streams of records and agents lie beyond, so that sums share none.
MAX_SEED: Final = 2**63 - 1


class SamplingPlan(StrictStruct, frozen=True, kw_only=True):
    """How the answer's tokens are chosen; the defaults that a caller may override.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus mass, in (0, 1].
        top_k: Keep the k likeliest; 0 keeps all.
        min_p: Drop tokens below this share of the likeliest one's probability.
        repetition_penalty: Divides positive and multiplies negative logits of written tokens.
        seed: Record i of the input draws from its own stream, seeded `seed + i`, so that its text
            does not depend on the batch it ran in.
        stop: Strings that end the answer; they are not part of it.
    """

    max_new_tokens: Count = 256
    temperature: Finite = 0.0
    top_p: Finite = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31)] = 0
    min_p: Finite = 0.0
    repetition_penalty: Finite = 1.0
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] = 0
    stop: tuple[str, ...] = ()


# A longer draft is rarely right to its end, and a call of so many positions takes as long as many.
MAX_DRAFT: Final = 64
MAX_MATCH: Final = 16
SpeculationMethod = Literal["prompt_lookup"]


class SpeculationPlan(StrictStruct, frozen=True, kw_only=True):
    """How greedy text is drafted (speculative decoding); the text stays what it is.

    Attributes:
        method: `prompt_lookup` drafts what followed the last tokens where they stood before, in
            the prompt or in the text so far.
        max_draft: Most tokens of a draft.
        min_match: So many last tokens at least must have stood there.
    """

    method: SpeculationMethod = "prompt_lookup"
    max_draft: Annotated[int, Meta(ge=1, le=MAX_DRAFT)] = 12
    min_match: Annotated[int, Meta(ge=1, le=MAX_MATCH)] = 1


class StopPlan(StrictStruct, frozen=True, kw_only=True):
    """When the recursion may end before its last round.

    A record has converged once every message of a round has at least this mean cosine to the same
    link's message of the round before. Its next round is then its last.
    """

    cosine: Annotated[float, Meta(gt=0.0, le=1.0)]


class SearchPlan(StrictStruct, frozen=True, kw_only=True):
    """The tool `search`: over an index of a local corpus, or with a web service.

    Attributes:
        corpus: JSON lines `{id, title, text}` in the bundle; None for a web service.
    """

    backend: Literal["local", "tavily"]
    corpus: str | None
    top_k: Annotated[int, Meta(ge=1, le=1000)]


class PythonPlan(StrictStruct, frozen=True, kw_only=True):
    """The tool `python`: code that the model wrote, in a sandbox or not at all.

    It may use `memory_mb` MiB.
    """

    memory_mb: Annotated[int, Meta(ge=16, le=2**20)]


class ToolsPlan(StrictStruct, frozen=True, kw_only=True):
    """What the answer agent may call while it writes, and the bounds of it.

    Attributes:
        max_calls: Of one answer; later ones are answered with a refusal.
        timeout_s: Of one call.
        max_result_chars: A longer result says how much was left out.
    """

    search: SearchPlan | None = None
    python: PythonPlan | None = None
    ask: bool = False
    functions: tuple[str, ...] = ()
    max_calls: Annotated[int, Meta(ge=1, le=1000)] = 4
    timeout_s: Annotated[float, Meta(gt=0.0, le=3600.0)] = 10.0
    max_result_chars: Count = 2000


class Limits(StrictStruct, frozen=True, kw_only=True):
    """Bounds the bundle was compiled for; messages count among the tokens of a prompt."""

    max_prompt_tokens: Count
    max_batch: Annotated[int, Meta(ge=1, le=2**16)]


ConversationPart = Literal["last_user", "system"]
History = Literal["transcript", "turns", "refuse"]


class ServePlan(StrictStruct, frozen=True, kw_only=True):
    """Which part of a conversation becomes which field of a record.

    Attributes:
        fields: By field of the record: the last user message, or the text of all system messages.
        history: What becomes of earlier turns, and of a system message that no field takes: a
            `transcript` before the last question in the same field, `turns` of their own before the
            answer agent's prompt, or they are refused.
    """

    fields: dict[str, ConversationPart]
    history: History = "transcript"

    def field_of(self, part: ConversationPart) -> str | None:
        """Return the field that takes a part of a conversation; None if no field does."""
        return next((name for name, taken in self.fields.items() if taken == part), None)

    def others(self, shown: Iterable[str]) -> tuple[str, ...]:
        """Return the fields that every request must bring besides its conversation.

        Args:
            shown: What prompts show, as `Plan.fields` has it.
        """
        names = dict.fromkeys(field_place(value).name for value in shown)
        return tuple(name for name in names if name not in self.fields and name != "id")


def usual_question(shown: Iterable[str]) -> str:
    """Return the field that takes the last question where nothing else is said.

    Args:
        shown: What prompts show, as `Plan.fields` has it.
    """
    names = {field_place(value).name for value in shown} - {"id"}
    return next(iter(names)) if len(names) == 1 else "question"


class Plan(StrictStruct, frozen=True, kw_only=True):
    """The whole plan.

    The fields are those of records that the prompts use, `question` first where it is used; without
    `stop_when` all rounds run. The date is what chat templates get that write it; None for that of
    loading.
    """

    newest_version: ClassVar = PLAN_VERSION

    version: int = PLAN_VERSION
    name: str
    rounds: Round
    answer_agent: str
    agents: dict[str, AgentPlan]
    links: dict[str, LinkPlan]
    caches: dict[str, CachePlan]
    steps: tuple[Step, ...]
    sampling: SamplingPlan
    limits: Limits
    fields: tuple[str, ...]
    snapshots: dict[str, SnapshotPlan] = field(default_factory=dict)
    stop_when: StopPlan | None = None
    speculation: SpeculationPlan | None = None
    tools: ToolsPlan | None = None
    serve: ServePlan | None = None
    date: Annotated[str, Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None

    @property
    def conversation(self) -> ServePlan:
        """Return what `serve` says, or by default: the last question is the prompts' one field.

        Of several fields it is `question`; the others must come with each request.
        """
        return self.serve or ServePlan(fields={usual_question(self.fields): "last_user"})

    @property
    def day(self) -> datetime.date | None:
        """The date as such.

        Raises:
            ValueError: It is none.
        """
        return None if self.date is None else parse_day(self.date)

    def masked_layers(self, backbone: str, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """Return the groups of a backbone's layers from which its agents' rows are hidden."""
        links = [link for link in self.links.values() if link.carries == "cache"]
        on_it = [link for link in links if self.agents[link.target].backbone == backbone]
        return masked_layers(num_layers, [link.layers for link in on_it])

    @property
    def answer_prompt(self) -> PromptStep:
        """The step that reads the prompt of the answer itself, the last one that reads any."""
        return next(step for step in reversed(self.steps) if isinstance(step, PromptStep))

    @property
    def answer_step(self) -> DecodeStep | AskStep:
        """The step that writes the answer, the last one."""
        step = self.steps[-1]
        assert isinstance(step, DecodeStep | AskStep), "a plan ends with its answer"
        return step

    def num_latent_steps(self, step: ThinkStep) -> int:
        """Return the length of a rollout, which is that of each of its agents."""
        return self.agents[step.agents[0]].latent_steps


def feedback_links(plan: Plan) -> frozenset[str]:
    """Return the ids of the links whose message is seen in a later round than it is sent in."""
    prompts = (step for step in plan.steps if isinstance(step, PromptStep))
    return frozenset(m.link for step in prompts for m in step.messages if m.round < step.round)


def slot_positions(plan: Plan) -> dict[tuple[str, Variant], dict[str, int]]:
    """Return how many positions thoughts take in each slot of a prompt, by agent and variant.

    Slots that stay empty do not appear, nor those of messages whose length a record decides.
    """
    found: dict[tuple[str, Variant], dict[str, int]] = {}
    for step in plan.steps:
        if not isinstance(step, PrefillStep):
            continue
        variants = dict(zip(step.agents, step.variants, strict=True))
        for message in step.messages:
            link = plan.links[message.link]
            if link.carries == "thoughts":
                slots = found.setdefault((message.agent, variants[message.agent]), {})
                slots[message.slot] = plan.agents[link.source].latent_steps
    return found


class HasPrompts(Protocol):
    """What an agent's prompts are read from."""

    @property
    def system(self) -> tuple[PromptPart, ...]:
        """Its system text."""

    @property
    def first(self) -> tuple[PromptPart, ...] | None:
        """As in `AgentPlan`."""

    @property
    def then(self) -> tuple[PromptPart, ...]:
        """As in `AgentPlan`."""


def prompt_fields(agents: Iterable[HasPrompts]) -> tuple[str, ...]:
    """Return the record fields that prompts use, `question` first where it is used.

    Entries of a list stand by themselves: `facts[0]`, `facts[1]`.
    """
    parts: list[PromptPart] = []
    for agent in agents:
        parts += (*agent.system, *(agent.first or ()), *agent.then)
    found = dict.fromkeys(part.value for part in parts if part.kind == "field")
    return tuple(sorted(found, key=lambda name: name != "question"))
