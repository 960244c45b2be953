"""The team as a CrewAI crew: a sequence of tasks, each with the task before as its context.

CrewAI writes prompts of its own around a role, a task and its context, and `Crew(prompt_file=...)`
does not reach them (1.15.30). With `--baseline own` they stay, and the answers are those of other
prompts. Otherwise a hook, which CrewAI has for this, puts the team's messages in their place.
"""

from __future__ import annotations

from crewai import LLM, Agent, Crew, Process, Task
from crewai.hooks import LLMCallHookContext, before_llm_call
from lockstep import Agent as Member
from lockstep import Ask, Settings, answer_questions


def make(settings: Settings) -> Ask:
    """Return the crew as a function of the question."""
    llm = LLM(
        model=settings.model,
        provider="openai",
        base_url=settings.url,
        api_key="none",
        temperature=0,
        max_tokens=settings.max_tokens,
        max_retries=0,
    )
    members = {member.name: member for member in settings.agents}
    agents = {
        name: Agent(
            role=name,
            goal="The right number",
            backstory=settings.system,
            llm=llm,
            allow_delegation=False,
            max_retry_limit=0,
            verbose=False,
        )
        for name in members
    }
    asked: dict[object, str] = {}  # questions by task

    if settings.baseline != "own":

        @before_llm_call
        def as_the_team_writes(context: LLMCallHookContext) -> None:
            earlier = context.task.context
            text = earlier[0].output.raw if earlier else None
            prompt = members[context.agent.role].prompt(asked[context.task.id], text)
            context.messages[:] = [
                {"role": "system", "content": settings.system},
                {"role": "user", "content": prompt},
            ]

    def ask(question: str) -> dict[str, object]:
        tasks: list[Task] = []
        for _ in range(settings.rounds):
            for name, member in members.items():
                tasks.append(
                    Task(
                        description=_description(member, question, is_first=not tasks),
                        expected_output="A short text",
                        agent=agents[name],
                        context=tasks[-1:],
                    )
                )
                asked[tasks[-1].id] = question
        crew = Crew(
            agents=list(agents.values()),
            tasks=tasks,
            process=Process.sequential,
            memory=False,
            cache=False,
            planning=False,
            tracing=False,
            verbose=False,
        )
        return {"answer": crew.kickoff().raw}

    return ask


def _description(member: Member, question: str, *, is_first: bool) -> str:
    # Braces of a description are CrewAI's inputs only where `kickoff` gets some.
    return member.prompt(question, None if is_first else "").strip()


if __name__ == "__main__":
    answer_questions(make)
