"""What a backbone does in training: read a batch of ragged calls, or think on from it.

Calls are padded on the left, so that they end together. That suits everything that training does: a
rollout goes on where every row ends, and what does not learn (text before the first message) comes
first, so one column splits constant from variable. Text that all rows begin with may go before the
padding: then it needs to run for one row only, but rows are not contiguous any more, so a sliding
window would count wrong, and a state would forget while there is padding.

Shape legend: N rows (agents x records), S columns, P shared or constant columns, K key/value heads,
M latent steps, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as autograd_config
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.fx.experimental import _config as shape_config
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from recmas_compiler.backbones.loaded.cache_argument import cache_argument
from recmas_compiler.backbones.loaded.own_cache import cache_of, goes_on, padding_mask, tensors_of
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.hidden_rows import hidden_by_layer, rows_hidden
from recmas_compiler.lowering.training_graph.constant_rows import ConstantRows
from recmas_compiler.lowering.training_graph.packed_products import pack_products
from recmas_compiler.lowering.training_graph.padded_rows import (
    FEWEST_CONSTANT_COLUMNS,
    Padded,
    Row,
    Rows,
    pad_rows,
)
from recmas_compiler.lowering.training_graph.row_pieces import (
    extend_pieces,
    reads_pieces,
    whole_rows,
)
from recmas_runtime.core.text import first_line
from recmas_runtime.formats.layers import has_states

P = ParamSpec("P")
R = TypeVar("R")

# Lengths are symbols in compiled code, and columns come in multiples of this many, so that code
# made for aligned lengths serves all of them.
COMPILED_COLUMNS: Final = 8

# One function is compiled anew for gradients on or off and needed or not, a constant part or none,
# one position or many, one row or many: never for another length.
MOST_VERSIONS: Final = 32

_FAILURES: Final = (
    TorchDynamoException,
    FailOnRecompileLimitHit,
    CppCompileError,
    InvalidCxxCompiler,
)

Kept = Any
"""What a call goes on from: rows as `Rows`, or a cache of pieces."""

# Batches begin with the system text of an agent; by chance some have a few words more in common.
MOST_SHARED_TEXTS: Final = 32


class CompileWarning(UserWarning):
    """Something runs eagerly although it was to be compiled."""


class Compiled(Generic[P, R]):
    """A function as one compiled graph, without graph breaks; its backward pass as another one.

    Args:
        function: Takes and gives tensors; is run as it is once compiling it has failed.
    """

    def __init__(self, function: Callable[P, R], *, name: str) -> None:
        self._function = function
        self._name = name
        # Torch's own annotations do not know these two.
        others: Any = {"recompile_limit": MOST_VERSIONS, "isolate_recompiles": True}
        self._compiled: Callable[P, R] | None = torch.compile(
            function, fullgraph=True, dynamic=True, **others
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it, compiled if that is possible."""
        if self._compiled is not None:
            try:
                # Lengths that happen to be equal, or to equal a width, are still different things.
                # Gradients are compiled with the rest, while there is still a way back.
                with (
                    shape_config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
                    autograd_config.patch(force_non_lazy_backward_lowering=True),
                ):
                    return self._compiled(*args, **kwargs)
            except _FAILURES as error:
                self._compiled = None
                cause = first_line(error)
                warnings.warn(
                    f"{self._name} runs eagerly, torch.compile cannot compile it: {cause}",
                    CompileWarning,
                    stacklevel=2,
                )
        return self._function(*args, **kwargs)


class AgentCalls:
    """The calls of one frozen backbone.

    What comes before the first message is constant: it runs without gradients, once per step, and
    the rounds share its keys and values. What all rows begin with runs for one row, and not again
    in later steps. Links get the same gradients, because neither the weights nor the inputs of
    these parts depend on them.

    Args:
        backbone: In eval mode, its weights without gradients.
        checkpoint_calls: Keep a call's inputs only and compute it again for its gradients.
        pack_weights: Before the first call, pack the backbone's weights, which are then gone.
    """

    def __init__(
        self,
        backbone: TorchBackbone,
        *,
        compile_calls: bool,
        checkpoint_calls: bool,
        pack_weights: bool = False,
    ) -> None:
        self._backbone = backbone
        self._checkpoint = checkpoint_calls
        self._pack = pack_weights
        if compile_calls and has_states(backbone.facts.layers):
            compile_calls = False
            warnings.warn(
                f"calls of {backbone.facts.source} run eagerly: the code of layers that keep a "
                "state would be compiled anew for every length",
                CompileWarning,
                stacklevel=2,
            )
        self._is_compiled = compile_calls
        self._always_mask = compile_calls
        self._multiple = COMPILED_COLUMNS if compile_calls else 1
        self._may_split = goes_on(backbone.model)
        read, extend = _bodies(backbone)
        self._eager_extend = extend
        # Whether attention finds cached rows where they were computed.
        self._in_pieces = not compile_calls and reads_pieces(backbone, extend)
        self._shared_rows = lru_cache(MOST_SHARED_TEXTS)(self._run_shared)
        source = backbone.facts.source
        self._read_columns = Compiled(read, name=f"a call of {source}") if compile_calls else read
        self._extend = Compiled(extend, name=f"a rollout of {source}") if compile_calls else extend

    def read(self, rows: Sequence[Row], constants: ConstantRows) -> list[Tensor]:
        """Return for each row the hidden states [S - P, D] of the last columns; all end together.

        Rows behind other ones run one by one: padding between the two would be counted by a window.
        """
        if any(row.front for row in rows):
            return [hidden_SD for row in rows for hidden_SD in self._read([row], constants)]
        return list(self._read(rows, constants))

    def rows_of(self, row: Row) -> Rows:
        """Return what all layers keep of a row and of what comes before it, [1, K, S, D] each."""
        padded, kept = self._begin_alone(row)
        with self._hiding([row], row.num_before + row.length):
            _, cache = self._go_on(padded.embeds_NSD, padded.mask_NS, padded.positions_NS, kept)
            return _whole(cache, padded.embeds_NSD.dtype)()

    def _read(self, rows: Sequence[Row], constants: ConstantRows) -> Tensor:
        padded, kept = self._begin(rows, constants)
        start = padded.num_constant

        def run(embeds_NRD: Tensor) -> Tensor:
            positions_NR = _columns(padded.positions_NS, start)
            if rows[0].front:
                with self._hiding(rows, rows[0].num_before + rows[0].length):
                    return self._go_on(embeds_NRD, None, positions_NR, kept)[0]
            if self._in_pieces:
                return self._go_on(embeds_NRD, padded.mask_NS, positions_NR, kept)[0]
            return self._read_columns(embeds_NRD, padded.mask_NS, positions_NR, *kept)

        return recomputed(run, _columns(padded.embeds_NSD, start), checkpointed=self._checkpoint)

    def roll_out(
        self,
        rows: Sequence[Row],
        num_steps: int,
        inner: Callable[[Tensor], Tensor],
        constants: ConstantRows,
    ) -> tuple[Tensor, Tensor]:
        """Return thoughts [N, M, D] and what they become as input embeddings [N, M, D].

        Args:
            num_steps: M, at least 1.
            inner: Maps hidden states [N, D] to input embeddings [N, D], each row its own way.
        """
        padded, kept = self._begin(rows, constants, more=num_steps - 1, reuse=True)
        start = padded.num_constant

        def run(embeds_NRD: Tensor) -> tuple[Tensor, Tensor]:
            mask_NS, positions_N1 = padded.mask_NS, padded.next_positions
            length = rows[0].num_before + rows[0].length
            extend = self._go_on if rows[0].front or self._in_pieces else self._compiled_go_on
            with self._hiding(rows, length):
                hidden_NRD, cache = extend(
                    embeds_NRD, mask_NS, _columns(padded.positions_NS, start), kept
                )
            if self._in_pieces and all(row.is_constant for row in rows):
                constants.note(
                    [row.leading_ids for row in rows],
                    _whole(cache, embeds_NRD.dtype),
                    num_columns=padded.embeds_NSD.shape[1],
                    num_shared=len(padded.shared_ids),
                )
            thoughts_ND = [hidden_NRD[:, -1].contiguous()]
            inputs_ND = [inner(thoughts_ND[0])]
            for step in range(1, num_steps):
                mask_NS = None if mask_NS is None else pad(mask_NS, (0, 1), value=1)
                with self._hiding(rows, length + step):
                    hidden_N1D, cache = extend(
                        inputs_ND[-1][:, None].to(embeds_NRD.dtype),
                        mask_NS,
                        positions_N1,
                        cache,
                    )
                thoughts_ND.append(hidden_N1D[:, 0])
                inputs_ND.append(inner(hidden_N1D[:, 0]))
                positions_N1 = positions_N1 + 1
            return torch.stack(thoughts_ND, dim=1), torch.stack(inputs_ND, dim=1)

        return recomputed(run, _columns(padded.embeds_NSD, start), checkpointed=self._checkpoint)

    @torch.no_grad()
    def write(
        self, rows: Sequence[Row], max_tokens: int, constants: ConstantRows
    ) -> list[tuple[int, ...]]:
        """Return the likeliest tokens behind each row, one by one, without the one that ends them.

        Args:
            max_tokens: Of each text, at least 1.
        """
        padded, kept = self._begin(rows, constants, more=max_tokens - 1)
        cache: Kept = kept
        mask_NS, positions_NR = padded.mask_NS, padded.positions_NS[:, padded.num_constant :]
        embeds_NRD = padded.embeds_NSD[:, padded.num_constant :]
        written: list[list[int]] = [[] for _ in rows]
        has_ended = [False] * len(rows)
        for step in range(max_tokens):
            if step:
                positions_NR = positions_NR[:, -1:] + 1
                mask_NS = None if mask_NS is None else pad(mask_NS, (0, 1), value=1)
            with self._hiding(rows, rows[0].num_before + rows[0].length + step):
                hidden_NRD, cache = self._go_on(embeds_NRD, mask_NS, positions_NR, cache)
            chosen_N = self._backbone.logits(hidden_NRD[:, -1]).float().argmax(-1)
            for row, token_id in enumerate(chosen_N.tolist()):
                has_ended[row] = has_ended[row] or token_id in self._backbone.eos_token_ids
                if not has_ended[row]:
                    written[row].append(token_id)
            if all(has_ended):
                break
            embeds_NRD = self._embed(chosen_N)[:, None]
        return [tuple(ids) for ids in written]

    @property
    def no_states(self) -> Tensor:
        """The hidden states [0, D] of no position."""
        weight = next(self._backbone.embedding.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.zeros(0, self._backbone.facts.width, device=weight.device, dtype=dtype)

    def _begin(
        self,
        rows: Sequence[Row],
        constants: ConstantRows,
        *,
        more: int = 0,
        reuse: bool = False,
    ) -> tuple[Padded, Rows]:
        """Pad rows and run their constant columns, unless an earlier round did.

        Args:
            more: Positions that come behind the rows.
            reuse: Take what other prompts have read, too. Not where a turn is read: its last bits
                are not to depend on what ran before.
        """
        if self._pack:
            pack_products(self._backbone)
            self._pack = False
        if any(row.front for row in rows):
            (row,) = rows
            return self._begin_alone(row)
        window = self._backbone.facts.sliding_window
        share_up_to = None if window is None else window - more
        if has_states(self._backbone.facts.layers):
            share_up_to = 0
        padded = pad_rows(
            rows,
            self._embed,
            multiple=self._multiple,
            always_mask=self._always_mask,
            share_up_to=share_up_to,
            may_split=self._may_split,
        )
        begin, end = len(padded.shared_ids), padded.num_constant
        kept: Rows = ()
        if begin:
            kept = tuple(
                rows_1KPD.expand(len(rows), -1, -1, -1)
                for rows_1KPD in self._shared_rows(padded.shared_ids)
            )
        if begin == end:
            return padded, kept
        key = begin, end, padded.constant_ids
        if key not in constants.columns:
            known = constants.known(padded) if reuse and self._in_pieces else None
            if known is not None:
                begin, kept = known.end, known.rows()
            if known is None or known.missing >= FEWEST_CONSTANT_COLUMNS:
                # Detached, nothing of this call has gradients: as of a call without messages.
                kept = self._constant_rows(
                    _columns(padded.embeds_NSD.detach(), begin, end),
                    None if padded.mask_NS is None else _columns(padded.mask_NS, 0, end),
                    _columns(padded.positions_NS, begin, end),
                    kept,
                )
            constants.columns[key] = kept
            if self._in_pieces and kept[0].shape[2] == end:
                num_shared = len(padded.shared_ids)
                constants.note(
                    padded.constant_ids, lambda: kept, num_columns=end, num_shared=num_shared
                )
        found = constants.columns[key]
        return padded.split_at(found[0].shape[2] if self._in_pieces else end), found

    def _go_on(
        self, embeds_NRD: Tensor, mask_NS: Tensor | None, positions_NR: Tensor, kept: Kept
    ) -> tuple[Tensor, Kept]:
        """Run positions behind kept rows; return hidden states, and what the next ones go on from.

        Args:
            kept: Rows, or what an earlier call returned; that is not to be used again.
        """
        if not self._in_pieces:
            return self._eager_extend(embeds_NRD, mask_NS, positions_NR, *kept)
        return extend_pieces(self._backbone, embeds_NRD, mask_NS, positions_NR, kept)

    def _compiled_go_on(
        self, embeds_NRD: Tensor, mask_NS: Tensor | None, positions_NR: Tensor, kept: Kept
    ) -> tuple[Tensor, Kept]:
        return self._extend(embeds_NRD, mask_NS, positions_NR, *kept)

    def _constant_rows(
        self, embeds_NRD: Tensor, mask_NS: Tensor | None, positions_NR: Tensor, kept: Rows
    ) -> Rows:
        run = self._go_on if self._in_pieces else self._compiled_go_on
        return _whole(run(embeds_NRD, mask_NS, positions_NR, kept)[1], embeds_NRD.dtype)()

    def _hiding(self, rows: Sequence[Row], num_rows: int) -> AbstractContextManager[None]:
        """Hide rows that come before from the layers that are not handed them, in one call.

        Args:
            num_rows: All rows that the call sees, its own included.
        """
        handed = rows[0].handed
        hidden = hidden_by_layer(self._backbone.facts, handed, num_rows) if handed else {}
        return rows_hidden(self._backbone.body, hidden)

    def _begin_alone(self, row: Row) -> tuple[Padded, Rows]:
        """Return a row without padding, to run behind what comes before it."""
        padded = pad_rows([row], self._embed, multiple=1, always_mask=False, may_split=False)
        return replace(padded, positions_NS=padded.positions_NS + row.num_before), row.front

    @torch.no_grad()
    def _run_shared(self, ids: tuple[int, ...]) -> Rows:
        # Eager, because it runs too seldom to be worth compiling for one row.
        embeds_1PD = self._embed(torch.tensor([ids]))
        positions_1P = torch.arange(len(ids), device=embeds_1PD.device)[None]
        return _whole(self._go_on(embeds_1PD, None, positions_1P, ())[1], embeds_1PD.dtype)()

    def _embed(self, ids: Tensor) -> Tensor:
        return self._backbone.embed(ids.to(next(self._backbone.embedding.parameters()).device))


def recomputed(run: Callable[[Tensor], R], inputs: Tensor, *, checkpointed: bool) -> R:
    """Run a function; if `checkpointed`, keep its inputs only and run again for its gradients."""
    if not checkpointed or not torch.is_grad_enabled():
        return run(inputs)
    result: R = checkpoint(run, inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def _whole(kept: Kept, dtype: torch.dtype) -> Callable[[], Rows]:
    """Return a function that gives all rows of what a call left, as they are now."""
    if isinstance(kept, tuple):
        return lambda: kept
    return whole_rows(kept, dtype)


def _columns(rows_NS: Tensor, first: int, end: int | None = None) -> Tensor:
    # A copy, because a view would be compiled as a thing of its own.
    return rows_NS[:, first:end].clone()


def _bodies(
    backbone: TorchBackbone,
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Rows]]]:
    """Return the backbone as functions of tensors: hidden states alone, and with cached rows."""
    body, layers = backbone.body, backbone.facts.layers
    name = cache_argument(body)

    def extend(
        embeds_NRD: Tensor, mask_NS: Tensor | None, positions_NR: Tensor, *kept: Tensor
    ) -> tuple[Tensor, Rows]:
        # Every row is kept, in sliding layers too: the mask does the rest.
        cache = cache_of(layers, kept)
        if mask_NS is not None:
            mask_NS = padding_mask(layers, mask_NS, embeds_NRD.shape[1])
        out = body(
            inputs_embeds=embeds_NRD,
            attention_mask=mask_NS,
            position_ids=positions_NR,
            use_cache=True,
            **{name: cache},
        )
        return out.last_hidden_state, tensors_of(cache, layers)

    def read(
        embeds_NRD: Tensor, mask_NS: Tensor | None, positions_NR: Tensor, *kept: Tensor
    ) -> Tensor:
        # Cached rows that nobody reads would get gradients of zeros in compiled code.
        return extend(embeds_NRD, mask_NS, positions_NR, *kept)[0]

    return read, extend
