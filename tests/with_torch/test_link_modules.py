"""Links compute the formulas of the design, and those of independently written code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recmas_compiler.links.files import End, LinkWeights
from recmas_compiler.links.modules import (
    load_declared_link,
    load_link,
    make_link,
    randomize,
    save_link,
)
from recmas_compiler.spec.document.places import UNKNOWN, SourcePosition
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.link_kinds import FORMS

KINDS = sorted(FORMS)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale + bias


def made(kind: str, role: str, in_dim: int = 6, out_dim: int = 6, link_id: str = "x") -> nn.Module:
    link = make_link(kind, role, in_dim, out_dim)
    randomize(link, link_id=link_id)
    with torch.no_grad():
        for name, parameter in link.named_parameters():
            if "ln" in name or "rms" in name:  # norms that do nothing would hide mistakes
                parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    return link


@pytest.mark.parametrize(("kind", "role"), KINDS)
def test_numbers_are_those_of_the_formula(kind: str, role: str) -> None:
    out_dim = 6 if role == "inner" else 4
    link = made(kind, role, out_dim=out_dim)
    w = dict(link.state_dict())
    h = torch.randn(2, 3, 6)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1))

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])

    before, after = ("pre_ln", "post_ln") if role == "inner" else ("ln_source", "ln_target")
    x = h if kind in ("residual", "biased_residual", "rescaled") else norm(before, h)
    update = linear("proj2", gelu(linear("proj1", x)))
    is_plain = role == "inner" and kind not in ("projected", "rescaled")
    expected = (h if is_plain else linear("residual_proj", h)) + update
    if kind == "ln_residual":
        expected = norm(after, expected)
    if kind == "rescaled":
        scale = w["post_rms.weight" if role == "inner" else "rms_target.weight"]
        expected = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale
    torch.testing.assert_close(link(h), expected)


@pytest.mark.parametrize(
    ("kind", "role", "names"),
    [
        ("residual", "inner", "proj1.weight proj2.weight"),
        ("residual", "outer", "proj1.weight proj2.weight residual_proj.weight"),
        ("biased_residual", "inner", "proj1.bias proj1.weight proj2.bias proj2.weight"),
        (
            "biased_residual",
            "outer",
            "proj1.bias proj1.weight proj2.bias proj2.weight"
            " residual_proj.bias residual_proj.weight",
        ),
        (
            "ln_residual",
            "outer",
            "ln_source.bias ln_source.weight ln_target.bias ln_target.weight proj1.bias"
            " proj1.weight proj2.bias proj2.weight residual_proj.bias residual_proj.weight",
        ),
        (
            "ln_residual",
            "inner",
            "post_ln.bias post_ln.weight pre_ln.bias pre_ln.weight"
            " proj1.bias proj1.weight proj2.bias proj2.weight",
        ),
    ],
)
def test_parameters_have_the_released_names(kind: str, role: str, names: str) -> None:
    assert sorted(make_link(kind, role, 4, 4).state_dict()) == names.split()


@pytest.mark.parametrize(
    ("kind", "role", "hidden"),
    [
        ("residual", "outer", 4),
        ("ln_residual", "outer", 8),
        ("projected", "outer", 4),
        ("ln_residual", "inner", 6),
    ],
)
def test_hidden_widths(kind: str, role: str, hidden: int) -> None:
    link = make_link(kind, role, 6, 4 if role == "outer" else 6)
    assert link.proj1.out_features == link.proj2.in_features == hidden


class _ReleasedInner(nn.Module):
    """The inner adapter as the released project describes it, written down anew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_ln = nn.LayerNorm(width)
        self.proj1 = nn.Linear(width, width)
        self.act = nn.GELU()
        self.proj2 = nn.Linear(width, width)
        self.post_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.proj2(self.act(self.proj1(self.pre_ln(x))))
        return self.post_ln(residual + x)


class _ReleasedOuter(nn.Module):
    """The cross-model adapter likewise."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.ln_source = nn.LayerNorm(source)
        self.proj1 = nn.Linear(source, 2 * target)
        self.act = nn.GELU()
        self.proj2 = nn.Linear(2 * target, target)
        self.residual_proj = nn.Linear(source, target)
        self.ln_target = nn.LayerNorm(target)

    def forward(self, x: Tensor) -> Tensor:
        update = self.proj2(self.act(self.proj1(self.ln_source(x))))
        return self.ln_target(self.residual_proj(x) + update)


@pytest.mark.parametrize(
    ("foreign", "widths"), [(_ReleasedInner(48), (48, 48)), (_ReleasedOuter(48, 32), (48, 32))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_others_give_their_numbers(
    tmp_path: Path, foreign: nn.Module, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file({k: v.to(dtype).contiguous() for k, v in foreign.state_dict().items()}, path)
    foreign.load_state_dict({k: v.to(dtype).float() for k, v in foreign.state_dict().items()})
    role = "inner" if isinstance(foreign, _ReleasedInner) else "outer"
    link = load_declared_link(
        declared("ln_residual", path, *widths),
        role,
        source=End(widths[0], "a"),
        target=End(widths[1], "b"),
        where=UNKNOWN,
    )
    x = torch.randn(3, 5, widths[0])
    torch.testing.assert_close(link(x), foreign(x))
    torch.testing.assert_close(load_link(path, "ln_residual", role, *widths)(x), foreign(x))


def declared(kind: str, path: Path, in_dim: int = 6, out_dim: int = 6) -> LinkWeights:
    return LinkWeights(kind=kind, init="aligned", file=str(path), in_dim=in_dim, out_dim=out_dim)


@pytest.mark.parametrize(("kind", "role"), KINDS)
def test_round_trip(tmp_path: Path, kind: str, role: str) -> None:
    path = tmp_path / "link.safetensors"
    link = made(kind, role)
    save_link(path, link, source="hf:a/b@1", target="hf:c/d@2")
    for loaded in (
        load_link(path, kind, role, 6, 6),
        load_declared_link(
            declared(kind, path),
            role,
            source=End(6, "hf:a/b@1"),
            target=End(6, "hf:c/d@2"),
            where=UNKNOWN,
        ),
    ):
        assert type(loaded) is type(link)
        for name, tensor in link.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_link_of_an_older_recmas_names_a_folder_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "link.safetensors"
    save_link(path, made("projected", "inner"), source="/models/a", target="/models/a")
    here = End(6, "folder:ab12", "/models/a")
    weights = declared("projected", path)
    load_declared_link(weights, "inner", source=here, target=here, where=UNKNOWN)
    moved = here._replace(folder="/other/a")
    with pytest.raises(RecmasError, match="put the folder back there"):
        load_declared_link(weights, "inner", source=moved, target=moved, where=UNKNOWN)


def test_equal_links_are_equal_files(tmp_path: Path) -> None:
    link = made("projected", "outer")
    for name in map(str, range(8)):  # the library's own order changes with every write
        save_link(tmp_path / name, link, source="a", target="b")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def refusal(path: Path, kind: str = "projected", role: str = "inner", **widths: int) -> str:
    where = SourcePosition(file="spec.yaml", line=7, column=3)
    weights = declared(kind, path, **widths)
    source, target = End(weights.in_dim, "here"), End(weights.out_dim, "here")
    with pytest.raises(RecmasError) as caught:
        load_declared_link(weights, role, source=source, target=target, where=where)
    assert caught.value.problems[0].code == "RM120"
    text = str(caught.value)
    assert text.startswith("spec.yaml:7:3: error[RM120]: link file ")
    assert str(path) in text
    return text


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "link.safetensors"
    assert "no such file" in refusal(path)
    path.write_bytes(b"what")
    assert "not a safetensors file" in refusal(path)
    link = made("projected", "inner")
    save_link(path, link)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "cut off" in refusal(path)
    path.write_bytes(whole)
    assert "of kind `projected`, not `residual`" in refusal(path, kind="residual")
    assert "in_dim is 6, but 5 is needed" in refusal(path, in_dim=5, out_dim=5)
    assert "`ln_source.weight`" in refusal(path, role="outer")
    save_link(path, link, source="there")
    assert "made for the source `there`, but this is `here`" in refusal(path)
    save_link(path, link, source="here", target="there")
    assert "made for the target `there`" in refusal(path)

    tensors = load_file_of(tmp_path, link)
    save_file({**tensors, "more": torch.zeros(1)}, path)
    assert "`more`" in refusal(path)
    save_file({k: v for k, v in tensors.items() if k != "proj2.bias"}, path)
    assert "`proj2.bias`" in refusal(path)
    save_file({**tensors, "proj2.bias": torch.full((6,), math.nan)}, path)
    assert "`proj2.bias` holds NaN or infinity" in refusal(path)
    save_file({**tensors, "proj2.bias": torch.zeros(6, dtype=torch.int32)}, path)
    assert "floating-point" in refusal(path)


def load_file_of(folder: Path, link: nn.Module) -> dict[str, Tensor]:
    save_link(folder / "whole.safetensors", link)
    return load_file(folder / "whole.safetensors")


@pytest.mark.parametrize("tensors", [{}, {"proj1.weight": torch.zeros(3)}])
def test_files_without_a_link_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    assert "has no tensor" in refusal(tmp_path / "x.safetensors", kind="residual")


def test_random_start_depends_on_the_link_alone() -> None:
    torch.manual_seed(1)
    first = made("projected", "outer", link_id="a->b").state_dict()
    torch.manual_seed(2)
    again = made("projected", "outer", link_id="a->b").state_dict()
    other = made("projected", "outer", link_id="b->a").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["proj1.weight"], other["proj1.weight"])
