"""The payloads of both IR levels: frozen, typed, each with the place it was declared at.

Topology IR (may be cyclic): nodes are `Agent`, edges are `Link`.
Program IR (acyclic): nodes are `Prefill`, `Think`, `Write`, `Send`, `Decode`, `Ask`, edges are
`Flow`.
The tables that both levels refer to by name travel in `System`.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Literal

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.spec.document.places import SourcePosition
from recmas_runtime.formats.ids import inner_link_id, outer_link_id
from recmas_runtime.formats.manifest import RemoteEntry
from recmas_runtime.formats.messages import THOUGHTS, MessageForm, masked_layers, moved_links
from recmas_runtime.formats.plan import (
    Limits,
    PromptPart,
    SamplingPlan,
    ServePlan,
    SpeculationPlan,
    StopPlan,
    ToolsPlan,
    Variant,
    parse_day,
)
from recmas_runtime.formats.precisions import AUTO, PRECISIONS, ElementTypes, device_named

# Where a bundle keeps the passages that its answer agent may search.
SEARCH_CORPUS: Final = "tools/search.jsonl"


class Level(IntEnum):
    """How far a graph has come. A pass declares the level it requires and the one it ensures."""

    TOPOLOGY = 0  # agents and links, as declared
    UNROLLED = 1  # a program of steps; rounds are gone, no cycle is left
    PLANNED = 2  # every step knows its cache; can be lowered


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A frozen language model, as declared.

    Attributes:
        shared_as: The name of the backbone whose weights and engine it uses; `name` itself until
            ShareBackbones finds an equal one.
        dtype: Element type that its weights are rounded to.
        precision: How its engines hold them, of `formats.precisions.PRECISIONS`.
        device: What its engines are made for and run on, of `formats.devices`.
        template: Text of the chat template that the spec gives it; None for its own.
    """

    name: str
    facts: BackboneFacts
    dtype: str
    shared_as: str
    where: SourcePosition
    precision: str = "float32"
    device: str = AUTO
    template: str | None = None

    @property
    def engine_identity(self) -> tuple[str, ...]:
        """What backbones have in common that can share weights and engine."""
        facts = self.facts
        engine = self.dtype, self.precision, self.device, self.template or ""
        return facts.identity, facts.folder or "", *engine

    @property
    def device_kind(self) -> str:
        """The kind of device that its engines are made for."""
        return device_named(self.device).kind

    @property
    def types(self) -> ElementTypes:
        """What its engines compute in."""
        return PRECISIONS[self.precision].types[self.device_kind]


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A model behind an API, as declared: it stands in the place of a backbone."""

    name: str
    entry: RemoteEntry
    where: SourcePosition


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A role on a backbone or a remote model (a topology node).

    Attributes:
        system: System text as parts (text and field); empty for none.
        first: Prompt used while a slot has no message yet; None if not declared.
        inner: None on a remote model, which has no states that a link could map.
        chat_template: Extra variables for the chat template.
    """

    name: str
    backbone: str
    latent_steps: int
    system: tuple[PromptPart, ...]
    first: tuple[PromptPart, ...] | None
    then: tuple[PromptPart, ...]
    inner: LinkWeights | None
    chat_template: dict[str, bool | int | float | str] = field(default_factory=dict)
    where: SourcePosition

    def parts(self, variant: Variant) -> tuple[PromptPart, ...]:
        """Return the parts of a prompt; `first` is `then` where it is not declared."""
        return self.first if variant == "first" and self.first is not None else self.then

    def slots(self, variant: Variant) -> tuple[str, ...]:
        """Return the agents whose messages the given prompt has slots for, in order."""
        return tuple(p.value for p in self.parts(variant) if p.kind == "slot")


@dataclass(frozen=True, kw_only=True)
class Link:
    """An outer link (a topology edge) from `source` to `target`.

    Attributes:
        feedback: Its message is seen in the next round.
        weights: None where messages are no vectors.
        form: What its messages are made of.
        layer_share: Where rows are handed over: to how many of all layers. The layers of the form
            are chosen, and this is None, once the backbone is loaded.
    """

    source: str
    target: str
    feedback: bool
    weights: LinkWeights | None
    form: MessageForm = THOUGHTS
    layer_share: float | None = None
    where: SourcePosition

    @property
    def id(self) -> str:
        """The link's name in logs, traces and bundles: `SOURCE->TARGET`."""
        return outer_link_id(self.source, self.target)

    def sent_in(self, round_: int) -> int:
        """Return the round in which was sent what is seen in `round_`; below 1 for none yet."""
        return round_ - 1 if self.feedback else round_


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A key/value cache, decided by PlanCaches.

    Attributes:
        id: Name of the cache: its agents joined by `+`.
        agents: Row order (agent-major).
        capacity: Rows per sample at the limits, a multiple of 64.
        bytes_per_sample: At that capacity, for one sample of the batch, all agents.
        last_step: Id of the step after which it is free.
    """

    id: str
    backbone: str
    agents: tuple[str, ...]
    capacity: int
    bytes_per_sample: int
    first_step: str
    last_step: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of the layer states of some agents' sequences, decided by PlanSnapshots.

    Attributes:
        agents: Row order, as in their cache.
        bytes_per_sample: For one sample of the batch, all agents.
    """

    id: str
    agents: tuple[str, ...]
    bytes_per_sample: int


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Run the prompts of one or more agents (one batch) into their cache (a program node).

    Attributes:
        reuse: Id of the earlier Prefill of the same agents whose leading rows are kept; None
            recomputes everything.
        prefix_of: Id of an earlier Prefill of other agents, whose leading rows are copied as far as
            prompts share a prefix; None for none.
        restore: Id of the snapshot whose layer states stand behind those rows; None for none.
        snapshots: Ids of the snapshots that later Prefills restore.
    """

    agents: tuple[str, ...]
    round: int
    variants: tuple[Variant, ...]
    reuse: str | None = None
    prefix_of: str | None = None
    restore: str | None = None
    snapshots: tuple[str, ...] = ()
    cache: str | None = None

    @property
    def rows_of(self) -> str | None:
        """Id of the earlier Prefill whose rows are kept or copied, if there is one."""
        return self.reuse if self.reuse is not None else self.prefix_of


@dataclass(frozen=True, kw_only=True)
class Think:
    """Roll out m latent steps; yields thoughts [B, m, d] per agent (a program node).

    Agents run together only if they take equally many.

    Attributes:
        fused: The inner link is part of the step graph (set by FuseLinks).
    """

    agents: tuple[str, ...]
    round: int
    fused: bool = False
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Write:
    """Write text, to be handed to other agents (a program node).

    Agents write together only if they may write equally much.

    Attributes:
        max_tokens: Most tokens of each text.
        keeps_states: States or rows of these tokens are handed over, too.
    """

    agents: tuple[str, ...]
    round: int
    max_tokens: int
    keeps_states: bool
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Send:
    """Turn what the source has of this round into messages of one form (a program node).

    Attributes:
        targets: Receivers; several when FuseLinks joined a fan-out into one call.
        apply_inner: Whether R_k is computed here; False where FuseLinks takes it from the latent
            steps, and where messages are no vectors.
    """

    source: str
    targets: tuple[str, ...]
    round: int
    apply_inner: bool = True

    @property
    def links(self) -> tuple[str, ...]:
        """Ids of the outer links, one per target."""
        return tuple(outer_link_id(self.source, target) for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Write the answer's text (a program node; there is exactly one)."""

    agent: str
    round: int
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Have remote models write from prompts that go there as chat messages (a program node).

    Attributes:
        max_tokens: Most tokens of each text that is handed over; None for the answer, which is then
            written by this step and by no Decode.
    """

    agents: tuple[str, ...]
    round: int
    variants: tuple[Variant, ...]
    max_tokens: int | None


StepOp = Prefill | Think | Write | Send | Decode | Ask
# Those that read prompts, and those that work in a cache.
PromptOp = Prefill | Ask
CacheOp = Prefill | Think | Write | Decode
NodeOp = Agent | StepOp


def is_answer(op: NodeOp) -> bool:
    """Tell whether a step writes the answer; there is exactly one."""
    return isinstance(op, Decode) or (isinstance(op, Ask) and op.max_tokens is None)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What a later step takes from an earlier one (a program edge).

    Attributes:
        carries: `cache` (rows of the key/value cache), `hidden` (the last prompt position),
            `context` (what a prompt has left: states or rows), `thoughts`, `written` (a text, or
            its states or rows), or `message`.
    """

    carries: Literal["cache", "hidden", "context", "thoughts", "written", "message"]


EdgeOp = Link | Flow


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build for: `build:` of the spec."""

    target: str
    precision: str
    max_prompt_tokens: int
    max_batch: int

    @property
    def limits(self) -> Limits:
        """The bounds that go into the plan."""
        return Limits(max_prompt_tokens=self.max_prompt_tokens, max_batch=self.max_batch)


@dataclass(frozen=True, kw_only=True)
class System:
    """The declared tables, shared by both levels and never changed by program passes.

    Attributes:
        remotes: Models behind an API, by name; none is that of a backbone.
        caches: By id; empty before PlanCaches.
        snapshots: By id; empty before PlanSnapshots.
        stop_when: Early end of the rounds; None runs all of them.
        speculation: How greedy text is drafted; None for no drafts.
        serve: What becomes of a conversation; None for the usual.
        date: Day for chat templates that write it, as `YYYY-MM-DD`; None for that of loading.
        search_corpus: Absolute path of the file or folder that is copied to `SEARCH_CORPUS`.
        loss_text: Absolute path of the text that losses of a precision are measured over.
    """

    name: str
    rounds: int
    answer_agent: str
    sampling: SamplingPlan
    build: BuildOptions
    backbones: dict[str, Backbone]
    agents: dict[str, Agent]
    links: dict[str, Link]
    remotes: dict[str, Remote] = field(default_factory=dict)
    caches: dict[str, Cache] = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    stop_when: StopPlan | None = None
    speculation: SpeculationPlan | None = None
    tools: ToolsPlan | None = None
    serve: ServePlan | None = None
    search_corpus: str | None = None
    loss_text: str | None = None
    date: str | None = None

    def is_remote(self, agent: str) -> bool:
        """Tell whether an agent runs on a model behind an API."""
        return self.agents[agent].backbone in self.remotes

    @property
    def local_agents(self) -> dict[str, Agent]:
        """The agents that run on backbones."""
        return {name: agent for name, agent in self.agents.items() if not self.is_remote(name)}

    @property
    def day(self) -> datetime.date | None:
        """The date as such, which the spec has checked."""
        return None if self.date is None else parse_day(self.date)

    def sent_by(self, agent: str) -> tuple[Link, ...]:
        """Return the links over which an agent has something to send."""
        steps = self.agents[agent].latent_steps
        return tuple(
            link
            for link in self.links.values()
            if link.source == agent and link.form.is_sent(steps)
        )

    @property
    def moved_links(self) -> tuple[str, ...]:
        """Ids of the links whose rows may land at other positions than they were computed at."""
        links = ((link.source, link.target, link.form) for link in self.links.values())
        return tuple(outer_link_id(*ends) for ends in moved_links(links))

    @property
    def link_weights(self) -> dict[str, LinkWeights]:
        """The weights of every link that is applied, by id, inner links first.

        An agent that only answers, or hands over text or rows, has no use for its inner link.
        """
        inner = {
            inner_link_id(name): agent.inner
            for name, agent in self.agents.items()
            if agent.inner is not None
            and any(
                link.form.has_vectors or link.form.needs_thoughts for link in self.sent_by(name)
            )
        }
        outer = {link.id: link.weights for link in self.links.values() if link.weights is not None}
        return inner | outer

    def num_masks(self, backbone: str) -> int:
        """Return how many masks the decoder of a backbone has to hide rows that are handed over.

        Layers that are not chosen yet count as one group.
        """
        links = [
            link
            for link in self.links.values()
            if link.form.carries == "cache" and self.backbone_of(link.target).name == backbone
        ]
        chosen = {link.layer_share for link in links if link.layer_share is not None}
        num_layers = self.backbones[backbone].facts.num_layers
        return len(masked_layers(num_layers, [link.form.layers for link in links])) + len(chosen)

    def backbone_of(self, agent: str) -> Backbone:
        """Return the backbone whose weights and engine a local agent uses, after sharing."""
        declared = self.backbones[self.agents[agent].backbone]
        return self.backbones[declared.shared_as]


def chosen_count(share: float, num_layers: int) -> int:
    """Return how many layers a share of them is: at least one."""
    return max(1, round(share * num_layers))


# Ids of program steps: `ROUND/WHO/WHAT`, so that a printed program reads without a legend.


def prefill_id(round_: int, agents: tuple[str, ...]) -> str:
    """Return the id of a Prefill: `r1/planner/prefill`, or `r1/a+b/prefill` for a batch."""
    return f"r{round_}/{'+'.join(agents)}/prefill"


def think_id(round_: int, agents: tuple[str, ...]) -> str:
    """Return the id of a Think: `r1/planner/think`."""
    return f"r{round_}/{'+'.join(agents)}/think"


def write_id(round_: int, agents: tuple[str, ...]) -> str:
    """Return the id of a Write: `r1/planner/write`."""
    return f"r{round_}/{'+'.join(agents)}/write"


def send_id(round_: int, source: str, targets: tuple[str, ...]) -> str:
    """Return the id of a Send: `r1/planner->critic/send`, or `r1/planner->critic+solver/send`."""
    return f"r{round_}/{outer_link_id(source, '+'.join(targets))}/send"


def ask_id(round_: int, agents: tuple[str, ...]) -> str:
    """Return the id of an Ask: `r1/planner/ask`."""
    return f"r{round_}/{'+'.join(agents)}/ask"


def decode_id(round_: int, agent: str) -> str:
    """Return the id of the Decode: `r3/solver/decode`."""
    return f"r{round_}/{agent}/decode"
