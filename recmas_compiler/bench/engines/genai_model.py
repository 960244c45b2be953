"""Models that onnxruntime-genai's builder wrote, run with their caches bound in place.

Plain ONNX Runtime drives them: the package itself is needed to build such a model, not to run it.
Two kinds are known by their inputs. The body (`exclude_embeds`, `exclude_lm_head`) maps embeddings
to hidden states and so can take latent steps; a whole model maps tokens to logits and writes text.

Shape legend: R rows, S positions of a call, C cache rows, d model width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.onnx.backbone import Floats, Indices
from recmas_runtime.engines.onnx.session import make_session, onnx_runtime

MODEL: Final = "model.onnx"


class GenaiModel:
    """A model and the cache that it works in.

    Args:
        folder: What the builder wrote.
        num_kv_heads: Key/value heads of the model; its graphs do not say their width.
        head_dim: Width of a head.
        threads: Threads within an operator; None takes the physical cores.

    Attributes:
        takes_tokens: Whether it is a whole model.
    """

    def __init__(
        self, folder: Path, *, num_kv_heads: int, head_dim: int, threads: int | None
    ) -> None:
        self._session = make_session(folder / MODEL, threads=threads)
        inputs = [value.name for value in self._session.get_inputs()]
        self.takes_tokens = "input_ids" in inputs
        self._caches = [name for name in inputs if name.startswith("past")]
        self._num_kv_heads, self._head_dim = num_kv_heads, head_dim
        # The caches follow it.
        self._output = self._session.get_outputs()[0].name
        self._binding: Any = None
        self._rows: list[Any] = []

    def new_cache(self, rows: int, capacity: int) -> None:
        """Start over with a cache of `rows` sequences; past and present are one buffer."""
        self._binding = self._session.io_binding()
        self._rows = []
        for name in self._caches:
            shape = (rows, self._num_kv_heads, capacity, self._head_dim)
            zeros = np.zeros(shape, np.float32)
            value = onnx_runtime().OrtValue.ortvalue_from_numpy(zeros)
            self._rows.append((zeros, value))
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)

    def run(self, inputs: Floats | Indices, used: int) -> Floats:
        """Run positions behind the first `used`; returns hidden states or logits of the last.

        Args:
            inputs: Embeddings [R, S, d], or tokens [R, S] of a whole model.
            used: Positions in the cache that are real.
        """
        rows, positions = inputs.shape[:2]
        binding = self._binding
        binding.bind_cpu_input("input_ids" if self.takes_tokens else "inputs_embeds", inputs)
        binding.bind_cpu_input("attention_mask", np.ones((rows, used + positions), np.int64))
        binding.bind_output(self._output, "cpu")
        self._session.run_with_iobinding(binding)
        output: NDArray[Any] = binding.get_outputs()[-1].numpy()
        return np.ascontiguousarray(output[:, -1], dtype=np.float32)
