"""Usage: with_langchain.py URL KEY. What `langchain-openai` makes of a server, as JSON."""

import asyncio
import json
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

url, key = sys.argv[1:]
model = ChatOpenAI(model="tiny", base_url=url, api_key=key, max_retries=1, timeout=30)
told = {}
answer = model.invoke("what 7")
told["invoke"] = answer.content
told["usage"] = answer.usage_metadata["total_tokens"]
turns = [SystemMessage("Be kind."), HumanMessage("what 7"), AIMessage("h"), HumanMessage("what 3")]
told["turns"] = model.invoke(turns).content
chunks = list(model.stream("what 7", stream_usage=True))
told["stream"] = "".join(chunk.content for chunk in chunks)
told["stream_usage"] = next(c.usage_metadata["total_tokens"] for c in chunks if c.usage_metadata)


async def streamed():
    return "".join([chunk.content async for chunk in model.astream("what 5")])


told["astream"] = asyncio.run(streamed())
told["batch"] = [each.content for each in model.batch(["what 1", "what 2"])]
told["limited"] = (
    ChatOpenAI(
        model="tiny", base_url=url, api_key=key, max_tokens=1, stop=["zzz"], seed=4, temperature=0
    )
    .invoke("what 7")
    .response_metadata["finish_reason"]
)


def refused(call):
    try:
        return repr(call())
    except openai.BadRequestError as error:
        return [error.status_code, error.param]


schema = {"title": "Answer", "type": "object", "properties": {"a": {"type": "string"}}}
told["tools"] = refused(
    lambda: model.with_structured_output(schema, method="function_calling").invoke("what 7")
)
told["json"] = refused(
    lambda: model.with_structured_output(schema, method="json_schema").invoke("what 7")
)
told["responses"] = (
    ChatOpenAI(model="tiny", base_url=url, api_key=key, use_responses_api=True)
    .invoke("what 7")
    .text
)
print(json.dumps(told, default=str))
