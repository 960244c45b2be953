"""A whole bundle written by hand: real engines, real files, no compiler and no torch.

Its backbone does the least that a language model can: a token's embedding is its one-hot vector,
the decoder passes embeddings through, and the head says which token comes next. After a digit
comes the letter of that place in the alphabet (0 -> a), after a letter the end. So a prompt that
ends in "7" is answered "h", whatever the messages: enough to test everything around the engines.
After a "C" it calls the tool `lookup` with "Q", after a line break it says "z", and after a "Z" it
says "YZYZ" without an end. It may be made to say a text of your own after a digit.

With a state, its layer also keeps the sum of all it has read, of which hidden states have a trace:
too little to change an answer, enough to tell a wrong one.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from recmas_runtime.formats.bundle import write_json_atomic
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.layers import StateShape, uniform_layers
from recmas_runtime.formats.links import expected_tensors
from recmas_runtime.formats.manifest import (
    BackboneEntry,
    FileEntry,
    LinkEntry,
    Manifest,
    ParityEntry,
)
from recmas_runtime.formats.plan import (
    AgentPlan,
    CachePlan,
    DecodeStep,
    Limits,
    LinkPlan,
    Message,
    Plan,
    PrefillStep,
    PromptPart,
    SamplingPlan,
    SendStep,
    SnapshotPlan,
    ThinkStep,
)
from recmas_runtime.formats.safetensors_file import write_tensors

SPECIAL = ("<|end|>", "<|user|>")
# Whole tags as ordinary tokens: the head knows one token of the past and could not spell them.
TAGS = ("<lookup>", "</lookup>")
CHAT_TEMPLATE = "{% for message in messages %}{{ '<|user|>' + message.content }}{% endfor %}"
NUM_STEPS = 2
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TRACE = 1e-3  # of a sum that is kept, in hidden states
OPERANDS = {
    "pre_norm": TensorProto.BOOL,
    "pre_scale": TensorProto.FLOAT,
    "pre_bias": TensorProto.FLOAT,
    "w1": TensorProto.FLOAT,
    "b1": TensorProto.FLOAT,
    "w2": TensorProto.FLOAT,
    "w3": TensorProto.FLOAT,
    "bias": TensorProto.FLOAT,
    "post_norm": TensorProto.BOOL,
    "post_scale": TensorProto.FLOAT,
    "post_bias": TensorProto.FLOAT,
}


def make_tokenizer(says: str = "") -> Tokenizer:
    """Return a byte-level tokenizer without merges: one token per byte, then the special ones.

    What it `says`, if anything, is one more token.
    """
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *TAGS, *filter(None, [_spelled(says)])]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    return tokenizer


def _spelled(text: str) -> str:
    """Return a text as a byte-level vocabulary spells it."""
    return "".join(piece for piece, _ in _BYTES.pre_tokenize_str(text))


def write_hand_bundle(root: Path, *, with_state: bool = False, says: str = "") -> Path:
    """Write the bundle: a planner and a solver, two rounds, feedback.

    Args:
        says: What comes after a digit instead of a letter.
    """
    tokenizer = make_tokenizer(says)
    width = tokenizer.get_vocab_size()
    for folder in ("backbones/one", "links", "parity"):
        (root / folder).mkdir(parents=True)
    folder = root / "backbones/one"
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    following = _next_token(tokenizer, says)
    _write_graphs(root, following, width, with_state=with_state)
    links = {
        name: LinkEntry(
            file=f"links/{role}.{name.replace('->', '.').removesuffix('.inner')}.safetensors",
            kind="projected",
            role=role,
            in_dim=width,
            out_dim=width,
            init="random",
        )
        for name, role in {
            "planner.inner": "inner",
            "solver.inner": "inner",
            "planner->solver": "outer",
            "solver->planner": "outer",
        }.items()
    }
    for seed, link in enumerate(links.values()):
        write_link(root / link.file, link, seed=seed)
    _write_parity(root, tokenizer, width, trace=TRACE if with_state else 0.0)
    (root / "spec.yaml").write_text("recmas: 1\n", encoding="utf-8")
    write_json_atomic(root / "plan.json", to_json(make_plan(width, with_state=with_state)))
    write_manifest(root, _backbone(tokenizer, width, with_state=with_state), links)
    return root


def write_manifest(root: Path, backbone: BackboneEntry, links: dict[str, LinkEntry]) -> None:
    """Write the manifest over everything that is in the folder."""
    (root / "manifest.json").unlink(missing_ok=True)
    files = {
        path.relative_to(root).as_posix(): FileEntry(
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(
        name="by-hand",
        fingerprint="0" * 64,
        spec_digest="0" * 64,
        precision="float32",
        tools={"recmas": "0.1.0"},
        backbones={"one": backbone},
        links=links,
        link_engine="links/link.onnx",
        probe="parity/probe.onnx",
        parity=(
            ParityEntry(
                file="parity/one.safetensors",
                backbone="one",
                figures={"hidden_relative": 0.0, "logits_relative": 0.0, "link_relative": 0.0},
                greedy_tokens_equal=True,
            ),
        ),
        files=files,
    )
    write_json_atomic(root / "manifest.json", to_json(manifest))


def rehash(root: Path) -> None:
    """Bring sizes and hashes in the manifest up to date, so that deeper checks are reached."""
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    for relative, entry in manifest["files"].items():
        raw = (root / relative).read_bytes()
        entry.update(sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))
    write_json_atomic(root / "manifest.json", manifest)


def edit_json(path: Path, keys: str, value: Any) -> None:
    """Set one value of a JSON file; `keys` are separated by slashes, `-` deletes."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = keys.split("/")
    place = whole
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is DELETE:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


DELETE = object()


def make_plan(width: int = 0, *, with_state: bool = False) -> Plan:
    """Return the plan, step by step as the compiler would write it.

    Args:
        width: Of the state, if there is one.
        with_state: Whether what is kept of prompts needs snapshots.
    """
    agents = {
        "planner": AgentPlan(
            backbone="one",
            system=(),
            first=(PromptPart(kind="text", value="Plan: "), _field("question")),
            then=(
                PromptPart(kind="text", value="Plan: "),
                _field("question"),
                PromptPart(kind="slot", value="solver"),
                PromptPart(kind="text", value="Better:"),
            ),
            inner="planner.inner",
            latent_steps=NUM_STEPS,
        ),
        "solver": AgentPlan(
            backbone="one",
            system=(PromptPart(kind="text", value="Be brief."),),
            first=None,
            then=(
                PromptPart(kind="text", value="Solve "),
                PromptPart(kind="slot", value="planner"),
                _field("question"),
            ),
            inner="solver.inner",
            latent_steps=NUM_STEPS,
        ),
    }
    steps = []
    for round_ in (1, 2):
        for agent, target in (("planner", "solver"), ("solver", "planner")):
            steps.append(
                PrefillStep(
                    round=round_,
                    agents=(agent,),
                    variants=("first" if (agent, round_) == ("planner", 1) else "then",),
                    messages=messages_of(agent, round_),
                    reuse_prefix=round_ == 2,
                    cache=agent,
                    restore=agent if with_state and round_ == 2 else None,
                    snapshots=(agent,) if with_state and round_ == 1 else (),
                )
            )
            if (agent, round_) == ("solver", 2):
                steps.append(DecodeStep(round=2, agent="solver", cache="solver"))
                break
            steps.append(ThinkStep(round=round_, agents=(agent,), fused=True, cache=agent))
            steps.append(
                SendStep(
                    round=round_,
                    source=agent,
                    targets=(target,),
                    links=(f"{agent}->{target}",),
                    apply_inner=False,
                )
            )
    cache = {"backbone": "one", "capacity": 192, "bytes_per_sample": 192 * 2 * 4}
    return Plan(
        name="by-hand",
        rounds=2,
        answer_agent="solver",
        agents=agents,
        links={
            "planner->solver": LinkPlan(source="planner", target="solver", carries="thoughts"),
            "solver->planner": LinkPlan(source="solver", target="planner", carries="thoughts"),
        },
        caches={name: CachePlan(agents=(name,), **cache) for name in agents},
        snapshots={
            name: SnapshotPlan(cache=name, bytes_per_sample=4 * width)
            for name in agents
            if with_state
        },
        steps=tuple(steps),
        sampling=SamplingPlan(max_new_tokens=8),
        limits=Limits(max_prompt_tokens=128, max_batch=4),
        fields=("question",),
    )


def messages_of(agent: str, round_: int) -> tuple[Message, ...]:
    """Return what an agent is sent: the solver in this round, the planner in the one before."""
    source, sent_in = ("planner", round_) if agent == "solver" else ("solver", round_ - 1)
    message = Message(agent=agent, slot=source, link=f"{source}->{agent}", round=sent_in)
    return (message,) if sent_in >= 1 else ()


def write_link(path: Path, link: LinkEntry, *, seed: int) -> None:
    """Write a link with random weights."""
    random = np.random.default_rng(seed)
    tensors = {
        name: random.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in expected_tensors(link).items()
    }
    metadata = {"kind": link.kind, "in_dim": str(link.in_dim), "out_dim": str(link.out_dim)}
    write_tensors(path, tensors, metadata)


def _field(name: str) -> PromptPart:
    return PromptPart(kind="field", value=name)


def _backbone(tokenizer: Tokenizer, width: int, *, with_state: bool) -> BackboneEntry:
    (layer,) = uniform_layers(1, heads=1, key_width=1)
    if with_state:
        layer = replace(layer, states=(StateShape(name="sum", shape=(width,)),))
    paths = {
        name: f"backbones/one/{file}"
        for name, file in {
            "decoder": "decoder.onnx",
            "embed": "embed.onnx",
            "head": "head.onnx",
            "weights": "weights.safetensors",
            "tokenizer": "tokenizer.json",
            "chat_template": "chat_template.jinja",
        }.items()
    }
    return BackboneEntry(
        source="by hand",
        digest="0" * 64,
        model_type="none",
        width=width,
        layers=(layer,),
        vocab_size=width,
        max_positions=4096,
        dtype="float32",
        bos_token=None,
        eos_token_ids=(tokenizer.token_to_id("<|end|>"),),
        **paths,
    )


def _next_token(tokenizer: Tokenizer, says: str) -> np.ndarray:
    end = tokenizer.token_to_id("<|end|>")
    following = np.full(tokenizer.get_vocab_size(), end)
    for place, letter in enumerate("abcdefghij"):
        following[tokenizer.token_to_id(str(place))] = tokenizer.token_to_id(letter)
    line_break = tokenizer.encode("\n").tokens[0]
    for before, after in (*pairwise(("C", "<lookup>", "Q", "</lookup>")), *pairwise("ZYZ")):
        following[tokenizer.token_to_id(before)] = tokenizer.token_to_id(after)
    following[tokenizer.token_to_id(line_break)] = tokenizer.token_to_id("z")
    if says:
        word = tokenizer.token_to_id(_spelled(says))
        following[[tokenizer.token_to_id(digit) for digit in "0123456789"]] = word
    return following


def _write_graphs(root: Path, following: np.ndarray, width: int, *, with_state: bool) -> None:
    folder = root / "backbones/one"
    table = np.eye(width, dtype=np.float32)
    head = table[following]
    write_tensors(folder / "weights.safetensors", {"table": table, "head": head})
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    _save(
        folder / "embed.onnx",
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        {"input_ids": (integers, ["B", "S"])},
        {"inputs_embeds": (floats, ["B", "S", width])},
        {"table": table},
    )
    _save(
        folder / "head.onnx",
        [helper.make_node("MatMul", ["hidden", "head"], ["logits"])],
        {"hidden": (floats, ["B", width])},
        {"logits": (floats, ["B", width])},
        {"head": head},
    )
    cache = (floats, ["B", 1, "C", 1])
    operands = {f"inner.{name}": (dtype, ["G", "x", "y"]) for name, dtype in OPERANDS.items()}
    states = {"sum.0": (floats, ["B", width])} if with_state else {}
    hidden = [helper.make_node("Identity", ["inputs_embeds"], ["hidden"])]
    _save(
        folder / "decoder.onnx",
        [
            *(_summing() if with_state else hidden),
            helper.make_node("Identity", ["key.0"], ["present_key.0"]),
            helper.make_node("Identity", ["value.0"], ["present_value.0"]),
            helper.make_node("Unsqueeze", ["last_index", "last_axis"], ["last_column"]),
            helper.make_node("GatherND", ["hidden", "last_column"], ["last"], batch_dims=1),
            helper.make_node("Unsqueeze", ["last", "middle_axis"], ["thought"]),
            helper.make_node("Identity", ["thought"], ["next_embeds"]),
        ],
        {
            "inputs_embeds": (floats, ["B", "S", width]),
            "write_index": (integers, ["B"]),
            "last_index": (integers, ["B"]),
            "key.0": cache,
            "value.0": cache,
            **states,
            **operands,
        },
        {
            "hidden": (floats, ["B", "S", width]),
            "thought": (floats, ["B", 1, width]),
            "next_embeds": (floats, ["B", 1, width]),
            "present_key.0": cache,
            "present_value.0": cache,
            **{f"present_{name}": kind for name, kind in states.items()},
        },
        {
            **{name: np.array([1]) for name in ("last_axis", "middle_axis")},
            **({name: np.array(n) for name, n in _SUMMING.items()} if with_state else {}),
        },
    )
    _save(
        root / "links/link.onnx",
        [
            helper.make_node("MatMul", ["x", "w3"], ["mapped"]),
            helper.make_node("Add", ["mapped", "bias"], ["y"]),
        ],
        {
            "x": (floats, ["G", "N", "di"]),
            **{name: (dtype, ["G", "x", "y"]) for name, dtype in OPERANDS.items()},
        },
        {"y": (floats, ["G", "N", "do"])},
        {},
    )
    _save(
        root / "parity/probe.onnx",
        [
            helper.make_node("Add", ["one", "one"], ["output"]),
            helper.make_node("Identity", ["two"], ["expected"]),
        ],
        {},
        {"output": (floats, [1]), "expected": (floats, [1])},
        {"one": np.ones(1, np.float32), "two": np.full(1, 2, np.float32)},
    )


_SUMMING = {"zero": 0, "one": 1, "ones": [1], "twos": [2], "trace": np.float32(TRACE)}


def _summing() -> list[onnx.NodeProto]:
    """Return nodes that add up what is read, padding left out."""
    return [
        helper.make_node("Shape", ["inputs_embeds"], ["length"], start=1, end=2),
        helper.make_node("Squeeze", ["length"], ["columns"]),
        helper.make_node("Range", ["zero", "columns", "one"], ["column"]),
        helper.make_node("Unsqueeze", ["last_index", "ones"], ["last_real"]),
        helper.make_node("LessOrEqual", ["column", "last_real"], ["is_real"]),
        helper.make_node("Cast", ["is_real"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "twos"], ["weights"]),
        helper.make_node("Mul", ["inputs_embeds", "weights"], ["read"]),
        helper.make_node("CumSum", ["read", "one"], ["sums"]),
        helper.make_node("Unsqueeze", ["sum.0", "ones"], ["before"]),
        helper.make_node("Add", ["sums", "before"], ["all"]),
        helper.make_node("Mul", ["all", "trace"], ["traces"]),
        helper.make_node("Add", ["inputs_embeds", "traces"], ["hidden"]),
        helper.make_node("ReduceSum", ["read", "ones"], ["new"], keepdims=0),
        helper.make_node("Add", ["sum.0", "new"], ["present_sum.0"]),
    ]


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    constants: dict[str, np.ndarray],
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(n, *kind) for n, kind in inputs.items()],
        [helper.make_tensor_value_info(n, *kind) for n, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, path)


def _write_parity(root: Path, tokenizer: Tokenizer, width: int, *, trace: float) -> None:
    table = np.eye(width, dtype=np.float32)
    digit, letter = (tokenizer.token_to_id(c) for c in "1b")
    first = [digit, 1, 2, 3, 4]  # begins with the greedy prompt
    again = [7, 8, 9, 10]
    # Of the two rows the second has less in each of the calls that have more than one position.
    lengths = np.array([(2, 1), (2, 1), (1, 1)], np.int64)
    feedback_lengths = np.array([(3, 2), (1, 1)], np.int64)

    def read(tokens: list[int]) -> np.ndarray:
        """Return the hidden states of tokens, each with a trace of all up to it."""
        return table[tokens] + np.float32(trace) * table[tokens].cumsum(axis=0)

    hidden = read(first)
    feedback = np.stack([read([*first[:kept], *again])[kept:] for kept in lengths[0]])
    ends, feedback_ends = (n.cumsum(axis=0) - 1 for n in (lengths, feedback_lengths))
    write_tensors(
        root / "parity/one.safetensors",
        {
            "inputs_embeds": table[first][None],
            "lengths": lengths,
            "hidden": hidden[None],
            "feedback_embeds": table[again][None],
            "feedback_lengths": feedback_lengths,
            "feedback_hidden": feedback,
            "thought_next": np.concatenate([hidden[ends], feedback[[0, 1], feedback_ends]]),
            "logits_hidden": table[[digit]],
            "logits": table[[letter]],
            "greedy_prompt": np.array([digit], np.int64),
            "greedy_tokens": np.array([letter, tokenizer.token_to_id("<|end|>")], np.int64),
        },
        {"inner": "planner.inner"},
    )
