"""The files of `benchmarks/paper/benchmarks.yaml` in their published forms, a few records each."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"


def paper_module(name: str) -> ModuleType:
    """Import a script beside the paper's table."""
    if str(PAPER) not in sys.path:
        sys.path.insert(0, str(PAPER))
    return import_module(name)


MATH = [
    {"unique_id": "test/algebra/1", "problem": "What is $3 + 4$?", "answer": "7"},
    {"unique_id": "test/algebra/2", "problem": "Double six.", "answer": "12"},
    {"unique_id": "test/algebra/3", "problem": "Halve $10$.", "answer": "5"},
]
AIME = [
    {"id": "0", "problem": "How many days has a week?", "answer": "7"},
    {"id": "1", "problem": "How many months has a year?", "answer": "12"},
]
MEDQA = [
    {
        "query": "Which organ pumps blood?",
        "options": ["Liver", "Heart", "Lung", "Skin"],
        "answer": "Heart",
    },
    {
        "query": "Which organ takes up air?",
        "options": ["Liver", "Heart", "Lung", "Skin"],
        "answer": "Lung",
    },
]
GPQA = [
    {
        "Record ID": f"rec{i}",
        "Question": f"What is {i} + {i}?",
        "Correct Answer": str(2 * i),
        "Incorrect Answer 1": str(2 * i + 1),
        "Incorrect Answer 2": str(2 * i + 2),
        "Incorrect Answer 3": str(2 * i + 3),
    }
    for i in (1, 2)
]
CONTEST = {
    "question_content": "Read a number and print it.",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "3\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "5\n", "output": "5\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
MBPP = [
    {
        "task_id": i,
        "prompt": f"Write a function that adds {i}.",
        "code": f"def add(a):\n    return a + {i}\n",
        "test_list": [f"assert add(1) == {1 + i}"],
        "test_imports": [],
        "test": f"assert add(2) == {2 + i}",
    }
    for i in (1, 2)
]
SEARCH = [
    {"id": "a", "question": "In which city is the tower?", "answer": "Paris"},
    {"id": "b", "question": "In which country is it?", "answer": "France"},
]
# File of the shipped list -> its records; parquet files are JSON lines here.
FILES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "math500.jsonl": MATH,
    "aime2025.jsonl": AIME,
    "aime2026.jsonl": [{"problem_idx": i, **one} for i, one in enumerate(AIME)],
    "gpqa_diamond.csv": GPQA,
    "medqa.json": MEDQA,
    "mbppplus.jsonl": MBPP,
    "hotpotqa.jsonl": SEARCH,
    "bamboogle.jsonl": SEARCH,
    **{
        f"livecodebench/test{n}.jsonl": [{"question_id": f"q{n}", **CONTEST}]
        for n in ("", 2, 3, 4, 5, 6)
    },
}


def write_data(folder: Path) -> Path:
    """Write all files; returns the shipped list of benchmarks, for these: no hashes, pass@2."""
    for name, records in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        elif path.suffix == ".json":
            path.write_text(json.dumps(records))
        else:
            # Without a line end at the end: files that are joined must not run into each other.
            path.write_text("\n".join(map(json.dumps, records)))
    shipped = msgspec.yaml.decode((PAPER / "benchmarks.yaml").read_bytes())
    for about in shipped.values():
        for one in about["data"]:
            one["file"] = one["file"].replace(".parquet", ".jsonl")
            one["sha256"] = None
        about["set"] = [s.replace("rollouts=10", "rollouts=2") for s in about["set"]]
    listed = folder / "benchmarks.yaml"
    listed.write_bytes(msgspec.yaml.encode(shipped))
    return listed


def write_config(path: Path, **changes: Any) -> Path:
    """Write the shipped config with some keys changed."""
    config = msgspec.yaml.decode((PAPER / "paper.yaml").read_bytes())
    path.write_bytes(msgspec.yaml.encode({**config, **changes}))
    return path
