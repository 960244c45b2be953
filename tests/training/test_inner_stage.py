"""The inner stage: hidden states on disk and off, its loss, and what it is compared with."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from kit.models import LoadTiny
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.links.modules import make_link, randomize
from recmas_compiler.training.data.hidden_state_cache import (
    HiddenStates,
    TargetCall,
    cached_hidden_states,
)
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.tasks import inner
from recmas_compiler.training.tasks.inner import (
    InnerTask,
    calibration_of,
    can_align,
    inner_baselines,
    mean_cosine,
)
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
MIB = 2**20


def calls(number: int, *, seed: int = 0) -> list[TargetCall]:
    """Return calls of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(number):
        prompt, target = 5 + (7 * i) % 13, 3 + (5 * i) % 11
        ids = torch.randint(3, 250, (prompt + target,), generator=draw).tolist()
        found.append(TargetCall(ids=tuple(ids), num_target_tokens=target))
    return found


def plain_pairs(backbone: TorchBackbone, call: TargetCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight from the definition: one call, no padding, position before each target token."""
    with torch.no_grad():
        ids = torch.tensor([call.ids])
        hidden = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    first = len(call.ids) - call.num_target_tokens
    return hidden[first - 1 : -1], torch.tensor(call.ids[first:])


def stored(backbone: TorchBackbone, some: list[TargetCall], folder: Path, mib: int) -> HiddenStates:
    return cached_hidden_states(
        backbone, some, folder=folder, max_bytes=mib * MIB, world=ALONE, progress=Silent()
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_they_are_the_states_before_each_target_token(
    tiny: LoadTiny, tmp_path: Path, family: str
) -> None:
    backbone, some = tiny(family), calls(9)
    kinds = (stored(backbone, some, tmp_path, 64), stored(backbone, some, tmp_path, 0))
    assert [states.is_stored for states in kinds] == [True, False]
    for states in kinds:
        assert len(states) == 9
        hidden, ids = states.pairs([4, 1, 8])
        plain = [plain_pairs(backbone, some[place]) for place in (4, 1, 8)]
        assert torch.allclose(hidden, torch.cat([h for h, _ in plain]), atol=1e-5, rtol=1e-4)
        assert torch.equal(ids, torch.cat([i for _, i in plain]))


def test_what_does_not_fit_is_halved_and_then_not_kept(tiny: LoadTiny, tmp_path: Path) -> None:
    backbone, some = tiny("llama"), calls(9)
    values = sum(call.num_target_tokens for call in some) * backbone.facts.width

    def kept(max_bytes: int) -> list[str]:
        folder = tmp_path / str(max_bytes)
        cached_hidden_states(
            backbone, some, folder=folder, max_bytes=max_bytes, world=ALONE, progress=Silent()
        )
        return [path.suffix for path in folder.glob("*")]

    assert kept(values * 4) == [".float32"]
    assert kept(values * 4 - 1) == [".float16"]
    assert kept(values * 2 - 1) == []


def test_a_file_of_the_same_calls_is_used_again(tiny: LoadTiny, tmp_path: Path) -> None:
    backbone, some = tiny("llama"), calls(5)
    stored(backbone, some, tmp_path, 64)
    (path,) = tmp_path.glob("*")
    written, content = path.stat().st_mtime_ns, path.read_bytes()
    stored(backbone, some, tmp_path, 64)
    assert path.stat().st_mtime_ns == written, "it was computed again"
    stored(backbone, calls(5, seed=1), tmp_path, 64)
    assert len(list(tmp_path.glob("*"))) == 2
    for damage in (content[:-4], content + b"more", bytes(len(content)), b"?" + content[1:], b""):
        path.write_bytes(damage)
        stored(backbone, some, tmp_path, 64)
        assert path.read_bytes() == content


def test_a_full_disk(tiny: LoadTiny, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RecmasError, match="cannot write") as refused:
            stored(tiny("llama"), calls(40), tmp_path, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.problems[0].code == "RM303"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mse_weight", [0.0, 0.5])
def test_the_loss_is_its_formula(tiny: LoadTiny, mse_weight: float) -> None:
    backbone, some = tiny("qwen2"), calls(4)
    link = make_link("projected", "inner", 64, 64)
    task = InnerTask(
        "a",
        link,
        train=HiddenStates(backbone=backbone, calls=some),
        held_out=HiddenStates(backbone=backbone, calls=[]),
        mse_weight=mse_weight,
    )
    expected, tokens = 0.0, 0
    for call in (some[2], some[0]):
        hidden, ids = plain_pairs(backbone, call)
        for h, i in zip(hidden, ids, strict=True):
            wanted, answer = backbone.embed(i), link(h)
            expected += (1 - cosine_similarity(answer, wanted, dim=0)).item()
            expected += mse_weight * (answer - wanted).square().mean().item()
            tokens += 1
    found = task.loss([2, 0])
    assert found.total.item() == pytest.approx(expected, rel=1e-4)
    assert found.tokens == tokens
    found.total.backward()
    assert all(weight.grad is not None for weight in link.parameters())
    assert backbone.embedding.weight.grad is None
    assert task.measure(ALONE) == {}


def test_parts_count_from_their_first_call(tiny: LoadTiny, tmp_path: Path) -> None:
    backbone, some = tiny("llama"), calls(6)
    for whole in (stored(backbone, some, tmp_path, 64), stored(backbone, some, tmp_path, 0)):
        part = whole.part(2, 3)
        assert len(part) == 3
        assert part.is_stored == whole.is_stored
        for found, wanted in zip(part.pairs([1, 2]), whole.pairs([3, 4]), strict=True):
            assert torch.equal(found, wanted)
        assert len(whole.part(6, 0)) == 0


def test_measuring_is_a_mean_over_tokens(tiny: LoadTiny) -> None:
    backbone, some = tiny("llama"), calls(40)
    link = make_link("residual", "inner", 64, 64)
    randomize(link, link_id="x")
    cosines = []
    for call in some:
        hidden, ids = plain_pairs(backbone, call)
        cosines += cosine_similarity(link(hidden), backbone.embed(ids), dim=-1).tolist()
    found = mean_cosine(link, HiddenStates(backbone=backbone, calls=some), ALONE)
    assert found == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_what_costs_no_training(tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "FEWEST_ALIGNED_PAIRS", 100)
    backbone = tiny("llama")
    train = HiddenStates(backbone=backbone, calls=calls(60))
    held_out = HiddenStates(backbone=backbone, calls=calls(10, seed=1))
    figures = inner_baselines(
        "a", "projected", train=train, held_out=held_out, aligned=None, world=ALONE
    )
    assert figures.keys() == {"random", "aligned", "constant", "expectation"}
    assert abs(figures["random"]) < 0.1
    # Tokens are drawn at random here: nothing can be known of them but their mean.
    mean = calibration_of(train).next_ND.mean(0)
    constant = [
        cosine_similarity(mean, backbone.embed(torch.tensor(i)), dim=0).item()
        for call in calls(10, seed=1)
        for i in call.target_ids
    ]
    assert figures["constant"] == pytest.approx(sum(constant) / len(constant), abs=1e-5)


def test_too_few_pairs_align_nothing(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    calibration = calibration_of(HiddenStates(backbone=backbone, calls=calls(20)))
    assert not can_align(calibration)


def test_states_on_disk_give_more_pairs_to_align_to(
    tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner, "NUM_COMPUTED_PAIRS", 100)
    backbone, some = tiny("llama"), calls(200)
    num_pairs = sum(call.num_target_tokens for call in some)
    computed = calibration_of(HiddenStates(backbone=backbone, calls=some))
    kept = calibration_of(stored(backbone, some, tmp_path, 8))
    assert 100 <= len(computed.token_N) < num_pairs == len(kept.token_N)
    torch.testing.assert_close(
        kept.hidden_ND[: len(computed.token_N)], computed.hidden_ND, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(backbone.embed(kept.token_N), kept.next_ND)
