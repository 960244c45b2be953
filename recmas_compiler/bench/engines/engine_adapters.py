"""What can take a latent step, in one form: prompt, steps and tokens over some backbone.

Shape legend: R rows, S positions, d model width.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from recmas_compiler.bench.engines.genai_model import MODEL, GenaiModel
from recmas_compiler.bench.engines.step_weights import weight_bytes, weight_precision
from recmas_runtime.engines.onnx.backbone import BackboneEngine, Floats, Indices, LinkEngine
from recmas_runtime.engines.onnx.session import resolve_device
from recmas_runtime.formats.bundle import Bundle, open_bundle
from recmas_runtime.formats.links import Operands, load_operands, stack_operands
from recmas_runtime.formats.manifest import BackboneEntry

ENGINES: Final = ("onnx", "torch", "huggingface", "naive", "genai")
# Their caches grow with what is used: the capacity of a cell means nothing to them.
WITHOUT_CAPACITY: Final = frozenset({"huggingface", "naive"})


@dataclass(frozen=True, kw_only=True)
class FormKey:
    """Which form to open.

    Attributes:
        engine: One of `ENGINES`.
        bundle: Folder of the bundle; links, tables and dimensions come from there.
        backbone: Name in its manifest.
        genai: Folder of the model, for `genai`.
        device: `cpu` or `cuda`.
        threads: Threads within an operator.
    """

    engine: str
    bundle: str
    backbone: str
    genai: str | None
    device: str
    threads: int


class Form(Protocol):
    """One engine, ready to be timed.

    Attributes:
        precision: How it holds its weights.
        step_bytes: Bytes of the weights that a step reads.
        can_step: Whether it takes latent steps.
        can_write: Whether it writes tokens.
    """

    precision: str
    step_bytes: int
    can_step: bool
    can_write: bool

    def prepare(self, batch: int, capacity: int, used: int) -> None:
        """Take a new cache and a prompt of `used` positions, the same in every form."""

    def prefill(self) -> None:
        """Run the prompt."""

    def step(self, count: int) -> None:
        """Take latent steps behind the prompt."""

    def write(self, count: int) -> None:
        """Write tokens behind the prompt, the likeliest each time."""

    def inside_s(self) -> float:
        """Return the seconds spent in the engine's own calls; NaN where nobody counts them."""


class EngineForm:
    """Anything with the methods of the runtime's `BackboneEngine`.

    Args:
        engine: The engine.
        inner: Operands of one inner link.
        precision: How it holds its weights.
        step_bytes: Bytes of the weights that a step reads.
    """

    can_step = can_write = True

    def __init__(self, engine: Any, *, inner: Operands, precision: str, step_bytes: int) -> None:
        self.precision, self.step_bytes = precision, step_bytes
        self._engine, self._inner = engine, inner
        self._cache: Any = None

    def prepare(self, batch: int, capacity: int, used: int) -> None:
        """Take a new cache and a prompt."""
        if self._cache is not None:
            self._engine.give_back(self._cache)
        self._cache = self._engine.new_cache(batch, capacity)
        self._embeds = self._engine.embed(prompt(batch, used, self._engine.entry.vocab_size))
        self._used = np.full(batch, used, np.int64)

    def prefill(self) -> None:
        """Run the prompt."""
        zero = np.zeros_like(self._used)
        _, self._thought, self._following = self._engine.forward(
            self._cache, self._embeds, zero, self._used - 1, self._inner
        )

    def step(self, count: int) -> None:
        """Take latent steps."""
        # The first thought is the prompt's own: one call less than thoughts.
        self._engine.rollout(
            self._cache, self._thought, self._following, self._used, self._inner, count + 1
        )

    def write(self, count: int) -> None:
        """Write tokens."""
        zero, thought = np.zeros_like(self._used), self._thought
        for position in range(count):
            logits = self._engine.logits(np.ascontiguousarray(thought[:, 0]))
            embeds = self._engine.embed(logits.argmax(-1)[:, None])
            _, thought, _ = self._engine.forward(
                self._cache, embeds, self._used + position, zero, self._inner
            )

    def inside_s(self) -> float:
        """Return NaN: nobody counts."""
        return math.nan


class OnnxForm(EngineForm):
    """A bundle's own engine; tells apart what ONNX Runtime takes and what Python adds."""

    def __init__(self, engine: BackboneEngine, **about: Any) -> None:
        super().__init__(engine, **about)
        self._clock = _Clock(engine.decoder)

    def prepare(self, batch: int, capacity: int, used: int) -> None:
        """Take a new cache and a prompt."""
        super().prepare(batch, capacity, used)
        self._cache.session = self._clock

    def inside_s(self) -> float:
        """Return the seconds spent in ONNX Runtime's calls."""
        return self._clock.seconds


class _Clock:
    """A session that adds up the time of its runs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds = 0.0

    def run_with_iobinding(self, *arguments: Any) -> None:
        """Run the session."""
        start = time.perf_counter()
        self._session.run_with_iobinding(*arguments)
        self.seconds += time.perf_counter() - start


class GenaiForm:
    """A model of onnxruntime-genai's builder.

    Args:
        folder: The model's folder.
        entry: The same backbone in a bundle.
        link: Applies the inner link behind a body, which has none of its own.
        inner: Its operands.
        threads: Threads within an operator.
    """

    def __init__(
        self, folder: Path, *, entry: BackboneEntry, link: LinkEngine, inner: Operands, threads: int
    ) -> None:
        self._model = GenaiModel(
            folder, num_kv_heads=entry.num_kv_heads, head_dim=entry.head_dim, threads=threads
        )
        self.can_write = self._model.takes_tokens
        self.can_step = not self.can_write
        self.precision = weight_precision(folder / MODEL)
        self.step_bytes = weight_bytes(folder / MODEL)
        self._link, self._inner = link, inner
        self._entry = entry

    def prepare(self, batch: int, capacity: int, used: int) -> None:
        """Take a new cache and a prompt."""
        self._used = used
        self._model.new_cache(batch, capacity)
        self._prompt: Floats | Indices = prompt(batch, used, self._entry.vocab_size)
        if self.can_step:
            draw = np.random.default_rng(0)
            shape = (batch, used, self._entry.width)
            self._prompt = draw.standard_normal(shape, np.float32) / np.float32(8)

    def prefill(self) -> None:
        """Run the prompt."""
        self._last = self._model.run(self._prompt, 0)

    def step(self, count: int) -> None:
        """Take latent steps."""
        thought = self._last
        for position in range(count):
            following = self._link.apply(thought[None], self._inner)[0]
            thought = self._model.run(following[:, None], self._used + position)

    def write(self, count: int) -> None:
        """Write tokens."""
        logits = self._last
        for position in range(count):
            logits = self._model.run(logits.argmax(-1)[:, None], self._used + position)

    def inside_s(self) -> float:
        """Return NaN: nobody counts."""
        return math.nan


def prompt(batch: int, positions: int, vocab_size: int) -> Indices:
    """Return tokens [R, S] drawn from a fixed seed."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, positions))


def open_form(key: FormKey) -> Form:
    """Open what a key names.

    Raises:
        RecmasError: As loading a bundle, a backbone or a graph does.
    """
    bundle = open_bundle(key.bundle)
    entry = bundle.manifest.backbones[key.backbone]
    inner = _inner_link(bundle, key.backbone)
    inner_bytes = sum(operand.nbytes for operand in inner.values())
    if key.engine == "genai":
        assert key.genai is not None, "genai needs a model"
        link = LinkEngine(bundle.file(bundle.manifest.link_engine), threads=key.threads)
        return GenaiForm(Path(key.genai), entry=entry, link=link, inner=inner, threads=key.threads)
    if key.engine == "onnx":
        engine = BackboneEngine(
            entry, bundle.root, threads=key.threads, device=resolve_device(key.device)
        )
        return OnnxForm(
            engine,
            inner=inner,
            precision=entry.precision,
            step_bytes=weight_bytes(bundle.file(entry.decoder)) + inner_bytes,
        )
    from recmas_compiler.bench.engines.torch_system import open_torch_engine

    torch_engine, precision, body_bytes = open_torch_engine(
        bundle.root, key.backbone, kind=key.engine, device=key.device, threads=key.threads
    )
    return EngineForm(
        torch_engine, inner=inner, precision=precision, step_bytes=body_bytes + inner_bytes
    )


def _inner_link(bundle: Bundle, backbone: str) -> Operands:
    """Return the operands of the first inner link on a backbone, as one group."""
    name = next(a.inner for a in bundle.plan.agents.values() if a.backbone == backbone)
    entry = bundle.manifest.links[name]
    return stack_operands([load_operands(bundle.file(entry.file), entry)])
