"""The team as a loop of requests without any framework: what the endpoint itself takes."""

from __future__ import annotations

import json
import urllib.request

from lockstep import Ask, Settings, answer_questions


def make(settings: Settings) -> Ask:
    """Return the loop as a function of the question."""

    def reply(prompt: str) -> str:
        body = {
            "model": settings.model,
            "temperature": 0,
            "max_tokens": settings.max_tokens,
            "messages": [
                {"role": "system", "content": settings.system},
                {"role": "user", "content": prompt},
            ],
        }
        request = urllib.request.Request(
            f"{settings.url}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text: str = json.load(response)["choices"][0]["message"]["content"]
        return text

    def ask(question: str) -> dict[str, object]:
        text: str | None = None
        for _ in range(settings.rounds):
            for agent in settings.agents:
                text = reply(agent.prompt(question, text))
        return {"answer": text}

    return ask


if __name__ == "__main__":
    answer_questions(make)
