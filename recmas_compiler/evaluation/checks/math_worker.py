"""The process that asks math-verify: a JSON line in, a JSON line out, until the input ends.

It runs as a script of its own and is killed when it takes too long, so nothing here may matter to
anybody else. Computer algebra on what a model wrote can take any time and memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Final

MAX_MEMORY_BYTES: Final = 4 * 2**30
# What comparing formulas never does, by the names that Python audits it under.
_REFUSED: Final = (
    "subprocess.", "socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
    "os.truncate", "os.kill", "shutil.", "ctypes.", "pty.",
)  # fmt: skip


def shut_doors() -> None:
    """Refuse this process files to write to, other processes and the network, for good.

    Formulas go to a parser that evaluates them; this stands behind its own check of what they are.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(_REFUSED) or (event == "open" and _is_writing(arguments)):
            raise PermissionError(f"{event} is not for formulas")

    sys.addaudithook(refuse)


def _is_writing(arguments: tuple[object, ...]) -> bool:
    _, mode, flags = arguments
    opened_to_write = isinstance(flags, int) and bool(
        flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    return opened_to_write or (isinstance(mode, str) and any(sign in mode for sign in "wax+"))


def main() -> None:
    """Answer `{gold, answer}` with `{equal}` until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    from math_verify import parse, verify

    shut_doors()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        gold, answer = (
            # Its own time limits rest on signals and are soft: the parent's is not.
            parse(f"$\\boxed{{{asked[name]}}}$", parsing_timeout=0)
            for name in ("gold", "answer")
        )
        # Without parsed expressions there is nothing that it could say. It takes an inequality for
        # the interval of its solutions only where the right answer is the inequality.
        equal = (
            verify(gold, answer, timeout_seconds=0) or verify(answer, gold, timeout_seconds=0)
            if gold and answer
            else None
        )
        print(json.dumps({"equal": equal}), flush=True)


if __name__ == "__main__":
    main()
