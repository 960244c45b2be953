"""The printed IR: complete, deterministic, and free of the machine it was printed on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import recmas_compiler as rc
from kit.graphs import sequential, topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import BuildOptions
from recmas_compiler.ir.printer import print_graph, prompt_text
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.document.places import SourcePosition
from recmas_runtime.formats.plan import PromptPart, SamplingPlan


def changed(graph: Graph, **changes: Any) -> Graph:
    return graph.replaced(system=replace(graph.system, **changes))


def with_planner(graph: Graph, **changes: Any) -> Graph:
    planner = replace(graph.system.agents["planner"], **changes)
    agents = graph.system.agents | {"planner": planner}
    return changed(graph.replaced(nodes=graph.nodes() | {"planner": planner}), agents=agents)


def text(value: str) -> tuple[PromptPart, ...]:
    return (PromptPart(kind="text", value=value),)


# what enters the fingerprint: each of these changes what is computed
VARIATIONS = {
    "rounds": lambda g: changed(g, rounds=2),
    "answer": lambda g: changed(g, answer_agent="critic"),
    "temperature": lambda g: changed(g, sampling=SamplingPlan(temperature=0.5)),
    "stop": lambda g: changed(g, sampling=SamplingPlan(stop=("a, b",))),
    "precision": lambda g: changed(
        g,
        build=BuildOptions(target="onnx", precision="float16", max_prompt_tokens=512, max_batch=8),
    ),
    "precision of a backbone": lambda g: changed(
        g,
        backbones={
            name: replace(backbone, precision="int4")
            for name, backbone in g.system.backbones.items()
        },
    ),
    "system text": lambda g: with_planner(g, system=text("You are a planner.")),
    "trailing space": lambda g: with_planner(g, system=text("You are the planner. ")),
    "trailing line": lambda g: with_planner(g, system=text("You are the planner.\n")),
    "chat template": lambda g: with_planner(g, chat_template={"enable_thinking": True}),
    "latent steps": lambda g: with_planner(g, latent_steps=17),
    "link file": lambda g: with_planner(
        g, inner=replace(g.system.agents["planner"].inner, file="/home/ann/inner.safetensors")
    ),
    "link kind": lambda g: with_planner(
        g, inner=replace(g.system.agents["planner"].inner, kind="residual")
    ),
}


def test_variations_have_texts_of_their_own() -> None:
    graph = sequential()
    texts = {name: print_graph(vary(graph)) for name, vary in VARIATIONS.items()}
    texts["as it is"] = print_graph(graph)
    assert len(set(texts.values())) == len(texts)


@pytest.mark.parametrize("level", ["topology", "program"])
def test_paths_and_places_of_the_machine_do_not_show(level: str) -> None:
    def printed(home: str) -> str:
        where = SourcePosition(file=f"{home}/spec.yaml", line=3, column=5)
        graph = sequential()
        links = {
            link_id: replace(
                link,
                where=where,
                weights=replace(link.weights, file=f"{home}/links/{link.source}.safetensors"),
            )
            for link_id, link in graph.system.links.items()
        }
        smol = graph.system.backbones["smol"]
        facts = replace(smol.facts, identity=f"{home}/models/smol")
        backbones = {"smol": replace(smol, facts=facts, where=where)}
        edges = tuple(
            replace(edge, op=links[f"{edge.source}->{edge.target}"]) for edge in graph.edges()
        )
        graph = changed(graph.replaced(edges=edges), links=links, backbones=backbones)
        return print_graph(graph if level == "topology" else run_pipeline(graph))

    assert printed("/home/ann") == printed("/home/bob")
    assert "file planner.safetensors" in printed("/home/ann")


def test_printing_a_program_shows_its_graph() -> None:
    program = rc.compile(rc.load_spec(Path(__file__).parents[2] / "specs/sequential.yaml"))
    assert str(program) == print_graph(program.graph)
    assert "\nprogram\n" in str(program)


def test_a_topology_that_breaks_the_rules_can_be_read() -> None:
    printed = print_graph(topology("a b c", "a>b b>a a>c"))
    assert "%a  : thoughts[B,16,576]  = agent(smol, b=%b)" in printed


def test_prompt_text_is_what_the_spec_says() -> None:
    parts = (
        PromptPart(kind="field", value="question"),
        PromptPart(kind="text", value="\nPlan: "),
        PromptPart(kind="slot", value="planner"),
    )
    assert prompt_text(parts) == "{{ question }}\nPlan: {{ latent.planner }}"
