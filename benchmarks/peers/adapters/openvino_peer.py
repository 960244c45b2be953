"""OpenVINO GenAI: its pipeline for prompts and text, the pipeline's model for latent steps.

The pipeline takes tokens and gives tokens. So latent steps run on the model that it made of a GGUF
file, compiled once more with vectors as its input and the states before the head as its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from openvino import opset13
from peer_worker import About, Logits, PeerModel

MODEL = "openvino_model.xml"


class Model(PeerModel):
    """A folder that the pipeline wrote from a GGUF file.

    Without `inference_precision` OpenVINO chooses: bfloat16 where the processor has it.
    """

    def __init__(self, *, folder: str, threads: int, inference_precision: str | None) -> None:
        self._settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if inference_precision:
            self._settings["INFERENCE_PRECISION_HINT"] = inference_precision
        self._path = Path(folder) / MODEL
        self._pipeline = genai.LLMPipeline(folder, "CPU", **self._settings)
        self._requests: dict[str, Any] = {}
        model = ov.Core().read_model(self._path)
        head = _head(model)
        table = head.input_value(1).get_partial_shape()
        self._width = table[1].get_length()
        self.about = About(
            version=f"openvino-genai {genai.__version__}",
            vocabulary=table[0].get_length(),
            step_bytes=_bytes_of_constants(model) - _bytes_behind(head.input_value(1)),
            settings={"inference_precision": inference_precision or "its own choice"},
        )

    def prompt(self, ids: Sequence[int]) -> None:
        self._generate(ids, 1)

    def fill(self, rows: int, ids: Sequence[int]) -> None:
        self._rows, self._used = rows, len(ids)
        draw = np.random.default_rng(0).standard_normal((1, len(ids), self._width), np.float32)
        request = self._request("body")
        request.reset_state()
        self._last = self._run(np.repeat(draw * np.float32(0.05), rows, axis=0), 0)[:, -1:]
        self._filled = [np.array(state.state.data) for state in request.query_state()]

    def rewind(self) -> None:
        for state, value in zip(self._request("body").query_state(), self._filled, strict=True):
            state.state = ov.Tensor(value)
        # The first run behind states that were set takes them over, which is no part of a step.
        self._behind = self._run(self._last, self._used)

    def step(self, count: int) -> None:
        hidden = self._behind
        for number in range(count):
            hidden = self._run(hidden, self._used + 1 + number)

    def drop(self) -> None:
        self._request("body").reset_state()
        self._filled = []

    def write(self, ids: Sequence[int], count: int) -> float:
        # The time of a token is that behind the first one.
        metrics = self._generate(ids, count + 1).perf_metrics
        return float(metrics.get_tpot().mean) / 1e3

    def logits(self, ids: Sequence[int]) -> Logits:
        request = self._request("every")
        request.reset_state()
        found = request.infer(self._feeds(1, len(ids), 0, ids))
        logits: Logits = np.array(found[0][0], np.float32)
        return logits

    def _generate(self, ids: Sequence[int], count: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.do_sample, config.ignore_eos = False, True
        return self._pipeline.generate(ov.Tensor(np.array([ids], np.int64)), config)

    def _request(self, name: str) -> Any:
        if name not in self._requests:
            core = ov.Core()
            model = core.read_model(self._path)
            if name == "body":
                _take_vectors(model)
            compiled = core.compile_model(model, "CPU", self._settings)
            self._requests[name] = compiled.create_infer_request()
        return self._requests[name]

    def _run(self, inputs: Any, used: int) -> Any:
        rows, positions = inputs.shape[:2]
        feeds = self._feeds(rows, positions, used, np.zeros(positions, np.int64))
        found = self._request("body").infer({**feeds, "inputs_embeds": inputs})
        return np.array(found[0])

    @staticmethod
    def _feeds(rows: int, positions: int, used: int, ids: Any) -> dict[str, Any]:
        return {
            "input_ids": np.tile(np.asarray(ids, np.int64), (rows, 1)),
            "attention_mask": np.ones((rows, used + positions), np.int64),
            "position_ids": np.tile(np.arange(used, used + positions, dtype=np.int64), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }


def _head(model: Any) -> Any:
    """Return the product that makes logits."""
    (node,) = (result.input_value(0).get_node() for result in model.get_results())
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return node


def _take_vectors(model: Any) -> None:
    """Give a model vectors as an input and the states before the head as its output."""
    head = _head(model)
    width = head.input_value(1).get_partial_shape()[1].get_length()
    (lookup,) = (
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Gather"
        and node.output(0).get_partial_shape().rank.get_length() == 3
        and node.output(0).get_partial_shape()[2] == ov.Dimension(width)
    )
    vectors = opset13.parameter([-1, -1, width], np.float32, name="inputs_embeds")
    vectors.output(0).set_names({"inputs_embeds"})
    for target in lookup.output(0).get_target_inputs():
        target.replace_source_output(vectors.output(0))
    (logits,) = model.get_results()
    states = opset13.result(head.input_value(0))
    model.remove_result(logits)
    model.add_results([states])
    model.add_parameters([vectors])
    model.validate_nodes_and_infer_types()


def _bytes_of_constants(model: Any) -> int:
    constants = (n for n in model.get_ordered_ops() if n.get_type_name() == "Constant")
    return sum(int(constant.get_byte_size()) for constant in constants)


def _bytes_behind(output: Any) -> int:
    """Return the bytes of the constants that a weight is made of."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return int(node.get_byte_size())
    return sum(_bytes_behind(value) for value in node.input_values())
