"""Tasks of lm-evaluation-harness whose answers the hand-made bundle knows."""

from __future__ import annotations

import json
from pathlib import Path

LETTERS = "abcdefghij"
WRITTEN = """\
task: letters_written
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{letter}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """\
task: letters_chosen
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(letter)}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_letter_tasks(folder: Path, num_questions: int) -> None:
    """Write both tasks and their questions."""
    (folder / "letters_written.yaml").write_text(WRITTEN)
    (folder / "letters_chosen.yaml").write_text(CHOSEN)
    lines = []
    for number in range(num_questions):
        digit = number % 10
        choices = [LETTERS[(digit + step) % 10] for step in (3, 0, 5, 7)]
        question = f"Number {number}: what follows {digit}"
        lines.append({"question": question, "letter": LETTERS[digit], "choices": choices})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
