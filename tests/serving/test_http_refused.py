"""Nothing is ignored silently: every key of OpenAI's forms is honoured, or refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.http_server import Served, local, serving
from recmas_runtime.serve.http.chat import ChatRequest
from recmas_runtime.serve.http.completions import CompletionRequest
from recmas_runtime.serve.http.responses import ResponsesRequest

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"model": "tiny", "messages": [{"role": "user", "content": "what 7"}]},
    TEXT: {"model": "tiny", "prompt": "what 7"},
    RESPONSES: {"model": "tiny", "input": "what 7"},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def said(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


# form, keys over the least of it -> the key that is named, the code
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"tools": [TOOL]}, "tools", "RM543"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "RM543"),
    (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice", "RM543"),
    (CHAT, {"functions": [{"name": "f"}]}, "functions", "RM543"),
    (CHAT, {"function_call": {"name": "f"}}, "function_call", "RM543"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "RM543"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format",
        "RM543",
    ),
    (CHAT, {"logprobs": True}, "logprobs", "RM543"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs", "RM543"),
    (CHAT, {"logit_bias": {"50256": -100}}, "logit_bias", "RM543"),
    (CHAT, {"presence_penalty": 0.5}, "presence_penalty", "RM543"),
    (CHAT, {"frequency_penalty": -0.5}, "frequency_penalty", "RM543"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities", "RM543"),
    (CHAT, {"audio": {"voice": "x", "format": "wav"}}, "audio", "RM543"),
    (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction", "RM543"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "RM543"),
    (CHAT, {"verbosity": "low"}, "verbosity", "RM543"),
    (CHAT, {"web_search_options": {}}, "web_search_options", "RM543"),
    (CHAT, {"store": True}, "store", "RM543"),
    (CHAT, {"metadata": {"a": "b"}}, "metadata", "RM543"),
    (CHAT, {"service_tier": "flex"}, "service_tier", "RM543"),
    (CHAT, {"n": 2, "stream": True}, "n", "RM543"),
    (CHAT, {"n": 17}, "n", "RM546"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "RM543"),
    (
        CHAT,
        {"stream": True, "stream_options": {"chunk": 1}},
        "stream_options.chunk",
        "RM543",
    ),
    (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "RM543"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "RM546"),
    (CHAT, {"max_tokens": "8"}, "max_tokens", "RM546"),
    (CHAT, {"max_tokens": 8.5}, "max_tokens", "RM546"),
    (CHAT, {"max_tokens": True}, "max_tokens", "RM546"),
    (CHAT, {"temperature": -1}, "temperature", "RM546"),
    (CHAT, {"temperature": "hot"}, "temperature", "RM546"),
    (CHAT, {"top_p": 0}, "top_p", "RM546"),
    (CHAT, {"top_p": 1.5}, "top_p", "RM546"),
    (CHAT, {"seed": -1}, "seed", "RM546"),
    (CHAT, {"seed": 2**64}, "seed", "RM546"),
    (CHAT, {"seed": 2**63 - 2, "n": 3}, "seed", "RM543"),
    (CHAT, {"stop": ""}, "stop", "RM546"),
    (CHAT, {"stop": ["a", ""]}, "stop[1]", "RM546"),
    (CHAT, {"stop": ["a"] * 17}, "stop", "RM546"),
    (CHAT, {"stop": [1]}, "stop[0]", "RM546"),
    (CHAT, {"user": 7}, "user", "RM546"),
    (CHAT, {"stream": "yes"}, "stream", "RM546"),
    (CHAT, {"top_k": 5}, "top_k", "RM543"),
    (CHAT, {"min_p": 0.1}, "min_p", "RM543"),
    (CHAT, {"providerOptions": {}}, "providerOptions", "RM543"),
    (CHAT, {"extra_body": {"a": 1}}, "extra_body", "RM543"),
    (CHAT, {"Model": "tiny"}, "Model", "RM543"),
    (CHAT, {"model": ""}, "model", "RM546"),
    (CHAT, {"model": None}, "model", "RM546"),
    (CHAT, {"messages": []}, "messages", "RM546"),
    (CHAT, {"messages": "what 7"}, "messages", "RM546"),
    (CHAT, {"messages": ["what 7"]}, "messages[0]", "RM546"),
    (CHAT, {"messages": None}, "messages", "RM546"),
    (CHAT, said({"content": "what 7"}), "messages[0].role", "RM546"),
    (CHAT, said({"role": "user"}), "messages[0].content", "RM546"),
    (CHAT, said(user(None)), "messages[0].content", "RM546"),
    (CHAT, said(user(7)), "messages[0].content", "RM546"),
    (CHAT, said(user([IMAGE])), "messages[0].content[0].type", "RM543"),
    (
        CHAT,
        said(user([{"type": "text", "text": "a"}, AUDIO])),
        "messages[0].content[1].type",
        "RM543",
    ),
    (CHAT, said(user([{"type": "text"}])), "messages[0].content[0].text", "RM546"),
    (CHAT, said(user("a"), {"role": "tool", "content": "b"}), "messages[1].role", "RM543"),
    (CHAT, said({"role": "function", "content": "b"}), "messages[0].role", "RM543"),
    (
        CHAT,
        said(user("a"), {"role": "assistant", "tool_calls": [CALL]}, user("b")),
        "messages[1].tool_calls",
        "RM546",
    ),
    (CHAT, said({**user("a"), "name": "Ann"}), "messages[0].name", "RM546"),
    (CHAT, said({**user("a"), "weight": 1}), "messages[0].weight", "RM543"),
    (CHAT, said(user("")), "messages", "RM500"),
    (CHAT, said(user("   ")), "messages", "RM500"),
    (CHAT, said(user("a"), {"role": "assistant", "content": "b"}), "messages", "RM543"),
    (CHAT, said(user("1" * 500)), "messages", "RM501"),
    (CHAT, {"recmas": {"record": {"question": "b"}}}, "recmas.record", "RM500"),
    (CHAT, {"recmas": {"record": {"context": "b"}}}, "recmas.record", "RM500"),
    (CHAT, {"recmas": {"record": []}}, "recmas.record", "RM546"),
    (CHAT, {"recmas": {"record": {"id": 1.5}}}, "recmas.record", "RM500"),
    (CHAT, {"recmas": {"record": {"id": "x" * 2000}}}, "recmas.record", "RM500"),
    (CHAT, {"recmas": {"rounds": 3}}, "recmas.rounds", "RM506"),
    (CHAT, {"recmas": {"rounds": 0}}, "recmas.rounds", "RM546"),
    (CHAT, {"recmas": {"baseline": "worse"}}, "recmas.baseline", "RM508"),
    (CHAT, {"recmas": {"trace": 1}}, "recmas.trace", "RM546"),
    (CHAT, {"recmas": {"trace": True}, "n": 2}, "recmas.trace", "RM543"),
    (CHAT, {"recmas": {"thoughts": 3}}, "recmas.thoughts", "RM543"),
    (CHAT, {"recmas": {"thoughts": 10**6, "trace": True}}, "recmas.thoughts", "RM546"),
    (CHAT, {"recmas": {"round": 1}}, "recmas.round", "RM543"),
    (CHAT, {"recmas": True}, "recmas", "RM546"),
    (TEXT, {"prompt": ""}, "prompt", "RM500"),
    (TEXT, {"prompt": []}, "prompt", "RM546"),
    (TEXT, {"prompt": [[]]}, "prompt[0]", "RM546"),
    (TEXT, {"prompt": 7}, "prompt", "RM546"),
    (TEXT, {"prompt": ["a", 1]}, "prompt[1]", "RM546"),
    (TEXT, {"prompt": [-1]}, "prompt[0]", "RM546"),
    (TEXT, {"prompt": None}, "prompt", "RM546"),
    (TEXT, {"prompt": ["a"] * 100, "n": 2}, "prompt", "RM543"),
    (TEXT, {"prompt": ["a", "b"], "stream": True}, "prompt", "RM543"),
    (TEXT, {"n": 2, "stream": True}, "n", "RM543"),
    (TEXT, {"max_tokens": 0}, "max_tokens", "RM543"),
    (TEXT, {"suffix": "x"}, "suffix", "RM543"),
    (TEXT, {"best_of": 2}, "best_of", "RM543"),
    (TEXT, {"logit_bias": {"1": 1}}, "logit_bias", "RM543"),
    (TEXT, {"presence_penalty": 1}, "presence_penalty", "RM543"),
    (TEXT, {"frequency_penalty": 1}, "frequency_penalty", "RM543"),
    (TEXT, {"logprobs": 1}, "logprobs", "RM543"),
    (TEXT, {"logprobs": 21, "echo": True}, "logprobs", "RM546"),
    (TEXT, {"logprobs": 1, "echo": True, "max_tokens": 2}, "max_tokens", "RM543"),
    (TEXT, {"logprobs": 1, "echo": True, "temperature": 1.0}, "temperature", "RM543"),
    (TEXT, {"logprobs": 1, "echo": True, "stream": True}, "stream", "RM543"),
    (TEXT, {"logprobs": 1, "echo": True, "n": 2}, "n", "RM543"),
    (TEXT, {"logprobs": 1, "echo": True, "recmas": {}}, "recmas", "RM543"),
    (TEXT, {"messages": []}, "messages", "RM543"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools", "RM543"),
    (RESPONSES, {"tool_choice": "required"}, "tool_choice", "RM543"),
    (RESPONSES, {"max_tool_calls": 1}, "max_tool_calls", "RM543"),
    (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id", "RM543"),
    (RESPONSES, {"conversation": "conv_1"}, "conversation", "RM543"),
    (RESPONSES, {"prompt": {"id": "x"}}, "prompt", "RM543"),
    (RESPONSES, {"reasoning": {"effort": "low"}}, "reasoning", "RM543"),
    (RESPONSES, {"include": ["message.output_text.logprobs"]}, "include", "RM543"),
    (RESPONSES, {"top_logprobs": 1}, "top_logprobs", "RM543"),
    (RESPONSES, {"background": True}, "background", "RM543"),
    (RESPONSES, {"store": True}, "store", "RM543"),
    (RESPONSES, {"truncation": "auto"}, "truncation", "RM543"),
    (RESPONSES, {"service_tier": "priority"}, "service_tier", "RM543"),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}}, "text", "RM543"),
    (RESPONSES, {"input": []}, "input", "RM546"),
    (
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "RM543",
    ),
    (
        RESPONSES,
        {"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]},
        "input[0].type",
        "RM543",
    ),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "1"}]}, "input[0].type", "RM543"),
    (RESPONSES, {"input": " "}, "input", "RM500"),
    (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens", "RM546"),
    (RESPONSES, {"max_tokens": 5}, "max_tokens", "RM543"),
]

# Values that ask for nothing.
NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"tools": [], "tool_choice": "none", "parallel_tool_calls": False}),
    (CHAT, {"tools": None, "tool_choice": "auto", "functions": [], "function_call": "none"}),
    (CHAT, {"response_format": {"type": "text"}, "modalities": ["text"]}),
    (CHAT, {"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "metadata": {}}),
    (CHAT, {"presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "store": False}),
    (CHAT, {"user": "ann", "safety_identifier": "ann", "prompt_cache_key": "x"}),
    (CHAT, {"stop": None, "seed": None, "temperature": None, "top_p": None, "max_tokens": None}),
    (CHAT, {"stop": [], "seed": 0, "temperature": 0, "top_p": 1, "service_tier": "auto"}),
    (CHAT, {"stream": False, "stream_options": None, "recmas": None, "reasoning_effort": None}),
    (CHAT, {"max_tokens": 8, "max_completion_tokens": 8}),
    (CHAT, {"max_tokens": 8.0, "seed": 3.0, "n": 1.0}),
    (CHAT, {"seed": 2**63 - 2, "n": 2, "temperature": 1}),
    (TEXT, {"suffix": "", "best_of": 1, "logit_bias": {}, "presence_penalty": 0, "echo": False}),
    (TEXT, {"logprobs": None, "user": "ann", "stop": ["\n\n"], "seed": 1234, "temperature": 0.0}),
    (RESPONSES, {"tools": [], "store": False, "include": [], "truncation": "disabled"}),
    (RESPONSES, {"text": {"format": {"type": "text"}}, "tool_choice": "auto", "reasoning": None}),
    (RESPONSES, {"instructions": None, "metadata": {}, "background": False, "user": "ann"}),
]


@pytest.fixture(scope="module")
def served(hand_bundle: Path) -> Iterator[Served]:
    with serving(local({"tiny": hand_bundle})) as server:
        yield server


@pytest.mark.parametrize(("form", "keys", "param", "code"), REFUSED)
def test_refused(served: Served, form: str, keys: dict[str, Any], param: str, code: str) -> None:
    response = served.post(form, {**LEAST[form], **keys})
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith((".", "?", "!"))


@pytest.mark.parametrize(("form", "keys"), NEUTRAL)
def test_what_asks_for_nothing_is_taken(served: Served, form: str, keys: dict[str, Any]) -> None:
    response = served.post(form, {**LEAST[form], **keys})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("form", [ChatRequest, CompletionRequest, ResponsesRequest])
def test_each_key_that_is_not_supported_is_in_the_table(form: Any) -> None:
    path = {ChatRequest: CHAT, CompletionRequest: TEXT, ResponsesRequest: RESPONSES}[form]
    refused = {param for where, _, param, code in REFUSED if (where, code) == (path, "RM543")}
    assert set(form.unsupported) <= refused
    assert set(form.unsupported) <= set(form.model_fields)


@pytest.mark.parametrize("form", list(LEAST))
def test_a_model_that_is_not_loaded(served: Served, form: str) -> None:
    response = served.post(form, {**LEAST[form], "model": "other"})
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "there is no model 'other'. Loaded are: tiny.",
        "type": "not_found_error",
        "param": "model",
        "code": "RM540",
    }


def test_messages_say_what_is_wrong_and_what_to_do(served: Served) -> None:
    def message(form: str, **keys: Any) -> str:
        return str(served.post(form, {**LEAST[form], **keys}).json()["error"]["message"])

    assert message(CHAT, tools=[TOOL]) == (
        "`tools` is not supported. Tools of a system are declared in its spec: leave it out."
    )
    most = f"`seed`: expected at most {2**63 - 1}, found {2**63}."
    assert message(CHAT, seed=2**63) == f"{most} Leave it out for one that is drawn."
    assert message(CHAT, seed=2**63 - 1, n=2).endswith(f"Take one of at most {2**63 - 2}.")
    assert message(CHAT, stop=5) == "`stop`: expected a string or a list, found 5."
    assert message(CHAT, messages=[user([IMAGE])]) == (
        "`messages[0].content[0].type`: expected 'text', found \"image_url\"."
    )
    assert (
        message(CHAT, stop=["a"] * 17) == "`stop`: expected at most 16 items, found a list of 17."
    )
    assert message(CHAT, recmas={"rounds": 7}) == (
        "`recmas.rounds` is 7, built were 2. Take at most 2."
    )
    named = {**user("a"), "name": "Ann"}
    assert message(CHAT, messages=[named]) == (
        '`messages[0].name`: expected null, found "Ann". Leave it out.'
    )
    read = {"logprobs": 1, "echo": True, "n": 2}
    assert message(TEXT, **read).endswith("a text is read once. Leave one of them out.")
    assert message(TEXT, prompt=" ") == "`prompt` is empty. Write a question."
    blank = {"role": "user", "content": " "}
    assert message(RESPONSES, input=[blank]) == (
        "input[0], the last one, is empty. Write a question."
    )
    assert message(TEXT, top_k=1) == (
        "unknown key `top_k`. Honoured are: model, prompt, max_tokens, temperature, top_p, seed, "
        "stop, n, stream, stream_options, echo, logprobs, user, recmas."
    )


def test_a_conversation_that_is_too_long_names_its_messages(served: Served) -> None:
    def error(form: str, **keys: Any) -> dict[str, Any]:
        response = served.post(form, {**LEAST[form], **keys})
        assert response.status_code == 400
        return dict(response.json()["error"])

    more = "more needs a bundle that is built with a larger build.max_prompt_tokens."
    said_before = [user("1" * 9), {"role": "assistant", "content": "a"}] * 100
    told = error(CHAT, messages=[*said_before, user("what 7")])
    assert told["message"].startswith("the ")
    assert "; the conversation has 201 messages. " in told["message"]
    assert told["message"].endswith(f" Leave out earlier messages; {more}")
    assert (told["code"], told["param"]) == ("RM501", "messages")
    told = error(RESPONSES, input=[*said_before, user("what 7")])
    assert "; the conversation has 201 messages. " in told["message"]
    assert told["param"] == "input"
    for form, key in ((CHAT, "messages"), (TEXT, "prompt"), (RESPONSES, "input")):
        long = "1" * 500
        told = error(form, **{key: [user(long)] if form == CHAT else long})
        assert "record" not in told["message"]
        assert told["message"].endswith(f" Shorten the text; {more}")
        assert told["param"] == key


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (
            r'{"model": "tiny", "messages": [{"role": "user", "content": "a\ud800"}]}',
            "messages[0].content",
        ),
        (r'{"model": "tiny", "recmas": {"record": {"a": ["b", "\udc00"]}}}', "recmas.record.a[1]"),
        (r'{"model": "tiny", "recmas": {"rec\ud800": 1}}', "recmas"),
        (r'{"\ud800": 1}', None),
        (r'{"model": "tiny", "temperature": 1e999}', "temperature"),
    ],
)
def test_what_no_text_or_number_is_has_a_place_and_a_remedy(
    served: Served, raw: str, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    response = served.http.post(CHAT, content=raw, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("RM546", param)
    remedy = " Send one below 1e308." if param == "temperature" else "send both halves or none."
    assert error["message"].endswith(remedy)
