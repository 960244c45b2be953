"""The prompts of one record: checked and built once, or each time where agents send text."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from recmas_runtime.core.errors import RecmasError, RecordError, fail
from recmas_runtime.core.text import counted
from recmas_runtime.formats.messages import MessageForm, message_spans
from recmas_runtime.formats.plan import (
    Plan,
    PromptPart,
    PromptStep,
    SendStep,
    Variant,
    slot_positions,
)
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.prompts.render import (
    Chat,
    Prompt,
    Tokens,
    build_prompt,
    chat_messages,
    text_chars,
)
from recmas_runtime.prompts.tokenizer import Tokenizer
from recmas_runtime.running.records import Record, check_record


def named_failure(failure: RecmasError, record: Record) -> RecmasError:
    """Return an engine's failure as that of a record."""
    if isinstance(failure, RecordError) and failure.names_record:
        return failure
    named = RecmasError(
        replace(problem, message=f"record {record.id!r}: {problem.message}")
        for problem in failure.problems
    )
    named.__cause__ = failure
    return named


class RecordPrompts:
    """Every prompt of a plan for one record.

    Args:
        num_rows: By backbone, the rows of its table of embeddings.
        answer_chat: What the answer agent's prompts are made with, where that is another chat.

    Raises:
        RecmasError: RM500 for a missing field, a blank question or a token without a row, RM501 for
            a prompt that is too long, RM543 for earlier turns that the answer agent's chat template
            does not take.
    """

    def __init__(
        self,
        plan: Plan,
        chats: Mapping[str, Chat],
        record: Record,
        *,
        num_rows: Mapping[str, int],
        answer_chat: Chat | None = None,
    ) -> None:
        check_record(record, plan.fields)
        self._plan = plan
        self._chats = chats
        self._answer_chat = answer_chat
        self._num_rows = num_rows
        self._record = record
        self._slots = slot_positions(plan)
        self._placed = {link.source for link in plan.links.values() if link.needs_context}
        self._built = {
            (agent, variant): self._build(agent, variant, {})
            for step in plan.steps
            if isinstance(step, PromptStep)
            for agent, variant in zip(step.agents, step.variants, strict=True)
        }
        self._check_messages()

    def get(self, agent: str, variant: Variant, texts: Mapping[str, str]) -> Prompt:
        """Return an agent's prompt, texts by slot in place of messages.

        Raises:
            RecmasError: RM501 if the texts make it too long.
        """
        return self._build(agent, variant, texts) if texts else self._built[agent, variant]

    def _build(self, agent: str, variant: Variant, texts: Mapping[str, str]) -> Prompt:
        spec = self._plan.agents[agent]
        fields = {field_of_slot(slot): text for slot, text in texts.items()}
        is_answer = agent == self._plan.answer_agent
        parts = with_texts(spec.parts(variant), texts)
        record = {**self._record.fields, **fields}
        turns = self._record.turns if is_answer else ()
        if spec.backbone not in self._chats:  # a remote model, which has templates of its own
            messages = chat_messages(system=spec.system, prompt=parts, record=record, turns=turns)
            return Prompt((), messages=messages)
        chat = (self._answer_chat if is_answer else None) or self._chats[spec.backbone]
        self._refuse_long(agent, (*spec.system, *parts), record, chat.tokenizer, turns)
        with _refused_turns(turns, agent, chat.template):
            prompt = build_prompt(
                system=spec.system,
                prompt=parts,
                record=record,
                chat=chat.template,
                tokenizer=chat.tokenizer,
                variables=spec.chat_template,
                placed=agent in self._placed,
                turns=turns,
            )
        self._check_tokens(prompt, agent)
        positions = prompt.num_positions(self._slots.get((agent, variant), {}))
        self._check_length(agent, positions)
        return prompt

    def _check_length(self, agent: str, positions: int, behind: int = 0) -> None:
        """Refuse a prompt of so many positions, messages and the rows before it included."""
        limit = self._plan.limits.max_prompt_tokens
        if positions > limit:
            rows = f", {behind} of them rows of other agents," if behind else ""
            raise fail(
                "RM501",
                f"record {self._record.id!r}: the prompt of agent {agent!r}{self._before(agent)} "
                f"takes {positions} positions{rows or ','} the bundle allows {limit}",
                hint=self._shorten(agent),
            )

    def _before(self, agent: str) -> str:
        """Return what messages say of the turns before an agent's prompt."""
        count = len(self._record.turns) if agent == self._plan.answer_agent else 0
        return f" with {counted(count, 'earlier turn')} of the conversation" if count else ""

    def _shorten(self, agent: str) -> str:
        what = "Send fewer turns" if self._before(agent) else "Shorten the question"
        return f"{what}, or build with a larger build.max_prompt_tokens."

    def _check_messages(self) -> None:
        """Refuse prompts that messages make too long, whose lengths this record decides.

        Texts are as long as they come out; those of written tokens count with the most.
        """
        plan = self._plan
        if all(link.carries in ("thoughts", "text") for link in plan.links.values()):
            return  # as long in every record
        sizes: dict[tuple[str, int], int] = {}
        turns: dict[str, tuple[Prompt, dict[str, int]]] = {}
        follows: set[str] = set()  # the agents whose prompt now stands behind rows
        begins: set[tuple[str, int]] = set()  # messages of rows that need none before them
        for step in plan.steps:
            if isinstance(step, SendStep):
                for link in step.links:
                    form = plan.links[link]
                    steps = plan.agents[step.source].latent_steps
                    sizes[link, step.round] = num_positions(form, *turns[step.source], steps)
                    if form.needs_context and step.source not in follows:
                        begins.add((link, step.round))
            if not isinstance(step, PromptStep):
                continue
            for agent, variant in zip(step.agents, step.variants, strict=True):
                received = [m for m in step.messages if m.agent == agent]
                slots = {
                    m.slot: sizes[m.link, m.round]
                    for m in received
                    if plan.links[m.link].has_vectors
                }
                handed = [m for m in received if plan.links[m.link].carries == "cache"]
                rows = sum(sizes[m.link, m.round] for m in handed)
                if handed:
                    rows += (handed[0].link, handed[0].round) not in begins  # see behind_sink
                follows = follows - {agent} | ({agent} if handed else set())
                turns[agent] = prompt, slots = self._built[agent, variant], slots
                self._check_length(agent, prompt.num_positions(slots) + rows, rows)

    def _check_tokens(self, prompt: Prompt, agent: str) -> None:
        """Refuse tokens that a tokenizer knows and its backbone does not: engines would fail."""
        backbone = self._plan.agents[agent].backbone
        num_rows = self._num_rows[backbone]
        ids = (i for item in prompt.items if isinstance(item, Tokens) for i in item.ids)
        beyond = next((token_id for token_id in ids if token_id >= num_rows), None)
        if beyond is not None:
            token = self._chats[backbone].tokenizer.token_text(beyond)
            raise fail(
                "RM500",
                f"record {self._record.id!r}: the prompt of agent {agent!r} has the token "
                f"{token!r} ({beyond}); backbone {backbone!r} has embeddings for {num_rows} only",
                hint="Remove it from the text, or build with the tokenizer of this very model.",
            )

    def _refuse_long(
        self,
        agent: str,
        parts: Sequence[PromptPart],
        record: Mapping[str, object],
        tokenizer: Tokenizer,
        turns: Sequence[EarlierTurn],
    ) -> None:
        """Refuse a text that cannot fit before it is rendered, which takes its length in time."""
        limit = self._plan.limits.max_prompt_tokens
        num_chars = text_chars(parts, record) + sum(len(turn.content.strip()) for turn in turns)
        if num_chars <= limit or tokenizer.max_token_chars is None:
            return
        room = limit * tokenizer.max_token_chars
        if num_chars > room:
            raise fail(
                "RM501",
                f"record {self._record.id!r}: the text in the prompt of agent {agent!r}"
                f"{self._before(agent)} has {num_chars} characters, the {limit} tokens that the "
                f"bundle allows hold at most {room}",
                hint=self._shorten(agent),
            )


@contextmanager
def _refused_turns(
    turns: Sequence[EarlierTurn], agent: str, template: ChatTemplate
) -> Iterator[None]:
    """Tell what a template says against earlier turns as RM543: the request may be changed."""
    if turns and not template.writes_turns:
        raise _no_turns(agent, "it does not write them")
    try:
        yield
    except RecmasError as error:
        if turns and {problem.code for problem in error.problems} == {"RM206"}:
            raise _no_turns(agent, error.problems[0].message) from error
        raise


def _no_turns(agent: str, why: str) -> RecmasError:
    return fail(
        "RM543",
        f"the chat template of agent {agent!r} does not take the earlier turns of this "
        f"conversation: {why}",
        hint="Most templates take one system message at most, then users and assistants in turn.",
    )


def num_positions(
    form: MessageForm, prompt: Prompt, slots: Mapping[str, int], latent_steps: int
) -> int:
    """Return how many vectors or rows a message has at most, given its sender's prompt.

    Args:
        slots: How many positions vectors take in the slots of that prompt.
        latent_steps: Of the sender.
    """
    match form.carries:
        case "thoughts":
            return latent_steps
        case "context":
            places = prompt.context_positions(form.of, slots)
            return len(message_spans(form, len(places), latent_steps))
        case "written":
            return form.max_tokens or 0
        case "text":
            return 0
    rows = {
        "context": prompt.num_rows("context", slots),
        "prompt": prompt.num_rows("prompt", slots),
        "thoughts": latent_steps - 1,
        "written": form.max_tokens or 0,
    }
    return sum(rows[kind] for kind in form.rows)


def with_texts(parts: Sequence[PromptPart], texts: Container[str]) -> list[PromptPart]:
    """Return a prompt with fields in place of the slots that texts fill.

    So their text never becomes control tokens.
    """
    return [
        PromptPart(kind="field", value=field_of_slot(part.value))
        if part.kind == "slot" and part.value in texts
        else part
        for part in parts
    ]


def field_of_slot(slot: str) -> str:
    """Return the field that stands in place of a slot."""
    return f"latent.{slot}"  # no field of a record can have a dot in its name
