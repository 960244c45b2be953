"""What an agent reads in training: its prompt, or its prompt with its target text behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from recmas_compiler.ir.ops import System
from recmas_compiler.lowering.plan import agent_plan
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.text import counted
from recmas_runtime.formats.messages import MessageForm
from recmas_runtime.formats.plan import PromptPart, Variant, prompt_fields
from recmas_runtime.prompts.render import (
    Chat,
    Prompt,
    Slot,
    Tokens,
    build_prompt,
    field_text,
    text_chars,
)
from recmas_runtime.prompts.tool_turns import answer_chat
from recmas_runtime.prompts.turn import build_turn
from recmas_runtime.running.record_prompts import field_of_slot, with_texts

if TYPE_CHECKING:  # what reads training data does not need torch
    from recmas_compiler.backbones.torch_model import TorchBackbone

# What the receiver of a message is asked where it is to say what the message says.
REPEAT: Final = "\nRepeat the text above word for word."

Form = Literal["prompt", "turn"]
CallKey = tuple[str, Variant, Form]
"""Agent, which of its prompts, and whether the target text is behind it."""


@dataclass(frozen=True, kw_only=True)
class TrainExample:
    """One record to learn from.

    Attributes:
        id: Unique within its file.
        index: Place in its file, from 0.
        line: Where it begins there, from 1.
        targets: Agent to the text that it should think or say.
    """

    id: str
    index: int
    fields: Mapping[str, object]
    targets: Mapping[str, str]
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """The text of one agent call, as tokens with slots between them.

    Attributes:
        items: The last one is text.
        num_target_tokens: How many of the last tokens are the assistant's; 0 for a prompt alone.
        placed: The prompt, with the places of its fields: of a prompt alone whose states or rows
            are handed over.
    """

    items: tuple[Tokens | Slot, ...]
    num_target_tokens: int
    placed: Prompt | None = None

    def num_positions(self, slots: Mapping[str, int]) -> int:
        """Return how long the call is when `slots` says how long the messages are."""
        return sum(
            len(item.ids) if isinstance(item, Tokens) else slots.get(item.agent, 0)
            for item in self.items
        )

    def cut(self, num_target_tokens: int) -> Call:
        """Return the call without the target's tokens after the first so many."""
        spare = self.num_target_tokens - num_target_tokens
        if spare <= 0:
            return self
        *before, last = self.items
        assert isinstance(last, Tokens), "the target is text"
        return replace(
            self,
            items=(*before, Tokens(last.ids[:-spare])),
            num_target_tokens=num_target_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records as the calls that training makes of them; nothing is on a device yet.

    Attributes:
        num_counted: So many of the first records have a loss; the others only send messages.
    """

    examples: tuple[TrainExample, ...]
    calls: Mapping[CallKey, tuple[Call, ...]]
    num_counted: int

    def __len__(self) -> int:
        return len(self.examples)


class CallWriter:
    """Renders and tokenizes calls of a system with each agent's own template and tokenizer."""

    def __init__(self, system: System, backbones: Mapping[str, TorchBackbone]) -> None:
        self.system = system
        self._agents = {name: agent_plan(system, name) for name in system.agents}
        self._chats = {
            name: Chat.load(b.tokenizer_json, b.chat_template, b.special_tokens, day=system.day)
            for name, b in backbones.items()
        }
        answerer = self._agents[system.answer_agent]
        self._answer_chat = answer_chat(self._chats, answerer, system.tools)
        # Agents of whose prompts states or rows are handed over.
        self._handing = {
            name
            for name in system.agents
            if any(link.form.carries in ("context", "cache") for link in system.sent_by(name))
        }
        # Records, by agent, whose target the template does not write as it stands.
        self._changed: dict[str, dict[str, None]] = {}

    def _chat(self, agent: str) -> Chat:
        if agent == self.system.answer_agent:
            return self._answer_chat
        return self._chats[self._agents[agent].backbone]

    def warnings(self) -> tuple[Problem, ...]:
        """Return what was found out about the targets of the calls written so far."""
        return tuple(
            Problem(
                code="RM755",
                severity="warning",
                message=f"the chat template of agent {agent!r} would strip or shorten the target "
                f"of {counted(len(records), 'record')}, the first is {next(iter(records))!r}",
                hint="They are trained whole, as they stand in the data, between the prompt and "
                "what the template writes behind an answer.",
            )
            for agent, records in self._changed.items()
        )

    def min_positions(self, agent: str, example: TrainExample) -> int:
        """Return how many positions a call of the agent takes at least, without writing it.

        0 for what cannot be told so.
        """
        declared = self._agents[agent]
        record = {**example.fields, "id": example.id}
        most = self._chats[declared.backbone].tokenizer.max_token_chars
        variants = (declared.then, declared.first or ())
        chars = max(text_chars((*declared.system, *parts), record) for parts in variants)
        chars = max(chars, len(example.targets.get(agent, "")))
        return 0 if most is None else -(-chars // most)

    def write(
        self,
        agent: str,
        variant: Variant,
        form: Form,
        example: TrainExample,
        texts: Mapping[str, str] | None = None,
    ) -> Call:
        """Return one call.

        Args:
            texts: By slot the text that stands there in the place of a message, never as control
                tokens.

        Raises:
            RecmasError: RM500 for a field that cannot be used, RM206 for a chat template that
                cannot render the call, RM700 if the example has no target for the agent.
        """
        declared = self._agents[agent]
        chat = self._chat(agent)
        record = {**example.fields, "id": example.id}
        parts = declared.parts(variant)
        if texts:
            record |= {field_of_slot(slot): text for slot, text in texts.items()}
            parts = tuple(with_texts(parts, texts))
        is_placed = agent in self._handing
        try:
            if form == "prompt":
                prompt = build_prompt(
                    system=declared.system,
                    prompt=parts,
                    record=record,
                    chat=chat.template,
                    tokenizer=chat.tokenizer,
                    variables=declared.chat_template,
                    placed=is_placed,
                )
                return Call(
                    items=prompt.items, num_target_tokens=0, placed=prompt if is_placed else None
                )
            turn = build_turn(
                system=declared.system,
                prompt=parts,
                target=self._target(agent, example),
                record=record,
                chat=chat.template,
                tokenizer=chat.tokenizer,
                variables=declared.chat_template,
            )
        except RecmasError as error:
            raise _named(error, agent, example) from error
        if not turn.is_as_written:
            self._changed.setdefault(agent, {})[example.id] = None
        return Call(items=turn.prompt.items, num_target_tokens=turn.num_target_tokens)

    def written_ids(self, agent: str, example: TrainExample, most: int | None) -> tuple[int, ...]:
        """Return the tokens of an agent's target as the agent would write them, at most so many."""
        text = self._target(agent, example)
        tokenizer = self._chat(agent).tokenizer
        return tokenizer.encode_piece(text, plain=[(0, len(text))], continues=True)[:most]

    def text_of(self, agent: str, ids: Sequence[int]) -> str:
        """Return the text of tokens that an agent wrote."""
        return self._chat(agent).tokenizer.decode(ids)

    def received_ids(self, agent: str, text: str) -> tuple[int, ...]:
        """Return the tokens of a text in the middle of an agent's prompt, none of them control."""
        tokenizer = self._chat(agent).tokenizer
        return tokenizer.encode_piece(text, plain=[(0, len(text))], continues=True)

    def said(self, link: str, example: TrainExample) -> str:
        """Return in words what a message is to say.

        This is the text of the field that it is made of, else the sender's target, else the fields
        that the sender's prompt shows.
        """
        source, form = self.system.links[link].source, self.system.links[link].form
        record = {**example.fields, "id": example.id}
        if form.of is not None:
            return field_text(form.of, record)
        if source in example.targets and form.carries != "context":
            return example.targets[source]
        return "\n".join(field_text(name, record) for name in self.fields_read(source))

    def fields_read(self, agent: str) -> tuple[str, ...]:
        """Return the record fields that an agent's prompts show."""
        return prompt_fields([self._agents[agent]])

    def write_repetition(self, agent: str, slot: str, text: str) -> Call:
        """Return a turn in which an agent writes a text again from a message alone.

        Raises:
            RecmasError: As `write`.
        """
        chat = self._chat(agent)
        turn = build_turn(
            system=(),
            prompt=(
                PromptPart(kind="slot", value=slot),
                PromptPart(kind="text", value=REPEAT),
            ),
            target=text,
            record={},
            chat=chat.template,
            tokenizer=chat.tokenizer,
            variables=self._agents[agent].chat_template,
        )
        return Call(items=turn.prompt.items, num_target_tokens=turn.num_target_tokens)

    def write_ideal(self, agent: str, example: TrainExample) -> tuple[Call, ...]:
        """Return an agent's turns of round 1 and of later rounds, perfect messages in their slots.

        Inner and outer links bring a thought towards the input embedding of the token that follows
        it. So the perfect message is the sender's target text, as far as its thoughts or tokens
        reach; it is empty where the sender has no target or writes nothing, and in round 1 in slots
        of feedback. Later rounds have a turn of their own only where it is another one.
        """
        declared = self._agents[agent]
        tokenizer = self._chats[declared.backbone].tokenizer
        forms = {
            link.source: link.form for link in self.system.links.values() if link.target == agent
        }
        before = {
            link.source
            for link in self.system.links.values()
            if link.target == agent and not link.feedback
        }
        opening: Variant = "then" if declared.first is None else "first"
        rounds = [(opening, before)]
        if self.system.rounds > 1 and not before.issuperset(declared.slots("then")):
            rounds.append(("then", set(declared.slots("then"))))

        def ideal(sender: str, senders: set[str]) -> Tokens:
            text = example.targets.get(sender, "") if sender in senders else ""
            ids = tokenizer.encode_piece(text, plain=[(0, len(text))], continues=True)
            return Tokens(ids[: _most_tokens(forms[sender], self._agents[sender].latent_steps)])

        turns = []
        for variant, senders in rounds:
            turn = self.write(agent, variant, "turn", example)
            items = (ideal(i.agent, senders) if isinstance(i, Slot) else i for i in turn.items)
            turns.append(replace(turn, items=tuple(items)))
        return tuple(turns)

    def write_given(self, agent: str, example: TrainExample) -> tuple[Call, ...]:
        """Return an agent's turns of round 1 and of later rounds, senders' targets in their slots.

        They stand there as the texts of a text system do. Later rounds have a turn of their own
        only where it is another one.

        Raises:
            RecmasError: As `write`.
        """
        declared = self._agents[agent]
        links = [link for link in self.system.links.values() if link.target == agent]
        before = {link.source for link in links if not link.feedback}
        opening: Variant = "then" if declared.first is None else "first"
        rounds = [(opening, before)]
        if self.system.rounds > 1 and not before.issuperset(declared.slots("then")):
            rounds.append(("then", set(declared.slots("then"))))
        return tuple(
            self.write(
                agent,
                variant,
                "turn",
                example,
                {
                    slot: self._target(slot, example)
                    for slot in declared.slots(variant)
                    if slot in senders and self.system.sent_by(slot)
                },
            )
            for variant, senders in rounds
        )

    def _target(self, agent: str, example: TrainExample) -> str:
        if agent not in example.targets:
            raise fail(
                "RM700",
                "there is no target text",
                hint=f"Name a field in `train.targets.{agent}`; an agent other than the one that "
                "answers may do without one in `train.outer.mode: rollout`.",
            )
        return example.targets[agent]


def _most_tokens(form: MessageForm, latent_steps: int) -> int:
    """Return how many tokens of a sender's text its message can say."""
    if form.carries == "thoughts":
        return latent_steps
    return (form.max_tokens or 0) if form.carries in ("written", "text") else 0


def _named(error: RecmasError, agent: str, example: TrainExample) -> RecmasError:
    """Say whose call of which record it was."""
    named = f"agent {agent!r}, record {example.id!r}"
    return RecmasError(replace(p, message=f"{named}: {p.message}") for p in error.problems)
