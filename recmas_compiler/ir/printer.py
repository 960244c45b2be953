"""The text form of both IR levels: deterministic, aligned, one line per node.

Tests and people read it, and the fingerprint of a bundle hashes it. So it holds everything that
changes what is computed, and nothing of the machine: a link's file is shown by its name, a
backbone by the source that the spec gives.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import PurePath

from msgspec import Struct, structs

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.ir.graph import Graph, route_messages
from recmas_compiler.ir.ops import (
    Agent,
    Ask,
    Backbone,
    BuildOptions,
    Cache,
    Decode,
    Level,
    Link,
    NodeOp,
    Prefill,
    Remote,
    Send,
    Snapshot,
    System,
    Think,
    Write,
)
from recmas_compiler.links.files import LinkWeights
from recmas_runtime.core.text import aligned
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.ids import outer_link_id
from recmas_runtime.formats.messages import THOUGHTS, MessageForm, message_spans
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.formats.precisions import AUTO

Row = tuple[str, ...]


# A brace of a text that would begin something together with what follows it.
_BRACE = re.compile(r"\{(?=[{%#])|\{\Z")


def print_graph(graph: Graph) -> str:
    """Return the text of a topology or a program, tables first, ending in a newline."""
    system = graph.system
    sections = [
        _settings(graph),
        _section("backbones", map(_backbone_row, system.backbones.values())),
        _section("remote models", map(_remote_row, system.remotes.values())),
        _section("agents", (_agent_row(a, system) for a in system.agents.values())),
        _section("links", map(_link_row, system.links.values())),
        _section("caches", map(_cache_row, system.caches.values())),
        _section("snapshots", map(_snapshot_row, system.snapshots.values())),
        _prompts(system),
    ]
    if graph.level is Level.TOPOLOGY:
        sections.append(_section("topology", _topology_rows(graph)))
    else:
        sections.append(_section("program", _program_rows(graph)))
    return "\n".join(section for section in sections if section)


def prompt_text(parts: tuple[PromptPart, ...]) -> str:
    """Return a prompt as the spec writes it, with `{{ field }}` and `{{ latent.AGENT }}`."""
    written = {"text": "{}", "field": "{{{{ {} }}}}", "slot": "{{{{ latent.{} }}}}"}
    return "".join(
        written[part.kind].format(
            _BRACE.sub('{{ "{" }}', part.value) if part.kind == "text" else part.value
        )
        for part in parts
    )


def _settings(graph: Graph) -> str:
    system = graph.system
    rows: list[Row] = [
        ("system", system.name),
        ("level", graph.level.name.lower()),
        ("rounds", str(system.rounds)),
        ("answer", " ".join((system.answer_agent, *_options(system.sampling)))),
        ("build", " ".join(_options(system.build))),
    ]
    if system.date is not None:
        rows.append(("date", system.date))
    if system.stop_when is not None:
        rows.append(("stop when", " ".join(_options(system.stop_when))))
    if system.speculation is not None:
        rows.append(("speculation", " ".join(_options(system.speculation))))
    rows += _tool_rows(system)
    if system.serve is not None:
        taken = [f"{name}={part}" for name, part in system.serve.fields.items()]
        rows.append(("serve", " ".join((*taken, f"history={system.serve.history}"))))
    return "".join(f"{line}\n" for line in aligned(rows))


def _tool_rows(system: System) -> Iterator[Row]:
    """Yield a row for each tool that is on, then one with their bounds."""
    tools = system.tools
    if tools is None:
        return
    if tools.search is not None:
        source = [] if system.search_corpus is None else [PurePath(system.search_corpus).name]
        yield ("tool search", " ".join((*source, *_options(tools.search))))
    if tools.python is not None:
        yield ("tool python", " ".join(_options(tools.python)))
    if tools.ask:
        yield ("tool ask", "a human")
    for name in tools.functions:
        yield (f"tool {name}", "a function of the caller")
    bounds = ("max_calls", "timeout_s", "max_result_chars")
    yield ("tool calls", " ".join(f"{name}={getattr(tools, name)}" for name in bounds))


def _options(options: Struct | BuildOptions) -> Iterator[str]:
    """Yield `name=value` for each field; strings are quoted where ambiguous."""
    values = structs.asdict(options) if isinstance(options, Struct) else asdict(options)
    for name, value in values.items():
        shown = json.dumps(value, ensure_ascii=True) if isinstance(value, str | tuple) else value
        yield f"{name}={shown}"


def _backbone_row(backbone: Backbone) -> Row:
    facts = backbone.facts
    return (
        backbone.name,
        facts.source,
        facts.model_type,
        _numbers(backbone),
        f"d={facts.width}",
        f"layers={_layers(facts)}",
        f"heads={facts.num_heads}/{facts.num_kv_heads}x{facts.head_dim}",
        f"vocab={facts.vocab_size}",
        f"positions={facts.max_positions}",
        f"parameters={facts.num_parameters}",
        "" if backbone.device == AUTO else f"on {backbone.device}",
        "" if backbone.template is None else f"template={_short_digest(backbone.template)}",
        "" if backbone.shared_as == backbone.name else f"uses {backbone.shared_as}",
    )


def _remote_row(remote: Remote) -> Row:
    told = {k: v for k, v in to_json(remote.entry).items() if k not in ("model", "base_url")}
    rest = (f"{key}={json.dumps(value, sort_keys=True)}" for key, value in sorted(told.items()))
    return (remote.name, remote.entry.name, " ".join(rest))


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _numbers(backbone: Backbone) -> str:
    is_wide = backbone.precision == "float32"
    return backbone.dtype if is_wide else f"{backbone.dtype} as {backbone.precision}"


def _layers(facts: BackboneFacts) -> str:
    window = {"sliding": f"({facts.sliding_window})"}
    kinds = Counter(facts.attention)
    return "+".join(f"{kinds[kind]}*{kind}{window.get(kind, '')}" for kind in sorted(kinds))


def _agent_row(agent: Agent, system: System) -> Row:
    variables = ("chat_template=" + json.dumps(agent.chat_template, sort_keys=True),)
    return (
        agent.name,
        agent.backbone,
        f"steps={agent.latent_steps}",
        *(("", "", "", "") if agent.inner is None else ("inner", *_weights(agent.inner))),
        "answers" if agent.name == system.answer_agent else "",
        *(variables if agent.chat_template else ()),
    )


def _link_row(link: Link) -> Row:
    weights = ("", "", "") if link.weights is None else _weights(link.weights)
    form = "" if link.form == THOUGHTS else form_text(link.form)
    if link.layer_share is not None:
        form += f" layers={link.layer_share} of all"
    return (link.id, *weights, "feedback" if link.feedback else "", form)


def form_text(form: MessageForm) -> str:
    """Return what a link carries in one line, such as `context of=passage every=4`."""
    given = {k: v for k, v in to_json(form).items() if k != "carries"}
    shown = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in given.items()}
    return " ".join((form.carries, *(f"{k}={v}" for k, v in shown.items())))


def _weights(weights: LinkWeights) -> Row:
    start = weights.init if weights.file is None else f"file {PurePath(weights.file).name}"
    return (weights.kind, f"{weights.in_dim}->{weights.out_dim}", start)


def _cache_row(cache: Cache) -> Row:
    rows = "*".join(str(n) for n in (len(cache.agents), cache.capacity) if n > 1)
    size = f"bytes/sample={cache.bytes_per_sample}"
    return (
        cache.id,
        cache.backbone,
        f"rows={rows}",
        size,
        f"%{cache.first_step} .. %{cache.last_step}",
    )


def _snapshot_row(snapshot: Snapshot) -> Row:
    return (snapshot.id, f"bytes/sample={snapshot.bytes_per_sample}")


def _prompts(system: System) -> str:
    lines = []
    for agent in system.agents.values():
        texts = {"system": agent.system, "first": agent.first or (), "then": agent.then}
        for title, parts in texts.items():
            if parts or title == "then":
                lines.append(f"  {agent.name} {title}")
                # A bar keeps blank lines visible, and a prompt cannot be taken for the IR.
                text_lines = prompt_text(parts).split("\n")
                lines += [f"    | {line}" if line else "    |" for line in text_lines]
    return "".join(f"{line}\n" for line in ("prompts", *lines))


def _topology_rows(graph: Graph) -> Iterator[Row]:
    within_round = graph.without_feedback()
    # A topology that breaks the rules must still be readable.
    order = list(graph.nodes()) if within_round.cycles() else within_round.order()
    for name in order:
        agent = graph.op(name)
        assert isinstance(agent, Agent), f"{name} is not an agent"
        is_remote = graph.system.is_remote(name)
        width = 0 if is_remote else graph.system.backbone_of(name).facts.width
        incoming = [(source, graph.edge(source, name)) for source in graph.predecessors(name)]
        operands = [
            f"{s}=%{s}{'@previous' if isinstance(e, Link) and e.feedback else ''}"
            for s, e in incoming
        ]
        shape = "text[B]" if is_remote else f"thoughts[B,{agent.latent_steps},{width}]"
        yield (f"%{name}", f": {shape}", _call("agent", agent.backbone, *operands))


def _program_rows(graph: Graph) -> Iterator[Row]:
    for step, op in graph.in_order():
        yield (f"%{step}", f": {_result(op, graph.system)}", _step_call(graph, step, op))


def _result(op: NodeOp, system: System) -> str:
    match op:
        case Prefill(agents=agents):
            return f"hidden[{_batch(agents)},{system.backbone_of(agents[0]).facts.width}]"
        case Think(agents=agents):
            steps = system.agents[agents[0]].latent_steps
            width = system.backbone_of(agents[0]).facts.width
            return f"thoughts[{_batch(agents)},{steps},{width}]"
        case Send(source=source, targets=targets):
            form = system.links[outer_link_id(source, targets[0])].form
            if not form.has_vectors:
                return f"{'rows' if form.carries == 'cache' else form.carries}[B]"
            fan_out = f"{len(targets)}," if len(targets) > 1 else ""
            width = system.backbone_of(targets[0]).facts.width
            return f"message[{fan_out}B,{num_vectors(system, source, form)},{width}]"
        case Write(agents=agents, max_tokens=max_tokens):
            return f"text[{_batch(agents)},<={max_tokens}]"
        case Ask(agents=agents, max_tokens=int(max_tokens)):
            return f"text[{_batch(agents)},<={max_tokens}]"
        case Decode() | Ask():
            return "text[B]"
        case Agent():
            raise AssertionError(f"an agent in a program: {op.name}")


def num_vectors(system: System, source: str, form: MessageForm) -> str:
    """Return how many vectors a message has, with `<=` where a record decides."""
    steps = system.agents[source].latent_steps
    match form.carries:
        case "thoughts":
            return str(steps)
        case "written":
            return f"<={form.max_tokens}"
        case _:
            most = len(message_spans(form, system.build.max_prompt_tokens, steps))
            return f"<={most}"


def _step_call(graph: Graph, step: str, op: NodeOp) -> str:
    taken = [f"%{source}" for source in graph.predecessors(step)]
    match op:
        case Ask(max_tokens=most):
            return _call(
                "ask", *_prompts_read(graph, step, op), *([f"tokens={most}"] if most else [])
            )
        case Prefill(cache=cache):
            prompts = _prompts_read(graph, step, op)
            kept = [] if op.reuse is None else [f"reuse=%{op.reuse}"]
            kept += [] if op.prefix_of is None else [f"prefix=%{op.prefix_of}"]
            kept += [] if op.restore is None else [f"restore={op.restore}"]
            kept += [f"snapshot={snapshot}" for snapshot in op.snapshots]
            return _call("prefill", *prompts, *kept, *_cache(cache))
        case Think(agents=agents, fused=fused, cache=cache):
            steps = graph.system.agents[agents[0]].latent_steps
            link = "inner=fused" if fused else "inner=apart"
            return _call("think", *taken, f"steps={steps}", link, *_cache(cache))
        case Write(max_tokens=max_tokens, cache=cache):
            states = ["states"] if op.keeps_states else []
            return _call("write", *taken, f"tokens={max_tokens}", *states, *_cache(cache))
        case Send(links=links, apply_inner=apply_inner):
            inner = ["inner"] if apply_inner else []
            return _call("send", *taken, *inner, *links)
        case Decode(cache=cache):
            return _call("decode", *taken, *_cache(cache))
        case Agent():
            raise AssertionError(f"an agent in a program: {op.name}")


def _prompts_read(graph: Graph, step: str, op: Prefill | Ask) -> list[str]:
    slots = dict.fromkeys(op.agents, "")
    for message, send in route_messages(graph, step).items():
        slots[message.agent] += f", {message.slot}=%{send}"
    return [
        f"{agent}.{variant}({slots[agent].removeprefix(', ')})"
        for agent, variant in zip(op.agents, op.variants, strict=True)
    ]


def _batch(agents: tuple[str, ...]) -> str:
    return f"{len(agents)}*B" if len(agents) > 1 else "B"


def _cache(cache: str | None) -> list[str]:
    return [] if cache is None else [f"cache={cache}"]


def _call(name: str, *arguments: str) -> str:
    return f"= {name}({', '.join(arguments)})"


def _section(title: str, rows: Iterable[Row]) -> str:
    lines = aligned(rows)
    return "".join(f"{line}\n" for line in (title, *(f"  {line}" for line in lines))) * bool(lines)
