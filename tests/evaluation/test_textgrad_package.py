"""Textual gradients with the package itself, in an environment of its own: `make test-textgrad`.

The backward engine is the tiny backbone, or an OpenAI-compatible endpoint on this machine whose
replies are written by the test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import recmas_compiler as rc
import recmas_runtime as rt
from kit.commands import run_recmasc
from kit.files import lines
from kit.http_server import local, serving
from recmas_compiler.text_gradients import OptimiseOptions, TextGradients, optimise, read_settings
from recmas_compiler.text_gradients.package import import_textgrad
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent
from recmas_runtime.running.records import Record

pytestmark = pytest.mark.textgrad

PROTOCOL = """
name: words
version: 1
description: Exact words.
data: {source: nowhere, split: test, fields: {question: [question]}, gold: {answer: [answer]}}
max_new_tokens: 6
check: {kind: exact}
"""
KEY = "key-of-the-tests"
Reply = Callable[[str, str], str]  # system text and prompt


class Endpoint:
    """An endpoint that notes what it is asked, and replies as a test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.keys: set[str] = set()
        self.reply: Reply = lambda system, prompt: "Say more."
        self.status = 200
        self.tells_usage = True
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                system, prompt = (message["content"] for message in body["messages"])
                endpoint.keys.add(self.headers["Authorization"])
                if endpoint.status != 200:
                    return self._send(endpoint.status, {"error": {"message": "too long for me"}})
                endpoint.asked.append((system, prompt))
                content = endpoint.reply(system, prompt)
                choice = {"index": 0, "message": {"role": "assistant", "content": content},
                          "finish_reason": "stop"}  # fmt: skip
                usage = {"prompt_tokens": 70, "completion_tokens": 7, "total_tokens": 77}
                return self._send(
                    200,
                    {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                     "choices": [choice], "usage": usage if endpoint.tells_usage else None},
                )  # fmt: skip

            def _send(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("KEY_OF_TESTS", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def training(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(lines(*({"question": f"T{i}", "answer": "no such thing"} for i in range(4))))
    return path


Optimise = Callable[..., TextGradients]
# What differs between two runs of the same.
TIMES = ("seconds", "step_seconds", "spec")


@pytest.fixture
def run(tiny_bundle: Path, training: Path, tmp_path: Path) -> Optimise:
    (tmp_path / "words.yaml").write_text(PROTOCOL)

    def call(*settings: str, out: str = "run", resume: bool = False, **more: Any) -> TextGradients:
        given = [f"data={training}", "records=3", "validation=1", "batch=2", "handover_tokens=4"]
        return optimise(
            OptimiseOptions(
                bundle=tiny_bundle,
                protocol=str(tmp_path / "words.yaml"),
                settings=read_settings([*given, *settings]),
                folder=tmp_path / out,
                resume=resume,
                threads=1,
            ),
            progress=more.pop("progress", Silent()),
        )

    return call


def by_endpoint(endpoint: Endpoint) -> list[str]:
    return [f"url={endpoint.url}", "model=critic-7b", "key_env=KEY_OF_TESTS", "retries=0"]


def is_update(system: str, prompt: str) -> bool:
    return "<IMPROVED_VARIABLE>" in prompt


def test_importing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    import_textgrad()
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before


def test_prompts_learn_and_the_spec_holds_them(
    run: Optimise, endpoint: Endpoint, tmp_path: Path, tiny_bundle: Path
) -> None:
    def reply(system: str, prompt: str) -> str:
        if not is_update(system, prompt):
            return "Name the number."
        at = prompt.index("agent '") + len("agent '")
        agent = prompt[at : prompt.index("'", at)]
        return f"Here: <IMPROVED_VARIABLE> New words for {agent}. </IMPROVED_VARIABLE>"

    endpoint.reply = reply
    found = run("steps=2", *by_endpoint(endpoint))
    assert found.stopped == "steps"
    assert found.texts == {"planner.system": "New words for planner."}
    first, second = found.steps
    assert [one.fate for one in first.proposals] == ["kept"]
    assert [one.fate for one in second.proposals] == ["unchanged"]
    assert (first.num_wrong, first.num_failed, first.num_cut) == (2, 0, 0)
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert found.spent.calls == len(endpoint.asked)
    assert found.spent.backward_tokens == 77 * len(endpoint.asked)
    assert KEY not in (tmp_path / "run/state.json").read_text()
    written = tmp_path / "run/spec.yaml"
    assert found.spec_file == written
    spec = rc.load_spec(written)
    assert spec.document.agents["planner"].system == "New words for planner."
    with rt.load(tiny_bundle, threads=1) as base:
        system = found.system(base)
        assert system.plan.agents["planner"].system[0].value == "New words for planner."
        assert "text" in {link.carries for link in system.plan.links.values()}


def test_gradients_go_back_through_the_texts_of_all_agents(
    run: Optimise, endpoint: Endpoint
) -> None:
    endpoint.reply = lambda system, prompt: f"Feedback {len(endpoint.asked)}."
    run("steps=1", "batch=1", "rewrites=prompt", *by_endpoint(endpoint))
    loss, *others = [prompt for _, prompt in endpoint.asked]
    assert "no such thing" in endpoint.asked[0][0]
    assert "no such thing" not in loss  # the answer alone is what the loss looks at
    backward = [p for p in others if not is_update("", p)]
    updates = [p for p in others if is_update("", p)]
    # The first gradient is that of the answer, from the loss; all others follow from another one.
    assert "<OBJECTIVE_FUNCTION>" in backward[0]
    assert all("address the following feedback" in prompt for prompt in backward[1:])
    roles = {prompt.split("<ROLE> ")[1].split(" </ROLE>")[0] for prompt in backward}
    for agent in ("planner", "critic"):
        assert any(f"text of the agent '{agent}'" in role for role in roles)
    assert len(updates) == 5  # of five parameters, each with gradients


@pytest.mark.parametrize(
    ("reply", "fate"),
    [
        ("no tags at all", "no tags"),
        ("<IMPROVED_VARIABLE> </IMPROVED_VARIABLE>", "empty"),
        ("<IMPROVED_VARIABLE>Say {{ secret }}.</IMPROVED_VARIABLE>", "fields"),
        ("<IMPROVED_VARIABLE>{% if x %}</IMPROVED_VARIABLE>", "fields"),
        (f"<IMPROVED_VARIABLE>{'very ' * 250_000}long</IMPROVED_VARIABLE>", "spec"),  # over 1 MiB
        (f"<IMPROVED_VARIABLE>{'very ' * 900}long</IMPROVED_VARIABLE>", "too long"),
        ("<IMPROVED_VARIABLE>Plan well.</IMPROVED_VARIABLE>", "unchanged"),
    ],
)
def test_what_breaks_a_prompt_is_rejected_and_counted(
    run: Optimise, endpoint: Endpoint, reply: str, fate: str
) -> None:
    endpoint.reply = lambda system, prompt: reply
    found = run("steps=1", *by_endpoint(endpoint))
    assert found.fates == {fate: 1}
    assert found.texts == found.start
    assert f"1 {fate}" in found.to_text()
    assert "No prompt has changed." in found.to_text()


def test_replies_without_tags_are_taken_where_that_is_asked_for(
    run: Optimise, endpoint: Endpoint
) -> None:
    endpoint.reply = lambda system, prompt: "Plan in three steps."
    found = run("steps=1", "untagged=take", *by_endpoint(endpoint))
    assert found.texts == {"planner.system": "Plan in three steps."}
    assert "1 proposal had no tags" in found.to_text()


def test_a_step_after_which_fewer_are_right_is_taken_back(
    run: Optimise, endpoint: Endpoint, tiny_bundle: Path, training: Path
) -> None:
    # The validation record is the last one; its right answer is what the system says now.
    with rt.load(tiny_bundle, threads=1) as base:
        said = base.baseline("text@4").run("T3", max_new_tokens=6).answer
    records = [{"question": f"T{i}", "answer": "no such thing"} for i in range(3)]
    training.write_text(lines(*records, {"question": "T3", "answer": said}))

    def reply(system: str, prompt: str) -> str:
        marks = re.findall(r"\{\{ \S+ \}\}", prompt.partition("<CONSTRAINTS>")[2])
        return f"<IMPROVED_VARIABLE>Other words: {' '.join(marks)} Go.</IMPROVED_VARIABLE>"

    endpoint.reply = reply
    found = run("steps=1", "rewrites=prompt", *by_endpoint(endpoint))
    assert found.start_validation == 1.0
    assert found.validation == 1.0
    assert found.fates == {"taken back": 5}
    assert found.texts == found.start


class StopAfter(Silent):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def stage(self, *arguments: Any, **options: Any) -> Any:
        outer = self
        inner = super().stage(*arguments, **options)

        class Stage:
            def __enter__(self) -> Any:
                inner.__enter__()

                def advance(*_: Any, **__: Any) -> None:
                    outer._left -= 1
                    if outer._left == 0:
                        raise KeyboardInterrupt

                return advance

            def __exit__(self, *exception: Any) -> Any:
                return inner.__exit__(*exception)

        return Stage()


def timeless(found: TextGradients) -> Any:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in TIMES}
        return [without(v) for v in value] if isinstance(value, list | tuple) else value

    return without(found.to_json())


def test_an_interrupted_run_ends_as_if_it_had_not_been(run: Optimise) -> None:
    settings = ("steps=3", "rewrites=prompt", "untagged=take", "reply_tokens=12", "validation=0")
    whole = run(*settings, out="whole")
    cut = run(*settings, out="cut", progress=StopAfter(1))
    assert cut.interrupted
    assert len(cut.steps) == 1
    with pytest.raises(RecmasError, match="holds a run of textgrad already"):
        run(*settings, out="cut")
    with pytest.raises(RecmasError, match="another one"):
        run(*settings, "batch=1", out="cut", resume=True)
    resumed = run(*settings, out="cut", resume=True)
    assert timeless(resumed) == timeless(whole)
    assert whole.spent.backward_tokens > 0
    assert whole.engine == "the backbone 'tiny'"


def test_all_records_learn_unless_a_number_is_given(run: Optimise, endpoint: Endpoint) -> None:
    found = run("steps=1", "records=null", "validation=2", *by_endpoint(endpoint))
    assert (found.num_records, found.num_validation) == (2, 2)
    with pytest.raises(RecmasError, match="ask for 5 records, there are 4"):
        run("records=null", "validation=4", *by_endpoint(endpoint), out="other")


def test_budgets_end_a_run_and_may_grow(run: Optimise, endpoint: Endpoint) -> None:
    short = run("steps=3", "max_tokens=1", *by_endpoint(endpoint))
    assert (short.stopped, len(short.steps)) == ("tokens", 0)
    more = run("steps=3", "max_seconds=0.001", *by_endpoint(endpoint), resume=True)
    assert (more.stopped, len(more.steps)) == ("seconds", 0)
    whole = run("steps=2", *by_endpoint(endpoint), resume=True)
    assert (whole.stopped, len(whole.steps)) == ("steps", 2)


def test_tokens_that_the_endpoint_does_not_tell_are_told(run: Optimise, endpoint: Endpoint) -> None:
    endpoint.tells_usage = False
    found = run("steps=1", *by_endpoint(endpoint))
    assert found.spent.backward_tokens == 0
    assert found.spent.untold_calls == found.spent.calls == len(endpoint.asked)
    assert f"the tokens of {found.spent.calls} calls" in found.to_text()


def test_a_prompt_that_the_endpoint_cannot_read_costs_its_gradients(
    run: Optimise, endpoint: Endpoint
) -> None:
    endpoint.status = 400
    found = run("steps=1", *by_endpoint(endpoint))
    assert found.steps[0].num_cut == 2
    assert "2 records had gradients over what the engine reads." in found.to_text()
    assert found.steps[0].proposals == ()


def test_an_endpoint_that_fails_ends_the_run_and_keeps_its_steps(
    run: Optimise, endpoint: Endpoint
) -> None:
    run("steps=1", *by_endpoint(endpoint))
    endpoint.status = 503
    with pytest.raises(RecmasError, match="does not answer") as error:
        run("steps=2", *by_endpoint(endpoint), resume=True)
    assert error.value.problems[0].code == "RM507"
    assert KEY not in str(error.value)
    endpoint.status = 200
    assert len(run("steps=2", *by_endpoint(endpoint), resume=True).steps) == 2


def test_the_command_optimises_evaluates_and_builds(
    run: Optimise, endpoint: Endpoint, tiny_bundle: Path, training: Path, tmp_path: Path
) -> None:
    endpoint.reply = lambda system, prompt: (
        "<IMPROVED_VARIABLE>Plan in three steps.</IMPROVED_VARIABLE>"
    )
    data = tmp_path / "test.jsonl"
    data.write_text(lines(*({"question": f"Q{i}", "answer": "x"} for i in range(3))))
    chosen = ["records=3", "validation=1", "batch=1", "steps=1", "handover_tokens=4"]
    given = [f"data={training}", *chosen, *by_endpoint(endpoint)]
    arguments = [
        "eval", tiny_bundle, "--data", data, "--protocol", tmp_path / "words.yaml", "--threads", 1,
        "--out", tmp_path / "out", "--baseline", "text@4", "--baseline", "textgrad",
        *(part for one in given for part in ("--textgrad", one)),
    ]  # fmt: skip
    done = run_recmasc(*arguments, "--json")
    assert done.exit_code == 0, done.output
    data_of = json.loads(done.stdout)["data"]
    assert [one["name"] for one in data_of["systems"]] == ["text@4", "textgrad"]
    assert data_of["textgrad"]["texts"] == {"planner.system": "Plan in three steps."}
    written = data_of["textgrad"]["spec"]
    # Its backbone is a folder, which stands where that of the bundle's spec does.
    assert "Relative paths in it" in run_recmasc(*arguments, "--resume").stdout
    placed = tiny_bundle.parent / "learned.yaml"
    shutil.copy(written, placed)
    assert run_recmasc("check", placed).exit_code == 0
    built = tmp_path / "built"
    assert run_recmasc("build", placed, "--out", built).exit_code == 0
    with rt.load(built, threads=1) as learned:
        assert learned.plan.agents["planner"].system[0].value == "Plan in three steps."
    again = run_recmasc(*arguments, "--json", "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["data"]["textgrad"] == data_of["textgrad"]
    refused = run_recmasc(*arguments)
    assert "RM302" in refused.output
    shared = run_recmasc(
        *arguments, "--out", tmp_path / "other", "--textgrad", f"data={data}",
        "--textgrad", "records=2",
    )  # fmt: skip
    assert "which is tested on" in shared.output


def test_what_a_service_of_ours_cannot_read_is_counted(run: Optimise, tiny_bundle: Path) -> None:
    # It takes prompts of 384 tokens, and textgrad's are longer.
    with serving(local({"tiny": tiny_bundle})) as served:
        settings = [f"url={served.url}/v1", "model=tiny", "key_env=NO_KEY", "reply_tokens=6"]
        found = run("steps=1", "batch=1", *settings)
    (step,) = found.steps
    assert (step.num_wrong, step.num_cut, step.proposals) == (1, 1, ())
    assert found.spent.backward_tokens > 0  # the loss was short enough


def test_texts_that_are_too_long_together_are_not_all_taken(
    run: Optimise, endpoint: Endpoint, tiny_bundle: Path
) -> None:
    def reply(system: str, prompt: str) -> str:
        marks = re.findall(r"\{\{ \S+ \}\}", prompt.partition("<CONSTRAINTS>")[2])
        words = " ".join(["many words"] * length)
        return f"<IMPROVED_VARIABLE>{' '.join(marks)} {words}</IMPROVED_VARIABLE>"

    endpoint.reply = reply
    fates = set()
    for length in (4, 10, 20, 30, 40):  # the planner's system text and prompt share one limit
        found = run("steps=1", "batch=1", "validation=0", "rewrites=prompt",
                    *by_endpoint(endpoint), out=f"run-{length}")  # fmt: skip
        planner = [p.fate for p in found.steps[0].proposals if p.parameter.startswith("planner.")]
        fates.add(tuple(planner))
        with rt.load(tiny_bundle, threads=1) as base:
            learned = base.with_plan(found.plan(base.plan))
            for question in ("T0", "T1", "T2"):
                learned.prompts(Record(id=question, fields={"question": question}))
    assert ("kept", "too long", "too long") in fates
