"""What `verify` finds in bundles whose hashes are right and that yet cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from kit.hand_bundle import edit_json, rehash
from recmas_runtime.cli.main import main
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.safetensors_file import read_tensors, write_tensors
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.render import Chat
from recmas_runtime.prompts.samples import SAMPLE_DAY, prompt_digests, token_digest

CASE = "parity/one.safetensors"
TEMPLATE = "backbones/one/chat_template.jinja"
TOKENIZER = "backbones/one/tokenizer.json"


def problems_of(
    capsys: pytest.CaptureFixture[str], bundle: Path, *, status: int = 5
) -> list[dict[str, Any]]:
    rehash(bundle)
    assert main(["verify", str(bundle), "--json"]) == status
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["problems"]
    return found


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        (b"\xff{{ messages }}", "RM404", "not UTF-8"),
        (b"{% for message in %}", "RM206", "not valid Jinja"),
        (b"{{ raise_exception('no') }}", "RM405", "prompt `first` of agent 'planner'"),
        (
            b"{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}"
            b"{% endif %}{{ m.content }}{% endfor %}",
            "RM405",
            "prompt `system` of agent 'solver'",
        ),
        (b"{% for m in messages %}{{ m.content[:40] }}{% endfor %}", "RM405", "leaves out"),
        (b"{{ '\\ud800' }}", "RM405", "of agent 'planner'"),
    ],
)
def test_templates_that_cannot_render(
    own_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    template: bytes,
    code: str,
    words: str,
) -> None:
    (own_bundle / TEMPLATE).write_bytes(template)
    problem = problems_of(capsys, own_bundle, status=3 if code == "RM206" else 5)[0]
    assert problem["code"] == code
    assert words in problem["message"]


def test_a_tokenizer_that_is_none(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_bundle / TOKENIZER).write_text("{}")
    (problem,) = problems_of(capsys, own_bundle)
    assert problem["code"] == "RM404"


def keep_digests(bundle: Path) -> dict[str, dict[str, str]]:
    """Write into the manifest what a build keeps of a bundle's prompts."""
    opened = open_bundle(bundle)
    chats = {
        name: Chat.load(
            bundle / entry.tokenizer,
            (bundle / entry.chat_template).read_text(),
            entry.special_tokens,
        )
        for name, entry in opened.manifest.backbones.items()
    }
    digests = prompt_digests(opened.plan, chats)
    edit_json(bundle / "manifest.json", "prompt_digests", digests)
    return digests


def test_prompts_behind_turns_are_kept_too(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the answer agent alone, where a plan shows conversations so."""
    usual = keep_digests(own_bundle)
    serve = {"fields": {"question": "last_user"}, "history": "turns"}
    edit_json(own_bundle / "plan.json", "serve", serve)
    rehash(own_bundle)
    found = keep_digests(own_bundle)
    assert found["planner"] == usual["planner"]
    assert found["solver"].pop("then behind turns") != found["solver"]["then"]
    assert found == usual
    assert problems_of(capsys, own_bundle, status=0) == []
    key = "prompt_digests/solver/then behind turns"
    edit_json(own_bundle / "manifest.json", key, "0" * 64)
    (problem,) = problems_of(capsys, own_bundle)
    assert problem["message"].startswith("prompt `then behind turns` of agent 'solver' has other")
    last_only = "{{ '<|user|>' + messages[-1].content }}"
    (own_bundle / TEMPLATE).write_text(last_only)
    edit_json(own_bundle / "plan.json", "agents/solver/system", [])
    (problem,) = problems_of(capsys, own_bundle)
    assert "leaves out the earlier turns of a conversation" in problem["message"]


def test_prompts_have_the_tokens_that_they_were_built_with(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digests = keep_digests(own_bundle)
    assert {agent: set(variants) for agent, variants in digests.items()} == {
        "planner": {"first", "then"},
        "solver": {"then"},
    }
    assert problems_of(capsys, own_bundle, status=0) == []
    # as another version of the library would cut texts
    tokenizer = Tokenizer.from_file(str(own_bundle / TOKENIZER))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(own_bundle / TOKENIZER))
    found = problems_of(capsys, own_bundle)
    assert {problem["code"] for problem in found} == {"RM405"}
    assert [problem["message"] for problem in found] == [
        f"prompt `{variant}` of agent {agent!r} has other tokens here than where the bundle was "
        "built"
        for agent, variants in digests.items()
        for variant in variants
    ]


def test_tokenizers_give_the_tokens_that_they_were_built_with(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of texts that no prompt has: here an added token takes the space beside it along."""
    tokenizer = Tokenizer.from_file(str(own_bundle / TOKENIZER))
    digest = token_digest(Chat.load(own_bundle / TOKENIZER, "{{ messages }}", {}).tokenizer)
    edit_json(own_bundle / "manifest.json", "token_digests", {"one": digest})
    keep_digests(own_bundle)
    assert problems_of(capsys, own_bundle, status=0) == []
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False, lstrip=True)])
    tokenizer.save(str(own_bundle / TOKENIZER))
    (problem,) = problems_of(capsys, own_bundle)
    assert (problem["code"], problem["file"]) == ("RM405", TOKENIZER)
    assert "the tokenizer of backbone 'one' gives texts other tokens here" in problem["message"]


def test_prompts_of_templates_that_write_the_date_are_compared_on_one_day(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_bundle / TEMPLATE
    path.write_text("{{ strftime_now('%d %B %Y') }}\n" + path.read_text())
    rehash(own_bundle)
    keep_digests(own_bundle)
    day = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").on(SAMPLE_DAY)
    assert day.render([], add_generation_prompt=True) == "2025-01-01"
    assert problems_of(capsys, own_bundle, status=0) == []


def test_a_prompt_beyond_the_limit(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads((own_bundle / "plan.json").read_text())
    text = [{"kind": "text", "value": "x" * 200}, *plan["agents"]["solver"]["then"]]
    edit_json(own_bundle / "plan.json", "agents/solver/then", text)
    (problem,) = problems_of(capsys, own_bundle)
    assert problem["code"] == "RM405"
    assert "the bundle allows 128" in problem["message"]


def test_tokens_beyond_the_table(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_file(str(own_bundle / TOKENIZER))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(own_bundle / TOKENIZER))
    (problem,) = problems_of(capsys, own_bundle, status=0)
    assert (problem["code"], problem["severity"]) == ("RM404", "warning")
    assert "tokens up to 260, backbone 'one' has embeddings for 260" in problem["message"]


Edit = Callable[[dict[str, np.ndarray]], object]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs_embeds", np.zeros((1, 5, 260), np.float64)),
        ("inputs_embeds", np.zeros((5, 260), np.float32)),
        ("inputs_embeds", np.zeros((2, 5, 260), np.float32)),
        ("inputs_embeds", np.zeros((1, 5, 7), np.float32)),
        ("inputs_embeds", np.zeros((1, 0, 260), np.float32)),
        ("lengths", np.array([(5, 3)], np.float32)),
        ("lengths", np.array([5, 3])),
        ("lengths", np.array([[5]])),
        ("lengths", np.array([(5, 3, 1)])),
        ("lengths", np.array([(7, 1), (-2, 1)])),
        ("lengths", np.array([(5, 0)])),
        ("lengths", np.array([(5, 6)])),
        ("lengths", np.array([(4, 3)])),
        ("lengths", np.array([(2**40, 1)])),
        ("lengths", np.zeros((0, 2), np.int64)),
        ("feedback_lengths", np.array([(4, 5)])),
        ("feedback_lengths", np.array([(4000, 5)])),
        ("feedback_embeds", np.zeros((1, 5, 260), np.float32)),
        ("feedback_embeds", np.zeros((2, 4, 260), np.float32)),
        ("feedback_hidden", np.zeros((1, 4, 260), np.float32)),
        ("hidden", np.zeros((1, 5), np.float32)),
        ("hidden", np.zeros((1, 5, 260), np.int64)),
        ("thought_next", np.zeros(3, np.float32)),
        ("logits_hidden", np.zeros((1, 3), np.float32)),
        ("logits", np.zeros((1, 1, 260), np.float32)),
        ("greedy_prompt", np.array([260])),
        ("greedy_prompt", np.array([-1])),
        ("greedy_prompt", np.zeros(0, np.int64)),
        ("greedy_tokens", np.array([1.0], np.float32)),
        ("greedy_tokens", np.array([9999])),
        ("link.planner.inner.x", np.zeros((2, 7), np.float32)),
    ],
)
def test_parity_tensors_of_other_types_and_shapes(
    own_bundle: Path, capsys: pytest.CaptureFixture[str], name: str, value: np.ndarray
) -> None:
    tensors, metadata = read_tensors(own_bundle / CASE)
    kept = {key: tensor.copy() for key, tensor in tensors.items()}
    write_tensors(own_bundle / CASE, {**kept, name: value}, metadata)
    (problem,) = problems_of(capsys, own_bundle)
    assert (problem["code"], problem["file"]) == ("RM404", CASE)
    assert "the parity case's tensor" in problem["message"]
    assert "internal error" not in capsys.readouterr().err
