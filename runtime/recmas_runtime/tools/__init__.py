"""Tools that an answer agent calls while it writes: search, Python, a human, functions."""

from recmas_runtime.tools.call_scanner import CallScanner
from recmas_runtime.tools.calls import ToolCall, ToolResult, result_block
from recmas_runtime.tools.sandbox import Sandbox, SandboxResult, find_sandbox
from recmas_runtime.tools.toolbox import Toolbox, terminal_ask

__all__ = [
    "CallScanner",
    "Sandbox",
    "SandboxResult",
    "ToolCall",
    "ToolResult",
    "Toolbox",
    "find_sandbox",
    "result_block",
    "terminal_ask",
]
