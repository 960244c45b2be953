"""onnxruntime-genai: a whole model for prompts and text, its body for latent steps.

The package has no latent step. So ONNX Runtime runs the body (built without embedding and head)
with its caches bound in place, which is the fastest that its graphs can do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai as genai
from peer_worker import About, Logits, PeerModel, seconds

MOST_STEPS = 64
PAST, PRESENT = "past_key_values", "present"


class Model(PeerModel):
    """A folder that the builder wrote; `every` is a graph with the logits of all positions."""

    def __init__(self, *, folder: str, body: str, every: str, threads: int) -> None:
        config = genai.Config(folder)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = genai.Model(config)
        self._tokenizer = genai.Tokenizer(self._model)
        self._threads, self._body, self._every = threads, Path(body), Path(every)
        self._sessions: dict[Path, Any] = {}
        shape = json.loads(Path(folder, "genai_config.json").read_text(encoding="utf-8"))["model"]
        self._width = shape["decoder"]["hidden_size"]
        self._heads = shape["decoder"]["num_key_value_heads"], shape["decoder"]["head_size"]
        self.about = About(
            version=f"onnxruntime-genai {genai.__version__}",
            vocabulary=shape["vocab_size"],
            settings={"onnxruntime": onnxruntime.__version__},
        )

    def prompt(self, ids: Sequence[int]) -> None:
        self._generator(len(ids) + 1).append_tokens(np.array(ids, np.int32))

    def fill(self, rows: int, ids: Sequence[int]) -> None:
        session = self._session(self._body)
        self._rows, self._used = rows, len(ids)
        self._binding = session.io_binding()
        self._caches = []
        shape = rows, self._heads[0], len(ids) + MOST_STEPS, self._heads[1]
        for value in session.get_inputs():
            if value.name.startswith(PAST):
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self._caches.append(cache)
                self._binding.bind_ortvalue_input(value.name, cache)
                present = value.name.replace(PAST, PRESENT)
                self._binding.bind_ortvalue_output(present, cache)
        draw = np.random.default_rng(0).standard_normal((1, len(ids), self._width), np.float32)
        self._last = self._run(np.repeat(draw * np.float32(0.05), rows, axis=0), 0)

    def rewind(self) -> None:
        pass  # a run is told how many positions there are

    def step(self, count: int) -> None:
        hidden = self._last
        for number in range(count):
            hidden = self._run(hidden, self._used + number)

    def drop(self) -> None:
        del self._binding, self._caches

    def write(self, ids: Sequence[int], count: int) -> float:
        generator = self._generator(len(ids) + count + 1)
        generator.append_tokens(np.array(ids, np.int32))

        def tokens() -> None:
            for _ in range(count):
                generator.generate_next_token()

        return seconds(tokens) / count

    def logits(self, ids: Sequence[int]) -> Logits:
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        session = self._session(self._every)
        for value in session.get_inputs():
            if value.name.startswith(PAST):
                feeds[value.name] = np.zeros((1, self._heads[0], 0, self._heads[1]), np.float32)
        (logits,) = session.run(["logits"], feeds)
        found: Logits = logits[0]
        return found

    def _generator(self, most: int) -> Any:
        search = genai.GeneratorParams(self._model)
        # A text that ends early would be no measure.
        search.set_search_options(max_length=most, min_length=most, do_sample=False)
        return genai.Generator(self._model, search)

    def _session(self, path: Path) -> Any:
        if path not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.add_session_config_entry("session.force_spinning_stop", "1")
            options.log_severity_level = 3
            self._sessions[path] = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[path]

    def _run(self, inputs: Any, used: int) -> Any:
        """Run positions behind the first `used`; returns the states of the last one."""
        rows, positions = inputs.shape[:2]
        self._binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(inputs))
        self._binding.bind_cpu_input("attention_mask", np.ones((rows, used + positions), np.int64))
        self._binding.bind_output("hidden_states", "cpu")
        self._session(self._body).run_with_iobinding(self._binding)
        return self._binding.get_outputs()[-1].numpy()[:, -1:]
