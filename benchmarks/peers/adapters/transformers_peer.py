"""transformers, eager: the weights of a GGUF file as a folder in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from peer_worker import About, Logits, PeerModel, seconds
from transformers import AutoModelForCausalLM, AutoTokenizer


class Model(PeerModel):
    """A model as `from_pretrained` gives it."""

    def __init__(self, *, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        where: dict[str, Any] = {"local_files_only": True}
        self._tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        self._model.eval()
        weights = sum(each.nbytes for each in self._model.model.parameters())
        table = self._model.get_input_embeddings().weight
        self.about = About(
            version=f"transformers {transformers.__version__}",
            vocabulary=len(table),
            step_bytes=weights - table.nbytes,
            settings={"torch": torch.__version__},
        )

    def prompt(self, ids: Sequence[int]) -> None:
        self._model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)

    def fill(self, rows: int, ids: Sequence[int]) -> None:
        self._used = len(ids)
        found = self._model.model(torch.tensor([list(ids)] * rows), use_cache=True)
        self._rows, self._last = found.past_key_values, found.last_hidden_state[:, -1:]

    def rewind(self) -> None:
        behind = self._rows.get_seq_length() - self._used
        if behind:
            self._rows.crop(-behind)

    def step(self, count: int) -> None:
        hidden = self._last
        for _ in range(count):
            hidden = self._model.model(
                inputs_embeds=hidden, past_key_values=self._rows, use_cache=True
            ).last_hidden_state

    def drop(self) -> None:
        del self._rows

    def write(self, ids: Sequence[int], count: int) -> float:
        def write(tokens: int) -> float:
            prompt = torch.tensor([list(ids)])
            given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
            mask = torch.ones_like(prompt)
            return seconds(lambda: self._model.generate(prompt, attention_mask=mask, **given))

        # Of the tokens behind the first one.
        return (write(count + 1) - write(1)) / count

    def logits(self, ids: Sequence[int]) -> Logits:
        return np.asarray(self._model(torch.tensor([list(ids)])).logits[0].numpy(), np.float32)
