"""What a spec says about training, with paths made absolute. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from recmas_compiler.links.trained import links_folder
from recmas_compiler.spec.document.places import path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import Section
from recmas_compiler.spec.schema.train import TrainSection
from recmas_compiler.spec.spec import Spec
from recmas_compiler.training.data.examples import Examples, load_examples
from recmas_runtime.core.errors import RecmasError

# What a run may change between two starts and still end with the same weights, and the stages and
# methods, each of which counts by itself.
_WITHOUT_EFFECT: Final = (
    "accumulation", "cache_mb", "checkpoint_calls", "checkpoint_every", "data", "eval_every",
    "eval_records", "inner", "links_dir", "lora", "outer", "preset", "sft",
)  # fmt: skip

_STAGES: Final = ("inner", "outer")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train on and how.

    Attributes:
        held_out: Absolute path of the held-out records, or the part of `data` that is held out.
        links_dir: Absolute path of the folder that trained links go to.
    """

    section: TrainSection
    data: Path
    held_out: Path | float
    links_dir: Path

    def examples(self, spec: Spec) -> Examples:
        """Read the data.

        Raises:
            RecmasError: RM700 for data that cannot be used.
        """
        section = self.section
        return load_examples(
            spec, section.targets, data=self.data, held_out=self.held_out, seed=section.seed
        )

    def digest(self, *own: Section) -> str:
        """Return the sha256 of the settings that a stage's result depends on, hexadecimal.

        Where things are kept, how often they are measured and into how many pieces a device splits
        its work do not count.

        Args:
            own: The stage's section, and that of the method if it is not links that learn.
        """
        values = self.section.model_dump(mode="json", exclude=set(_WITHOUT_EFFECT))
        values["own"] = [s.model_dump(mode="json", exclude_none=True) for s in own]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def with_steps(settings: TrainSettings, steps: int) -> TrainSettings:
    """Return the settings with so many steps in each stage."""
    section = settings.section
    stages = {name: getattr(section, name).model_copy(update={"steps": steps}) for name in _STAGES}
    return replace(settings, section=section.model_copy(update=stages))


def train_settings(spec: Spec) -> TrainSettings:
    """Return what a spec says about training.

    Raises:
        RecmasError: RM104 if it says nothing.
    """
    section, folder = spec.document.train, links_folder(spec)
    if section is None or folder is None:
        hint = "Add `train: {data: FILE.jsonl, targets: {AGENT: FIELD}}`."
        place = spec.places.value(())
        raise RecmasError(problem_at(place, "RM104", "the spec has no `train`.", hint=hint))
    held_out = section.held_out
    return TrainSettings(
        section=section,
        data=path_of(section.data, spec.base_dir),
        held_out=path_of(held_out, spec.base_dir) if isinstance(held_out, str) else held_out,
        links_dir=folder,
    )
