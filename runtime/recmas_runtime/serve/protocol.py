"""What a front end and the engines say to each other, in memory or as JSON lines.

A front end sends requests and gets events; every event names the request it belongs to. A request
for an answer ends with exactly one `Done` or `Failed`, unless it was cancelled: then nothing more
comes.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from msgspec import field

from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.codec import Count, Finite, Size, StrictStruct
from recmas_runtime.formats.plan import ServePlan
from recmas_runtime.prompts.earlier_turns import EarlierTurn as EarlierTurn

# A line between processes; bodies of requests and traces of answers fit.
MAX_LINE_BYTES: Final = 64 * 2**20


class Request(StrictStruct, frozen=True, kw_only=True, tag_field="kind"):
    """What a front end sends; `id` is its own, and the events carry it."""

    id: Size


class Ask(Request, frozen=True, kw_only=True, tag="ask"):
    """Answer a record.

    Attributes:
        model: The name that a bundle was loaded under.
        record: Fields of the record.
        index: Is added to the seed, so that several answers of one record differ.
        sampling: Settings of `SamplingPlan` over the bundle's, by name.
        rounds: How many of the built rounds run; None for all.
        baseline: A baseline's name; `latent` is the system itself.
        thoughts: Nearest tokens of each thought in the trace; None for no trace.
        turns: Earlier turns of the conversation, for systems that show them as turns of their own
            before the answer agent's prompt (`ServePlan.history` is `turns`).
    """

    model: str
    record: dict[str, Any]
    index: Size = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    rounds: Count | None = None
    baseline: str = "latent"
    thoughts: Size | None = None
    turns: tuple[EarlierTurn, ...] = ()


class Read(Request, frozen=True, kw_only=True, tag="read"):
    """Have the answer agent's backbone read a text, and tell how likely each token was.

    No other agent runs and no template is applied: a system that was told the whole text would
    know what it is asked to predict.

    Attributes:
        text: What is read, as text or as token ids.
        top: How many likeliest tokens come with each place.
    """

    model: str
    text: str | tuple[Size, ...]
    top: Size = 0


class Cancel(Request, frozen=True, kw_only=True, tag="cancel"):
    """Stop a request; its rows are free after the step that runs."""


class Load(Request, frozen=True, kw_only=True, tag="load"):
    """Load a bundle under a name."""

    path: str
    model: str


class Unload(Request, frozen=True, kw_only=True, tag="unload"):
    """Let a bundle go once its requests have ended; new ones are refused at once."""

    model: str


class Event(StrictStruct, frozen=True, kw_only=True, tag_field="kind"):
    """What the engines tell of a request."""

    id: Size


class Step(Event, frozen=True, kw_only=True, tag="step"):
    """A step of the plan begins.

    Attributes:
        op: prefill, think, send, write or decode.
        round: From 1, of `rounds`.
        agents: Those that run; of a `send` the source, then the targets.
    """

    op: str
    round: Size
    rounds: Size
    agents: tuple[str, ...]


class Piece(Event, frozen=True, kw_only=True, tag="piece"):
    """Text of the answer that is now certain."""

    text: str


class Done(Event, frozen=True, kw_only=True, tag="done"):
    """The answer is whole.

    Attributes:
        answer: `Answer.to_json()`.
        cached_tokens: Of its prompt tokens, those that were taken from other requests.
        trace: With `thoughts` asked for: `steps`, one for each step of the plan as
            `StepEvent.of_record` tells it, and `thoughts` and `messages` of `RecordReadings`.
        queued_ms: How long the request waited for its first step.
    """

    answer: dict[str, Any]
    cached_tokens: Size = 0
    trace: dict[str, Any] | None = None
    queued_ms: Finite = 0.0


class TokenRead(StrictStruct, frozen=True, kw_only=True):
    """One token of a text that was read.

    Attributes:
        text: What it adds to the text.
        offset: Where that begins, in characters.
        logprob: Its log-probability behind all before it; None for the first.
        top: Likeliest tokens in its place with their log-probabilities.
    """

    id: Size
    text: str
    offset: Size
    logprob: Finite | None
    top: tuple[tuple[str, Finite], ...] = ()


class WasRead(Event, frozen=True, kw_only=True, tag="was_read"):
    """A text was read."""

    tokens: tuple[TokenRead, ...]


class Loaded(Event, frozen=True, kw_only=True, tag="loaded"):
    """A bundle is ready to answer."""

    model: ModelInfo


class Unloaded(Event, frozen=True, kw_only=True, tag="unloaded"):
    """A bundle is gone."""

    model: str


Reason = Literal["input", "full", "stopped", "failed", "timeout"]


class Failed(Event, frozen=True, kw_only=True, tag="failed"):
    """A request has no answer.

    Attributes:
        reason: Whose matter it is: the request's (`input`), a queue that has no room (`full`), a
            service that ends or was restarted (`stopped`), the engine's (`failed`), or a limit of
            time (`timeout`).
        problems: Why, as errors tell it everywhere.
    """

    reason: Reason
    problems: tuple[ProblemInfo, ...]


class ProblemInfo(StrictStruct, frozen=True, kw_only=True):
    """`core.errors.Problem` without what only a terminal needs."""

    code: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, problem: Problem) -> ProblemInfo:
        """Return a problem as events tell it."""
        return cls(code=problem.code, message=problem.message, hint=problem.hint or "")


class AgentInfo(StrictStruct, frozen=True, kw_only=True):
    """An agent of a loaded system; it takes no latent steps where nobody receives them."""

    name: str
    backbone: str
    latent_steps: Size


class LinkInfo(StrictStruct, frozen=True, kw_only=True):
    """A link of a loaded system; feedback is seen in the next round."""

    source: str
    target: str
    carries: str
    feedback: bool


class ModelInfo(StrictStruct, frozen=True, kw_only=True):
    """A loaded system, as far as a front end must know it.

    Attributes:
        name: What requests call it.
        system: The spec's name of the system.
        fields: Fields of a record that its prompts show.
        max_new_tokens: Most tokens of an answer that the backbone has room for.
        default_max_tokens: Those of an answer that does not say how many.
        max_batch: Requests that its rows are planned for at a time.
        bytes_per_request: Memory that one request's caches take at the limits of the bundle.
        digest: Of the bundle's manifest.
        created: When it was built, or put in its place if that was later, in seconds since 1970.
        loads_ms: How long loading took.
    """

    name: str
    system: str
    rounds: Count
    answer_agent: str
    agents: tuple[AgentInfo, ...]
    links: tuple[LinkInfo, ...]
    fields: tuple[str, ...]
    max_new_tokens: Size
    default_max_tokens: Size
    max_batch: Count
    bytes_per_request: Size
    has_tools: bool
    digest: str
    created: Size
    loads_ms: Finite
    serve: ServePlan


class Gauges(StrictStruct, frozen=True, kw_only=True, tag_field="kind", tag="gauges"):
    """What the engines do now, and did so far; sent once a second while anything runs.

    Attributes:
        rows_per_step: How often a step ran with how many rows, by their number.
        cache_bytes: Of the caches of requests that run.
        kept_bytes: Of beginnings of prompts that are kept for later requests.
        phase_ms: Time in engine calls by phase: chunk, step, verify, head.
    """

    running: Size
    waiting: Size
    rows_per_step: dict[str, Size]
    chunk_tokens: Size
    hit_tokens: Size
    cache_bytes: Size
    kept_bytes: Size
    phase_ms: dict[str, Finite]


AnyRequest = Ask | Read | Cancel | Load | Unload
AnyEvent = Step | Piece | Done | WasRead | Loaded | Unloaded | Failed
