"""The team as an AutoGen round-robin chat.

Its own `AssistantAgent` sends the chat as it is: system message, task, what the others said. It
cannot put what another agent said inside a prompt, so the agents are custom ones, as AutoGen's
documentation tells to write them, with its client.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from autogen_agentchat.agents import BaseChatAgent
from autogen_agentchat.base import Response
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import BaseChatMessage, TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.models import SystemMessage, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from lockstep import Agent, Ask, Settings, answer_questions


class Member(BaseChatAgent):
    """Writes from the question, which is the chat's first message, and the chat's last one."""

    def __init__(self, agent: Agent, system: str, client: OpenAIChatCompletionClient) -> None:
        super().__init__(agent.name, description=agent.name)
        self._agent, self._system, self._client = agent, system, client
        self._heard: list[str] = []

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (TextMessage,)

    async def on_messages(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> Response:
        self._heard += [message.to_text() for message in messages]
        last = self._heard[-1] if len(self._heard) > 1 else None
        prompt = self._agent.prompt(self._heard[0], last)
        reply = await self._client.create(
            [SystemMessage(content=self._system), UserMessage(content=prompt, source="user")],
            cancellation_token=cancellation_token,
        )
        assert isinstance(reply.content, str)
        return Response(chat_message=TextMessage(content=reply.content, source=self.name))

    async def on_reset(self, cancellation_token: CancellationToken) -> None:
        self._heard.clear()


def make(settings: Settings) -> Ask:
    """Return the team as a function of the question."""
    # A loop belongs to its thread, and a client and a team to their loop.
    mine = threading.local()

    def ask(question: str) -> dict[str, object]:
        if not hasattr(mine, "loop"):
            mine.loop = asyncio.new_event_loop()
            mine.team = _team(settings)
        return {"answer": mine.loop.run_until_complete(_run(mine.team, question))}

    return ask


def _team(settings: Settings) -> RoundRobinGroupChat:
    client = OpenAIChatCompletionClient(
        base_url=settings.url,
        model=settings.model,
        api_key="none",
        temperature=0,
        max_tokens=settings.max_tokens,
        max_retries=0,
        include_name_in_message=False,
        model_info={
            "vision": False,
            "function_calling": False,
            "json_output": False,
            "family": "unknown",
            "structured_output": False,
        },
    )
    members = [Member(agent, settings.system, client) for agent in settings.agents]
    # The task counts as a message.
    end = MaxMessageTermination(1 + len(members) * settings.rounds)
    return RoundRobinGroupChat(members, termination_condition=end)


async def _run(team: RoundRobinGroupChat, question: str) -> str:
    result = await team.run(task=question)
    await team.reset()
    last = result.messages[-1]
    assert isinstance(last, TextMessage)
    return last.content


if __name__ == "__main__":
    answer_questions(make)
