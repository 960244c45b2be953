"""What patterns expand to, what may be written over them, and `--set`."""

from __future__ import annotations

import json

import pytest

from kit.specs import CHAIN, PAIR
from recmas_compiler.spec.patterns.starter_data import split_records
from recmas_compiler.spec.patterns.starter_specs import STARTERS, starter_files, starter_spec
from recmas_compiler.spec.spec import Spec, parse_spec
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.messages import MessageForm
from recmas_runtime.prompts.render import field_text


def links_of(spec: Spec) -> dict[str, bool]:
    return {name: link.feedback for name, link in spec.document.links.items()}


def test_sequential() -> None:
    spec = parse_spec(CHAIN)
    assert list(spec.document.agents) == ["planner", "critic", "solver"]
    assert links_of(spec) == {
        "planner -> critic": False,
        "critic -> solver": False,
        "solver -> planner": True,
    }
    assert spec.document.answer.agent == "solver"
    assert spec.document.agents["planner"].prompt.first is not None
    assert spec.document.agents["critic"].prompt.first is None
    assert spec.warnings == ()


def test_two_agents_and_one() -> None:
    two = parse_spec(CHAIN.replace("planner, critic, solver", "a, b"))
    assert links_of(two) == {"a -> b": False, "b -> a": True}
    one = parse_spec(CHAIN.replace("planner, critic, solver", "alone"))
    assert links_of(one) == {"alone -> alone": True}
    assert one.document.answer.agent == "alone"


def test_what_is_written_out_wins() -> None:
    spec = parse_spec(
        CHAIN
        + """\
  big: {source: ./big}
agents:
  helper: {backbone: big, prompt: "{{ question }}"}
  critic: {backbone: small, latent_steps: 3}
  planner: {backbone: big}
  solver:
    backbone: small
    prompt: "{{ question }} {{ latent.critic }} {{ latent.helper }}"
links:
  helper->solver:
  planner -> critic: {kind: residual}
  solver -> planner: {kind: residual}
answer: {temperature: 0.5}
"""
    )
    document = spec.document
    assert list(document.agents) == ["planner", "critic", "solver", "helper"]
    assert document.agents["critic"].latent_steps == 3
    assert "{{ latent.planner }}" in document.agents["critic"].prompt.then
    assert document.links["planner -> critic"].kind == "residual"
    assert document.links["critic -> solver"].kind == "projected"
    assert document.links["solver -> planner"].feedback
    assert document.answer.agent == "solver"
    assert document.answer.temperature == 0.5


def test_places_of_what_a_pattern_writes() -> None:
    spec = parse_spec(CHAIN, file="f.yaml")
    assert str(spec.position("agents", "critic")) == "f.yaml:4:33"
    assert str(spec.position("agents", "critic", "prompt")) == "f.yaml:4:33"
    assert str(spec.position("links", "planner -> critic")) == "f.yaml:4:33"
    assert str(spec.position("answer", "agent")) == "f.yaml:4:1"


@pytest.mark.parametrize("name", STARTERS)
def test_starters_are_sound(name: str) -> None:
    text = starter_spec(name)
    assert text.startswith("# yaml-language-server: $schema=")
    assert text.isascii()
    assert parse_spec(text).warnings == ()


@pytest.mark.parametrize("name", [name for name in STARTERS if name != "latentmas"])
def test_starters_train_on_records_that_fit(name: str) -> None:
    spec = parse_spec(starter_spec(name, train=True))
    assert spec.warnings == ()
    assert spec.document.train is not None
    assert parse_spec(starter_spec(name)).document.train is None
    files = starter_files(name)
    assert files == starter_files(name), "always the same ones"
    records = {
        file: [json.loads(line) for line in text.splitlines()]
        for file, text in files.items()
        if file.endswith(".jsonl")
    }
    learned, asked = records[spec.document.train.data], records["questions.jsonl"]
    prompts = [prompt for each in spec.declared.prompts.values() for _, prompt in each.fields()]
    used = {part.value for prompt in prompts for part in prompt.parts if part.kind == "field"}
    for record in (*learned, *asked):
        assert used | set(spec.document.train.targets.values()) <= set(record)
    ids = [record["id"] for record in (*learned, *asked)]
    assert len(set(ids)) == len(ids)
    known = {record["question"] for record in learned}
    assert not [record for record in asked if record["question"] in known]


def test_every_agent_of_latentmas_has_what_all_before_it_have() -> None:
    spec = parse_spec(starter_spec("latentmas"))
    assert starter_spec("latentmas") == starter_spec("latentmas", task="sequential")
    agents = list(spec.document.agents)
    assert spec.declared.links.keys() == {
        (before, agent) for i, agent in enumerate(agents) for before in agents[:i]
    }
    for i, agent in enumerate(agents):
        assert [slot.agent for slot in spec.declared.prompts[agent].then.slots] == agents[:i]
    beside = parse_spec(starter_spec("latentmas", task="hierarchical"))
    assert beside.warnings == ()
    *experts, summarizer = beside.document.agents
    assert beside.declared.links.keys() == {(expert, summarizer) for expert in experts}
    for each in (spec, beside):
        forms = {link.form for link in each.document.links.values()}
        assert forms == {MessageForm(carries="cache", rows=("prompt", "thoughts"))}
        assert each.document.agents[agents[0] if each is spec else experts[0]].inner.init == (
            "latentmas"
        )
    with pytest.raises(RecmasError, match=r"RM118.*nothing of `latentmas` is trained"):
        starter_spec("latentmas", train=True)
    assert starter_files("latentmas", train=False) == {}


def test_each_task_of_split_has_prompts_that_its_records_fill() -> None:
    learned, asked = split_records()
    assert (len(learned), len(asked)) == (12, 6)
    for task, fields in (
        ("qa", {"context", "question"}),
        ("two-hop", {"facts[0]", "facts[1]", "question"}),
    ):
        spec = parse_spec(starter_spec("split", task=task, train=True))
        assert spec.warnings == ()
        assert spec.document.name == f"split-{task}"
        untrained = parse_spec(starter_spec("split", task=task))
        assert untrained.warnings == ()
        assert {link.carries for link in untrained.document.links.values()} == {"cache"}
        assert {link.carries for link in spec.document.links.values()} == {"thoughts"}
        prompts = [prompt for each in spec.declared.prompts.values() for _, prompt in each.fields()]
        used = {part.value for prompt in prompts for part in prompt.parts if part.kind == "field"}
        assert used == fields
        solver = spec.declared.prompts["solver"].then
        assert [p.value for p in solver.parts if p.kind == "field"] == ["question"]
        for record in (*learned, *asked):
            assert all(field_text(name, record) for name in used)
    assert starter_spec("split") == starter_spec("split", task="qa")
    # No answer is learned by heart.
    assert len({record["answer"] for record in (*learned, *asked)}) == len(learned) + len(asked)
    with pytest.raises(RecmasError, match=r"RM118.*Did you mean `two-hop`"):
        starter_spec("split", task="twohop")


def test_a_task_without_records() -> None:
    with pytest.raises(RecmasError, match=r"RM118.*no records to train `code` on"):
        starter_files("mixture", task="code")
    assert "boxed" in starter_files("mixture", task="math")["train.jsonl"]


def test_unknown_starter() -> None:
    with pytest.raises(RecmasError, match=r"RM118.*Did you mean `sequential`"):
        starter_spec("sequental")


def test_overrides_are_typed() -> None:
    spec = parse_spec(
        PAIR,
        overrides=[
            "rounds=5",
            "rounds=6",
            "latent_steps=0",
            "answer.temperature=5e-1",
            'answer.stop=["a, b", no]',
            "agents.solver.system=Be careful: think {{ question }} # twice",
            "agents.solver.inner.kind=projected",
            "links.planner->solver.kind=residual",
            "build.max_batch=0x10",
            "name='17'",
        ],
    )
    document = spec.document
    assert (document.rounds, document.latent_steps, document.name) == (6, 0, "17")
    assert document.answer.temperature == 0.5
    assert document.answer.stop == ("a, b", "no")
    assert document.agents["solver"].system == "Be careful: think {{ question }} # twice"
    assert document.links["planner -> solver"].kind == "residual"
    assert document.build.max_batch == 16


def test_overrides_reach_what_a_pattern_writes() -> None:
    spec = parse_spec(CHAIN, overrides=["agents.critic.latent_steps=2", "answer.seed=7"])
    assert spec.document.agents["critic"].latent_steps == 2
    assert "{{ latent.planner }}" in spec.document.agents["critic"].prompt.then
    assert (spec.document.answer.seed, spec.document.answer.agent) == (7, "solver")


def test_an_override_mends_an_error() -> None:
    broken = PAIR.replace("rounds: 2", "rounds: 200")
    assert parse_spec(broken, overrides=["rounds=2"]) == parse_spec(PAIR)


def test_findings_about_overridden_values_name_the_override() -> None:
    with pytest.raises(RecmasError) as refused:
        parse_spec(PAIR, overrides=["answer.agent=slver", "agents.solver.backbone=big"])
    assert [(p.code, p.file) for p in refused.value.problems] == [
        ("RM110", "--set agents.solver.backbone=big"),
        ("RM111", "--set answer.agent=slver"),
    ]


@pytest.mark.parametrize(
    "override",
    ["", "=", "=3", "rounds", ".=1", "a..b=1", "rounds.x=1", "answer=", "agents.x.y.z=1"],
)
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(RecmasError) as refused:
        parse_spec(PAIR, overrides=[override])
    assert {p.file for p in refused.value.problems} == {f"--set {override}"}
    assert {p.code for p in refused.value.problems} == {"RM122"}
