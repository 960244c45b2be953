"""The team as a bundle: `--baseline latent` hands over thoughts, `--baseline text` texts."""

from __future__ import annotations

from lockstep import AskAll, Settings, answer_together

import recmas_runtime as rt
from recmas_runtime.formats.plan import SamplingPlan


def make(settings: Settings) -> AskAll:
    """Return the loaded bundle as a function of questions."""
    system = rt.load(settings.bundle, threads=settings.threads).with_rounds(settings.rounds)
    if settings.baseline == "text":
        system = system.baseline(f"text@{settings.max_tokens}")
    sampling = SamplingPlan(max_new_tokens=settings.max_tokens, temperature=0.0)

    def ask(questions: list[str]) -> list[dict[str, object]]:
        if settings.at_once == 1:
            return [counted(system.run(question, sampling=sampling)) for question in questions]
        found = system.answer_all(questions, at_once=settings.at_once, sampling=sampling)
        return [counted(result) for result in found]

    def counted(found: rt.Answer | rt.RecmasError) -> dict[str, object]:
        if isinstance(found, rt.RecmasError):
            raise found
        return {
            "answer": found.answer,
            "calls": len(settings.agents) * settings.rounds,
            "prompt_tokens": found.usage.prompt_tokens,
            "written_tokens": found.usage.handover_tokens + found.usage.completion_tokens,
            "latent_steps": found.usage.latent_steps,
        }

    return ask


if __name__ == "__main__":
    answer_together(make)
