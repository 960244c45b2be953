"""The team as a bundle: `--baseline latent` hands over thoughts, `--baseline text` texts."""

from __future__ import annotations

from lockstep import Ask, Settings, answer_questions

import recmas_runtime as rt
from recmas_runtime.formats.plan import SamplingPlan


def make(settings: Settings) -> Ask:
    """Return the loaded bundle as a function of the question."""
    system = rt.load(settings.bundle, threads=settings.threads).with_rounds(settings.rounds)
    if settings.baseline == "text":
        system = system.baseline(f"text@{settings.max_tokens}")
    sampling = SamplingPlan(max_new_tokens=settings.max_tokens, temperature=0.0)

    def ask(question: str) -> dict[str, object]:
        found = system.run(question, sampling=sampling)
        return {
            "answer": found.answer,
            "calls": len(settings.agents) * settings.rounds,
            "prompt_tokens": found.usage.prompt_tokens,
            "written_tokens": found.usage.handover_tokens + found.usage.completion_tokens,
            "latent_steps": found.usage.latent_steps,
        }

    return ask


if __name__ == "__main__":
    answer_questions(make)
