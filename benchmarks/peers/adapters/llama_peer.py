"""llama.cpp, by its C interface: a GGUF file.

Its graph ends in the head whether anybody wants logits or not. Rows are sequences of one batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from peer_worker import About, Logits, PeerModel, seconds

MOST_STEPS = 64
CONTEXT = 1024
# A state as it is would be far larger than any embedding.
STATE_SCALE = np.float32(0.02)


@llama.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    """Drop what llama.cpp has to say."""


class Model(PeerModel):
    """An open file, with one context for tokens and another for vectors."""

    def __init__(self, *, gguf: str, threads: int) -> None:
        llama.llama_log_set(silent, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self._threads = threads
        self._model = llama.llama_model_load_from_file(
            gguf.encode(), llama.llama_model_default_params()
        )
        assert self._model, f"{gguf} cannot be loaded"
        vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._width = llama.llama_model_n_embd(self._model)
        self._tokens = self._context(rows=1, capacity=CONTEXT, states=False)
        self._states: Any = None
        self.about = About(
            version=f"llama-cpp-python {llama.__version__}",
            vocabulary=vocabulary,
            step_bytes=llama.llama_model_size(self._model),
            head_in_step=True,
        )

    def prompt(self, ids: Sequence[int]) -> None:
        self._clear()
        self._read(ids, 0)
        llama.llama_get_logits_ith(self._tokens, -1)

    def fill(self, rows: int, ids: Sequence[int]) -> None:
        self._rows, self._used = rows, len(ids)
        self._states = self._context(rows=rows, capacity=len(ids) + MOST_STEPS, states=True)
        drawn = np.random.default_rng(0).standard_normal((len(ids), self._width), np.float32)
        self._decode_states(drawn * np.float32(0.05), [(0, at) for at in range(len(ids))])
        memory = llama.llama_get_memory(self._states)
        for row in range(1, rows):
            llama.llama_memory_seq_cp(memory, 0, row, 0, -1)

    def rewind(self) -> None:
        memory = llama.llama_get_memory(self._states)
        for row in range(self._rows):
            llama.llama_memory_seq_rm(memory, row, self._used, -1)

    def step(self, count: int) -> None:
        states = np.full((self._rows, self._width), 0.01, np.float32)
        for number in range(count):
            places = [(row, self._used + number) for row in range(self._rows)]
            self._decode_states(states, places)
            for row in range(self._rows):
                found = llama.llama_get_embeddings_ith(self._states, row)
                states[row] = np.ctypeslib.as_array(found, (self._width,)) * STATE_SCALE

    def drop(self) -> None:
        llama.llama_free(self._states)
        self._states = None

    def write(self, ids: Sequence[int], count: int) -> float:
        self._clear()
        self._read(ids, 0)
        greedy = llama.llama_sampler_init_greedy()

        def tokens() -> None:
            for position in range(len(ids), len(ids) + count):
                token = llama.llama_sampler_sample(greedy, self._tokens, -1)
                self._read([token], position)

        taken = seconds(tokens) / count
        llama.llama_sampler_free(greedy)
        return taken

    def logits(self, ids: Sequence[int]) -> Logits:
        self._clear()
        self._read(ids, 0, all_logits=True)
        found = llama.llama_get_logits(self._tokens)
        return np.ctypeslib.as_array(found, (len(ids), self.about.vocabulary)).copy()

    def _context(self, *, rows: int, capacity: int, states: bool) -> Any:
        settings = llama.llama_context_default_params()
        # The context is divided among the rows.
        settings.n_ctx = -(-capacity // 256) * 256 * rows
        settings.n_batch, settings.n_seq_max = CONTEXT, rows
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.embeddings = states
        if states:
            settings.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        context = llama.llama_init_from_model(self._model, settings)
        assert context, f"no context of {settings.n_ctx} positions"
        return context

    def _clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._tokens), True)

    def _read(self, ids: Sequence[int], start: int, *, all_logits: bool = False) -> None:
        batch = llama.llama_batch_init(len(ids), 0, 1)
        for place, token in enumerate(ids):
            batch.token[place] = token
            self._place(batch, place, 0, start + place, all_logits or place == len(ids) - 1)
        self._decode(self._tokens, batch, len(ids))

    def _decode_states(self, states: Any, places: Sequence[tuple[int, int]]) -> None:
        batch = llama.llama_batch_init(len(places), self._width, 1)
        values = np.ascontiguousarray(states, np.float32)
        ctypes.memmove(batch.embd, values.ctypes.data, values.nbytes)
        for place, (row, position) in enumerate(places):
            is_last = place + 1 == len(places) or places[place + 1][0] != row
            self._place(batch, place, row, position, is_last)
        self._decode(self._states, batch, len(places))

    @staticmethod
    def _place(batch: Any, place: int, row: int, position: int, wanted: bool) -> None:
        batch.pos[place], batch.n_seq_id[place] = position, 1
        batch.seq_id[place][0], batch.logits[place] = row, wanted

    @staticmethod
    def _decode(context: Any, batch: Any, count: int) -> None:
        batch.n_tokens = count
        status = llama.llama_decode(context, batch)
        llama.llama_synchronize(context)
        llama.llama_batch_free(batch)
        assert status == 0, f"llama_decode returned {status}"
