"""A process that holds one engine and times it when asked: JSON lines in, JSON lines out.

Whatever can take a latent step has one interface: prompt, steps and tokens of some backbone.

Shape legend: R rows, S positions of a call, C cache rows, d model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import onnx
from numpy.typing import NDArray

from recmas_runtime.checking.machine import peak_resident_bytes
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.interface import Floats, Indices
from recmas_runtime.engines.onnx.backbone import BackboneEngine, LinkEngine
from recmas_runtime.engines.onnx.session import make_session, onnx_runtime, resolve_device
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.layers import PROMPT_BRANCH
from recmas_runtime.formats.links import Operands, load_operands, stack_operands
from recmas_runtime.formats.manifest import BackboneEntry

_MODEL: Final = "model.onnx"
ENGINES: Final = ("onnx", "torch", "huggingface", "naive", "genai")
# Their caches grow with what is used: the capacity of a cell means nothing to them.
WITHOUT_CAPACITY: Final = frozenset({"huggingface", "naive"})
# A turn goes back behind the prompt, twice; theirs are caches of rows, or cut only those.
ROWS_ONLY: Final = frozenset({"torch", "huggingface", "genai"})


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Which engine to open: one of `ENGINES`; links, tables and dimensions come from the bundle."""

    engine: str
    bundle: str
    backbone: str
    genai: str | None
    device: str
    threads: int


class EngineAdapter(ABC):
    """One engine, ready to be timed; a step reads `step_bytes` of weights."""

    precision: str
    step_bytes: int
    can_step: bool = True
    can_write: bool = True

    @abstractmethod
    def prepare(self, batch: int, capacity: int, used: int) -> None:
        """Take a new cache and a prompt of `used` positions, the same for every engine."""

    @abstractmethod
    def prefill(self) -> None:
        """Run the prompt."""

    @abstractmethod
    def step(self, count: int) -> None:
        """Take latent steps behind the prompt."""

    @abstractmethod
    def write(self, count: int) -> None:
        """Write tokens behind the prompt, the likeliest each time."""

    def inside_s(self) -> float | None:
        """Return the seconds spent in the engine's own calls; None where they are not timed."""
        return None


class _BackboneAdapter(EngineAdapter):
    """Anything with the methods of the runtime's `BackboneEngine`, and one inner link."""

    def __init__(self, engine: Any, *, inner: Operands, precision: str, step_bytes: int) -> None:
        self.precision, self.step_bytes = precision, step_bytes
        self._engine, self._inner = engine, inner
        self._cache: Any = None

    def prepare(self, batch: int, capacity: int, used: int) -> None:
        if self._cache is not None:
            self._engine.release(self._cache)
        self._cache = self._engine.new_cache(batch, capacity)
        self._embeds = self._engine.embed(prompt(batch, used, self._engine.entry.vocab_size))
        self._used = np.full(batch, used, np.int64)

    def prefill(self) -> None:
        zero = np.zeros_like(self._used)
        _, self._hidden, self._next_embeds = self._engine.forward(
            self._cache, self._embeds, zero, self._used - 1, self._inner
        )

    def step(self, count: int) -> None:
        # The first hidden state is the prompt's own: one call less than there are states.
        self._engine.rollout(
            self._cache, self._hidden, self._next_embeds, self._used, self._inner, count + 1
        )

    def write(self, count: int) -> None:
        zero, hidden = np.zeros_like(self._used), self._hidden
        for position in range(count):
            logits = self._engine.logits(np.ascontiguousarray(hidden[:, 0]))
            embeds = self._engine.embed(logits.argmax(-1)[:, None])
            _, hidden, _ = self._engine.forward(
                self._cache, embeds, self._used + position, zero, self._inner
            )


class _OnnxAdapter(_BackboneAdapter):
    """A bundle's own engine; tells apart what ONNX Runtime takes and what Python adds."""

    def __init__(self, engine: BackboneEngine, **about: Any) -> None:
        super().__init__(engine, **about)
        self._clock = _Clock(engine.decoder)

    def prepare(self, batch: int, capacity: int, used: int) -> None:
        super().prepare(batch, capacity, used)
        self._cache.session = self._clock

    def inside_s(self) -> float:
        return self._clock.seconds


class _Clock:
    """A session that adds up the time of its runs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds = 0.0

    def run_with_iobinding(self, *arguments: Any) -> None:
        start = time.perf_counter()
        self._session.run_with_iobinding(*arguments)
        self.seconds += time.perf_counter() - start


class _GenaiAdapter(EngineAdapter):
    """A model that onnxruntime-genai's builder wrote, run with its caches bound in place.

    Plain ONNX Runtime drives it: the package itself is needed to build such a model, not to run it.
    Two kinds are known by their inputs. The body (`exclude_embeds`, `exclude_lm_head`) maps
    embeddings to hidden states and so can take latent steps, the inner link applied behind it; a
    whole model maps tokens to logits and writes text. A bundle's entry says how wide a head is.
    """

    def __init__(
        self, folder: Path, *, entry: BackboneEntry, link: LinkEngine, inner: Operands, threads: int
    ) -> None:
        self.precision = weight_precision(folder / _MODEL)
        self.step_bytes = weight_bytes(folder / _MODEL)
        self._entry, self._link, self._inner = entry, link, inner
        self._session = make_session(folder / _MODEL, threads=threads)
        inputs = [value.name for value in self._session.get_inputs()]
        self.can_write = "input_ids" in inputs
        self.can_step = not self.can_write
        self._caches = [name for name in inputs if name.startswith("past")]
        # The other outputs are the caches.
        self._output = self._session.get_outputs()[0].name

    def prepare(self, batch: int, capacity: int, used: int) -> None:
        # Past and present are one buffer.
        self._used = used
        self._prompt: Floats | Indices = prompt(batch, used, self._entry.vocab_size)
        if self.can_step:
            draw = np.random.default_rng(0)
            embeds = draw.standard_normal((batch, used, self._entry.width), np.float32)
            self._prompt = embeds / np.float32(8)
        self._binding = self._session.io_binding()
        self._bound: list[Any] = []  # keeps the buffers alive
        for name in self._caches:
            _, layer, kind = name.split(".")  # past_key_values.LAYER.key or .value
            rows = self._entry.layers[int(layer)].rows
            assert rows is not None, f"{name} is of a layer without rows"
            width = rows.key_width if kind == "key" else rows.value_width
            zeros = np.zeros((batch, rows.heads, capacity, width), np.float32)
            value = onnx_runtime().OrtValue.ortvalue_from_numpy(zeros)
            self._bound.append((zeros, value))
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)

    def prefill(self) -> None:
        self._last = self._run(self._prompt, 0)

    def step(self, count: int) -> None:
        hidden = self._last
        for position in range(count):
            following = self._link.apply(hidden[None], self._inner)[0]
            hidden = self._run(following[:, None], self._used + position)

    def write(self, count: int) -> None:
        logits = self._last
        for position in range(count):
            logits = self._run(logits.argmax(-1)[:, None], self._used + position)

    def _run(self, inputs: Floats | Indices, used: int) -> Floats:
        """Run positions behind the first `used`; returns hidden states or logits of the last."""
        rows, positions = inputs.shape[:2]
        binding = self._binding
        binding.bind_cpu_input("input_ids" if self.can_write else "inputs_embeds", inputs)
        binding.bind_cpu_input("attention_mask", np.ones((rows, used + positions), np.int64))
        binding.bind_output(self._output, "cpu")
        self._session.run_with_iobinding(binding)
        output: NDArray[Any] = binding.get_outputs()[-1].numpy()
        return np.ascontiguousarray(output[:, -1], dtype=np.float32)


def prompt(batch: int, positions: int, vocab_size: int) -> Indices:
    """Return tokens [R, S] drawn from a fixed seed."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, positions))


def open_engine(key: EngineKey) -> EngineAdapter:
    """Open what a key names; raises as loading a bundle, a backbone or a graph does."""
    bundle = open_bundle(key.bundle)
    entry = bundle.manifest.backbones[key.backbone]
    # The first inner link on the backbone, as one group.
    name = next(a.inner for a in bundle.plan.agents.values() if a.backbone == key.backbone)
    link_entry = bundle.manifest.links[name]
    inner = stack_operands([load_operands(bundle.file(link_entry.file), link_entry)])
    inner_bytes = sum(operand.nbytes for operand in inner.values())
    if key.engine == "genai":
        assert key.genai is not None, "genai needs a model"
        link = LinkEngine(bundle.file(bundle.manifest.link_engine), threads=key.threads)
        return _GenaiAdapter(
            Path(key.genai), entry=entry, link=link, inner=inner, threads=key.threads
        )
    if key.engine == "onnx":
        engine = BackboneEngine(
            entry, bundle.root, threads=key.threads, device=resolve_device(key.device)
        )
        return _OnnxAdapter(
            engine,
            inner=inner,
            precision=entry.precision,
            step_bytes=weight_bytes(bundle.file(entry.decoder)) + inner_bytes,
        )
    from recmas_compiler.bench.open_torch import open_torch_engine

    torch_engine, precision, body_bytes = open_torch_engine(
        bundle.root, key.backbone, kind=key.engine, device=key.device, threads=key.threads
    )
    return _BackboneAdapter(
        torch_engine, inner=inner, precision=precision, step_bytes=body_bytes + inner_bytes
    )


# They look single rows of their table up and never read all of it.
_MIXTURES: Final = frozenset({"MoE", "QMoE"})
_LOOKUPS: Final = frozenset({"Gather", "GatherND", "GatherBlockQuantized"})
# Inputs of GroupQueryAttention that have a row for each position.
_ANGLE_TABLES: Final = (7, 8)


def weight_bytes(graph: Path) -> int:
    """Return the bytes of the weights that one run of a graph reads, each once.

    Counted are initializers as they are stored, so that scales and packed integers count as what
    they are; tables that are only looked up do not count. Of a layer's experts those count that one
    position takes. Where prompts have weights of their own, those of a step count.
    """
    model = onnx.load(str(graph), load_external_data=False)
    nodes = [node for node in _all_nodes(model.graph) if node.op_type not in _LOOKUPS]
    read = {name for node in nodes for name in _read_whole(node)}
    taken = _experts_taken(model.graph)
    # Two names for one place in the file are one weight.
    places: dict[object, int] = {}
    for tensor in model.graph.initializer:
        if tensor.name in taken:
            places[tensor.name] = _num_bytes(tensor) * taken[tensor.name] // tensor.dims[0]
        elif tensor.name in read:
            outside = {entry.key: entry.value for entry in tensor.external_data}
            place = (outside["location"], outside.get("offset", "0")) if outside else tensor.name
            places[place] = _num_bytes(tensor)
    return sum(places.values())


def _read_whole(node: onnx.NodeProto) -> list[str]:
    """Return the inputs of which an operator reads all; of tables of angles it reads a row."""
    looked_up = _ANGLE_TABLES if node.op_type == "GroupQueryAttention" else ()
    return [name for place, name in enumerate(node.input) if place not in looked_up]


def _experts_taken(graph: onnx.GraphProto) -> dict[str, int]:
    """Return by initializer [E, ...] how many of the E one position takes.

    They are operands of one operator that knows the number, or of a `Scan` over experts, which
    compares with indices that come from a `TopK`.
    """
    nodes = list(_all_nodes(graph))
    makers = {name: node for node in nodes for name in node.output}
    sizes = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.dims == [1]}
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    found: dict[str, int] = {}
    for node in nodes:
        number = _number_taken(node, makers, sizes)
        if number is not None:
            # weights that are stored narrowly are behind a Cast
            casts = [makers[n] for n in node.input if n in makers and makers[n].op_type == "Cast"]
            names = [*node.input, *(cast.input[0] for cast in casts)]
            found.update(dict.fromkeys(weights.intersection(names), number))
    return found


def _number_taken(
    node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], sizes: dict[str, Any]
) -> int | None:
    """Return how many experts a position takes, where a node computes experts."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type in _MIXTURES:
        return int(attributes["k"].i)
    if node.op_type != "Scan":
        return None
    compared = [each for each in attributes["body"].g.node if each.op_type == "Equal"]
    maker = makers.get(compared[0].input[0]) if compared else None
    while maker is not None and maker.op_type != "TopK":
        maker = makers.get(maker.input[0]) if maker.input else None
    return int(sizes[maker.input[1]].item()) if maker is not None else None


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the bodies in it, but for one that computes prompts."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and attribute.g.name != PROMPT_BRANCH:
                yield from _all_nodes(attribute.g)


def weight_precision(graph: Path) -> str:
    """Return how a graph holds its weights: `int4`, `int8`, or the element type of the largest."""
    model = onnx.load(str(graph), load_external_data=False)
    nodes = [node for node in _all_nodes(model.graph) if node.op_type not in _LOOKUPS]
    bits = [a.i for node in nodes for a in node.attribute if a.name == "bits"]
    bits += [8 for node in nodes if node.op_type == "MatMulIntegerToFloat"]
    if bits:
        return f"int{min(bits)}"
    largest = max(model.graph.initializer, key=_num_bytes)
    return str(onnx.helper.tensor_dtype_to_np_dtype(largest.data_type))


def _num_bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    element = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return len(tensor.raw_data) or math.prod(tensor.dims) * element.itemsize


_RESET: Final = Path("/proc/self/clear_refs")
_PEAK: Final = "5"


def restart_peak() -> None:
    """Forget the peak so far, where the system can: on Linux."""
    with contextlib.suppress(OSError):
        _RESET.write_text(_PEAK)


def main() -> None:
    """Answer requests until the input ends."""
    with _answers() as answers:
        try:
            engine = open_engine(EngineKey(**json.loads(sys.argv[1])))
        except RecmasError as error:
            _say(answers, {"problems": [problem.to_json() for problem in error.problems]})
            return
        _say(
            answers,
            {
                "precision": engine.precision,
                "step_bytes": engine.step_bytes,
                "can_step": engine.can_step,
                "can_write": engine.can_write,
            },
        )
        for line in sys.stdin:
            _say(answers, _visit(engine, **json.loads(line)))


def _visit(
    engine: EngineAdapter, *, batch: int, capacity: int, used: int, steps: int
) -> dict[str, Any]:
    """Time one prompt, latent steps behind it, and as many tokens."""
    restart_peak()
    engine.prepare(batch, capacity, used)
    found: dict[str, float] = {"prefill_s": _seconds(engine.prefill)}
    if engine.can_step:
        before = engine.inside_s()
        found["step_s"] = _seconds(lambda: engine.step(steps)) / steps
        after = engine.inside_s()
        if before is not None and after is not None:
            found["outside_share"] = 1 - (after - before) / (found["step_s"] * steps)
    if engine.can_write:
        found["token_s"] = _seconds(lambda: engine.write(steps)) / steps
    return {**found, "memory_bytes": peak_resident_bytes()}


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _answers() -> TextIO:
    """Return the real stdout, and let everything that libraries print go to stderr instead."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _say(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    # The parent may have ended before the answer.
    with contextlib.suppress(BrokenPipeError):
        main()
