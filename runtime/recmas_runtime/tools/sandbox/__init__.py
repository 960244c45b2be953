"""Run untrusted code: in a sandbox that was tried out first, or not at all."""

from recmas_runtime.tools.sandbox.discovery import find_sandbox, survey_sandboxes
from recmas_runtime.tools.sandbox.program import Sandbox, SandboxResult

__all__ = ["Sandbox", "SandboxResult", "find_sandbox", "survey_sandboxes"]
