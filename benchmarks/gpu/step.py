"""A latent step on a GPU beside the memory's floor and transformers, in plain PyTorch.

    python benchmarks/gpu/step.py                      # a GPU, bfloat16, 1.7 billion weights
    python benchmarks/gpu/step.py --device cpu --tiny  # a few seconds, on any machine

Untried on hardware: nobody has run this on a GPU yet.

It needs PyTorch alone; with transformers (any version that has Llama) it measures that too, on the
same weights, and says how far hidden states differ. Weights are random and made here. What runs is
what recmas's torch engine does: caches of fixed size with a write index for each row, products of
one input packed, the inner link within the step, and all steps of a rollout as one CUDA graph. JSON
on stdout, a Markdown table on stderr.

Shape legend: R rows, S positions, C cache rows, H query heads, K key/value heads, D head width, d
width, M latent steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of Llama's form."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float = 1e-6
    theta: float = 1e6

    @property
    def packed(self) -> int:
        """Rows of the matrix of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


# The shape of Qwen3-1.7B, without its norms of heads, which Llama's form does not have.
LARGE: Final = Shape(
    layers=28, width=2048, inner=6144, heads=16, kv_heads=8, head_dim=128, vocabulary=151_936
)
TINY: Final = Shape(layers=2, width=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocabulary=256)

# How far hidden states may be from transformers', by the largest: sums come in another order.
TOLERANCES: Final = {"float32": 1e-4, "bfloat16": 0.1, "float16": 1.25e-2}
_READS: Final = 20


def make_weights(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random weights by the names that transformers has for them."""
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        made = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return made.mul_(columns**-0.5).to(dtype)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {"embed_tokens.weight": matrix(shape.vocabulary, shape.width)}
    for i in range(shape.layers):
        sizes = {
            "self_attn.q_proj": (q, shape.width),
            "self_attn.k_proj": (kv, shape.width),
            "self_attn.v_proj": (kv, shape.width),
            "self_attn.o_proj": (shape.width, q),
            "mlp.gate_proj": (shape.inner, shape.width),
            "mlp.up_proj": (shape.inner, shape.width),
            "mlp.down_proj": (shape.width, shape.inner),
        }
        for name, size in sizes.items():
            weights[f"layers.{i}.{name}.weight"] = matrix(*size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{i}.{name}.weight"] = torch.ones(
                shape.width, device=device, dtype=dtype
            )
    return weights | {"norm.weight": torch.ones(shape.width, device=device, dtype=dtype)}


def make_link(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return the matrices of an inner link, y = x w3 + gelu(x w1) w2."""
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.width, shape.width)
    made = (torch.randn(size, generator=generator, device=device) for _ in range(3))
    return [matrix.mul_(shape.width**-0.5).to(dtype) for matrix in made]


def apply_link(x: Tensor, link: list[Tensor]) -> Tensor:
    """Return the next input vectors of hidden states."""
    w1, w2, w3 = link
    return x @ w3 + gelu(x @ w1) @ w2


class Engine:
    """A decoder over caches of fixed size; norms, sums over layers and angles are float32."""

    def __init__(
        self, shape: Shape, weights: Mapping[str, Tensor], link: list[Tensor], *, compiled: bool
    ) -> None:
        self.shape, self.link = shape, link
        norm = weights["norm.weight"]
        self.device, self.dtype = norm.device, norm.dtype
        self._norm = norm
        self._layers = [_packed(weights, i) for i in range(shape.layers)]
        half = torch.arange(0, shape.head_dim, 2, device=self.device) / shape.head_dim
        self._frequencies = 1.0 / shape.theta ** half.float()
        self._step: Callable[..., tuple[Tensor, Tensor]] = self._run_step
        if compiled:
            self._step = torch.compile(self._run_step, fullgraph=True, dynamic=False)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads, those of the link too."""
        tensors = [*(t for layer in self._layers for t in layer.values()), self._norm, *self.link]
        return sum(t.numel() * t.element_size() for t in tensors)

    def new_cache(self, rows: int, capacity: int) -> Tensor:
        """Return keys and values of all layers, [layers, 2, R, K, C, D]."""
        s = self.shape
        size = (s.layers, 2, rows, s.kv_heads, capacity, s.head_dim)
        return torch.zeros(size, device=self.device, dtype=self.dtype)

    def run(self, embeds_RSd: Tensor, cache: Tensor, index_R: Tensor) -> Tensor:
        """Run positions and write their rows; returns hidden states [R, S, d]."""
        rows, positions, _ = embeds_RSd.shape
        s, capacity = self.shape, cache.shape[4]
        offset_S = torch.arange(positions, device=self.device)
        position_RS = index_R[:, None] + offset_S
        angle_RSf = position_RS[..., None].float() * self._frequencies
        cos, sin = angle_RSf.cos()[:, None].to(self.dtype), angle_RSf.sin()[:, None].to(self.dtype)
        row_C = torch.arange(capacity, device=self.device)
        seen_R1SC = (row_C[None, None] <= position_RS[..., None])[:, None]
        row_RS = torch.arange(rows, device=self.device)[:, None].expand(rows, positions)
        sizes = [s.heads, s.kv_heads, s.kv_heads]
        x = embeds_RSd.float()
        for layer, (keys, values) in zip(self._layers, cache.unbind(0), strict=True):
            packed = self._normed(x, layer["first"]) @ layer["qkv"].T
            heads = packed.view(rows, positions, sum(sizes), s.head_dim).transpose(1, 2)
            q, k, v = torch.split(heads, sizes, dim=1)
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
            keys[row_RS, :, position_RS] = k.transpose(1, 2)
            values[row_RS, :, position_RS] = v.transpose(1, 2)
            # [R, K, H/K S, D]: each cached row is read once, whatever queries share it.
            shared = s.heads // s.kv_heads
            grouped = q.reshape(rows, s.kv_heads, shared * positions, s.head_dim)
            mask = seen_R1SC.repeat(1, 1, shared, 1)
            out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            flat = out.reshape(rows, s.heads, positions, s.head_dim).transpose(1, 2).flatten(2)
            x = x + (flat @ layer["out"].T).float()
            gate, up = (self._normed(x, layer["second"]) @ layer["gate_up"].T).chunk(2, dim=-1)
            x = x + ((silu(gate) * up) @ layer["down"].T).float()
        return self._normed(x, self._norm)

    def _normed(self, x: Tensor, scale: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.shape.epsilon)
        return (x * root * scale.float()).to(self.dtype)

    def _run_step(
        self, embeds_R1d: Tensor, cache: Tensor, index_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_R1d = self.run(embeds_R1d, cache, index_R)
        return hidden_R1d, apply_link(hidden_R1d, self.link)

    def roll(self, embeds_R1d: Tensor, cache: Tensor, index_R: Tensor, steps: int) -> Tensor:
        """Run latent steps one behind the other; returns hidden states [M, R, 1, d]."""
        states = []
        for _ in range(steps):
            hidden_R1d, embeds_R1d = self._step(embeds_R1d, cache, index_R)
            states.append(hidden_R1d.clone())
            index_R.add_(1)  # on the device, so that a captured graph moves on too
        return torch.stack(states)


def captured(engine: Engine, first_R1d: Tensor, cache: Tensor, index_R: Tensor, steps: int) -> Any:
    """Return a function that runs a rollout as one CUDA graph, from the same place each time."""
    start = index_R.clone()
    # Compiling, and what libraries allocate on first use, must not happen while capturing.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        engine.roll(first_R1d, cache, index_R, 2)
    torch.cuda.current_stream().wait_stream(side)
    index_R.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        states = engine.roll(first_R1d, cache, index_R, steps)

    def replay() -> Tensor:
        index_R.copy_(start)
        graph.replay()
        return states

    return replay


class Transformers:
    """The same weights in transformers, eagerly, with its own growing cache."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], link: list[Tensor]) -> None:
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=shape.epsilon,
            rope_theta=shape.theta,
            max_position_embeddings=32_768,
        )
        # Newer versions have the base of angles in a table; where it is not read, states differ.
        if isinstance(getattr(config, "rope_parameters", None), dict):
            config.rope_parameters = {"rope_type": "default", "rope_theta": shape.theta}
        norm, self._link = weights["norm.weight"], link
        with torch.device("meta"):
            model = LlamaModel(config)
        model = model.to_empty(device=norm.device).to(norm.dtype).eval()
        model.load_state_dict(dict(weights), strict=True)
        # What no file holds, and `meta` has left empty.
        rotary = type(model.rotary_emb)(config=config)
        model.rotary_emb = rotary.to(norm.device)
        self._model = model

    def run(self, embeds_RSd: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Return hidden states [R, S, d] and the cache."""
        found = self._model(inputs_embeds=embeds_RSd, past_key_values=past, use_cache=True)
        return found.last_hidden_state, found.past_key_values

    def roll(self, embeds_R1d: Tensor, past: Any, steps: int) -> Tensor:
        """Run latent steps one behind the other; returns hidden states [M, R, 1, d]."""
        states = []
        for _ in range(steps):
            hidden_R1d, past = self.run(embeds_R1d, past)
            embeds_R1d = apply_link(hidden_R1d, self._link)
            states.append(hidden_R1d)
        return torch.stack(states)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of an engine at a number of rows; times are medians, then least and most.

    Attributes:
        difference: Of hidden states to transformers', by the largest; None where it is not here.
    """

    engine: str
    rows: int
    step_ms: float
    step_ms_least: float
    step_ms_most: float
    prompt_ms: float
    floor_ms: float
    floor_share: float
    difference: float | None = None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    shape = TINY if options.tiny else LARGE
    torch.manual_seed(0)
    weights, link = make_weights(shape, device, dtype), make_link(shape, device, dtype)
    notes: list[str] = []
    other = _transformers(shape, weights, link, notes)
    engine = Engine(shape, weights, link, compiled=options.compile)
    bandwidth = read_bandwidth(engine.step_bytes, device)
    found: list[Row] = []
    for rows in options.rows:
        found += _rows_of(engine, other, rows, options, engine.step_bytes / bandwidth, notes)
    return {
        "machine": _machine(device),
        "settings": {
            "shape": asdict(shape),
            "dtype": options.dtype,
            "device": options.device,
            "prompt": options.prompt,
            "steps": options.steps,
            "compiled": options.compile,
            "cuda_graph": device.type == "cuda",
        },
        "step_bytes": engine.step_bytes,
        "read_bytes_per_s": bandwidth,
        "rows": [asdict(row) for row in found],
        "notes": notes,
    }


def _rows_of(
    engine: Engine,
    other: Transformers | None,
    rows: int,
    options: argparse.Namespace,
    floor_s: float,
    notes: list[str],
) -> Iterator[Row]:
    """Yield what is measured at a number of rows: the two take turns."""
    device, shape, steps = engine.device, engine.shape, options.steps
    size = (rows, options.prompt, shape.width)
    prompt_RSd = torch.randn(size, device=device).to(engine.dtype)
    capacity = -(-(options.prompt + steps + 1) // 64) * 64
    cache = engine.new_cache(rows, capacity)
    index_R = torch.zeros(rows, dtype=torch.long, device=device)

    def prefill() -> Tensor:
        return engine.run(prompt_RSd, cache, index_R.zero_())

    hidden_RSd = prefill()
    first_R1d = apply_link(hidden_RSd[:, -1:], engine.link).clone()
    index_R.fill_(options.prompt)
    if device.type == "cuda":
        rollout = captured(engine, first_R1d, cache, index_R, steps)
    else:

        def rollout() -> Tensor:
            return engine.roll(first_R1d, cache, index_R.fill_(options.prompt), steps)

    def theirs() -> Tensor:
        assert other is not None
        _, past = other.run(prompt_RSd, None)
        states: Tensor = _timed(lambda: other.roll(first_R1d, past, steps), device, theirs_s)
        return states

    ours_s: list[float] = []
    theirs_s: list[float] = []
    prompts_s: dict[str, list[float]] = {"recmas": [], "transformers": []}
    difference = None
    for turn in range(options.repeats + 1):
        prefill_s: list[float] = []
        _timed(prefill, device, prefill_s)
        index_R.fill_(options.prompt)
        mine = _timed(rollout, device, ours_s)
        prompts_s["recmas"] += prefill_s
        if other is not None:
            _timed(lambda: other.run(prompt_RSd, None), device, prompts_s["transformers"])
            expected = theirs()
            if turn == 0:
                spread = expected.float().abs().max()
                difference = float((mine.float() - expected.float()).abs().max() / spread)
    if difference is not None and not difference <= TOLERANCES[options.dtype]:
        allowed = TOLERANCES[options.dtype]
        notes.append(
            f"{rows} rows: hidden states differ by {difference:.1e}, allowed {allowed:.0e}"
        )
    times = [("recmas", ours_s)] + ([("transformers", theirs_s)] if other is not None else [])
    for name, seconds in times:
        each = [1e3 * s / steps for s in seconds[1:]]  # the first turn warms up
        yield Row(
            engine=name,
            rows=rows,
            step_ms=statistics.median(each),
            step_ms_least=min(each),
            step_ms_most=max(each),
            prompt_ms=1e3 * statistics.median(prompts_s[name][1:]),
            floor_ms=1e3 * floor_s,
            floor_share=1e3 * floor_s / statistics.median(each),
            difference=difference if name == "recmas" else None,
        )


def _transformers(
    shape: Shape, weights: Mapping[str, Tensor], link: list[Tensor], notes: list[str]
) -> Transformers | None:
    try:
        return Transformers(shape, weights, link)
    # Versions differ in what they take, and a machine may have none.
    except Exception as error:
        notes.append(f"transformers is not measured: {type(error).__name__}: {error}")
        return None


def read_bandwidth(num_bytes: int, device: torch.device) -> float:
    """Return how many bytes a second are read from a block as large as a step's weights."""
    block = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(block)
    sums: list[float] = []
    copies: list[float] = []
    for _ in range(_READS):
        _timed(lambda: block.sum(), device, sums)
        _timed(lambda: target.copy_(block), device, copies)
    # A copy reads and writes. Whichever kernel is faster shows better what the memory can do.
    return 4 * block.numel() * max(1 / min(sums), 2 / min(copies))


def _timed(run: Callable[[], Any], device: torch.device, seconds: list[float]) -> Any:
    """Return what a call gives, and note how long it took."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
    return result


def _packed(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    def get(name: str) -> Tensor:
        return weights[f"layers.{layer}.{name}.weight"]

    return {
        "qkv": torch.cat([get(f"self_attn.{name}_proj") for name in "qkv"]),
        "out": get("self_attn.o_proj"),
        "gate_up": torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]),
        "down": get("mlp.down_proj"),
        "first": get("input_layernorm"),
        "second": get("post_attention_layernorm"),
    }


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import transformers

        found["transformers"] = transformers.__version__
    except ImportError:
        found["transformers"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| engine | rows | ms per step | of the floor | prompt ms | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        apart = "" if row["difference"] is None else f"{row['difference']:.1e}"
        spread = f"{row['step_ms_least']:.3f} to {row['step_ms_most']:.3f}"
        lines.append(
            f"| {row['engine']} | {row['rows']} | {row['step_ms']:.3f} ({spread}) | "
            f"{row['floor_share']:.0%} | {row['prompt_ms']:.2f} | {apart} |"
        )
    gigabytes = found["step_bytes"] / 1e9, found["read_bytes_per_s"] / 1e9
    lines += ["", f"A step reads {gigabytes[0]:.2f} GB; the memory gives {gigabytes[1]:.0f} GB/s."]
    return "\n".join([*lines, *(f"- {note}" for note in found["notes"])])


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Return the command line; refuse what is not here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument(
        "--dtype", choices=sorted(TOLERANCES), help="default: bfloat16, on cpu float32"
    )
    parser.add_argument("--tiny", action="store_true", help="a shape for any machine")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], metavar="R")
    parser.add_argument("--prompt", type=int, default=128, metavar="POSITIONS")
    parser.add_argument("--steps", type=int, default=32, metavar="M")
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    options = parser.parse_args(arguments)
    for name in ("prompt", "steps", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: give at least 1")
    if min(options.rows) < 1:
        parser.error(f"--rows has {min(options.rows)}: give at least 1")
    is_cuda = options.device.startswith("cuda")
    if is_cuda and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device; --device cpu --tiny runs anywhere")
    options.dtype = options.dtype or ("bfloat16" if is_cuda else "float32")
    options.compile = is_cuda if options.compile is None else options.compile
    return options


def main() -> None:
    """Measure, and print JSON and a table."""
    options = options_of(sys.argv[1:])
    with torch.inference_mode():
        try:
            found = measure(options)
        except Exception as error:
            if not options.compile:
                raise
            # A machine without a compiler of kernels still has its figures.
            found = measure(argparse.Namespace(**{**vars(options), "compile": False}))
            found["notes"].append(f"runs uncompiled: {type(error).__name__}: {error}")
    print(json.dumps(found, indent=1))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
