"""Says in plain words what each pass did to a system, and what that saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from recmas_compiler.backbones.facts import weights_bytes
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import (
    Agent,
    Ask,
    Backbone,
    Link,
    Prefill,
    Send,
    System,
    Think,
    Write,
    ask_id,
    chosen_count,
    prefill_id,
    send_id,
)
from recmas_compiler.ir.printer import num_vectors, prompt_text
from recmas_compiler.passes.pass_base import Record
from recmas_compiler.passes.prompt_prefix import common_beginning, common_parts
from recmas_runtime.core.text import counted, human_bytes, listed
from recmas_runtime.formats.layers import sequence_bytes
from recmas_runtime.formats.plan import PromptPart, Variant, prompt_fields
from recmas_runtime.formats.precisions import AUTO, DTYPE_BYTES
from recmas_runtime.serve.conversation import in_words

# (backbone's name, text) -> its number of tokens, or None where no tokenizer is at hand
CountTokens = Callable[[str, str], int | None]

SHOWN_CHARACTERS = 40  # of the end of a prompt's kept part


def explain(
    topology: Graph, records: Sequence[Record], *, count_tokens: CountTokens | None = None
) -> str:
    """Return what the system is and what each pass changed in it, for its author.

    Args:
        records: One per pass that ran, in order (`RecordPasses`).
        count_tokens: Counts tokens of prompt text; without it texts are named, not counted.
    """
    count = count_tokens or (lambda backbone, text: None)
    system = topology.system
    sizes = (
        counted(len(system.agents), "agent"),
        counted(len(system.links), "link"),
        counted(system.rounds, "round"),
    )
    lines = [f"{system.name}: {listed(sizes)}; {system.answer_agent} writes the answer."]
    if chat := conversation_text(system):
        lines += ["", chat]
    if places := list(_places(system)):
        lines += ["", *places]
    for record in records:
        title, describe = PASSES.get(record.name, ("", _other_pass))
        sentences = list(describe(record, count)) or ["Nothing to do here."]
        lines += ["", f"{record.name}: {title}" if title else record.name]
        lines += [f"  - {sentence}" for sentence in sentences]
    return "\n".join(lines) + "\n"


def _places(system: System) -> Iterator[str]:
    """Yield where backbones run and what crosses between devices, if a spec says where."""
    devices = {name: backbone.device for name, backbone in system.backbones.items()}
    if set(devices.values()) <= {AUTO}:
        return
    for name, backbone in system.backbones.items():
        types = backbone.types
        what = f"{backbone.precision}, caches in {types.caches}, hidden states in {types.borders}"
        yield f"{name} runs on {_place(backbone.device)}: {what}."
    for link in system.links.values():
        ends = link.source, link.target
        if any(system.is_remote(end) for end in ends):
            continue
        source, target = (system.backbone_of(end).device for end in ends)
        if source != target:
            yield (
                f"{link.id} crosses from {_place(source)} to {_place(target)} through memory of "
                f"the host: {_crossing(system, link)} a record and round."
            )


def _place(device: str) -> str:
    return "the best device that is there" if device == AUTO else device


def _crossing(system: System, link: Link) -> str:
    """Return what a message takes there: the vectors that leave, and those that arrive."""
    form = link.form
    if form.carries == "text":
        return "text"
    source, target = (system.backbone_of(end) for end in (link.source, link.target))
    if form.carries == "cache":
        size, _ = _handed_layers(link, source)
        return f"rows of {human_bytes(size)} each"
    count = num_vectors(system, link.source, form)
    number = int(count.removeprefix("<="))
    most = "at most " if count.startswith("<=") else ""
    out, into = (
        human_bytes(number * backbone.facts.width * DTYPE_BYTES[backbone.types.borders])
        for backbone in (source, target)
    )
    return f"{most}{out} out, {most}{into} in"


def conversation_text(system: System) -> str:
    """Return what a spec says of conversations; empty if it says nothing."""
    if system.serve is None:
        return ""
    return f"In a conversation {in_words(system.serve, prompt_fields(system.agents.values()))}."


def _share_backbones(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    system = record.after.system
    for name, backbone in system.backbones.items():
        if backbone.shared_as != name:
            yield f"{name} is the same model as {backbone.shared_as} and uses its weights."
    for name, backbone in system.backbones.items():
        users = [agent for agent in system.local_agents if system.backbone_of(agent).name == name]
        if len(users) > 1:
            size = weights_bytes(
                backbone.facts,
                precision=backbone.precision,
                dtype=backbone.dtype,
                device=backbone.device_kind,
            )
            saved = human_bytes((len(users) - 1) * size)
            yield (
                f"One copy of {name} ({human_bytes(size)}) serves {listed(users)}: "
                f"{saved} less than a copy for each."
            )


def _unroll_rounds(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    system = record.after.system
    asks = [op for op in record.after.nodes().values() if isinstance(op, Ask)]
    kinds = Counter(type(op) for op in record.after.nodes().values())
    parts = (
        counted(kinds[Prefill], "prompt"),
        counted(kinds[Think], "latent rollout"),
        counted(kinds[Send], "message"),
        *([counted(kinds[Write], "text")] if kinds[Write] else []),
        *([f"{counted(len(asks), 'call')} of remote models"] if asks else []),
        "1 answer",
    )
    yield f"{counted(system.rounds, 'round')} unrolled: {listed(parts)}."
    yield from _remote_models(system)
    for link in system.links.values():
        if link.form.carries != "thoughts":
            yield _carried(system, link)
    waiting = record.before.without_feedback().descendants(system.answer_agent)
    yield (
        f"In round {system.rounds} {system.answer_agent} only writes the answer: "
        "it takes no latent steps there."
    )
    if system.speculation is not None:
        yield (
            f"Greedy text is drafted by prompt lookup, at most {system.speculation.max_draft} "
            "tokens at a time, and verified by one call; it stays the same, and a draft takes no "
            "rows beyond those of the text."
        )
    if waiting:
        late = [name for name in system.agents if name in waiting]
        yield f"No turn in round {system.rounds}, as they come after the answer: {listed(late)}."


def _remote_models(system: System) -> Iterator[str]:
    """Yield which agents are asked over a network, and where."""
    for name, remote in system.remotes.items():
        entry = remote.entry
        users = [agent for agent, op in system.agents.items() if op.backbone == name]
        key = (
            "without a key" if entry.api_key_env is None else f"with the key in {entry.api_key_env}"
        )
        yield (
            f"{listed(users)}: asked over the network, {entry.name}, {key}; prompts go there as "
            "chat messages, and its tokens are counted apart."
        )


def _carried(system: System, link: Link) -> str:
    """Return what the messages of a link are, how large, and what they cost."""
    form = link.form
    if form.carries == "text":
        return f"{link.id} hands over text: {link.source} writes at most {form.max_tokens} tokens."
    backbone = system.backbone_of(link.source)
    most = system.build.max_prompt_tokens
    if form.carries == "cache":
        what = {
            "context": f"its prompt, at most {most}",
            "prompt": f"its prompt with the generation prompt, at most {most}",
            "thoughts": f"its thoughts, {system.agents[link.source].latent_steps - 1}",
            "written": f"what it writes, at most {form.max_tokens}",
        }
        size, of = _handed_layers(link, backbone)
        rows = listed(what[kind] for kind in form.rows)
        return (
            f"{link.id} copies rows of {rows}, of {of}: {human_bytes(size)} a row. "
            f"{link.target} computes its prompt again in every round."
        )
    count = num_vectors(system, link.source, form).removeprefix("<=")
    vectors = f"at most {count} vectors of {system.backbone_of(link.target).facts.width} numbers"
    if form.carries == "written":
        return f"{link.id} sends the states of the tokens that {link.source} writes: {vectors}."
    of = "its prompt" if form.of is None else f"the field {form.of}"
    return f"{link.id} sends the states that {link.source} has at {of}, without a step: {vectors}."


def _handed_layers(link: Link, backbone: Backbone) -> tuple[int, str]:
    """Return the bytes of a row that is handed over, and the layers it is of, in words."""
    facts, element_bytes = backbone.facts, DTYPE_BYTES[backbone.types.caches]
    of_layers = [sequence_bytes([layer], 1, element_bytes=element_bytes) for layer in facts.layers]
    chosen = link.form.layers
    if link.layer_share is not None:
        count = chosen_count(link.layer_share, facts.num_layers)
        size = count * sum(of_layers) // facts.num_layers
        return size, f"{counted(count, 'layer')} (a share of {link.layer_share}, chosen when built)"
    if chosen is None:
        return sum(of_layers), "every layer"
    return sum(of_layers[layer] for layer in chosen), counted(len(chosen), "layer")


def _remove_dead_steps(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    system = record.before.system
    num_removed = len(record.before) - len(record.after)
    if num_removed == 0:
        return
    yield f"{num_removed} of {counted(len(record.before), 'step')} removed."
    for agent in system.agents.values():
        turns = _rounds(record.before, agent.name)
        gone = [round_ for round_ in turns if round_ not in _rounds(record.after, agent.name)]
        if gone and gone == turns:
            empty = "it takes no latent steps, so its messages are empty"
            useless = "nothing it thinks reaches the answer"
            if system.is_remote(agent.name):
                empty = "nothing it writes reaches the answer"
            yield f"{agent.name} never runs: {useless if agent.latent_steps else empty}."
        elif gone:
            yield f"{agent.name} does not run in {_in_rounds(gone)}: nobody reads it there."
    for link in system.links.values():
        reasons: dict[str, list[int]] = {}
        for round_ in _rounds(record.after, link.source):
            send = send_id(round_, link.source, (link.target,))
            if send in record.before and send not in record.after:
                reasons.setdefault(_why_unread(record, link, round_), []).append(round_)
        for why, rounds in reasons.items():
            yield f"The message {link.id} of {_in_rounds(rounds)} is not sent: {why}."


def _why_unread(record: Record, link: Link, round_: int) -> str:
    read_in = round_ + 1 if link.feedback else round_
    if read_in > record.before.system.rounds:
        return f"there is no round {read_in} to read it in"
    if read_in not in _rounds(record.after, link.target):
        return f"{link.target} does not run when it would be read"
    return f"the prompt {link.target} uses then has no slot for it"


def _rounds(program: Graph, agent: str) -> list[int]:
    """Return the rounds in which an agent, not yet part of a batch, runs."""
    rounds = range(1, program.system.rounds + 1)
    make = ask_id if program.system.is_remote(agent) else prefill_id
    return [round_ for round_ in rounds if make(round_, (agent,)) in program]


def _hoist_prompt_prefix(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    system = record.after.system
    kept: dict[tuple[str, Variant, Variant], list[int]] = {}
    for _, op in record.after.in_order():
        if isinstance(op, Prefill) and op.reuse is not None:
            earlier = record.after.op(op.reuse)
            assert isinstance(earlier, Prefill)
            for i, agent in enumerate(op.agents):
                case = (agent, earlier.variants[i], op.variants[i])
                kept.setdefault(case, []).append(op.round)
    for agent, old, new in sorted(kept, key=lambda case: list(system.agents).index(case[0])):
        olds, news = (system.agents[agent].parts(variant) for variant in (old, new))
        what = _kept_text(system, system.agents[agent], olds, news, count_tokens)
        yield f"{agent} in {_in_rounds(kept[agent, old, new])}: keeps {what}."


def _share_prompt_prefix(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    system = record.after.system
    for _, op in record.after.in_order():
        if not isinstance(op, Prefill) or op.prefix_of is None:
            continue
        source = record.after.op(op.prefix_of)
        assert isinstance(source, Prefill)
        for turn in zip(op.agents, op.variants, strict=True):
            others = zip(source.agents, source.variants, strict=True)
            other = max(others, key=lambda other: common_beginning(system, turn, other))
            olds, news = (system.agents[name].parts(variant) for name, variant in (other, turn))
            what = _kept_text(system, system.agents[turn[0]], olds, news, count_tokens)
            yield f"{turn[0]} in round {op.round}: copies {what} from {other[0]}."


def _kept_text(
    system: System,
    agent: Agent,
    olds: Sequence[PromptPart],
    news: Sequence[PromptPart],
    count_tokens: CountTokens,
) -> str:
    """Name the part of a prompt that stays in the cache, and how long it is."""
    common = tuple(common_parts(olds, news))
    whole = common == news
    parts = (*agent.system, *common)
    backbone = system.backbone_of(agent.name).name
    counts = [count_tokens(backbone, part.value) for part in parts if part.kind == "text"]
    tokens = [counted(sum(c for c in counts if c is not None), "token")]
    fields = dict.fromkeys(part.value for part in parts if part.kind == "field")
    amount = [*tokens, *(f"the {name}" for name in fields)]
    length = "" if None in counts else f" ({listed(amount)})"
    if whole:
        return f"its whole prompt{length}"
    if not any(part.value for part in common):
        only = "its system text" if agent.system else "what the chat template puts first"
        return f"{only}{length}"
    return f"its prompt up to {_end_of(common)}{length}"


def _end_of(parts: Iterable[PromptPart]) -> str:
    """Return the last words of a prompt in quotes; a field counts as a word."""
    words: list[str] = []
    for part in parts:
        words += part.value.split() if part.kind == "text" else [prompt_text((part,))]
    end: list[str] = []
    while words and len(" ".join(end)) < SHOWN_CHARACTERS:
        end.insert(0, words.pop())
    return f'"{"... " if words else ""}{" ".join(end)}"'


def _fuse_links(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    thinks = [op for op in record.after.nodes().values() if isinstance(op, Think) and op.fused]
    if thinks:
        agents = record.after.system.agents
        calls = sum(agents[name].latent_steps for op in thinks for name in op.agents)
        yield (
            "The inner link runs inside the latent step and messages reuse its result: "
            f"{counted(calls, 'separate call')} saved in each run."
        )
    fans: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for op in record.after.nodes().values():
        if isinstance(op, Send) and len(op.targets) > 1:
            fans.setdefault((op.source, op.targets), []).append(op.round)
    for (source, targets), rounds in fans.items():
        yield f"{source} to {listed(targets)} in {_in_rounds(rounds)}: one call."


def _batch_parallel_agents(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    batches: dict[tuple[str, ...], list[int]] = {}
    for op in record.after.nodes().values():
        if isinstance(op, Prefill) and len(op.agents) > 1:
            batches.setdefault(op.agents, []).append(op.round)
        elif isinstance(op, Ask) and len(op.agents) > 1:
            yield f"{listed(op.agents)} in round {op.round}: asked at the same time."
    for agents, rounds in batches.items():
        yield (
            f"{listed(agents)} in {_in_rounds(rounds)}: one batch, so the weights are read once "
            f"and not {len(agents)} times."
        )


def _plan_snapshots(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    system = record.after.system
    users: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for _, op in record.after.in_order():
        if isinstance(op, Prefill) and op.restore is not None:
            users.setdefault((op.restore, op.agents), []).append(op.round)
    for (name, agents), rounds in users.items():
        snapshot = system.snapshots[name]
        whose = "an earlier round" if snapshot.agents == agents else listed(snapshot.agents)
        size = human_bytes(snapshot.bytes_per_sample)
        yield (
            f"{listed(agents)} in {_in_rounds(rounds)}: goes on from layer states of {whose}, "
            f"{size} for each record."
        )
    if users:
        total = sum(snapshot.bytes_per_sample for snapshot in system.snapshots.values())
        batch = system.build.max_batch
        yield (
            f"In all {human_bytes(total)} for one record, {human_bytes(total * batch)} for a batch "
            f"of {batch}."
        )


def _plan_caches(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    system = record.after.system
    for cache in system.caches.values():
        size = human_bytes(cache.bytes_per_sample)
        rows = f"{cache.capacity} rows" + (" each" if len(cache.agents) > 1 else "")
        yield f"{listed(cache.agents)}: {rows}, {size} for each record at most."
    total = sum(cache.bytes_per_sample for cache in system.caches.values())
    batch = system.build.max_batch
    yield (
        f"In all {human_bytes(total)} for one record, {human_bytes(total * batch)} for a batch "
        f"of {batch}."
    )


def _other_pass(record: Record, count_tokens: CountTokens) -> Iterator[str]:
    if record.after is not record.before:
        yield f"{counted(len(record.before), 'node')} became {len(record.after)}."


def _in_rounds(rounds: Iterable[int]) -> str:
    numbers = list(rounds)
    if len(numbers) == 1:
        return f"round {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"rounds {numbers[0]} to {numbers[-1]}"
    return f"rounds {listed(numbers)}"


# pass -> (its purpose in words, what describes its record)
PASSES: dict[str, tuple[str, Callable[[Record, CountTokens], Iterator[str]]]] = {
    "ShareBackbones": ("equal models are held once", _share_backbones),
    "UnrollRounds": ("the loop becomes a list of steps", _unroll_rounds),
    "RemoveDeadSteps": ("what the answer does not need is not run", _remove_dead_steps),
    "HoistPromptPrefix": ("a prompt's beginning is computed once", _hoist_prompt_prefix),
    "FuseLinks": ("links join the calls around them", _fuse_links),
    "BatchParallelAgents": ("independent agents run side by side", _batch_parallel_agents),
    "SharePromptPrefix": ("what prompts of several agents begin with, too", _share_prompt_prefix),
    "PlanSnapshots": ("states that cannot be cut back are saved", _plan_snapshots),
    "PlanCaches": ("memory is decided ahead", _plan_caches),
}
