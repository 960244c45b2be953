"""Usage: with_litellm.py URL KEY. What `litellm` makes of a server, as JSON."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its prices come from elsewhere otherwise
import litellm

litellm.telemetry = False
url, key = sys.argv[1:]
where = {"model": "openai/tiny", "api_base": url, "api_key": key, "timeout": 30}
messages = [{"role": "user", "content": "what 7"}]
told = {}
answer = litellm.completion(**where, messages=messages, max_tokens=8, temperature=0)
told["completion"] = answer.choices[0].message.content
told["finish"] = answer.choices[0].finish_reason
told["usage"] = answer.usage.total_tokens
chunks = list(
    litellm.completion(
        **where, messages=messages, stream=True, stream_options={"include_usage": True}
    )
)
told["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
told["stream_finish"] = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
told["stream_usage"] = getattr(chunks[-1], "usage", None) and chunks[-1].usage.total_tokens


async def beside():
    found = await asyncio.gather(
        *(
            litellm.acompletion(**where, messages=[{"role": "user", "content": f"what {i}"}])
            for i in range(4)
        )
    )
    return "".join(each.choices[0].message.content for each in found)


told["async"] = asyncio.run(beside())
told["text"] = (
    litellm.text_completion(**{**where, "model": "text-completion-openai/tiny"}, prompt="what 7")
    .choices[0]
    .text
)


def refused(**keys):
    try:
        return repr(litellm.completion(**where, messages=messages, num_retries=0, **keys))
    except litellm.BadRequestError as error:
        return [error.status_code, "RM543" in str(error) or "not supported" in str(error)]


told["tools"] = refused(
    tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
)
told["unknown"] = refused(extra_body={"top_k": 3})
print(json.dumps(told))
