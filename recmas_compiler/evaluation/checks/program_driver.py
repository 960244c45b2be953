"""What runs inside the sandbox: it executes the parts of a program as if each stood alone.

It is passed as text, with a call of `drive` behind it, so it imports the standard library only.
Every part is compiled for itself, so that `from __future__` may begin it, and runs in the same
module.
"""

import __future__

import io
import json
import os
import resource
import signal
import sys
import types
from typing import Any

_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
# Deep recursion takes stack; beyond this the process's other memory begins.
_STACK_BYTES = 100 << 20


class _Nowhere(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def drive(
    parts: list[str],
    kind: str,
    function: str = "",
    cases: str = "[]",
    case_s: float = 0.0,
) -> None:
    """Run the parts; write the mark given on standard input if the tests were passed.

    The mark is written at the very end, so leaving early does not look like success. What a program
    prints while it is tested goes nowhere; one of kind `input` is a script, whose output counts.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    soft = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    module = types.ModuleType("__main__" if kind == "input" else "answer")
    sys.modules[module.__name__] = module
    if kind == "input":
        try:
            _execute(parts, module)
        except SystemExit:  # the output counts, whatever the status
            return
        return
    mark = sys.stdin.readline()
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Nowhere()))
    _execute(parts, module)
    if kind == "calls":
        _call(module, function, json.loads(cases), case_s)
    os.write(1, mark.encode())


def _execute(parts: list[str], module: types.ModuleType) -> None:
    flags = 0
    for part in parts:
        code = compile(part, "<answer>", "exec", flags, dont_inherit=True)
        flags |= code.co_flags & _FUTURE
        exec(code, module.__dict__)  # noqa: S102 - that is what the sandbox is for


def _call(module: Any, name: str, cases: list[Any], case_s: float) -> None:
    """Compare what calls return; a method of `Solution` is called on one object throughout."""
    target = getattr(module.Solution() if hasattr(module, "Solution") else module, name)
    for case in cases:
        signal.setitimer(signal.ITIMER_REAL, case_s)  # unhandled, its signal ends the process
        found = target(*case["arguments"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        found = list(found) if isinstance(found, tuple) else found
        if found != case["result"]:
            raise SystemExit(f"{name} returns {found!r}, not {case['result']!r}")
