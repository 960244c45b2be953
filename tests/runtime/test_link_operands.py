from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from kit.hand_bundle import write_link
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.link_kinds import FORMS
from recmas_runtime.formats.links import expected_tensors, load_operands, stack_operands
from recmas_runtime.formats.manifest import LinkEntry
from recmas_runtime.formats.safetensors_file import read_tensors, write_tensors

erf = np.vectorize(math.erf)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5) * scale + bias


def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * scale


def unified(x: np.ndarray, o: Mapping[str, np.ndarray]) -> np.ndarray:
    """The unified form, as the engines compute it."""
    normed = np.where(o["pre_norm"], layer_norm(x, o["pre_scale"], o["pre_bias"]), x)
    y = x @ o["w3"] + gelu(normed @ o["w1"] + o["b1"]) @ o["w2"] + o["bias"]
    return np.where(o["post_norm"], rms_norm(y, o["post_scale"]) + o["post_bias"], y)


def declared(x: np.ndarray, kind: str, role: str, w: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each kind by its own formula, as the design states it."""

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        return value @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name: str, value: np.ndarray) -> np.ndarray:
        return layer_norm(value, w[f"{name}.weight"], w[f"{name}.bias"])

    match kind, role:
        case (("residual" | "biased_residual"), "inner"):
            return x + linear("proj2", gelu(linear("proj1", x)))
        case (("residual" | "biased_residual"), "outer"):
            return linear("residual_proj", x) + linear("proj2", gelu(linear("proj1", x)))
        case "ln_residual", "inner":
            return norm("post_ln", x + linear("proj2", gelu(linear("proj1", norm("pre_ln", x)))))
        case "ln_residual", "outer":
            hidden = gelu(linear("proj1", norm("ln_source", x)))
            return norm("ln_target", linear("residual_proj", x) + linear("proj2", hidden))
        case "projected", _:
            pre = "pre_ln" if role == "inner" else "ln_source"
            return linear("residual_proj", x) + linear("proj2", gelu(linear("proj1", norm(pre, x))))
        case "rescaled", _:
            y = linear("residual_proj", x) + linear("proj2", gelu(linear("proj1", x)))
            return rms_norm(y, w["post_rms.weight" if role == "inner" else "rms_target.weight"])
    raise AssertionError


def make_link(
    folder: Path, kind: str, role: str, out_dim: int = 5, seed: int = 0
) -> tuple[Path, LinkEntry]:
    in_dim = out_dim if role == "inner" else 7
    entry = LinkEntry(file="x", kind=kind, role=role, in_dim=in_dim, out_dim=out_dim, init="random")
    path = folder / f"{kind}.{role}.{out_dim}.{seed}"
    write_link(path, entry, seed=seed)
    return path, entry


@pytest.mark.parametrize(("kind", "role"), FORMS)
def test_the_unified_form_is_the_declared_one(tmp_path: Path, kind: str, role: str) -> None:
    path, entry = make_link(tmp_path, kind, role)
    x = np.random.default_rng(1).normal(size=(4, entry.in_dim))
    operands = load_operands(path, entry)
    weights, _ = read_tensors(path)
    np.testing.assert_allclose(
        unified(x, operands), declared(x, kind, role, weights), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(("kind", "role"), FORMS)
def test_operands_are_what_engines_bind(tmp_path: Path, kind: str, role: str) -> None:
    path, entry = make_link(tmp_path, kind, role)
    hidden = entry.out_dim * (2 if (kind, role) == ("ln_residual", "outer") else 1)
    source, target = entry.in_dim, entry.out_dim
    assert {n: (o.dtype.name, o.shape) for n, o in load_operands(path, entry).items()} == {
        "pre_norm": ("bool", (1, 1)),
        "pre_scale": ("float32", (1, source)),
        "pre_bias": ("float32", (1, source)),
        "w1": ("float32", (source, hidden)),
        "b1": ("float32", (1, hidden)),
        "w2": ("float32", (hidden, target)),
        "w3": ("float32", (source, target)),
        "bias": ("float32", (1, target)),
        "post_norm": ("bool", (1, 1)),
        "post_scale": ("float32", (1, target)),
        "post_bias": ("float32", (1, target)),
    }
    assert all(operand.flags.c_contiguous for operand in load_operands(path, entry).values())


def test_links_of_different_hidden_width_stack(tmp_path: Path) -> None:
    narrow = load_operands(*make_link(tmp_path, "projected", "outer"))
    wide = load_operands(*make_link(tmp_path, "ln_residual", "outer", seed=1))
    stacked = stack_operands([narrow, wide])
    assert stacked["w1"].shape == (2, 7, 10)
    x = np.random.default_rng(2).normal(size=(2, 3, 7))
    found = unified(x, stacked)
    np.testing.assert_allclose(found[0], unified(x[0], narrow), rtol=1e-6)
    np.testing.assert_allclose(found[1], unified(x[1], wide), rtol=1e-6)


def test_half_precision_checkpoints_are_read(tmp_path: Path) -> None:
    path, entry = make_link(tmp_path, "projected", "outer")
    tensors, metadata = read_tensors(path)
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "half", halves, metadata)
    w1 = load_operands(tmp_path / "half", entry)["w1"]
    assert w1.dtype == np.float32
    np.testing.assert_array_equal(w1, halves["proj1.weight"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("proj1.bias"), "missing or unknown tensors .* proj1.bias"),
        (lambda t, m: t.update(extra=np.zeros(1, np.float32)), "missing or unknown .* extra"),
        (lambda t, m: t.update({"proj1.weight": np.zeros((5, 5), np.float32)}), r"float32\[5, 5\]"),
        (lambda t, m: t.update({"proj1.bias": np.zeros(5, np.int64)}), r"int64\[5\]"),
        (lambda t, m: t.update({"proj1.bias": np.full(5, np.nan, np.float32)}), "not finite"),
        (lambda t, m: m.update(kind="residual"), "'kind' is 'residual', expected 'projected'"),
        (lambda t, m: m.update(in_dim="8"), "'in_dim' is '8', expected '7'"),
        (lambda t, m: m.clear(), "'kind' is None"),
    ],
)
def test_another_link_than_announced_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path, entry = make_link(tmp_path, "projected", "outer")
    tensors, metadata = read_tensors(path)
    change(tensors, metadata)
    write_tensors(tmp_path / "changed", tensors, metadata)
    with pytest.raises(RecmasError, match=f"RM404.*{message}"):
        load_operands(tmp_path / "changed", entry)


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    path, entry = make_link(tmp_path, "projected", "outer")
    with pytest.raises(RecmasError, match="no link is of kind 'linear'"):
        load_operands(path, structs.replace(entry, kind="linear"))


def test_names_are_those_of_the_released_checkpoints() -> None:
    entry = LinkEntry(
        file="x", kind="ln_residual", role="outer", in_dim=3, out_dim=2, init="random"
    )
    assert expected_tensors(entry) == {
        "ln_source.weight": (3,),
        "ln_source.bias": (3,),
        "proj1.weight": (4, 3),
        "proj1.bias": (4,),
        "proj2.weight": (2, 4),
        "proj2.bias": (2,),
        "residual_proj.weight": (2, 3),
        "residual_proj.bias": (2,),
        "ln_target.weight": (2,),
        "ln_target.bias": (2,),
    }
