"""What an engine is built from: the graph in TensorRT's form, and the shapes of its profiles.

A graph is edited as a protobuf; its weights stay in the bundle's file and are read from there. An
optimization profile gives every input a smallest, a typical and a largest shape. Kernels are chosen
for the typical one; anything from smallest to largest runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from recmas_runtime.core.errors import RecmasError, fail, how_to_install
from recmas_runtime.formats.links import expected_tensors
from recmas_runtime.formats.manifest import PARITY_ROWS, Manifest
from recmas_runtime.formats.plan import Plan, cache_capacity

if TYPE_CHECKING:
    import onnx

# Index of the optimization profile in every decoder engine.
PREFILL: Final = 0
STEP: Final = 1

_CAPACITY: Final = "capacity"

Dims = tuple[int, ...]
Symbols = tuple[int | str, ...]
# by input: smallest, typical, largest shape
ProfileShapes = Mapping[str, tuple[Dims, Dims, Dims]]


class Range(NamedTuple):
    """Sizes of an axis."""

    least: int
    typical: int
    most: int


Ranges = Mapping[str, Range]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What one backbone's engines must take.

    Attributes:
        capacities: Cache rows per sample, ascending; each is an engine of its own.
        max_rows: Most rows of a call: agents that run as one batch, times records; those of a
            parity case at least.
        link_hidden: Least and greatest hidden width of the inner links.
    """

    capacities: tuple[int, ...]
    max_rows: int
    max_groups: int
    link_hidden: tuple[int, int]
    prompt_positions: int


def shapes_of(plan: Plan, manifest: Manifest, backbone: str, *, case_positions: int) -> Shapes:
    """Return the shapes that a plan needs of a backbone at the limits of its bundle.

    A cache is an engine's input with a size that is fixed when the engine is built, so there is an
    engine for each capacity that the plan's caches have; see `CachePlan.capacity`. The largest also
    holds the `case_positions` of the backbone's parity case, which every engine has to pass.
    """
    caches = [cache for cache in plan.caches.values() if cache.backbone == backbone]
    groups = max(len(cache.agents) for cache in caches)
    capacities = {cache.capacity for cache in caches}
    needed = max(*capacities, cache_capacity(case_positions))
    hidden = [
        expected_tensors(manifest.links[agent.inner])["proj1.weight"][0]
        for agent in plan.agents.values()
        if agent.backbone == backbone
    ]
    return Shapes(
        capacities=tuple(sorted(capacities - {max(capacities)} | {needed})),
        max_rows=max(groups * plan.limits.max_batch, PARITY_ROWS),
        max_groups=groups,
        link_hidden=(min(hidden), max(hidden)),
        prompt_positions=plan.limits.max_prompt_tokens,
    )


def decoder_ranges(shapes: Shapes, capacity: int) -> tuple[Ranges, Ranges]:
    """Return the ranges of a decoder's free axes: for prompts, and for single positions.

    One record is the typical batch, because that is where somebody waits for a step; every rows
    count is a multiple of the groups in all three shapes, as the graph's reshape wants it.
    """
    common = {
        "batch": Range(1, shapes.max_groups, shapes.max_rows),
        "groups": Range(1, shapes.max_groups, shapes.max_groups),
        "link_hidden": Range(shapes.link_hidden[0], shapes.link_hidden[1], shapes.link_hidden[1]),
    }
    typical = min(shapes.prompt_positions, capacity)
    prefill = {**common, "positions": Range(1, typical, capacity)}
    step = {**common, "positions": Range(1, 1, 1)}
    return prefill, step


def head_ranges(shapes: Shapes) -> Ranges:
    """Return the ranges of the head's free axes."""
    return {"batch": Range(1, 1, shapes.max_rows)}


def profile_shapes(inputs: Mapping[str, Symbols], ranges: Ranges) -> ProfileShapes:
    """Return the smallest, typical and largest shape of every input that has a free axis."""
    shapes = {}
    for name, dims in inputs.items():
        if any(isinstance(dim, str) for dim in dims):
            parts = [Range(dim, dim, dim) if isinstance(dim, int) else ranges[dim] for dim in dims]
            assert all(1 <= least <= typical <= most for least, typical, most in parts), name
            least, typical, most = zip(*parts, strict=True)
            shapes[name] = (least, typical, most)
    return shapes


def choose_capacity(capacities: Sequence[int], needed: int) -> int | None:
    """Return the smallest capacity that holds `needed` positions: attention pays for every row."""
    return min((capacity for capacity in capacities if capacity >= needed), default=None)


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights.

    Raises:
        RecmasError: RM201 if the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise fail(
            "RM201",
            "onnx is not installed; engines are built from ONNX graphs with it",
            hint=how_to_install("tensorrt"),
        ) from None
    return onnx.load(str(path), load_external_data=False)


def input_shapes(model: onnx.ModelProto) -> dict[str, Symbols]:
    """Return the shape of every input; free axes are names."""
    return {
        value.name: tuple(
            dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
    }


def static_decoder(model: onnx.ModelProto, capacity: int, *, file: str) -> onnx.ModelProto:
    """Return a copy of a decoder graph for one cache capacity; messages name the graph `file`.

    Raises:
        RecmasError: RM203 for attention that an engine would compute wrongly.
    """
    import onnx

    static = onnx.ModelProto()
    static.CopyFrom(model)
    _look_experts_up(static)
    _fix_capacity(static, capacity)
    _adapt_cache_writes(static)
    _adapt_attention(static, file=file)
    return static


def unsupported(message: str, *, file: str) -> RecmasError:
    """Return the error for operators of a graph that TensorRT cannot run."""
    hint = "Use target onnx, or a backbone with plain softmax attention."
    return fail("RM203", message, file=file, hint=hint)


def _look_experts_up(model: onnx.ModelProto) -> None:
    """Let every call of experts copy the matrices that positions take, as a step does.

    The other branch picks the positions of each expert: sizes that are known when it runs, within a
    loop, which no engine was seen to take.
    """
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type != "If":
            model.graph.node.append(node)
            continue
        (branch,) = (each.g for each in node.attribute if each.name == "then_branch")
        model.graph.node.extend(branch.node)
        model.graph.value_info.extend(branch.value_info)
        model.graph.node[-1].output[0] = node.output[0]  # a branch's last node gives its result


def _fix_capacity(model: onnx.ModelProto, capacity: int) -> None:
    """Make the caches' capacity a constant of the graph.

    TensorRT writes a cache in place only if its rows are a static axis (KVCacheUpdate: S_max).
    """
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == _CAPACITY:
                dim.dim_value = capacity  # dim_param and dim_value are one field: this clears it


def _adapt_cache_writes(model: onnx.ModelProto) -> None:
    """Count the axis of every cache write from the end: the parser takes -2 only."""
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            for attribute in node.attribute:
                if attribute.name == "axis" and attribute.i == 2:
                    attribute.i = -2


def _adapt_attention(model: onnx.ModelProto, *, file: str) -> None:
    """Scale queries before attention instead of within it, and make attention decomposable.

    The parser turns an attribute `scale` into multiplications of queries *and* keys by its root,
    and the keys here are the whole cache: every step would read and write all of it once more. With
    a scale of 1 that factor is a constant 1.

    Without `TRT_decomposable`, an attribute of the parser's own, a build fails where TensorRT has
    no fused kernel for a shape or an element type; float32 has none.
    """
    import onnx
    from onnx import helper

    graph = model.graph
    # Queries have the element type of keys, which is known, because updated caches are outputs of
    # the graph.
    values = (*graph.output, *graph.value_info)
    element_types = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes = []
    for node in graph.node:
        if node.op_type == "Attention":
            # The parser takes key lengths, but engines gave wrong tokens with them, and no error.
            if not any(node.input[3:4]) or any(node.input[4:]):
                raise unsupported(
                    f"TensorRT needs an explicit mask, and neither past keys nor key lengths, for "
                    f"operator Attention ({node.name})",
                    file=file,
                )
            scale = next((a for a in node.attribute if a.name == "scale"), None)
            assert scale is not None, "the exporter writes every scale out"
            query, factor = node.input[0], f"{node.output[0]}.scale"
            scaled = f"{node.output[0]}.scaled_query"
            element_type = element_types[node.input[1]]
            wide = onnx.TensorProto.FLOAT
            graph.initializer.append(helper.make_tensor(factor, wide, (), [scale.f]))
            if element_type == wide:
                nodes.append(helper.make_node("Mul", [query, factor], [scaled]))
            else:
                # A scale that 16 bits round would be another temperature for every position.
                names = [f"{scaled}.{stage}" for stage in ("wide", "float32")]
                nodes += [
                    helper.make_node("Cast", [query], [names[0]], to=wide),
                    helper.make_node("Mul", [names[0], factor], [names[1]]),
                    helper.make_node("Cast", [names[1]], [scaled], to=element_type),
                ]
            node.input[0] = scaled
            scale.f = 1.0
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
