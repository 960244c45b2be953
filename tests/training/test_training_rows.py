"""Ragged calls end together, keep their positions, and split where they begin to vary."""

from __future__ import annotations

import torch
from torch import Tensor

from kit.graphs import topology
from kit.models import LoadTiny
from kit.systems import declare
from kit.training import STEPS, examples, training_graph
from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls
from recmas_compiler.lowering.training_graph.constant_rows import ConstantRows
from recmas_compiler.lowering.training_graph.padded_rows import (
    FEWEST_CONSTANT_COLUMNS,
    Row,
    pad_rows,
)
from training_tolerances import TOLERANCES

LEAD = tuple(range(1, FEWEST_CONSTANT_COLUMNS + 5))


def embed(ids: Tensor) -> Tensor:
    return ids[:, None].expand(-1, 2).float()


def test_rows_end_together_and_count_from_zero() -> None:
    short = Row(pieces=((5, 6), torch.full((1, 2), 9.0), (7,)), num_wanted=1)
    long = Row(pieces=((1, 2, 3, 4, 5, 6),), num_wanted=1)
    padded = pad_rows([short, long], embed, multiple=1, always_mask=False)
    assert padded.embeds_NSD[..., 0].tolist() == [[0, 0, 5, 6, 9, 7], [1, 2, 3, 4, 5, 6]]
    assert padded.mask_NS is not None
    assert padded.mask_NS.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert padded.positions_NS.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert padded.next_positions.tolist() == [[4], [6]]
    assert pad_rows([long], embed, multiple=1, always_mask=False).mask_NS is None
    assert pad_rows([long], embed, multiple=4, always_mask=False).embeds_NSD.shape[1] == 8


def test_the_constant_part_ends_before_any_message() -> None:
    message = torch.ones(2, 2)
    one = Row(pieces=(LEAD, message, (8,)), num_wanted=1)
    other = Row(pieces=(LEAD[:-2], message, (8, 8, 8, 8)), num_wanted=1)
    padded = pad_rows([one, other], embed, multiple=1, always_mask=False)
    # The other row is longer by one and its message begins three columns earlier.
    num_columns = padded.embeds_NSD.shape[1]
    assert padded.num_constant == num_columns - 2 - 4
    assert padded.constant_ids == (LEAD[: padded.num_constant - 1], LEAD[:-2])
    assert pad_rows([one, other], embed, multiple=16, always_mask=True).num_constant % 16 == 0


def test_what_is_wanted_is_not_constant() -> None:
    row = Row(pieces=(LEAD, torch.ones(1, 2)), num_wanted=4)
    assert pad_rows([row], embed, multiple=1, always_mask=False).num_constant == len(LEAD) - 3
    alone = Row(pieces=(LEAD,), num_wanted=1)
    assert pad_rows([alone], embed, multiple=1, always_mask=False).num_constant == 0


def test_what_all_rows_begin_with_stays_before_the_padding() -> None:
    message = torch.ones(2, 2)
    one = Row(pieces=((*LEAD, 90, 91), message, (8,)), num_wanted=1)
    other = Row(pieces=((*LEAD, 92), message, (8, 8, 8, 8, 8, 8)), num_wanted=1)
    padded = pad_rows([one, other], embed, multiple=1, always_mask=False, share_up_to=99)
    assert padded.shared_ids == LEAD
    assert padded.embeds_NSD[0, :, 0].tolist() == [*LEAD, 0, 0, 0, 0, 90, 91, 1, 1, 8]
    num_columns, lead = padded.embeds_NSD.shape[1], len(LEAD)
    assert padded.mask_NS is not None
    assert padded.mask_NS[0].tolist() == [1] * lead + [0] * 4 + [1] * 5
    assert padded.positions_NS[0, lead + 4 :].tolist() == list(range(lead, lead + 5))
    # A few columns more are not worth a call of their own.
    assert padded.num_constant == lead
    assert pad_rows([one], embed, multiple=8, always_mask=False, share_up_to=99).num_constant == 16
    sliding = pad_rows(
        [one, other], embed, multiple=1, always_mask=False, share_up_to=num_columns - 1
    )
    assert sliding.shared_ids == ()


def test_what_is_wanted_is_not_shared() -> None:
    row = Row(pieces=(LEAD,), num_wanted=2)
    padded = pad_rows([row, row], embed, multiple=1, always_mask=False, share_up_to=99)
    assert padded.shared_ids == LEAD[:-2]


def test_a_rollout_leaves_the_sliding_window_as_if_nothing_were_shared(tiny: LoadTiny) -> None:
    # All prompts fit into the window, but not what is thought behind them.
    calls = AgentCalls(
        tiny("gemma3", sliding_window=48), compile_calls=False, checkpoint_calls=False
    )
    rows = [Row(pieces=((*LEAD, *range(30, 30 + n)),), num_wanted=1) for n in (1, 20)]
    together, _ = calls.roll_out(rows, 40, lambda hidden_ND: hidden_ND, ConstantRows())
    for row, found in zip(rows, together, strict=True):
        (alone,), _ = calls.roll_out([row], 40, lambda hidden_ND: hidden_ND, ConstantRows())
        assert (found - alone).abs().max() <= TOLERANCES["latent_absolute"]


def test_nothing_constant_runs_twice(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    loop = topology(
        "solver", "solver~>solver", rounds=4, steps=STEPS, backbones=[declare("tiny", backbone)]
    )
    graph = training_graph(loop, {"tiny": backbone})
    batch = graph.prepare(examples(loop))
    calls: list[tuple[int, bool]] = []

    def note(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        embeds = kwargs["inputs_embeds"]
        calls.append((len(embeds), embeds.requires_grad))

    handle = backbone.body.register_forward_pre_hook(note, with_kwargs=True)
    graph(batch).mean.backward()
    first, num = list(calls), len(batch)
    calls.clear()
    graph(batch).mean.backward()
    handle.remove()
    # Round 1 has no messages. Rounds 2 and 3 share what they begin with; the last one reads whole
    # targets, so its rows are padded otherwise.
    own = [(num, learns) for learns in (False, False, True, True, False, True)]
    assert [call for call in first if call[0] == num] == own
    # What all records begin with runs for one of them; both prompts have it in common.
    assert [call for call in first if call[0] == 1] == [(1, False)]
    assert calls == own
