"""Write records from which one backbone learns to answer, and to read a colleague's notes.

A record is one finished turn: `prompt`, and `answer`. Most show a passage and a question, as an
agent alone would see them; a share shows the question and, in place of a message, the right answer
as notes. The backbone that `recmasc train notes.yaml --method lora` gives has then never seen a
message, only what one would say. Records are JSON lines as `recmasc data` writes them.

    python benchmarks/messages/records.py squad.jsonl r4c.jsonl -o notes.jsonl --reader reader.jsonl

`--reader FILE` also writes records as they are, for the reader's inner link to learn from.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, Final

NOTES: Final = "Notes of a colleague who read the text:"
MOST_ANSWER_WORDS: Final = 6
YES_OR_NO: Final = {"yes", "no"}


def usable(record: dict[str, Any], max_words: int) -> bool:
    """Tell whether a record has a short passage, and a short answer that is more than yes or no."""
    answer = record["answer"]
    return (
        len(record["context"].split()) <= max_words
        and len(answer.split()) <= MOST_ANSWER_WORDS
        and answer.lower() not in YES_OR_NO
    )


def turn(record: dict[str, Any], *, as_notes: bool) -> dict[str, str]:
    """Return a turn of the passage and its question, or of the question and the answer as notes."""
    question, answer = record["question"], record["answer"]
    prompt = f"{question}\n\n{NOTES} {answer}" if as_notes else f"{record['context']}\n\n{question}"
    return {"id": record["id"], "prompt": prompt, "answer": answer}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", nargs="+", type=Path, help="JSON lines, as many of each as of all")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--reader", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="turns of each file")
    parser.add_argument("--reader-limit", type=int, default=400, help="the reader's of each file")
    parser.add_argument("--max-words", type=int, default=55, help="of a passage")
    parser.add_argument("--notes", type=float, default=0.3, help="share of turns that show notes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    order = random.Random(options.seed)
    turns: list[dict[str, Any]] = []
    reader: list[dict[str, Any]] = []
    for path in options.data:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if usable(record, options.max_words)]
        order.shuffle(records)
        turns += [
            turn(record, as_notes=order.random() < options.notes)
            for record in records[: options.limit]
        ]
        reader += records[: options.reader_limit]
    order.shuffle(turns)
    write(options.out, turns)
    if options.reader is not None:
        order.shuffle(reader)
        write(options.reader, reader)


if __name__ == "__main__":
    main()
