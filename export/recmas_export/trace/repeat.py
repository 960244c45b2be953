"""Equal layers are traced once and written as often as a backbone has them.

torch traces layer by layer: 27 of the 43 s that a build of thirty layers took. Layers of one kind
differ in their weights and in what they keep of a sequence. So a backbone's first layers are
traced, up to the second of each kind, and the others are copied from those.

What is copied is proved and not guessed. The modules of two layers of a kind are the same in all
but the numbers in their weights, and in the graph two of them that were traced compute the same
function of the layer before, their weights and their cache. What is not so is traced as a whole.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from recmas_runtime.formats.layers import LayerShape, cache_tensors

# What modules keep besides what they were made with.
_INTERNAL: Final = frozenset(vars(nn.Module()))
# By this the code of models finds a layer's part of the cache; it is the layer's own number.
_OWN_NUMBER: Final = "layer_idx"
_SCOPES: Final = "pkg.torch.onnx.name_scopes"


class LayersDifferError(Exception):
    """A graph whose layers are not what `repeat_layers` can copy."""


@dataclass(frozen=True)
class Repetition:
    """Which layers of a body are traced, and which of those the others are like.

    Attributes:
        owner: The module whose child `name` is the list of layers.
        path: Of the list, from the body, such as `layers`.
        layers: What each layer keeps of a sequence, all of them.
        traced: How many layers are, from the first.
        like: By layer that is not traced, the one that it is copied from, and one more of its kind.
    """

    owner: nn.Module
    name: str
    path: str
    layers: tuple[LayerShape, ...]
    traced: int
    like: Mapping[int, tuple[int, int]]

    @property
    def modules(self) -> Sequence[nn.Module]:
        """All layers."""
        found: nn.ModuleList = getattr(self.owner, self.name)
        return list(found)

    @contextmanager
    def first_layers(self) -> Iterator[None]:
        """Make the body one of the traced layers only inside the block."""
        whole = getattr(self.owner, self.name)
        setattr(self.owner, self.name, nn.ModuleList(list(whole)[: self.traced]))
        try:
            yield
        finally:
            setattr(self.owner, self.name, whole)


def find_repetition(
    body: nn.Module, layers: tuple[LayerShape, ...], kinds: Sequence[Hashable]
) -> Repetition | None:
    """Return how few layers of a body need to be traced; None where that is all of them.

    Args:
        body: A model whose layers are the one list in it that is as long as `layers`.
        kinds: By layer, what else it may differ in, such as how it attends.
    """
    lists = [
        (path, module)
        for path, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == len(layers)
    ]
    if len(lists) != 1:
        return None
    path, modules = lists[0]
    if _shares_weights(modules):
        return None
    alike = [
        (layer, kind, _description(module, number))
        for number, (layer, kind, module) in enumerate(zip(layers, kinds, modules, strict=True))
    ]
    like: dict[int, tuple[int, int]] = {}
    for number, one in enumerate(alike):
        # not the first of all, which takes what the layers begin with
        members = [other for other in range(1, number) if alike[other] == one][:2]
        if len(members) == 2:
            like[number] = (members[1], members[0])
    traced = 1 + max((n for n in range(len(layers)) if n not in like), default=0)
    like = {number: pair for number, pair in like.items() if number >= traced}
    owner_path, _, name = path.rpartition(".")
    owner = body.get_submodule(owner_path)
    return Repetition(owner, name, path, layers, traced, like) if like else None


def repeat_layers(model: ir.Model, repetition: Repetition, *, body: str) -> None:
    """Write the layers that were not traced into the graph of those that were, in place.

    Args:
        model: What was traced inside `first_layers`, with inputs and outputs named by
            `cache_tensors` of the traced layers.
        body: The name of the body in the module that was traced.

    Raises:
        LayersDifferError: The layers cannot be copied; the graph is as it was.
    """
    found = _Layers(model.graph, repetition, f"{body}.{repetition.path}")
    found.check()
    found.write()


class _Layers:
    """The layers of a graph: between which values they lie, and which nodes are whose."""

    def __init__(self, graph: ir.Graph, repetition: Repetition, path: str) -> None:
        self._graph, self._plan, self._path = graph, repetition, path
        self._inputs = {str(value.name): value for value in graph.inputs}
        self._outputs = {str(value.name): value for value in graph.outputs}
        self._own = {number: self._leaves(number) for number in range(repetition.traced)}
        self._dependent = self._find_dependent()
        self._after = {number: self._find_after(number) for number in range(repetition.traced)}
        self._nodes = {number: self._find_nodes(number) for number in range(1, repetition.traced)}

    def check(self) -> None:
        """Raise unless layers of a kind compute the same, and each alone reads the one before."""
        keys = _Keys(self._graph)
        for one, other in sorted(set(self._plan.like.values())):
            if self._function(one, keys) != self._function(other, keys):
                raise LayersDifferError(f"layers {other} and {one} compute different things")
        for number, value in self._after.items():
            behind = self._nodes.get(number + 1)
            users = set(value.consumers())
            if value.is_graph_output() or (behind is not None and not users <= set(behind)):
                raise LayersDifferError(f"not only the next layer reads layer {number}")

    def write(self) -> None:
        """Write the copies behind the last traced layer, with their weights, inputs and outputs."""
        before = self._after[self._plan.traced - 1]
        users = tuple(before.uses())
        at, last = before.producer(), before
        assert at is not None, "layers are made of nodes"
        for number, (like, _) in sorted(self._plan.like.items()):
            values = {self._after[like - 1]: last}
            for name, leaf in self._own[like].items():
                values[leaf] = self._leaf_like(leaf, name, like, number)
            for node in self._nodes[like]:
                copied = _copy(node, values, f"_layer_{number}")
                self._graph.insert_after(at, copied)
                at = copied
            last = values[self._after[like]]
            for name, output in self._present(like).items():
                made = values[output]
                made.name = _renumbered(name, number)
                self._outputs[made.name] = made
        for usage in users:
            usage.node.replace_input_with(usage.idx, last)
        self._set_ends()
        self._graph.sort()

    def _leaves(self, number: int) -> dict[str, ir.Value]:
        """Return a layer's weights and tensors of the cache by name."""
        prefix = f"{self._path}.{number}."
        names = [name for name in self._graph.initializers if name.startswith(prefix)]
        weights = {name: self._graph.initializers[name] for name in names}
        return weights | {name: self._inputs[name] for name in self._cache_names(number)}

    def _cache_names(self, number: int) -> list[str]:
        return [
            tensor.name
            for tensor in cache_tensors(self._plan.layers)
            if tensor.name.rpartition(".")[2] == str(number)
        ]

    def _present(self, number: int) -> dict[str, ir.Value]:
        names = [f"present_{name}" for name in self._cache_names(number)]
        return {name: self._outputs[name] for name in names}

    def _find_dependent(self) -> set[ir.Value]:
        """Return what depends on numbers of a layer's weights or cache, and not on sizes alone."""
        found = {leaf for leaves in self._own.values() for leaf in leaves.values()}
        for node in self._graph:
            if any(isinstance(a.value, ir.Graph) for a in node.attributes.values()):
                raise LayersDifferError(f"{node.op_type} has a graph of its own")
            if node.op_type == "Shape" and node.inputs[0] in self._inputs.values():
                continue
            if any(value in found for value in node.inputs):
                found |= set(node.outputs)
        return found

    def _find_after(self, number: int) -> ir.Value:
        """Return the one value that a layer hands to what comes behind it."""
        present = set(self._present(number).values())
        found = {
            value
            for node in self._graph
            if self._is_in(node, number)
            for value in node.outputs
            if value in self._dependent
            and value not in present
            and any(not self._is_in(user, number) for user in value.consumers())
        }
        if len(found) != 1:
            raise LayersDifferError(f"layer {number} hands on {len(found)} values")
        return found.pop()

    def _is_in(self, node: ir.Node, number: int) -> bool:
        return f"'{self._path}.{number}'" in node.metadata_props.get(_SCOPES, "")

    def _find_nodes(self, number: int) -> list[ir.Node]:
        """Return the nodes between the layer before and what this one makes, in order."""
        ends = {self._after[number], *self._present(number).values()}
        starts = {self._after[number - 1], *self._own[number].values()}
        nodes: set[ir.Node] = set()
        open_values = list(ends)
        while open_values:
            value = open_values.pop()
            if value in starts or value not in self._dependent:
                continue
            node = value.producer()
            if node is None:
                raise LayersDifferError(f"layer {number} reads {value.name}")
            if node not in nodes:
                nodes.add(node)
                open_values += [one for one in node.inputs if one is not None]
        return [node for node in self._graph if node in nodes]

    def _function(self, number: int, keys: _Keys) -> Hashable:
        """Return what is equal for layers that compute the same."""
        leaves: dict[ir.Value, Hashable] = {self._after[number - 1]: ("before",)}
        for name, leaf in self._own[number].items():
            leaves[leaf] = ("own", _without_number(name, self._path, number))
        made = keys.of(self._nodes[number], leaves)
        presents = self._present(number).items()
        return (
            made[self._after[number]],
            *((_without_number(name, self._path, number), made[value]) for name, value in presents),
        )

    def _leaf_like(self, leaf: ir.Value, name: str, like: int, number: int) -> ir.Value:
        """Return a layer's weight or input that stands where `leaf` does in the one it is like."""
        if name in self._inputs:
            made = ir.Value(name=_renumbered(name, number), shape=leaf.shape, type=leaf.type)
            self._inputs[str(made.name)] = made
            return made
        own = name.removeprefix(f"{self._path}.{like}.")
        made = ir.Value(name=f"{self._path}.{number}.{own}", shape=leaf.shape, type=leaf.type)
        made.const_value = TorchTensor(_tensor(self._plan.modules[number], own), made.name)
        self._graph.register_initializer(made)
        return made

    def _set_ends(self) -> None:
        """Put inputs and outputs in the order that they have in a graph of all layers."""
        kept = [tensor.name for tensor in cache_tensors(self._plan.layers)]
        for values, by_name, prefix in (
            (self._graph.inputs, self._inputs, ""),
            (self._graph.outputs, self._outputs, "present_"),
        ):
            names = [f"{prefix}{name}" for name in kept]
            places = [place for place, value in enumerate(values) if value.name in names]
            ahead, behind = values[: places[0]], values[places[-1] + 1 :]
            values[:] = [*ahead, *(by_name[name] for name in names), *behind]


def output_digests(graph: ir.Graph) -> dict[str, str]:
    """Return by output a digest that is equal for graphs that compute it in the same way.

    That is from inputs, weights of the same names, and sizes, whichever input has those.
    """
    keys = _Keys(graph)
    return {str(value.name): keys.whole[value] for value in graph.outputs}


class _Keys:
    """Digests of values, equal where the nodes that make them compute the same.

    Attributes:
        whole: Those of all values of a graph.
    """

    def __init__(self, graph: ir.Graph) -> None:
        leaves: dict[ir.Value, Hashable] = {value: ("input", value.name) for value in graph.inputs}
        leaves |= {value: ("weight", name) for name, value in graph.initializers.items()}
        self._inputs = set(graph.inputs)
        self.whole: dict[ir.Value, str] = {}
        self.whole = self.of(graph, leaves)

    def of(
        self, nodes: Iterable[ir.Node], leaves: Mapping[ir.Value, Hashable]
    ) -> dict[ir.Value, str]:
        """Return the digests of what nodes make, in order; `leaves` are what they begin with."""
        found = {value: _digest(leaf) for value, leaf in leaves.items()}
        for node in nodes:
            read = tuple(
                None if value is None else found[value] if value in found else self.whole[value]
                for value in node.inputs
            )
            attributes = tuple(sorted((a.name, _attribute(a)) for a in node.attributes.values()))
            what: Hashable = (node.domain, node.op_type, node.overload, attributes, read)
            if node.op_type == "Shape" and (first := node.inputs[0]) in self._inputs:
                what = ("sizes", _dims(node, first))
            for place, value in enumerate(node.outputs):
                found[value] = _digest((what, place))
        return found


def _digest(what: Hashable) -> str:
    return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


def _dims(node: ir.Node, value: ir.Value) -> Hashable:
    """Return what a `Shape` gives of an input: its dimensions from `start` to `end`."""
    ends = {a.name: a.as_int() for a in node.attributes.values()}
    dims = [] if value.shape is None else [str(dim) for dim in value.shape]
    return tuple(dims[ends.get("start", 0) : ends.get("end", len(dims))])


def _attribute(attribute: ir.Attr) -> Hashable:
    value = attribute.value
    if isinstance(value, ir.TensorProtocol):
        return (str(value.dtype), tuple(value.shape), value.tobytes())
    return repr(value)


def _copy(node: ir.Node, values: dict[ir.Value, ir.Value], suffix: str) -> ir.Node:
    """Return a node that reads what `values` has for its inputs, and add what it makes to them."""
    copied = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values.get(value, value) for value in node.inputs],
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{node.name}{suffix}",
        metadata_props=dict(node.metadata_props),
    )
    for old, new in zip(node.outputs, copied.outputs, strict=True):
        new.name = f"{old.name}{suffix}"
        new.shape, new.type = old.shape, old.type
        values[old] = new
    return copied


def _renumbered(name: str, number: int) -> str:
    """Return the name of a cache's tensor for another layer."""
    return f"{name.rpartition('.')[0]}.{number}"


def _without_number(name: str, path: str, number: int) -> str:
    """Return the name of a weight or a cache's tensor without the layer that it is of."""
    prefix = f"{path}.{number}."
    return name.removeprefix(prefix) if name.startswith(prefix) else name.rpartition(".")[0]


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or a buffer by its path; some buffers are in no state dict."""
    path, _, own = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), own)
    return found.detach()


def _shares_weights(layers: nn.ModuleList) -> bool:
    owners: dict[int, int] = {}
    return any(
        owners.setdefault(id(weight), number) != number
        for number, layer in enumerate(layers)
        for weight in layer.parameters()
    )


def _description(layer: nn.Module, number: int) -> Hashable:
    """Return what is equal for layers that are the same but for the numbers in their weights."""
    return tuple(
        (
            name,
            type(module),
            tuple(_sizes(module._parameters)),
            tuple(_sizes(module._buffers)),
            tuple(
                (key, tuple(id(hook) for hook in hooks.values()))
                for key, hooks in vars(module).items()
                if key.endswith("_hooks") and hooks
            ),
            tuple(
                (key, _from_own(value, number) if key == _OWN_NUMBER else _plain(value))
                for key, value in sorted(vars(module).items())
                if key not in _INTERNAL
            ),
        )
        for name, module in layer.named_modules()
    )


def _from_own(value: object, number: int) -> Hashable:
    return value - number if isinstance(value, int) else _plain(value)


def _sizes(tensors: Mapping[str, torch.Tensor | None]) -> Iterator[Hashable]:
    for name, tensor in tensors.items():
        yield (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))


def _plain(value: Any) -> Hashable:
    """Return a value that can be compared; of what is not known to be a value, the object."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return (type(value), value)
    if isinstance(value, tuple | list):
        return (type(value), tuple(_plain(one) for one in value))
    if isinstance(value, dict):
        return (dict, tuple((key, _plain(one)) for key, one in value.items()))
    if isinstance(value, functools.partial):
        return (
            functools.partial,
            *(_plain(one) for one in (value.func, value.args, value.keywords)),
        )
    return (type(value), id(value))
