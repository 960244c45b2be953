"""Unmodified clients of OpenAI's forms against a running server: `make test-clients`.

They are installed into `.clients/` by that target, never where the project itself is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.hand_bundle import make_tokenizer
from kit.http_server import (
    OpenService,
    ScriptedEngines,
    Served,
    done,
    failed,
    local,
    one_by_one,
    piece,
    scripted,
    serving,
    step,
)
from kit.lm_eval_tasks import write_letter_tasks
from recmas_runtime.serve.http.settings import HttpSettings

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent / "clients"
INSTALLED = Path(__file__).parents[2] / ".clients"
PYTHON = INSTALLED / "python/bin/python"
NODE_FOLDER = INSTALLED / "node"
KEY = "key-of-the-clients"
# No client may look anywhere but at the server.
ALONE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "NO_PROXY": "*",
    "OPENAI_API_KEY": KEY,
    "AI_SDK_LOG_WARNINGS": "false",
}
QUICK = HttpSettings(comment_s=0.05, chunk_s=0.1, first_event_s=0.05)
HUNG = 3600.0


@pytest.fixture(scope="module")
def served(hand_bundle: Path) -> Iterator[Served]:
    bundles = {"tiny": hand_bundle, "team/tiny:v1": hand_bundle}
    with serving(local(bundles), HttpSettings(api_keys=(KEY,))) as server:
        yield server


def run(command: list[str | Path], folder: Path, **more: str) -> str:
    """Return what a client prints."""
    ran = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env={**os.environ, **ALONE, "HF_HOME": str(folder / "hf"), **more},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


def told(command: list[str | Path], folder: Path) -> dict[str, Any]:
    return dict(json.loads(run(command, folder).splitlines()[-1]))


def in_node(script: str, served: Served, folder: Path) -> dict[str, Any]:
    """Run a script from where the packages are: Node looks for them beside it."""
    copy = NODE_FOLDER / script
    shutil.copy(HERE / script, copy)
    return told(["node", copy, f"{served.url}/v1", KEY], folder)


def test_openai(served: Served, tmp_path: Path) -> None:
    found = told([PYTHON, HERE / "with_openai.py", f"{served.url}/v1", KEY], tmp_path)
    texts = ("chat", "stream", "helper", "completion", "completion_stream", "response")
    assert {found[name] for name in (*texts, "response_stream")} == {"h"}
    assert found["finish"] == "stop"
    used = found["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert found["latent"] == 6
    assert found["stream_usage"] == used["total_tokens"]
    assert "content.delta" in found["helper_kinds"]
    assert found["length"] == "h"
    assert (found["n"], found["recmas"]) == (["h", "h"], [1, 1])
    assert found["turns"] == "e"
    assert found["response_kinds"][0] == "response.created"
    assert found["response_kinds"][-1] == "response.completed"
    assert found["models"] == ["team/tiny:v1", "tiny"]
    assert found["model"] == "team/tiny:v1"
    assert found["bad"][:4] == [400, "RM543", "logprobs", "invalid_request_error"]
    assert found["unknown"][:3] == [400, "RM543", "top_k"]
    assert found["missing"][:3] == [404, "RM540", "model"]
    assert found["locked"][:4] == [401, "RM544", None, "authentication_error"]
    assert found["async"] == "abcdefgh"


def with_scripts(open_service: OpenService, case: str, folder: Path) -> dict[str, Any]:
    with serving(open_service, QUICK) as served:
        found = told([PYTHON, HERE / "with_openai_errors.py", f"{served.url}/v1", case], folder)
        engines = served.service
        assert isinstance(engines, ScriptedEngines)
        found["asked"] = len(engines.asked)
        end = time.monotonic() + 10
        while case == "left" and not engines.cancelled and time.monotonic() < end:
            time.sleep(0.01)
        found["cancelled"] = len(engines.cancelled)
    return found


def test_openai_asks_again_after_a_refusal(tmp_path: Path) -> None:
    full = failed("full", "RM541", "no room")
    restarted = failed("stopped", "RM542", "it was restarted")
    found = with_scripts(one_by_one([full], [restarted], [done("So.")]), "retried", tmp_path)
    assert (found["answer"], found["asked"]) == ("So.", 3)


def test_openai_sees_a_failure_within_a_stream(tmp_path: Path) -> None:
    script = [step(), 0.3, piece("half"), failed("failed", "RM507", "the engine failed")]
    found = with_scripts(scripted(script), "broken", tmp_path)
    assert found["parts"] == ["half"]
    assert found["error"] == "the engine failed. Do something else."


def test_openai_leaves_a_stream(tmp_path: Path) -> None:
    found = with_scripts(scripted([step(), 0.2, piece("half"), HUNG]), "left", tmp_path)
    assert found["cancelled"] == 1


def test_langchain(served: Served, tmp_path: Path) -> None:
    found = told([PYTHON, HERE / "with_langchain.py", f"{served.url}/v1", KEY], tmp_path)
    assert {found[name] for name in ("invoke", "stream", "responses")} == {"h"}
    assert (found["turns"], found["astream"], found["batch"]) == ("d", "f", ["b", "c"])
    assert found["usage"] == found["stream_usage"] > 2
    assert found["limited"] == "length"
    assert found["tools"] == [400, "tools"], "it would answer None without an error"
    assert found["json"] == [400, "response_format"]


def test_litellm(served: Served, tmp_path: Path) -> None:
    found = told([PYTHON, HERE / "with_litellm.py", f"{served.url}/v1", KEY], tmp_path)
    assert {found[name] for name in ("completion", "stream", "text")} == {"h"}
    assert found["finish"] == found["stream_finish"] == "stop"
    assert found["usage"] == found["stream_usage"] > 2
    assert found["async"] == "abcd"
    assert found["tools"] == [400, True]
    assert found["unknown"][0] == 400


QUESTIONS = 20


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Twenty questions whose answers the bundle knows, as two tasks of lm-eval."""
    write_letter_tasks(tmp_path, QUESTIONS)
    (tmp_path / "tokenizer").mkdir()
    make_tokenizer().save(str(tmp_path / "tokenizer/tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "path", "names"),
    [
        ("local-completions", "completions", ("letters_written", "letters_chosen")),
        ("local-chat-completions", "chat/completions", ("letters_written",)),
    ],
)
def test_lm_eval(
    served: Served, tasks: Path, model: str, path: str, names: tuple[str, ...]
) -> None:
    arguments = {
        "model": "tiny",
        "base_url": f"{served.url}/v1/{path}",
        "tokenizer": str(tasks / "tokenizer"),
        "tokenizer_backend": "huggingface",
        "num_concurrent": "2",
        "max_retries": "1",
    }
    command: list[str | Path] = [PYTHON.with_name("lm_eval"), "run", "--model", model]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--include_path", tasks, "--tasks", ",".join(names), "--output_path", tasks / "out"]
    command += ["--log_samples"]
    run(command + ["--apply_chat_template"] * ("chat" in model), tasks)
    (file,) = (tasks / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    figures = {"letters_written": "exact_match,none", "letters_chosen": "acc,none"}
    for name in names:
        assert results["results"][name][figures[name]] == 1.0
        assert results["n-samples"][name] == {"original": QUESTIONS, "effective": QUESTIONS}


def test_openai_for_node(served: Served, tmp_path: Path) -> None:
    found = in_node("with_openai.mjs", served, tmp_path)
    assert {found[name] for name in ("chat", "stream", "helper", "response")} == {"h"}
    assert found["usage"] == found["stream_usage"] > 2
    assert found["response_kinds"][-1] == "response.completed"
    assert found["models"] == ["team/tiny:v1", "tiny"]
    assert found["model"] == "team/tiny:v1"
    assert found["refused"] == [400, "RM543", "tools"]


def test_ai(served: Served, tmp_path: Path) -> None:
    found = in_node("with_ai.mjs", served, tmp_path)
    for name in ("responses", "chat", "compatible"):
        each = found[name]
        assert (each["whole"], each["stream"], each["finish"]) == ("h", "d", "stop")
        assert each["errors"] == []
        assert min(each["total"], each["stream_total"]) > 2
    assert found["refused"] == [400, "logprobs"]


def test_curl_shows_each_piece_as_it_comes(tmp_path: Path) -> None:
    script = [step(), piece("one "), 1.0, piece("two"), done("one two")]
    body = {"model": "scripted", "messages": [{"role": "user", "content": "?"}], "stream": True}
    with serving(scripted(script), QUICK) as served:
        curl = subprocess.Popen(
            ["curl", "-sN", f"{served.url}/v1/chat/completions", "--json", json.dumps(body)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert curl.stdout is not None
        when = {}
        for line in curl.stdout:
            for word in ("assistant", "round 1/3", "one ", "waiting", "two", "[DONE]"):
                if word in line:
                    when.setdefault(word, time.monotonic())
        assert curl.wait() == 0
    assert list(when) == ["assistant", "round 1/3", "one ", "waiting", "two", "[DONE]"]
    assert when["two"] - when["one "] > 0.5


HOOKS = """\
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"
"""
# What a schema cannot say, such as that a stream has one answer, is refused all the same.
BEYOND_SCHEMAS = "positive_data_acceptance,negative_data_rejection"


@pytest.mark.parametrize("reaches_model", [False, True])
def test_schemathesis_finds_nothing(hand_bundle: Path, tmp_path: Path, reaches_model: bool) -> None:
    command: list[str | Path] = [PYTHON.with_name("schemathesis"), "run", "--no-color"]
    more = {}
    if reaches_model:
        (tmp_path / "hooks.py").write_text(HOOKS)
        more = {"SCHEMATHESIS_HOOKS": "hooks"}
        command += ["--exclude-checks", BEYOND_SCHEMAS]
    with serving(local({"tiny": hand_bundle}), HttpSettings(api_keys=(KEY,))) as served:
        command += [f"{served.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"]
        command += ["--checks", "all", "-n", "100", "--continue-on-failure", "--seed", "17"]
        out = run(command, tmp_path, **more)
        assert served.get("/ready").status_code == 200
        assert served.service.num_open == 0
    assert "8 selected / 8 total" in out
    assert "No issues found" in out or "failures" not in out.splitlines()[-1], out[-2000:]
