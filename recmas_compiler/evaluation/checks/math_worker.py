"""The process that asks math-verify: a JSON line in, a JSON line out, until the input ends.

It runs as a script of its own and is killed when it takes too long, so nothing here may matter to
anybody else. Computer algebra on what a model wrote can take any time and memory.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Final

MAX_MEMORY_BYTES: Final = 4 * 2**30


def main() -> None:
    """Answer `{gold, answer}` with `{equal}` until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    from math_verify import parse, verify

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
