"""A module becomes a graph of torch that holds for every size that a bundle has."""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import torch
from torch import fx
from torch._dynamo.exc import UserError
from torch.export import ExportedProgram

_ATEN: Final = torch.ops.aten

# Where a dimension has no end, sizes up to this one are tried.
_LARGE: Final = 1 << 20


def capture(
    module: torch.nn.Module, args: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]
) -> ExportedProgram:
    """Capture what a module computes, for all sizes that `dynamic_shapes` allows.

    torch refuses what it cannot prove to hold for all of them, and proves little: that
    `64 * s == s * min(64, 64 * s)` is beyond it. Where it refuses, what is left to prove is tried.

    Raises:
        UserError: What was captured does not hold for all sizes.
    """
    try:
        program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
    except UserError:
        program = torch.export.export(
            module,
            args,
            dynamic_shapes=dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        _try_assertions(program)
    if any(_is_complex(node) for node in program.graph.nodes):
        program = program.run_decompositions({_ATEN.unsqueeze.default: _unsqueeze})
    return program


def _try_assertions(program: ExportedProgram) -> None:
    """Take out of a program what it asserts of its sizes, if that is so for all that are tried."""
    for node in list(program.graph.nodes):
        if node.target is not _ATEN._assert_scalar.default:
            continue
        claim = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else node.args[0]
        if isinstance(claim, torch.SymBool) and not _holds(claim.node.expr, program):
            raise ValueError(f"what it computes holds only where {claim}")
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _holds(claim: Any, program: ExportedProgram) -> bool:
    symbols = sorted(claim.free_symbols, key=str)
    tried = [_sizes(program.range_constraints[symbol]) for symbol in symbols]
    return all(
        bool(claim.subs(dict(zip(symbols, sizes, strict=True)))) for sizes in product(*tried)
    )


def _sizes(limits: Any) -> list[int]:
    first, last = int(limits.lower), int(min(limits.upper, _LARGE))
    found = {first, first + 1, first + 2, 7, 64, 100, (first + last) // 2, last - 1, last}
    return sorted(size for size in found if first <= size <= last)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _unsqueeze(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Return `value.unsqueeze(dim)`; the converter to ONNX has none for complex numbers."""
    if not value.is_complex():
        return NotImplemented  # type: ignore[no-any-return]  # torch's way to say: leave it
    at = dim if dim >= 0 else dim - 1
    return torch.view_as_complex(torch.view_as_real(value).unsqueeze(at))
