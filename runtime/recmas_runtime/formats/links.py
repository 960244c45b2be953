"""Link weights as the engines take them: every kind of link in one unified form.

    y = post?( W3 x + W2 gelu(W1 pre?(x) + b1) + bias )

`pre` is a layer norm and `post` an RMS norm with a bias. A layer norm is one of numbers from which
their mean was taken, and what takes it is linear: it is part of W2, W3 and `bias`. Where a kind has
no norm, bias or W3 of its own, neutral values stand in: the graph is the same for all. Shape
legend: G links of one call, I input width, H hidden width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.link_kinds import FORMS, PROJ1, PROJ2, SKIP, LinkForm
from recmas_runtime.formats.manifest import LinkEntry
from recmas_runtime.formats.safetensors_file import read_tensors

Operands = dict[str, NDArray[Any]]


def load_operands(path: Path, entry: LinkEntry) -> Operands:
    """Read a link's weights and put them into the unified form.

    Args:
        path: safetensors file with the released tensor names, linear layers as [out, in].

    Returns:
        float32 arrays without the G axis (`pre_norm` and `post_norm`: bool): pre_norm [1, 1],
        pre_scale and pre_bias [1, I], w1 [I, H], b1 [1, H], w2 [H, O], w3 [I, O], bias [1, O],
        post_norm [1, 1], post_scale and post_bias [1, O].

    Raises:
        RecmasError: RM401 if it cannot be read, RM404 if it is not the link that `entry` says.
    """
    form = FORMS.get((entry.kind, entry.role))
    if form is None:
        raise _wrong(path, f"no link is of kind {entry.kind!r} and role {entry.role!r}")
    tensors, metadata = read_tensors(path)
    _check(path, entry, form, tensors, metadata)
    values = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    source, target = entry.in_dim, entry.out_dim
    skip = values[f"{SKIP}.weight"].T if form.has_skip_matrix else np.eye(source)
    bias = np.zeros(target, np.float32)
    for layer in (PROJ2, SKIP):
        bias = bias + values.get(f"{layer}.bias", np.float32(0))
    curved = values[f"{PROJ2}.weight"].T
    bias = bias[None]
    if form.post_centres:
        curved, skip, bias = (_centred(rows) for rows in (curved, skip, bias))
    hidden = form.hidden_dim(target)
    operands: Operands = {
        "pre_norm": np.array([[form.pre is not None]]),
        "pre_scale": values.get(f"{form.pre}.weight", np.ones(source))[None],
        "pre_bias": values.get(f"{form.pre}.bias", np.zeros(source))[None],
        "w1": values[f"{PROJ1}.weight"].T,
        "b1": values.get(f"{PROJ1}.bias", np.zeros(hidden))[None],
        "w2": curved,
        "w3": skip,
        "bias": bias,
        "post_norm": np.array([[form.post is not None]]),
        "post_scale": values.get(f"{form.post}.weight", np.ones(target))[None],
        "post_bias": values.get(f"{form.post}.bias", np.zeros(target))[None],
    }
    for name, operand in operands.items():
        kind = np.bool_ if operand.dtype == np.bool_ else np.float32
        operands[name] = np.ascontiguousarray(operand, kind)  # engines bind these buffers directly
    return operands


def read_operands(
    path_of: Callable[[str], Path], links: Mapping[str, LinkEntry]
) -> dict[str, Operands]:
    """Return the operands of every link of a bundle, by id; `path_of` is its `Bundle.file`.

    Raises:
        RecmasError: As `load_operands` and `path_of`.
    """
    return {name: load_operands(path_of(entry.file), entry) for name, entry in links.items()}


def stack_operands(links: Sequence[Mapping[str, NDArray[Any]]]) -> Operands:
    """Give the operands of one or more links of equal widths the leading G axis.

    Hidden widths may differ: zeros fill up to the widest, and gelu(0) = 0 adds nothing. A single
    link's operands are not copied.
    """
    if len(links) == 1:
        return {name: operand[None] for name, operand in links[0].items()}
    hidden = max(link["w1"].shape[1] for link in links)
    widened = [_widen_hidden(link, hidden) for link in links]
    return {name: np.stack([link[name] for link in widened]) for name in links[0]}


def expected_tensors(entry: LinkEntry) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a link's checkpoint."""
    return FORMS[entry.kind, entry.role].shapes(entry.in_dim, entry.out_dim)


def _check(
    path: Path,
    entry: LinkEntry,
    form: LinkForm,
    tensors: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, str],
) -> None:
    said = {"kind": entry.kind, "in_dim": str(entry.in_dim), "out_dim": str(entry.out_dim)}
    for key, value in said.items():
        if metadata.get(key) != value:
            raise _wrong(path, f"metadata {key!r} is {metadata.get(key)!r}, expected {value!r}")
    shapes = form.shapes(entry.in_dim, entry.out_dim)
    if entry.role == "inner" and entry.in_dim != entry.out_dim:
        raise _wrong(path, f"an inner link of widths {entry.in_dim} and {entry.out_dim}")
    if tensors.keys() != shapes.keys():
        odd = ", ".join(sorted(tensors.keys() ^ shapes.keys()))
        raise _wrong(path, f"missing or unknown tensors for {entry.kind} {entry.role}: {odd}")
    for name, shape in shapes.items():
        found = tensors[name]
        if found.shape != shape or found.dtype.kind != "f":
            raise _wrong(
                path, f"{name} is {found.dtype}{list(found.shape)}, expected float{list(shape)}"
            )
        if not np.isfinite(found).all():
            raise _wrong(path, f"{name} holds values that are not finite")


def _centred(rows: NDArray[Any]) -> NDArray[Any]:
    centred: NDArray[Any] = rows - rows.mean(axis=-1, keepdims=True, dtype=np.float64)
    return centred


def _widen_hidden(link: Mapping[str, NDArray[Any]], hidden: int) -> Operands:
    missing = hidden - link["w1"].shape[1]
    columns, rows = ((0, 0), (0, missing)), ((0, missing), (0, 0))
    return {
        **link,
        "w1": np.pad(link["w1"], columns),
        "b1": np.pad(link["b1"], columns),
        "w2": np.pad(link["w2"], rows),
    }


def _wrong(path: Path, message: str) -> RecmasError:
    return fail("RM404", message, file=str(path), hint="Build the bundle again.")
