"""OpenAI's forms over real engines: what is asked, what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.hand_bundle import make_tokenizer
from kit.http_server import Served, chunks, local, serving
from recmas_runtime.cli.main import main

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"


@pytest.fixture(scope="module")
def served(hand_bundle: Path) -> Iterator[Served]:
    """The bundle that answers a digit with a letter, under a name with a slash and a colon."""
    with serving(local({"tiny": hand_bundle, "team/tiny:v1": hand_bundle})) as server:
        yield server


def ask(served: Served, content: Any = "what 7", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    response = served.post(CHAT, {"model": "tiny", "messages": messages, **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_a_question_in_a_chat(served: Served) -> None:
    found = ask(served)
    assert found["object"] == "chat.completion"
    assert found["id"].startswith("chatcmpl-")
    assert found["model"] == "tiny"
    assert found["system_fingerprint"].startswith("recmas-")
    (choice,) = found["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "h", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert "recmas" not in found


def test_usage_adds_up(served: Served) -> None:
    used = ask(served)["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert used["completion_tokens"] == 2  # "h" and what ends it
    assert used["completion_tokens_details"] == {"reasoning_tokens": 0, "latent_steps": 6}
    cached = used["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= cached < used["prompt_tokens"]
    # The same again finds at least as much of its prompts.
    again = ask(served)["usage"]
    assert cached <= again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]


def test_handed_over_text_counts_as_reasoning(served: Served) -> None:
    used = ask(served, recmas={"baseline": "text@3"})["usage"]
    handed = used["completion_tokens_details"]["reasoning_tokens"]
    assert handed > 0
    assert used["completion_tokens"] == handed + 2
    assert used["completion_tokens_details"]["latent_steps"] == 0


def test_content_as_parts(served: Served) -> None:
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "3"}]
    assert ask(served, parts)["choices"][0]["message"]["content"] == "d"


def test_earlier_turns_come_before_the_question(served: Served) -> None:
    """The end of the transcript decides the letter, so all of it is one question."""
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "what 1"},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "and 4"},
    ]
    response = served.post(CHAT, {"model": "tiny", "messages": messages})
    found = response.json()
    assert found["choices"][0]["message"]["content"] == "e"
    assert found["usage"]["prompt_tokens"] > ask(served, "and 4")["usage"]["prompt_tokens"]


def test_names_with_slashes(served: Served) -> None:
    assert ask(served, model="team/tiny:v1")["model"] == "team/tiny:v1"
    for path in ("/v1/models/team/tiny:v1", "/v1/models/team%2Ftiny%3Av1"):
        assert served.get(path).json()["id"] == "team/tiny:v1"


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_tokens(served: Served, key: str) -> None:
    (choice,) = ask(served, **{key: 1})["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("h", "length")


def test_more_tokens_than_were_built_are_no_error(served: Served) -> None:
    assert ask(served, max_tokens=10**6)["choices"][0]["finish_reason"] == "stop"


def test_stop_ends_an_answer_and_is_no_part_of_it(served: Served) -> None:
    for stop in ("h", ["x", "h"]):
        (choice,) = ask(served, stop=stop)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")


def test_several_answers(served: Served) -> None:
    found = ask(served, n=3)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in found["choices"]] == ["h"] * 3
    assert found["usage"]["completion_tokens"] == 6


def test_a_seed_decides_what_is_drawn(served: Served) -> None:
    def texts(**body: Any) -> list[str]:
        found = ask(served, temperature=10.0, top_p=1.0, max_tokens=8, n=4, **body)
        return [choice["message"]["content"] for choice in found["choices"]]

    drawn = texts(seed=5)
    assert texts(seed=5) == drawn
    assert len(set(drawn)) > 1, "each answer draws for itself"
    assert texts(seed=6)[:3] == drawn[1:]
    assert texts() != texts(), "without a seed each request draws for itself"


def test_recmas_tells_more_where_it_is_asked(served: Served) -> None:
    found = ask(served, seed=3, recmas={"rounds": 1})["recmas"]
    assert (found["rounds"], found["seed"]) == (1, 3)
    assert found["timing_ms"]["total"] > 0
    several = ask(served, n=2, seed=3, recmas={})["recmas"]["choices"]
    assert [each["seed"] for each in several] == [3, 4]


def test_a_chat_as_a_stream(served: Served) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "what 7"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = served.post(CHAT, body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *middle, last, usage = chunks(response.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["choices"][0]["delta"]["content"] for each in middle) == "h"
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert usage["choices"] == []
    whole = ask(served)["usage"]
    assert usage["usage"] | {"prompt_tokens_details": None} == whole | {
        "prompt_tokens_details": None
    }
    assert all(each["usage"] is None for each in (first, *middle, last))
    assert all(each["object"] == "chat.completion.chunk" for each in (first, *middle, last, usage))
    assert ": round 2/2 solver: decode\n" in response.text
    assert "recmas" not in first | middle[0] | last


def test_steps_as_chunks_where_they_are_asked_for(served: Served) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "what 7"}],
        "stream": True,
        "recmas": {},
    }
    found = chunks(served.post(CHAT, body).text)
    steps = [each["recmas"]["step"] for each in found if "step" in each.get("recmas", {})]
    assert steps[0] == {"op": "prefill", "round": 1, "rounds": 2, "agents": ["planner"]}
    assert all(each["choices"][0]["delta"] == {} for each in found if "recmas" in each)
    assert found[-1]["recmas"]["rounds"] == 2
    assert "usage" not in found[0]


def test_completions(served: Served) -> None:
    found = served.post(TEXT, {"model": "tiny", "prompt": "what 7"}).json()
    assert found["object"] == "text_completion"
    assert found["choices"] == [
        {"index": 0, "text": "h", "logprobs": None, "finish_reason": "stop"}
    ]
    body = {"model": "tiny", "prompt": ["a 1", "b 2"], "n": 2, "echo": True}
    texts = [choice["text"] for choice in served.post(TEXT, body).json()["choices"]]
    assert texts == ["a 1b", "a 1b", "b 2c", "b 2c"]


def test_how_likely_a_prompt_is(served: Served) -> None:
    """As `lm_eval` asks: the prompt's tokens, and the backbone's likeliest one behind them."""
    body = {"model": "tiny", "prompt": "a7", "echo": True, "logprobs": 1, "max_tokens": 1}
    found = served.post(TEXT, body).json()
    (choice,) = found["choices"]
    assert choice["text"] == "a7h"
    told = choice["logprobs"]
    assert told["tokens"] == ["a", "7", "h"]
    assert told["text_offset"] == [0, 1, 2]
    assert told["top_logprobs"][0] is told["token_logprobs"][0] is None
    assert told["top_logprobs"][2] == {"h": told["token_logprobs"][2]}
    assert told["token_logprobs"][1] < told["token_logprobs"][2] < 0
    assert found["usage"]["prompt_tokens"] == 2
    assert found["usage"]["completion_tokens"] == 1


def test_token_ids_are_those_of_the_tokenizer(served: Served) -> None:
    def read(prompt: Any, **keys: Any) -> list[dict[str, Any]]:
        body = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 2, **keys}
        return list(served.post(TEXT, body).json()["choices"])

    tokenizer = make_tokenizer()
    ids = [tokenizer.encode(text).ids for text in ("a7h", "what 3")]
    assert read(ids) == read(["a7h", "what 3"])
    assert read(ids[0], max_tokens=1) == read("a7h", max_tokens=1)
    first = read(ids)[0]["logprobs"]
    assert first["tokens"] == ["a", "7", "h"]
    assert all(
        next(iter(each.values())) == max(each.values()) for each in first["top_logprobs"][1:]
    )
    assert read(ids, logprobs=0)[0]["logprobs"]["top_logprobs"] is None
    # And an answer to ids is that to their text.
    texts = served.post(TEXT, {"model": "tiny", "prompt": ids[1]}).json()["choices"]
    assert texts[0]["text"] == "d"


@pytest.mark.parametrize(
    ("prompt", "code"), [("", "RM500"), ([10**6], "RM500"), ("a" * 5000, "RM501")]
)
def test_texts_that_no_backbone_reads(served: Served, prompt: Any, code: str) -> None:
    body = {"model": "tiny", "prompt": prompt, "echo": True, "logprobs": 1}
    response = served.post(TEXT, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("prompt", code)


def test_a_trace_of_an_answer(served: Served) -> None:
    found = ask(served, recmas={"trace": True, "thoughts": 2})["recmas"]["trace"]
    assert set(found) >= {"steps", "thoughts", "messages"}
    assert "trace" not in ask(served, recmas={})["recmas"]


def test_a_completion_as_a_stream(served: Served) -> None:
    body = {"model": "tiny", "prompt": "what 7", "stream": True, "echo": True}
    found = chunks(served.post(TEXT, body).text)
    assert "".join(each["choices"][0]["text"] for each in found) == "what 7h"
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_responses(served: Served) -> None:
    body = {"model": "tiny", "input": "what 7", "instructions": "Be kind.", "metadata": {"a": "b"}}
    found = served.post(RESPONSES, body).json()
    assert (found["object"], found["status"]) == ("response", "completed")
    (item,) = found["output"]
    assert item["content"][0]["text"] == "h"
    assert found["metadata"] == {"a": "b"}
    used = found["usage"]
    assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"]
    again = {
        "model": "tiny",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "what 7"}]},
            item,
            {"type": "message", "role": "user", "content": "what 2"},
        ],
        "max_output_tokens": 1,
    }
    cut = served.post(RESPONSES, again).json()
    assert cut["output"][0]["content"][0]["text"] == "c"
    assert cut["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}


def test_responses_as_a_stream(served: Served) -> None:
    body = {"model": "tiny", "input": "what 7", "stream": True}
    text = served.post(RESPONSES, body).text
    events = [json.loads(each[6:]) for each in text.split("\n") if each.startswith("data: ")]
    assert [each["type"] for each in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [each["sequence_number"] for each in events] == list(range(9))
    names = [each[7:] for each in text.split("\n") if each.startswith("event: ")]
    assert names == [each["type"] for each in events]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "h"


def test_what_is_loaded(served: Served) -> None:
    found = served.get("/v1/models").json()
    assert [each["id"] for each in found["data"]] == ["team/tiny:v1", "tiny"]
    (one, _) = found["data"]
    assert set(one) == {"id", "object", "created", "owned_by", "recmas"}
    system = served.get("/recmas/systems/tiny").json()
    assert [agent["name"] for agent in system["agents"]] == ["planner", "solver"]
    assert {(link["source"], link["feedback"]) for link in system["links"]} == {
        ("planner", False),
        ("solver", True),
    }


def test_probes_say_one_word(served: Served) -> None:
    assert served.get("/health").json() == {"status": "ok"}
    assert served.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/nope", "/v1/models/nope", "/v1/responses/resp_1", "/metrics"])
def test_unknown_addresses(served: Served, path: str) -> None:
    response = served.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


def test_wrong_methods(served: Served) -> None:
    response = served.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "RM546"


def test_a_seed_that_is_told_gives_the_answer_again(
    served: Served, hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beyond what other languages count as exact, and with the command line."""
    drawn = {"temperature": 10.0, "max_tokens": 12}
    options = ["--temperature", "10", "--max-new-tokens", "12", "--json", "--quiet"]
    for first in ({}, {"seed": 2**53 + 1}, {"seed": 2**63 - 2}):
        found = ask(served, n=2, recmas={}, **drawn, **first)
        texts = [choice["message"]["content"] for choice in found["choices"]]
        assert len(set(texts)) == 2
        for text, told in zip(texts, found["recmas"]["choices"], strict=True):
            (again,) = ask(served, seed=told["seed"], **drawn)["choices"]
            assert again["message"]["content"] == text
            seed = ["--seed", str(told["seed"])]
            assert main(["run", str(hand_bundle), "what 7", *options, *seed]) == 0
            (answer,) = json.loads(capsys.readouterr().out)["data"]["answers"]
            assert answer["answer"] == text
