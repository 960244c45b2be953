"""The baseline `looplm` against a plain loop over a model of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny, Built
from kit.specs import SPECS
from naive_texts import NaiveTexts
from recmas_compiler.links.modules import load_link
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.running.baselines import apply_baseline

QUESTIONS = ("What is 7 * 8?", "Anna has three plans and an orange. Which is best?", "x")
ANSWER_TOKENS = 12  # of every spec in kit.specs

# What the answer agent is asked alone, and the latent steps of all agents in all rounds.
ALONE = {
    # Three rounds of 4 steps by three agents, and the answer agent has none in the last.
    "sequential": ("{} Use  and answer.", 4 * (3 + 3 + 2)),
    "mixture": ("   {}", 3 * (4 + 3)),
}


@torch.no_grad()
def looped(built: Built, families: Path, user: str, question: str, *, steps: int) -> str:
    """Return the greedy text behind the thoughts, for each of which the whole sequence runs."""
    system = built.topology.system
    answerer = system.answer_agent
    naive = NaiveTexts(built.topology, families)
    model, tokenizer = naive._backbone(system.agents[answerer])
    entry = built.system.manifest.links[inner_link_id(answerer)]
    file = built.bundle / entry.file
    link = load_link(file, entry.kind, entry.role, entry.in_dim, entry.out_dim)
    asked = user.format(question)
    embeds = naive._embeds(answerer, asked, {}, reuse=False, inserted=None)[None]
    for _ in range(steps - 1):
        thought = model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][:, -1]
        embeds = torch.cat([embeds, link(thought)[:, None]], dim=1)
    ids = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.long),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )[0]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("spec", ALONE)
def test_the_answer_follows_the_thoughts(build_tiny: BuildTiny, families: Path, spec: str) -> None:
    built = build_tiny(SPECS[spec])
    system = built.system.baseline("looplm")
    user, steps = ALONE[spec]
    expected = [looped(built, families, user, question, steps=steps) for question in QUESTIONS]
    records = [
        rt.Record(id=str(i), fields={"question": question}, index=i)
        for i, question in enumerate(QUESTIONS)
    ]
    found = system.run_batch(records)
    assert [answer.answer for answer in found] == expected
    assert {answer.usage.latent_steps for answer in found} == {steps}
    alone = built.system.baseline("single").run_batch(records)
    assert [answer.answer for answer in alone] != expected, "thoughts change what is answered"
    # Beside each other in shared engine calls.
    assert [answer.answer for answer in system.answer_all(records)] == expected


def test_candidates_are_read_behind_the_thoughts(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["mixture"]).system
    scores = [
        system.baseline(name).score_batch(["What is 7 * 8?"], [["56", "57"]])[0].losses
        for name in ("looplm", "single")
    ]
    assert scores[0] != scores[1]


def test_an_agent_that_never_thinks_borrows_a_link(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["sequential"]).system
    unused = structs.replace(system.manifest.links["solver.inner"], init="unused")
    links = {**system.manifest.links, "solver.inner": unused}
    manifest = structs.replace(system.manifest, links=links)
    plan = apply_baseline(system.plan, "looplm", manifest).plan
    assert plan.agents["solver"].inner == "planner.inner"
    links = {name: structs.replace(link, init="unused") for name, link in links.items()}
    manifest = structs.replace(system.manifest, links=links)
    told = r"RM508.*looplm: nobody on backbone 'tiny' makes latent steps"
    with pytest.raises(rt.RecmasError, match=told):
        apply_baseline(system.plan, "looplm", manifest)


@pytest.mark.parametrize(("each", "told"), [(0, "0 latent steps"), (900, "7200 latent steps")])
def test_there_must_be_steps_and_room_for_them(build_tiny: BuildTiny, each: int, told: str) -> None:
    system = build_tiny(SPECS["sequential"]).system
    agents = {
        name: structs.replace(agent, latent_steps=each)
        for name, agent in system.plan.agents.items()
    }
    plan = structs.replace(system.plan, agents=agents)
    with pytest.raises(rt.RecmasError, match=rf"RM508.*takes {told}, not 1 to 1011"):
        apply_baseline(plan, "looplm", system.manifest)


def test_prompts_leave_room_for_the_steps(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["sequential"]).system
    plan = system.baseline("looplm").plan
    assert plan.limits.max_prompt_tokens == 384
    agents = {n: structs.replace(a, latent_steps=100) for n, a in system.plan.agents.items()}
    plan = structs.replace(system.plan, agents=agents)
    plan = apply_baseline(plan, "looplm", system.manifest).plan
    assert plan.limits.max_prompt_tokens == 1024 - 800 - ANSWER_TOKENS
