"""Memory of a long run with a trace: flat after its first tenth, or else something is kept.

    python benchmarks/soak.py BUNDLE [--answers 5000] [--batch 4] [--max-new-tokens 16]

Runs `recmas run --output --trace` over so many records of different lengths and reads the process's
resident set, threads aside, as each tenth of the answers is there. It ends with status 1 if the
largest one after the first tenth is more than 2 % above that of the first tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ALLOWED = 0.02
POLL_S = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--answers", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recmas-soak-") as folder:
        sizes = list(tenths(arguments, Path(folder)))
    print("| answers | resident MB | over the first tenth |")
    print("|--------:|------------:|---------------------:|")
    first = sizes[0][1]
    for count, size in sizes:
        print(f"| {count} | {size / 1e6:.1f} | {size / first - 1:+.1%} |")
    growth = max(size for _, size in sizes[1:]) / first - 1
    print(f"\n{growth:+.2%}, allowed {ALLOWED:.0%}: {'flat' if growth <= ALLOWED else 'GROWS'}")
    return 0 if growth <= ALLOWED else 1


def tenths(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[int, int]]:
    """Run; yield the number of answers and the resident set in bytes, tenth by tenth."""
    questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    fields = json.loads((arguments.bundle / "plan.json").read_text(encoding="utf-8"))["fields"]
    with questions.open("w", encoding="utf-8") as stream:
        for number in range(arguments.answers):
            # Few words: tokenizers remembers the last 10,000 different ones, which takes a while.
            text = f"Question {number % 97}: " + "why " * (number * 7 % 12)
            stream.write(json.dumps({"id": number, **dict.fromkeys(fields, text)}) + "\n")
    command = [
        *(sys.executable, "-m", "recmas_runtime.cli.main", "run", str(arguments.bundle), "--quiet"),
        *("--input", str(questions), "--output", str(answers), "--trace", str(folder / "trace")),
        *("--threads", "1", "--max-new-tokens", str(arguments.max_new_tokens)),
    ]
    if arguments.batch is not None:
        command += ["--batch", str(arguments.batch)]
    due = [arguments.answers * tenth // 10 for tenth in range(1, 10)]
    with subprocess.Popen(command) as process:
        seen, place = 0, 0
        while due and process.poll() is None:
            if answers.exists():
                with answers.open("rb") as stream:
                    stream.seek(place)
                    block = stream.read()
                seen, place = seen + block.count(b"\n"), place + len(block)
            while due and seen >= due[0]:
                due.pop(0)
                yield seen, resident_bytes(process.pid)
            time.sleep(POLL_S)
    if process.returncode != 0:
        sys.exit(f"recmas run ended with status {process.returncode}")


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
