"""Protocol files: the ones that come with recmas, and malformed ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from recmas_compiler.evaluation.data.protocol import load_protocol, parse_protocol, protocol_names
from recmas_runtime.core.errors import RecmasError

SMALL = """
name: small
version: 1
description: A test.
data:
  source: nowhere
  split: test
  fields:
    question: [question]
  gold:
    answer: [answer]
check: {kind: math}
"""


def test_the_promised_protocols_are_there() -> None:
    assert protocol_names() == (
        "aime",
        "aqua_rat",
        "arc_challenge",
        "arc_easy",
        "babi_split",
        "bamboogle",
        "commonsenseqa",
        "countries",
        "gpqa",
        "gsm8k",
        "hotpotqa",
        "hotpotqa_split",
        "humaneval",
        "livecodebench",
        "math500",
        "mbpp",
        "medqa",
        "mmlu",
        "r4c",
        "split_qa",
        "squad",
        "strategyqa",
        "tipsheets",
    )


@pytest.mark.parametrize("name", protocol_names())
def test_every_protocol_loads_under_its_own_name(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.description.endswith(".")
    assert protocol.digest() == load_protocol(name).digest()


def test_overrides_change_the_digest() -> None:
    protocol = load_protocol("gsm8k", overrides=["max_new_tokens=64", "n=5", "temperature=0.7"])
    assert (protocol.max_new_tokens, protocol.n, protocol.temperature) == (64, 5, 0.7)
    assert protocol.digest() != load_protocol("gsm8k").digest()
    assert load_protocol("gsm8k", overrides=["check.timeout_s=1"]).check.timeout_s == 1.0


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL)
    assert load_protocol(str(path)).name == "small"


def replaced(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new)


MALFORMED = {
    "unknown_key": replaced("check:", "rollout: 3\ncheck:"),
    "unknown_key_of_data": replaced("  split: test", "  splitt: test"),
    "unknown_key_of_check": replaced("{kind: math}", "{kind: math, timeout: 3}"),
    "unknown_check": replaced("{kind: math}", "{kind: maths}"),
    "check_without_kind": replaced("{kind: math}", "{timeout_s: 3}"),
    "missing_keys": "name: x\n",
    "wrong_types": replaced("version: 1", 'version: "1"\nn: 0\ntemperature: warm'),
    "no_question": replaced("question: [question]", "problem: [problem]"),
    "empty_names": replaced("answer: [answer]", "answer: []"),
    "names_as_text": replaced("answer: [answer]", "answer: answer"),
    "unknown_converter": replaced("  gold:", "  convert: after_hash\n  gold:"),
    "unknown_reader": replaced("  gold:", "  reader: squat\n  gold:"),
    "append_of_nothing": replaced("  gold:", '  append: {choices: ""}\n  gold:'),
    "greedy_rollouts": replaced("check:", "rollouts: 4\ncheck:"),
    "greedy_seeds": replaced("check:", "seeds: [0, 1]\ncheck:"),
    "equal_seeds": replaced("check:", "seeds: [1, 1]\ntemperature: 1\ncheck:"),
    "bad_digest": replaced("check:", "prompt_digest: abc\ncheck:"),
    "duplicate_key": replaced("version: 1", "version: 1\nversion: 2"),
    "a_list": "- name: x\n",
    "only_a_comment": "# nothing\n",
    "not_yaml": "name: [\n",
}


def test_malformed_protocols(golden: Callable[..., None]) -> None:
    told = []
    for name, text in MALFORMED.items():
        with pytest.raises(RecmasError) as refused:
            parse_protocol(text, file="p.yaml")
        told.append(f"--- {name}\n{refused.value}\n")
    golden("".join(told))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "Did you mean `gsm8k`?"),
        ("nowhere.yaml", "no such file"),
        ("../gsm8k", "no protocol"),
    ],
)
def test_protocols_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(RecmasError) as refused:
        load_protocol(name)
    assert "RM600" in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize("override", ["n=many", "nn=3", "n", "check.kind=maths", "seeds=[a]"])
def test_overrides_that_are_refused(override: str) -> None:
    with pytest.raises(RecmasError) as refused:
        load_protocol("gsm8k", overrides=[override])
    assert {problem.code for problem in refused.value.problems} == {"RM122"}
    assert f"--set {override}" in str(refused.value)


def test_the_page_about_evaluation_is_current() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    assert parse_protocol(example.group(1), file="evaluation.md").name == "capitals"
    listed = re.findall(
        r"^\| (`[a-z0-9_`, ]+`) \| (?:math|choice|exact|F1|SQuAD|code) \|", page, re.M
    )
    assert sorted(re.findall(r"`(\w+)`", " ".join(listed))) == list(protocol_names())
