"""A small builder of topologies, with no spec and no backbone files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import Agent, Backbone, BuildOptions, Level, Link, Remote, System
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.spec.document.places import UNKNOWN
from recmas_runtime.formats.layers import LayerShape, StateShape, uniform_layers
from recmas_runtime.formats.manifest import RemoteEntry
from recmas_runtime.formats.messages import MessageForm
from recmas_runtime.formats.plan import PromptPart, SamplingPlan


def facts(source: str = "builtin:smollm2-135m-instruct", **changes: object) -> BackboneFacts:
    values: dict[str, object] = {
        "source": source,
        "identity": source,
        "model_type": "llama",
        "width": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_positions": 8192,
        "layers": uniform_layers(30, heads=3, key_width=64),
        "attention": ("full",) * 30,
        "sliding_window": None,
        "num_parameters": 134515008,
    }
    return BackboneFacts(**(values | changes))  # type: ignore[arg-type]


def prompt(text: str, slots: Sequence[str] = ()) -> tuple[PromptPart, ...]:
    parts = [PromptPart(kind="field", value="question"), PromptPart(kind="text", value=text)]
    for slot in slots:
        parts.append(PromptPart(kind="text", value=f"\n{slot} thought: "))
        parts.append(PromptPart(kind="slot", value=slot))
    return tuple(parts)


def backbone(name: str, **changes: object) -> Backbone:
    dtype = str(changes.pop("dtype", "float32"))
    return Backbone(name=name, facts=facts(**changes), dtype=dtype, shared_as=name, where=UNKNOWN)


def stateful(name: str, **changes: object) -> Backbone:
    """Return a backbone of two layers, of which the first keeps a state of 6 x 100 numbers."""
    state = LayerShape(states=(StateShape(name="recurrent", shape=(6, 100)),))
    layers = (state, *uniform_layers(1, heads=3, key_width=64))
    return backbone(name, layers=layers, attention=("linear", "full"), **changes)


def remote(name: str) -> Remote:
    """Return a model behind an API."""
    entry = RemoteEntry(model="far", base_url="http://127.0.0.1:9/v1")
    return Remote(name=name, entry=entry, where=UNKNOWN)


def topology(
    agents: str,
    links: str,
    *,
    rounds: int = 3,
    answer: str | None = None,
    steps: int = 16,
    steps_of: Mapping[str, int] | None = None,
    backbones: Sequence[Backbone] = (),
    backbone_of: Mapping[str, str] | None = None,
    kind: str = "projected",
    kind_of: Mapping[str, str] | None = None,
    max_new_tokens: int = 256,
    role: str = "You are the {name}.",
) -> Graph:
    """Build a topology from `"planner critic solver"` and `"planner>critic solver~>planner"`.

    `a>b` is a forward link, `a~>b` a feedback link. The last agent answers unless told otherwise.
    Prompts begin alike; system texts do if `role` does not name the agent.
    """
    names = agents.split()
    tables = {b.name: b for b in backbones} or {"smol": backbone("smol")}
    default = next(iter(tables))
    home = {name: (backbone_of or {}).get(name, default) for name in names}
    width = {name: tables[home[name]].facts.width for name in names}
    all_links: dict[str, Link] = {}
    for word in links.split():
        feedback = "~>" in word
        source, target = word.split("~>" if feedback else ">")
        link = Link(
            source=source,
            target=target,
            feedback=feedback,
            weights=LinkWeights(
                kind=(kind_of or {}).get(f"{source}->{target}", kind),  # type: ignore[arg-type]
                init="aligned",
                file=None,
                in_dim=width[source],
                out_dim=width[target],
            ),
            where=UNKNOWN,
        )
        all_links[link.id] = link
    all_agents: dict[str, Agent] = {}
    for name in names:
        incoming = [link for link in all_links.values() if link.target == name]
        forward = [link.source for link in incoming if not link.feedback]
        needs_first = any(link.feedback for link in incoming)
        all_agents[name] = Agent(
            name=name,
            backbone=home[name],
            latent_steps=(steps_of or {}).get(name, steps),
            system=(PromptPart(kind="text", value=role.format(name=name)),),
            first=prompt("\nStart.", forward) if needs_first else None,
            then=prompt("\nContinue.", [link.source for link in incoming]),
            inner=LinkWeights(
                kind=kind,  # type: ignore[arg-type]
                init="aligned",
                file=None,
                in_dim=width[name],
                out_dim=width[name],
            ),
            where=UNKNOWN,
        )
    system = System(
        name="test",
        rounds=rounds,
        answer_agent=answer or names[-1],
        sampling=SamplingPlan(max_new_tokens=max_new_tokens),
        build=BuildOptions(target="onnx", precision="float32", max_prompt_tokens=512, max_batch=8),
        backbones=tables,
        agents=all_agents,
        links=all_links,
    )
    return Graph(
        level=Level.TOPOLOGY,
        system=system,
        nodes=dict(all_agents),
        edges=tuple(Edge(link.source, link.target, link) for link in all_links.values()),
    )


def with_forms(graph: Graph, **forms: MessageForm) -> Graph:
    """Return a topology whose links carry something else; keys are `SOURCE_TARGET`."""
    links = dict(graph.system.links)
    for ends, form in forms.items():
        link_id = ends.replace("_", "->")
        weights = links[link_id].weights if form.has_vectors else None
        links[link_id] = replace(links[link_id], form=form, weights=weights)
    return graph.replaced(
        system=replace(graph.system, links=links),
        edges=tuple(Edge(link.source, link.target, link) for link in links.values()),
    )


def sequential() -> Graph:
    """Three agents in a row, three rounds, the last one feeding back to the first."""
    return topology("planner critic solver", "planner>critic critic>solver solver~>planner")


def diamond() -> Graph:
    """One agent feeding two, both feeding the one that answers."""
    return topology(
        "start left right end", "start>left start>right left>end right>end end~>start", rounds=2
    )


def self_loop() -> Graph:
    """One agent that reads its own thoughts of the round before."""
    return topology("solver", "solver~>solver")


def interlocked() -> Graph:
    """Two cycles that share agents: a-b-c-a and b-c-d-b."""
    return topology("a b c d", "a>b b>c c~>a c>d d~>b", rounds=3)


def mixture() -> Graph:
    """Three specialists and a summarizer that feeds back to each."""
    return topology(
        "math code science summarizer",
        "math>summarizer code>summarizer science>summarizer "
        "summarizer~>math summarizer~>code summarizer~>science",
        rounds=2,
    )


EXAMPLES = {
    "sequential": sequential,
    "diamond": diamond,
    "self_loop": self_loop,
    "interlocked": interlocked,
    "mixture": mixture,
}
