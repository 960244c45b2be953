"""Commented specs to begin with, one per pattern and one written out.

`python -m recmas_compiler.spec.patterns.starter_specs SPECS` rewrites what is generated in the
folder `specs`: the specs that are starters, the JSON schema and the tables; a test keeps them
current.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, get_args

from recmas_compiler.spec.document.problems import did_you_mean
from recmas_compiler.spec.patterns.starter_data import (
    ANSWERS,
    PROTOCOL_FILE,
    QUESTIONS_FILE,
    TRAIN_FILE,
    as_lines,
    color_protocol,
    color_records,
    split_records,
    sum_records,
)
from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE, schema_text, with_tables
from recmas_compiler.spec.schema.sections import PATTERN_NAMES, Task
from recmas_runtime.core.errors import fail

STARTERS: Final = ("relay", "split", *PATTERN_NAMES, "latentmas", "custom")
TASK_NAMES: Final = get_args(Task)
# Of starters that have a file for each; the first one is what they are without `--task`.
VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "split": ("qa", "two-hop"),
    "latentmas": ("sequential", "hierarchical"),
}
# Nothing in them learns.
_TRAINING_FREE: Final = ("latentmas",)

# The line of a starter that `--task` changes.
_TASK_LINE: Final = "  task: general "
# What a starter has from here on belongs to `--train`.
_TRAIN_LINE: Final = "\n# --- train\n"
# Rows of a cache go through no weights, so a starter that trains hands over vectors.
_UNTRAINED: Final = "carries: cache"
_TRAINED: Final = "carries: thoughts"


def schema_line(schema: str) -> str:
    """Return the comment by which editors find the JSON schema, a path or URL."""
    return f"# yaml-language-server: $schema={schema}\n"


def starter_spec(
    pattern: str,
    *,
    task: str | None = None,
    train: bool = False,
    paper: bool = False,
    schema: str = SCHEMA_FILE,
) -> str:
    """Return a commented spec to begin with.

    Args:
        pattern: One of `STARTERS`; `custom` is for a graph of one's own.
        task: What the pattern's prompts ask for, or which of `VARIANTS`; None leaves it as the
            starter has it.
        train: With the section `train`, which takes the records of `starter_data`. Links then carry
            thoughts, which learn.
        paper: With links that carry thoughts, as the paper's do.
        schema: Where editors find the JSON schema, relative to the spec.

    Raises:
        RecmasError: RM118 for a pattern or task that this version does not know, and for a task
            of a graph that is written out; for training of what does not learn.
    """
    if pattern not in STARTERS:
        raise fail(
            "RM118", f"there is no pattern `{pattern}`.", hint=did_you_mean(pattern, STARTERS)
        )
    if train and pattern in _TRAINING_FREE:
        hint = "Leave `--train` out; docs/training.md says what links of other kinds learn."
        raise fail("RM118", f"nothing of `{pattern}` is trained.", hint=hint)
    name = f"{pattern}_{_variant(pattern, task)}" if pattern in VARIANTS else pattern
    if pattern == "custom" and (train or paper):
        name = "custom_thoughts"  # its prompts are written out, and slots of vectors stand inside
    text = (Path(__file__).parent / "starters" / f"{name}.yaml").read_text("utf-8")
    text, _, section = text.partition(_TRAIN_LINE)
    if (train or paper) and pattern not in _TRAINING_FREE:
        text = text.replace(f"{_UNTRAINED}   ", _TRAINED).replace(_UNTRAINED, _TRAINED)
    if task is not None and pattern not in VARIANTS:
        text = _with_task(text, pattern, task)
    return schema_line(schema) + text + (f"\n{section}" if train else "")


def _variant(pattern: str, task: str | None) -> str:
    known = VARIANTS[pattern]
    if task is not None and task not in known:
        raise fail("RM118", f"`{pattern}` has no task `{task}`.", hint=did_you_mean(task, known))
    return task or known[0]


def starter_files(pattern: str, *, task: str | None = None, train: bool = True) -> dict[str, str]:
    """Return what lies beside a starter, by file name: records and questions.

    Args:
        train: Whether it trains; one that does not has questions only if it is `split`.

    Raises:
        RecmasError: RM118 for a task that recmas makes no records for.
    """
    if not train or pattern in _TRAINING_FREE:
        is_split = pattern == "split"
        return {QUESTIONS_FILE: as_lines(split_records()[1])} if is_split else {}
    if pattern == "relay":
        learned, asked = color_records()
    elif pattern == "split":
        learned, asked = split_records()
    elif (task or "general") in ANSWERS:
        learned, asked = sum_records(ANSWERS[task or "general"])
    else:
        hint = "Write records of your own; docs/training.md says how, --task math has an example."
        raise fail("RM118", f"there are no records to train `{task}` on.", hint=hint)
    files = {TRAIN_FILE: as_lines(learned), QUESTIONS_FILE: as_lines(asked)}
    return files | ({PROTOCOL_FILE: color_protocol()} if pattern == "relay" else {})


def _with_task(text: str, pattern: str, task: str) -> str:
    if task not in TASK_NAMES:
        raise fail("RM118", f"there is no task `{task}`.", hint=did_you_mean(task, TASK_NAMES))
    if _TASK_LINE not in text:
        hint = "Its prompts are written out: say there what the answer is to look like."
        raise fail("RM118", f"`{pattern}` takes no task.", hint=hint)
    return text.replace(_TASK_LINE, f"  task: {task:<8}", 1)


def ready_specs() -> dict[str, str]:
    """Return the specs of the folder `specs` that are starters, by file name.

    `sequential.yaml` is none: it is written out, to show the whole language at work.
    """
    return {
        f"{name}.yaml": starter_spec(name, schema=f"schema/{SCHEMA_FILE}")
        for name in ("mixture", "distillation", "deliberation")
    }


def write(specs: Path) -> None:
    """Rewrite the generated files in the folder `specs`."""
    (specs / "schema").mkdir(exist_ok=True)
    (specs / "schema" / SCHEMA_FILE).write_text(schema_text())
    for name, text in ready_specs().items():
        (specs / name).write_text(text)
    readme = specs / "README.md"
    readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "specs"))
