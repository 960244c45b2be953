"""Models behind an API in specs: what is refused, with its place, and that no secret is shown."""

from __future__ import annotations

import pytest

from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.spec.spec import SpecError, parse_spec
from recmas_runtime.formats.manifest import OPENAI_KEY, OPENAI_URL

MIXED = """\
recmas: 1
name: mixed
rounds: 2
latent_steps: 4
backbones:
  far: {source: 'openai:big', base_url: 'http://127.0.0.1:9/v1/'}
  near: {source: 'builtin:smollm2-135m-instruct'}
agents:
  planner:
    backbone: far
    prompt: {first: "P {{ question }}", then: "P {{ question }} {{ latent.solver }}"}
  critic: {backbone: near, prompt: "C {{ question }} {{ latent.planner }}"}
  solver: {backbone: near, prompt: "S {{ question }} {{ latent.planner }} {{ latent.critic }}"}
links:
  planner -> critic: {carries: text}
  planner -> solver: {carries: text, max_tokens: 64}
  critic -> solver: {}
  solver -> planner: {carries: text, feedback: true}
answer: {agent: solver}
"""


def told(text: str, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, file="s.yaml", overrides=overrides)
    return [str(problem) for problem in caught.value.problems]


def changed(old: str, new: str) -> str:
    assert old in MIXED
    return MIXED.replace(old, new)


REFUSED = [
    (
        ("  planner -> critic: {carries: text}", "  planner -> critic: {}"),
        "s.yaml:15:3: error[RM129]: `planner` runs on a model behind an API, which gives text and "
        "never the hidden states of latent steps: this link carries `thoughts`, the default. Write "
        "`carries: text`, or give the agent a backbone whose weights are here.",
    ),
    (
        ("{carries: text, feedback: true}", "{carries: context, feedback: true}"),
        "s.yaml:18:32: error[RM129]: `planner` runs on a model behind an API, which takes text and "
        "never hidden states at a prompt's positions: this link carries `context`. Write "
        "`carries: text`, or give the agent a backbone whose weights are here.",
    ),
    (
        ("{carries: text, max_tokens: 64}", "{carries: written}"),
        "s.yaml:16:32: error[RM129]: `planner` runs on a model behind an API, which gives text and "
        "never hidden states at written tokens: this link carries `written`. Write "
        "`carries: text`, or give the agent a backbone whose weights are here.",
    ),
    (
        ("    backbone: far\n", "    backbone: far\n    latent_steps: 2\n"),
        "s.yaml:11:19: error[RM129]: `planner` runs on `far`, a model behind an API, which takes "
        "no latent steps: `latent_steps` is 2. Remove it, or give the agent a backbone whose "
        "weights are here.",
    ),
    (
        ("    backbone: far\n", "    backbone: far\n    inner: {init: random}\n"),
        "s.yaml:11:5: error[RM129]: `inner` means nothing for `planner`, which runs on `far`, a "
        "model behind an API: it has no hidden states that a link could map. Remove it.",
    ),
    (
        ("    backbone: far\n", "    backbone: far\n    chat_template: {enable_thinking: true}\n"),
        "s.yaml:11:5: error[RM129]: `chat_template` means nothing for `planner`, which runs on "
        "`far`, a model behind an API: the service's own template renders its prompts. Remove it.",
    ),
    (
        ("'openai:big',", "'openai:big', precision: int8,"),
        "s.yaml:6:31: error[RM129]: `precision` means nothing for `far`, a model behind an API: "
        "its weights are not here. Remove it.",
    ),
    (
        ("instruct'}", "instruct', max_retries: 3}"),
        "s.yaml:7:51: error[RM129]: `max_retries` means nothing for `near`, whose weights are "
        "here. Remove it; it is for `source: openai:MODEL`.",
    ),
    (
        ("answer: {agent: solver}", "answer: {agent: planner, tools: {ask: true}}"),
        "s.yaml:19:26: error[RM129]: `planner` runs on a model behind an API, and tools are called "
        "by what recmas reads token by token as it is written here. Remove `tools`, or let an "
        "agent answer whose weights are here.",
    ),
    (
        ("'openai:big'", "'openai:'"),
        "s.yaml:6:17: error[RM105]: `openai:` names no model. Write `openai:MODEL`, with the name "
        "that the service has for it.",
    ),
    (
        ("'openai:big',", "'openai:big', body: {temperature: 1},"),
        "s.yaml:6:38: error[RM105]: `temperature` is what recmas itself says in a request. Remove "
        "it: sampling settings stand in `answer`, `leave_out` drops one.",
    ),
    (
        ("backbone: near", "backbone: far"),
        "s.yaml:8:1: error[RM129]: every agent runs on a model behind an API, so there is nothing "
        "to build. Give one of them a backbone whose weights are here.",
    ),
    (
        (
            "answer:",
            "train: {data: t.jsonl, targets: {solver: x, critic: y}}\nanswer:",
        ),
        "s.yaml:19:1: error[RM129]: links are trained through the whole system, and `planner` runs "
        "on a model behind an API, through which there are no gradients. Train a spec without such "
        "agents, and name the links' files in this one with `weights`; remove `train` here.",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m[:60] for _, m in REFUSED])
def test_what_takes_weights_is_refused_where_it_stands(
    change: tuple[str, str], message: str
) -> None:
    assert message in told(changed(*change))


def test_rows_of_a_cache_are_refused_too() -> None:
    found = told(
        changed("planner -> critic: {carries: text}", "planner -> critic: {carries: cache}")
    )
    assert any("never rows of a key/value cache" in text for text in found)


SECRETS = [
    "api_key: sk-verysecret",
    "token: sk-verysecret",
    "api_key_env: sk-verysecret",
    "base_url: 'https://me:sk-verysecret@host/v1'",
    "base_url: 'https://host/v1?key=sk-verysecret'",
    "body: {api_key: sk-verysecret}",
]


@pytest.mark.parametrize("setting", SECRETS)
def test_a_secret_is_refused_and_shown_nowhere(setting: str) -> None:
    text = MIXED.replace(", base_url: 'http://127.0.0.1:9/v1/'", f", {setting}")
    found = told(text)
    assert [each.split(":", 3)[3].split("]")[0] for each in found] == [" error[RM130"]
    assert "verysecret" not in str(found)


def test_a_secret_of_the_command_line_is_shown_nowhere() -> None:
    (found,) = told(MIXED, "backbones.far.api_key=sk-verysecret")
    assert "error[RM1" in found
    assert "verysecret" not in found


def test_defaults_and_the_resolved_spec() -> None:
    spec = parse_spec(MIXED)
    section = spec.document.backbones["far"]
    assert section.remote.base_url == "http://127.0.0.1:9/v1"
    assert section.remote.api_key_env is None
    resolved = spec.resolved_yaml()
    assert parse_spec(resolved).document == spec.document
    assert parse_spec(resolved).resolved_yaml() == resolved
    own = parse_spec(changed(", base_url: 'http://127.0.0.1:9/v1/'", ""))
    entry = own.document.backbones["far"].remote
    assert (entry.base_url, entry.api_key_env) == (OPENAI_URL, OPENAI_KEY)


def test_remote_agents_think_nothing_whatever_the_default_is() -> None:
    system = build_topology(parse_spec(MIXED)).system
    assert {name: agent.latent_steps for name, agent in system.agents.items()} == {
        "planner": 0,
        "critic": 4,
        "solver": 4,
    }
