"""A crew in the form that `crewai create crew` writes, with names and texts of its own."""

from crewai import Agent, Crew, Process, Task
from crewai.project import CrewBase, agent, crew, task
from harbour_report.tools.fee_table import FeeTableTool


@CrewBase
class HarbourReport:
    """Reports of a harbour."""

    agents_config = "config/agents.yaml"
    tasks_config = "config/tasks.yaml"

    @agent
    def observer(self) -> Agent:
        return Agent(config=self.agents_config["observer"], verbose=True)

    @agent
    def reckoner(self) -> Agent:
        return Agent(config=self.agents_config["reckoner"], tools=[FeeTableTool()])

    @agent
    def clerk(self) -> Agent:
        return Agent(config=self.agents_config["clerk"], tools=[FeeTableTool()], max_rpm=10)

    @task
    def observe_ships(self) -> Task:
        return Task(config=self.tasks_config["observe_ships"])

    @task
    def add_fees(self) -> Task:
        return Task(config=self.tasks_config["add_fees"])

    @task
    def write_report(self) -> Task:
        return Task(
            config=self.tasks_config["write_report"],
            context=[self.observe_ships(), self.add_fees()],
        )

    @crew
    def crew(self) -> Crew:
        return Crew(agents=self.agents, tasks=self.tasks, process=Process.sequential, verbose=True)
