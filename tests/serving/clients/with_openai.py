"""Usage: with_openai.py URL KEY. What the `openai` package makes of a server, as JSON."""

import asyncio
import json
import sys

import openai

url, key = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=2, timeout=30)
question = {"model": "tiny", "messages": [{"role": "user", "content": "what 7"}]}
told = {}

chat = client.chat.completions.create(**question, max_completion_tokens=8, seed=1, temperature=0)
told["chat"] = chat.choices[0].message.content
told["finish"] = chat.choices[0].finish_reason
told["usage"] = chat.usage.model_dump()
told["latent"] = chat.usage.completion_tokens_details.latent_steps

parts, usage = [], None
for chunk in client.chat.completions.create(
    **question, stream=True, stream_options={"include_usage": True}
):
    usage = chunk.usage or usage
    parts += [choice.delta.content for choice in chunk.choices if choice.delta.content]
told["stream"] = "".join(parts)
told["stream_usage"] = usage.total_tokens

with client.chat.completions.stream(**question, extra_body={"recmas": {}}) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_completion()
told["helper"] = final.choices[0].message.content
told["helper_kinds"] = sorted(set(kinds))

try:
    with client.chat.completions.stream(**question, max_tokens=1) as stream:
        for _ in stream:
            pass
        stream.get_final_completion()
except openai.LengthFinishReasonError as error:
    told["length"] = error.completion.choices[0].message.content

more = client.chat.completions.create(**question, n=2, extra_body={"recmas": {"rounds": 1}})
told["n"] = [choice.message.content for choice in more.choices]
told["recmas"] = [each["rounds"] for each in more.recmas["choices"]]

again = [
    question["messages"][0],
    chat.choices[0].message.model_dump(),
    {"role": "user", "content": "and 4"},
]
told["turns"] = (
    client.chat.completions.create(model="tiny", messages=again).choices[0].message.content
)

told["completion"] = client.completions.create(model="tiny", prompt="what 7").choices[0].text
told["completion_stream"] = "".join(
    chunk.choices[0].text
    for chunk in client.completions.create(model="tiny", prompt="what 7", stream=True)
)
response = client.responses.create(model="tiny", input="what 7", instructions="Be kind.")
told["response"] = response.output_text
told["response_usage"] = response.usage.total_tokens
with client.responses.stream(model="tiny", input="what 7") as stream:
    told["response_kinds"] = [event.type for event in stream]
    told["response_stream"] = stream.get_final_response().output_text

told["models"] = [model.id for model in client.models.list()]
told["model"] = client.models.retrieve("team/tiny:v1").id


def refused(call, kind):
    try:
        call()
    except kind as error:
        return [error.status_code, error.code, error.param, error.type, str(error.message)[:60]]


told["bad"] = refused(
    lambda: client.chat.completions.create(**question, logprobs=True), openai.BadRequestError
)
told["unknown"] = refused(
    lambda: client.chat.completions.create(**question, extra_body={"top_k": 3}),
    openai.BadRequestError,
)
told["missing"] = refused(
    lambda: client.chat.completions.create(model="other", messages=question["messages"]),
    openai.NotFoundError,
)
locked_out = openai.OpenAI(base_url=url, api_key="another-key", max_retries=0)
told["locked"] = refused(locked_out.models.list, openai.AuthenticationError)


async def beside():
    several = openai.AsyncOpenAI(base_url=url, api_key=key, timeout=30)
    found = await asyncio.gather(
        *(
            several.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": f"what {i}"}]
            )
            for i in range(8)
        )
    )
    return "".join(each.choices[0].message.content for each in found)


told["async"] = asyncio.run(beside())
print(json.dumps(told))
