"""The team with AVP: each agent thinks on the cache of all before it; the last one writes.

What AVP 0.6.2 cannot express: a message inside a prompt, or a message that ends with its round. A
context is the whole cache, so every prompt and thought of all rounds stands before the next agent,
and where the text would stand there is nothing. Thoughts are mixtures of token embeddings.
"""

from __future__ import annotations

import torch
from avp import HuggingFaceConnector
from lockstep import Ask, Settings, answer_questions


def make(settings: Settings) -> Ask:
    """Return the chain as a function of the question; `--bundle` is a folder of weights."""
    torch.set_num_threads(settings.threads)
    connector = HuggingFaceConnector.from_pretrained(
        settings.bundle, device="cpu", dtype=torch.float32, local_files_only=True
    )

    def ask(question: str) -> dict[str, object]:
        context = None
        counts = {"calls": 0, "prompt_tokens": 0, "latent_steps": 0}
        turns = [agent for _ in range(settings.rounds) for agent in settings.agents]
        answer = ""
        for turn, agent in enumerate(turns):
            prompt = agent.prompt(question, None if turn == 0 else "").strip()
            messages = [
                {"role": "system", "content": settings.system},
                {"role": "user", "content": prompt},
            ]
            counts["calls"] += 1
            rendered = connector.apply_chat_template(messages)
            counts["prompt_tokens"] += len(connector.tokenize(rendered))
            if turn == len(turns) - 1:
                answer = connector.generate(
                    messages,
                    context=context,
                    max_new_tokens=settings.max_tokens,
                    do_sample=False,
                )
            else:
                context = connector.think(messages, steps=settings.latent_steps, context=context)
                counts["latent_steps"] += settings.latent_steps
        written = len(connector.tokenize(answer))
        return {"answer": answer, "written_tokens": written, **counts}

    return ask


if __name__ == "__main__":
    answer_questions(make)
