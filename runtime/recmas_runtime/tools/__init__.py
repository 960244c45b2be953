"""Tools that an answer agent calls while it writes: search, Python, a human, functions.

Names are resolved on first use: most bundles have no tools, and sandboxes and searches take a while
to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recmas_runtime.tools.call_scanner import CallScanner as CallScanner
    from recmas_runtime.tools.calls import ToolCall as ToolCall
    from recmas_runtime.tools.calls import ToolResult as ToolResult
    from recmas_runtime.tools.calls import result_block as result_block
    from recmas_runtime.tools.human import terminal_ask as terminal_ask
    from recmas_runtime.tools.sandbox import Sandbox as Sandbox
    from recmas_runtime.tools.sandbox import SandboxResult as SandboxResult
    from recmas_runtime.tools.sandbox import find_sandbox as find_sandbox
    from recmas_runtime.tools.toolbox import Toolbox as Toolbox

_HOMES = {
    "call_scanner": ("CallScanner",),
    "calls": ("ToolCall", "ToolResult", "result_block"),
    "human": ("terminal_ask",),
    "sandbox": ("Sandbox", "SandboxResult", "find_sandbox"),
    "toolbox": ("Toolbox",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
