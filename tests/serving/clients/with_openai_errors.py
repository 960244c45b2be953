"""Usage: with_openai_errors.py URL CASE. How the `openai` package takes what goes wrong."""

import json
import sys

import openai

url, case = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="any", max_retries=2, timeout=30)
question = {"model": "scripted", "messages": [{"role": "user", "content": "Why?"}]}
told = {}
if case == "retried":
    told["answer"] = client.chat.completions.create(**question).choices[0].message.content
elif case == "broken":
    parts = []
    try:
        for chunk in client.chat.completions.create(**question, stream=True):
            parts += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    except openai.APIError as error:
        told["error"] = error.message
    told["parts"] = parts
elif case == "left":
    stream = client.chat.completions.create(**question, stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    told["left"] = True
else:
    raise SystemExit(f"no case {case}")
print(json.dumps(told))
